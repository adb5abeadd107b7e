"""What the qemu driver keeps in a VM's folder, and how the end of a VM is read from it. Knows nothing of QMP or networks.

Beside the files of agent/engines/processes.py:

ending.log    QEMU's own word on who asked for the end
qemu.log      QEMU's standard error
seed.iso, qmp.sock
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import psutil

from agent.engines.processes import ASKED, CONSOLE, CONSOLE_OLD, EXIT, PROCESS, ProcessFolder
from agent.engines.qemu_argv import ENDING, QMP, SEED, STDERR
from agent.machine import Stopped
from agent.process import ProcessRecord, boot_id, identify
from specs.names import VmId

_TAIL = 2000  # characters of QEMU's complaints shown to people
# ShutdownCause of QEMU's qapi/run-state.json counted from 0; the trace event prints the number.
_GUEST_SHUTDOWN = "qemu_system_shutdown_request reason=6"


class VmFolder(ProcessFolder):
    """One VM's folder, seen by the qemu driver. All methods block for the time of small file operations."""

    @property
    def is_prepared(self) -> bool:
        """Whether `prepare` has finished."""
        return (self.path / SEED).is_file()

    def forget_last_run(self) -> None:
        """Clears what is known of the last end, before a new start: an old note must never explain a new end."""
        self.remove(PROCESS, ASKED, EXIT, ENDING, STDERR, QMP)

    def remove_files(self) -> None:
        """Removes everything the driver keeps here."""
        self.remove(PROCESS, ASKED, EXIT, ENDING, STDERR, QMP, CONSOLE, CONSOLE_OLD, SEED)

    def complaint(self) -> str:
        """The end of QEMU's standard error."""
        return self.read(STDERR).strip()[-_TAIL:]

    def ending(self) -> Stopped:
        """How the VM came to be stopped, told by the files alone; for a VM whose process is known to be gone."""
        record = self.record()
        if record is None or self.is_asked:
            return Stopped()
        if _GUEST_SHUTDOWN in self.read(ENDING):
            return Stopped("exited", "the guest powered itself off")
        if record.boot != boot_id():
            return Stopped("crashed", "the host was restarted while the VM ran")
        complaint = self.complaint()
        return Stopped("crashed", self.how_it_died("QEMU") + (f": {complaint}" if complaint else ""))


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
