"""What the qemu driver keeps in a VM's folder, and how the end of a VM is read from it. Knows nothing of QMP or networks.

process.json  the identity of the QEMU process that was started last
asked-stop    the agent was told to end this VM; removed by the next start
exit.json     {"status": int | null} of the last process, where an agent saw it end
ending.log    QEMU's own word on who asked for the end
qemu.log      QEMU's standard error
seed.iso, console.log, qmp.sock
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
from pathlib import Path

import psutil

from agent.engines.qemu_argv import CONSOLE, ENDING, QMP, SEED, STDERR
from agent.machine import Stopped
from agent.process import ProcessRecord, boot_id, identify, read_record, write_record
from specs.names import VmId

PROCESS = "process.json"
ASKED = "asked-stop"
EXIT = "exit.json"
CONSOLE_OLD = "console.log.1"
CONSOLE_MAX = 4 * 1024 * 1024  # bytes; the file before it is kept too
_TAIL = 2000  # characters of QEMU's complaints shown to people
# ShutdownCause of QEMU's qapi/run-state.json counted from 0; the trace event prints the number.
_GUEST_SHUTDOWN = "qemu_system_shutdown_request reason=6"


class VmFolder:
    """One VM's folder, seen by the qemu driver. All methods block for the time of small file operations."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def is_prepared(self) -> bool:
        """Whether `prepare` has finished."""
        return (self.path / SEED).is_file()

    def record(self) -> ProcessRecord | None:
        """The process started last, if any. Raises AgentError on an unreadable record."""
        return read_record(self.path / PROCESS)

    def adopt(self, record: ProcessRecord) -> None:
        """Records a process that was found running."""
        with contextlib.suppress(FileNotFoundError):  # the folder was removed under a running VM
            write_record(self.path / PROCESS, record)

    def forget_last_run(self) -> None:
        """Clears what is known of the last end, before a new start: an old note must never explain a new end."""
        for name in (PROCESS, ASKED, EXIT, ENDING, STDERR, QMP):
            (self.path / name).unlink(missing_ok=True)

    def note_asked(self) -> None:
        """Keeps that the agent ends this VM on request."""
        with contextlib.suppress(FileNotFoundError):
            (self.path / ASKED).touch()

    def forget_asked(self) -> None:
        """Takes back that the VM is to end."""
        (self.path / ASKED).unlink(missing_ok=True)

    def note_exit(self, status: int | None) -> None:
        """Keeps the exit status that only the first watcher is told."""
        if status is not None:
            with contextlib.suppress(OSError):  # a full disk must not keep anybody from hearing of the exit
                # Not synced to disk: this runs on the event loop, and a torn file only costs the message its signal name.
                (self.path / EXIT).write_text(json.dumps({"status": status}))

    def remove_files(self) -> None:
        """Removes everything the driver keeps here."""
        for name in (PROCESS, ASKED, EXIT, ENDING, STDERR, QMP, CONSOLE, CONSOLE_OLD, SEED):
            (self.path / name).unlink(missing_ok=True)

    def bound_console(self) -> None:
        """Moves a console log that has grown too long aside: a chattering guest must not fill the host's disk."""
        console = self.path / CONSOLE
        with contextlib.suppress(FileNotFoundError):
            if console.stat().st_size > CONSOLE_MAX:
                shutil.copyfile(console, self.path / CONSOLE_OLD)
                os.truncate(console, 0)

    def complaint(self) -> str:
        """The end of QEMU's standard error."""
        return _read(self.path / STDERR).strip()[-_TAIL:]

    def ending(self) -> Stopped:
        """How the VM came to be stopped, told by the files alone; for a VM whose process is known to be gone."""
        record = self.record()
        if record is None or (self.path / ASKED).exists():
            return Stopped()
        if _GUEST_SHUTDOWN in _read(self.path / ENDING):
            return Stopped("exited", "the guest powered itself off")
        if record.boot != boot_id():
            return Stopped("crashed", "the host was restarted while the VM ran")
        complaint = self.complaint()
        return Stopped("crashed", self._how_it_died() + (f": {complaint}" if complaint else ""))

    def _how_it_died(self) -> str:
        try:
            status = int(json.loads(_read(self.path / EXIT))["status"])
        except (ValueError, KeyError, TypeError):
            return "QEMU ended while no agent watched"
        if status >= 0:
            return f"QEMU ended with status {status}"
        try:
            return f"QEMU was killed by {signal.Signals(-status).name}"
        except ValueError:
            return f"QEMU was killed by signal {-status}"


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except FileNotFoundError:
        return ""


def find_processes(runtime_dir: Path, binary: str) -> dict[VmId, ProcessRecord]:
    """Every QEMU process of this runtime folder, known by the folder in its command line. Blocks for milliseconds.

    VMs whose folder, or record, is gone are found too.
    """
    found: dict[VmId, ProcessRecord] = {}
    name = Path(binary).name
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            if not words or Path(words[0]).name != name or "-D" not in words[:-1]:
                continue
            log = Path(words[words.index("-D") + 1])
            record = identify(process.pid)
            if log.name == ENDING and log.parent.parent == runtime_dir and record is not None:
                found[VmId(log.parent.name)] = record
    return found
