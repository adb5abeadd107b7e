"""The one place that starts external commands. Argv lists only, never a shell; a time limit always."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import sh

from agent.errors import CommandFailed

DEFAULT_LIMIT = 60.0  # seconds
_DYING = 5.0  # seconds; a killed command may first have to come back from the kernel


async def run(
    *argv: str | Path,
    stdin: str | bytes | BinaryIO | None = None,
    stdout: BinaryIO | None = None,
    limit: float = DEFAULT_LIMIT,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    merged: bool = False,
) -> str:
    """Runs a command and returns its standard output as text.

    An open file given as `stdin` or `stdout` becomes the command's own, so that streams of any length pass without being read
    here; with `stdout` the text returned is empty. `merged` returns what was written as errors too, in its place.

    The command is killed, with everything in its session, when `limit` seconds pass or the caller is cancelled; the caller goes
    on once it is gone, so that whoever cleans up does not look before its last change.
    `env` is added to this process's environment. Raises CommandFailed with the command's standard error.
    """
    words = tuple(str(word) for word in argv)
    try:
        command = sh.Command(words[0])
    except sh.CommandNotFound:
        raise CommandFailed(words, status=None, stderr="", why="is not installed or not on PATH") from None
    options = {
        "_in": stdin if stdin is not None else b"",
        "_env": {**os.environ, **env} if env else None,
        "_cwd": str(cwd) if cwd else None,
        **({"_out": stdout} if stdout is not None else {}),
        **({"_err_to_out": True} if merged else {}),
    }
    child = _Child()
    # A new thread every time: it is in the same network namespace as its caller, which a pool's thread need not be, and many
    # slow commands cannot keep others waiting.
    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="command")
    ended = asyncio.get_running_loop().run_in_executor(thread, child.run, command, words[1:], options)
    thread.shutdown(wait=False)
    try:
        async with asyncio.timeout(limit):
            out = await asyncio.shield(ended)
    except sh.ErrorReturnCode as error:
        said = error.stdout if merged else error.stderr
        text = said.decode(errors="replace") if isinstance(said, bytes) else str(said)
        raise CommandFailed(words, status=error.exit_code, stderr=text) from None
    except TimeoutError:
        await _killed(child, ended)
        raise CommandFailed(words, status=None, stderr="", why=f"did not end within {limit:g} s and was killed") from None
    except asyncio.CancelledError:
        await _killed(child, ended)
        raise
    return out.decode(errors="replace")


async def _killed(child: _Child, ended: asyncio.Future[bytes]) -> None:
    ended.add_done_callback(lambda future: future.cancelled() or future.exception())  # how it died is no news
    child.kill()
    await asyncio.wait([ended], timeout=_DYING)


class _Child:
    """One command in a thread of its own.

    Started beside a running event loop, sh would wait a whole second whenever output ends before the command can be reaped,
    and its threads would call into a loop that may be closed by then.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: sh.RunningCommand | None = None
        self._unwanted = False

    def run(self, command: sh.Command, words: tuple[str, ...], options: dict[str, Any]) -> bytes:
        """Starts the command and waits for its end; called in the thread."""
        with self._lock:
            if self._unwanted:
                return b""
            self._process = command(
                *words, _bg=True, _bg_exc=False, _tty_in=False, _tty_out=False, _new_session=True, **options
            )
        self._process.wait()
        out: bytes = self._process.stdout
        return out

    def kill(self) -> None:
        """Ends the command and everything in its session, also if it has not started yet."""
        with self._lock:
            self._unwanted = True
            if self._process is not None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self._process.pid, signal.SIGKILL)
