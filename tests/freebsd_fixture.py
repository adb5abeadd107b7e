"""A FreeBSD host made of stand-ins: their commands come first on PATH, their state is in a folder of the test's own."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.standins import host
from tests.standins.command import COMMANDS


class FreeBsd:
    """The host. `state` is what the stand-ins know of it now."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.vmm = folder / "dev" / "vmm"
        self.vmm.mkdir(parents=True)
        self.bin = folder / "bin"
        self.bin.mkdir()
        for name in COMMANDS:
            (self.bin / name).symlink_to(Path(__file__).parent / "standins" / "command.py")

    @property
    def state(self) -> dict[str, Any]:
        """A copy."""
        return host.read()

    @contextlib.contextmanager
    def changing(self) -> Iterator[dict[str, Any]]:
        """The state, to be changed as an administrator or a crash would have left it."""
        with host.state() as value:
            yield value

    def change(self, **parts: Any) -> None:
        """Replaces parts of the state."""
        with self.changing() as value:
            for name, part in parts.items():
                value[name] = {**value[name], **part} if isinstance(part, dict) else part

    def links(self) -> set[str]:
        """The interfaces that the host did not have when it was installed."""
        return set(self.state["interfaces"]) - {"em0", "lo0"}


@pytest.fixture
def freebsd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FreeBsd]:
    """The host, with this process's PATH and environment set to it."""
    folder = tmp_path / "freebsd"
    made = FreeBsd(folder)
    monkeypatch.setenv(host.HOST, str(folder))
    monkeypatch.setenv("PATH", f"{made.bin}:{os.environ['PATH']}")
    return made
