"""Runs command lines in this process, beside a fleet that lives in the test's event loop."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO
from unittest.mock import patch

from api.cli.main import run_command
from tests.fleet_rig import FleetRig


@dataclass(frozen=True)
class Told:
    """How a command ended and what it wrote."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output, which must be JSON and nothing else."""
        return json.loads(self.out)


class _OfThisThread(io.StringIO):
    """Keeps what the thread that made it writes; the fleet's logs, from the event loop's thread, go on to `others`."""

    def __init__(self, others: TextIO) -> None:
        super().__init__()
        self._owner, self._others = threading.get_ident(), others

    def write(self, text: str, /) -> int:
        """Writes to this thread's text or to the others'."""
        return super().write(text) if threading.get_ident() == self._owner else self._others.write(text)


def muster_here(*words: str, stdin: str = "", **environment: str) -> Told:
    """Runs `muster WORDS` to its end in this thread; `environment` sets MUSTER_* and other variables."""
    out, err = _OfThisThread(sys.stdout), _OfThisThread(sys.stderr)
    with (
        patch.dict("os.environ", environment),
        patch("sys.stdin", io.StringIO(stdin)),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        status = run_command(list(words))
    return Told(status, out.getvalue(), err.getvalue())


async def muster(rig: FleetRig, *words: str, stdin: str = "", **environment: str) -> Told:
    """Runs `muster WORDS` against the rig's controller, in a thread so that the rig goes on."""
    environment = {"MUSTER_URL": str(rig.http.base_url), **environment}
    return await asyncio.to_thread(muster_here, *words, stdin=stdin, **environment)


def write(folder: Path, name: str, text: str) -> str:
    """A file with that text; returns its path."""
    path = folder / name
    path.write_text(text)
    return str(path)
