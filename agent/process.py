"""Processes that outlive the agent: how they are started and known again, when they end. Called by engines with a process a VM.

Who a process is, and why a pid alone is never believed, is in identity.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from agent.errors import AgentError
from agent.identity import ProcessRecord, alive, boot_id, identify

__all__ = [
    "ExitWatch",
    "ProcessRecord",
    "alive",
    "boot_id",
    "identify",
    "kill",
    "read_record",
    "send_signal",
    "spawn",
    "wait_gone",
    "write_json",
    "write_record",
]

POLL_INTERVAL = 0.2  # seconds; only where the kernel has no pidfd
KILL_LIMIT = 20.0  # seconds; a process with much memory takes one or two to be torn down


def write_json(path: Path, value: object) -> None:
    """Writes a JSON file that is either the old one or the whole new one, also after a power cut. Blocks; raises OSError."""
    temporary = path.with_name(f".{path.name}.new")
    with temporary.open("w") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_record(path: Path, record: ProcessRecord) -> None:
    """Keeps the record as `{"pid": 4242, "start": "81734", "boot": "…"}`. Blocks; raises OSError."""
    write_json(path, asdict(record))


def read_record(path: Path) -> ProcessRecord | None:
    """The record kept there; None if there is none. Raises AgentError on one that cannot be read, rather than guess."""
    try:
        value = json.loads(path.read_text())
        return ProcessRecord(int(value["pid"]), str(value["start"]), str(value["boot"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AgentError(f"{path} cannot be read ({error}); if no process of this VM runs, remove the file") from error


def spawn(argv: Sequence[str], *, cwd: Path, log: Path) -> ProcessRecord:
    """Starts a process that outlives this one; its output is appended to `log`. Blocks for milliseconds. Raises AgentError.

    Not with asyncio's subprocesses nor `sh`: both kill what they started when their loop or object goes away, and a VM must
    survive the agent. A session of its own keeps a terminal's Ctrl-C and hang-up from the VM.
    """
    try:
        with log.open("ab") as output:
            process = subprocess.Popen(
                list(argv), cwd=cwd, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
    except OSError as error:
        raise AgentError(f"`{argv[0]}` cannot be started in {cwd}: {error}") from error
    # Disowned: ExitWatch reaps the child through its pidfd. Left at None, Popen would wait for it behind our back.
    process.returncode = 0
    record = identify(process.pid)
    if record is None:  # ended already; a record that matches nothing says so
        record = ProcessRecord(process.pid, "ended at once", boot_id())
    return record


def send_signal(record: ProcessRecord, number: signal.Signals) -> bool:
    """Signals that very process; False if it is gone, and then whoever has its pid now is left alone. Raises AgentError."""
    with _pidfd(record.pid) as fd:
        # Checked after the pidfd is open: from here on the pid cannot come to mean another process.
        if not alive(record):
            return False
        try:
            if fd is not None and hasattr(signal, "pidfd_send_signal"):
                signal.pidfd_send_signal(fd, number)
            else:
                os.kill(record.pid, number)
        except ProcessLookupError:
            return False
        except PermissionError as error:
            raise AgentError(f"process {record.pid} may not be signalled by this user: {error}") from error
    return True


@contextlib.contextmanager
def _pidfd(pid: int) -> Iterator[int | None]:
    fd = _open_pidfd(pid)
    try:
        yield fd
    finally:
        if fd is not None:
            os.close(fd)


def _open_pidfd(pid: int) -> int | None:
    if not hasattr(os, "pidfd_open"):
        return None
    try:
        return os.pidfd_open(pid)
    except OSError:  # no such process, or a kernel before 5.3
        return None


class ExitWatch:
    """Notices the end of one process, a child of ours or not, and reaps it if it is one.

    `on_exit` is called once, on the loop's thread, with the exit status (negative: the signal that killed it), or None where
    the kernel tells the status to nobody but the parent. Made on a running loop; `close` ends the watch, not the process.
    """

    def __init__(self, record: ProcessRecord, on_exit: Callable[[int | None], None]) -> None:
        self.record = record
        self.gone = asyncio.Event()
        self._on_exit = on_exit
        self._loop = asyncio.get_running_loop()
        self._poll: asyncio.TimerHandle | None = None
        self._fd = _open_pidfd(record.pid)
        if self._fd is not None and _start_or_zombie_matches(record):
            self._loop.add_reader(self._fd, self._ended)
        else:
            self._poll = self._loop.call_soon(self._look)  # type: ignore[assignment]

    def _look(self) -> None:
        if alive(self.record):
            self._poll = self._loop.call_later(POLL_INTERVAL, self._look)
        else:
            self._ended()

    def _ended(self) -> None:
        status = self._reap()
        self.close()
        self.gone.set()
        self._on_exit(status)

    def _reap(self) -> int | None:
        with contextlib.suppress(ChildProcessError):
            if self._fd is not None and hasattr(os, "P_PIDFD"):
                result = os.waitid(os.P_PIDFD, self._fd, os.WEXITED | os.WNOHANG)
                if result is not None:
                    return result.si_status if result.si_code == os.CLD_EXITED else -result.si_status
            else:
                pid, status = os.waitpid(self.record.pid, os.WNOHANG)
                return os.waitstatus_to_exitcode(status) if pid else None
        return None

    async def wait(self, limit: float) -> bool:
        """Waits up to `limit` seconds for the process to end; whether it did."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit):
                await self.gone.wait()
        return self.gone.is_set()

    async def kill(self, limit: float = KILL_LIMIT) -> None:
        """Ends the process at once and returns when it is gone; nothing is done to one that is gone already.

        Raises AgentError if it will not go (stuck in the kernel).
        """
        if send_signal(self.record, signal.SIGKILL) and not await self.wait(limit):
            pid = self.record.pid
            raise AgentError(f"process {pid} did not end within {limit:g} s of SIGKILL: the kernel holds it, look at its disk")

    def close(self) -> None:
        """Stops watching. Repeatable."""
        if self._poll is not None:
            self._poll.cancel()
            self._poll = None
        if self._fd is not None:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = None


def _start_or_zombie_matches(record: ProcessRecord) -> bool:
    """Whether an opened pidfd belongs to the record: the process itself, or the zombie of a child that ended just now."""
    return identify(record.pid) in (record, None)


async def wait_gone(record: ProcessRecord, limit: float) -> bool:
    """Waits up to `limit` seconds for the process to end; whether it did."""
    watch = ExitWatch(record, lambda _: None)
    try:
        return await watch.wait(limit)
    finally:
        watch.close()


async def kill(record: ProcessRecord, limit: float = KILL_LIMIT) -> None:
    """Ends a process that nobody watches; see ExitWatch.kill."""
    watch = ExitWatch(record, lambda _: None)
    try:
        await watch.kill(limit)
    finally:
        watch.close()
