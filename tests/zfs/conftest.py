"""Begins the guest with real ZFS as soon as it is known that its test will run, so that other tests run meanwhile."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]


class Guest:
    """`ops/lab/zfs run` in the background, behind everything else for the processors. `log` is all it says."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="muster-zfs-"))
        self.log = self.folder / "log"
        self.results = self.folder / "results"
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                ["nice", "-n", "10", str(ROOT / "ops/lab/zfs"), "run", "--results", str(self.results)],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "MUSTER_LAB_LIMIT": "1800"},
            )

    def wait(self) -> int:
        """The exit status of what it ran."""
        return self._process.wait()

    def end(self) -> None:
        """Ends it if it still runs, and removes its folder."""
        if self._process.poll() is None:
            family = [self._process, *psutil.Process(self._process.pid).children(recursive=True)]
            for process in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.terminate()
            self._process.wait(60)
        shutil.rmtree(self.folder, ignore_errors=True)


_GUEST = pytest.StashKey[Guest]()


def _needs_guest(item: pytest.Item) -> bool:
    return "zfs_guest" in getattr(item, "fixturenames", ())


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What waits for the guest runs last."""
    items.sort(key=_needs_guest)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Begins the guest if a chosen test needs it."""
    if not session.config.option.collectonly and any(map(_needs_guest, session.items)):
        session.config.stash[_GUEST] = Guest()


def pytest_unconfigure(config: pytest.Config) -> None:
    """Ends it, also when the tests were broken off."""
    guest = config.stash.get(_GUEST, None)
    if guest is not None:
        guest.end()


@pytest.fixture
def zfs_guest(pytestconfig: pytest.Config) -> Guest:
    """The guest, most likely near its end."""
    return pytestconfig.stash[_GUEST]
