"""The one place that starts external commands. Argv lists only, never a shell; a time limit always."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import sh

from agent.errors import CommandFailed

DEFAULT_LIMIT = 60.0  # seconds
# Threads of its own: many slow commands must not keep the default pool from syncing records to disk.
_waiters = ThreadPoolExecutor(max_workers=64, thread_name_prefix="command")


async def run(
    *argv: str | Path,
    stdin: str | bytes | None = None,
    limit: float = DEFAULT_LIMIT,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> str:
    """Runs a command and returns its standard output as text.

    The command is killed, with everything in its session, when `limit` seconds pass or the caller is cancelled.
    `env` is added to this process's environment. Raises CommandFailed with the command's standard error.
    """
    words = tuple(str(word) for word in argv)
    try:
        command = sh.Command(words[0])
    except sh.CommandNotFound:
        raise CommandFailed(words, status=None, stderr="", why="is not installed or not on PATH") from None
    process = command(
        *words[1:],
        _bg=True,
        _bg_exc=False,
        _tty_in=False,
        _tty_out=False,
        _in=stdin if stdin is not None else b"",
        _env={**os.environ, **env} if env else None,
        _cwd=str(cwd) if cwd else None,
        _new_session=True,
    )
    try:
        async with asyncio.timeout(limit):
            # Awaiting the command itself costs a whole second whenever its output ends before it can be reaped.
            await asyncio.get_running_loop().run_in_executor(_waiters, process.wait)
    except sh.ErrorReturnCode as error:
        text = error.stderr.decode(errors="replace") if isinstance(error.stderr, bytes) else str(error.stderr)
        raise CommandFailed(words, status=error.exit_code, stderr=text) from None
    except TimeoutError:
        _kill(process)
        raise CommandFailed(words, status=None, stderr="", why=f"did not end within {limit:g} s and was killed") from None
    except asyncio.CancelledError:
        _kill(process)
        raise
    out: bytes = process.stdout
    return out.decode(errors="replace")


def _kill(process: sh.RunningCommand) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
