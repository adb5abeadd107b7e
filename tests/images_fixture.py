"""The real `tiny` image for tests, built once and kept outside the checkout, and a guest to enter over ssh.

Use: `from tests.images_fixture import tiny  # noqa: F401` and take the fixture `tiny` as an argument, or call `tiny_image()`.
"""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from agent.images import build
from agent.images.recipe import default_cache


def tiny_image(cache: Path | None = None) -> Path:
    """`<cache>/images/tiny.qcow2`, built if it is not there or not of this version (seconds; needs apt and qemu-utils)."""
    return built_image("tiny", cache)


def built_image(name: str, cache: Path | None = None) -> Path:
    """Where an image lies, built if it is not there or not of this version (seconds; needs apt)."""
    folder = cache or default_cache()

    def make() -> Path:
        built = asyncio.run(build(name, folder / "images", progress=print, cache_dir=folder))
        assert built.path is not None
        return built.path

    # A thread of its own: the caller may be inside an event loop.
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(make).result()


@pytest.fixture(scope="session")
def tiny() -> Path:
    """The path of tiny.qcow2; its folder is an image directory."""
    return tiny_image()


@pytest.fixture(scope="session")
def fc_tiny() -> Path:
    """The directory of fc-tiny; its folder is an image directory."""
    return built_image("fc-tiny")


@dataclass(frozen=True)
class SshKey:
    """A key pair of the tests' own. `public` is the line for a spec."""

    path: Path
    public: str

    def command(self, port: int, *words: str, host: str = "127.0.0.1") -> list[str]:
        """The argv that runs a command as root behind a TCP port."""
        options = (
            "StrictHostKeyChecking=no",
            "UserKnownHostsFile=/dev/null",
            "LogLevel=ERROR",
            "ConnectTimeout=20",
            "BatchMode=yes",
        )
        flags = [word for option in options for word in ("-o", option)]
        return ["ssh", *flags, "-o", "IdentitiesOnly=yes", "-i", str(self.path), "-p", str(port), f"root@{host}", *words]

    def run(self, port: int, *words: str) -> str:
        """Runs a command over ssh and returns its output; fails on another status than 0."""
        done = subprocess.run(self.command(port, *words), capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, f"ssh {words}: {done.returncode}: {done.stderr}"
        return done.stdout


@pytest.fixture(scope="session")
def ssh_key() -> Iterator[SshKey]:
    """A fresh ed25519 key."""
    folder = Path(tempfile.mkdtemp(prefix="muster-key-"))
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "tests", "-f", folder / "key"], check=True)
    yield SshKey(folder / "key", (folder / "key.pub").read_text().strip())
    shutil.rmtree(folder)
