"""What the firecracker driver keeps in a VM's folder, and how the end of a VM is read from it. Knows nothing of the API.

Beside the files of agent/engines/processes.py:

vmlinux, initrd  the image's kernel as it was when the VM was made, and what it loads first, if the image has that
jail/            what the process sees, made anew at every start
seed.iso

The console log also holds what Firecracker itself says: in one bounded file neither can fill the host's disk.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from pathlib import Path

import psutil

from agent.engines.firecracker_config import INITRD, KERNEL, SEED
from agent.engines.firecracker_jail import jail_id
from agent.engines.processes import ASKED, CONSOLE, CONSOLE_OLD, EXIT, PROCESS, ProcessFolder
from agent.machine import Stopped
from agent.process import ProcessRecord, boot_id, identify
from specs.names import VmId

_TAIL = 2000  # characters of complaints shown to people
# Firecracker's last word. A guest could write it too, and gain nothing: it may power itself off anyway.
_GOOD_END = re.compile(r"\[[^\]]*:main\] Firecracker exiting successfully\. exit_code=0\s*\Z")
_STARTED = "Successfully started microvm"
_EXITED = "the guest powered itself off or rebooted, which under Firecracker is the same"


class VmFolder(ProcessFolder):
    """One VM's folder, seen by the firecracker driver. All methods block for the time of small file operations."""

    @property
    def is_prepared(self) -> bool:
        """Whether `prepare` has finished."""
        return (self.path / SEED).is_file()

    def forget_last_run(self) -> None:
        """Clears what is known of the last end, before a new start: an old note must never explain a new end."""
        self.remove(PROCESS, ASKED, EXIT)
        with contextlib.suppress(FileNotFoundError):
            (self.path / CONSOLE).rename(self.path / CONSOLE_OLD)

    def remove_files(self) -> None:
        """Removes everything the driver keeps here but the jail."""
        names = (KERNEL, INITRD, SEED)
        self.remove(PROCESS, ASKED, EXIT, CONSOLE, CONSOLE_OLD, *names, *(f".{name}.new" for name in names))

    def says_started(self) -> bool:
        """Whether Firecracker has said that its configuration was good. Not to be relied on: its words may change."""
        return _STARTED in self.read(CONSOLE)

    def complaint(self) -> str:
        """The end of what jailer, Firecracker and guest have said since the last start."""
        return self.read(CONSOLE).strip()[-_TAIL:]

    def ending(self) -> Stopped:
        """How the VM came to be stopped, told by the files alone; for a VM whose process is known to be gone."""
        record = self.record()
        if record is None or self.is_asked:
            return Stopped()
        status = self.exit_status()
        if status == 0 or (status is None and _GOOD_END.search(self.read(CONSOLE)[-_TAIL:])):
            return Stopped("exited", _EXITED)
        if record.boot != boot_id():
            return Stopped("crashed", "the host was restarted while the VM ran")
        complaint = self.complaint() if status is not None and status > 0 else ""
        return Stopped("crashed", self.how_it_died("Firecracker") + (f": {complaint}" if complaint else ""))


def find_processes(runtime_dir: Path) -> dict[VmId, ProcessRecord]:
    """Every Firecracker of this runtime folder, also one that is still its jailer. Blocks for milliseconds.

    VMs whose folder, or record, is gone are found too: the arguments hold the folder's mark and the VM's id.
    """
    found: dict[VmId, ProcessRecord] = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            if not words or not Path(words[0]).name.startswith(("firecracker", "jailer")):
                continue
            given = dict(itertools.pairwise(words))
            vm_id = VmId(Path(given.get("--config-file", "")).name.removesuffix(".json"))
            record = identify(process.pid)
            if vm_id and given.get("--id") == jail_id(runtime_dir, vm_id) and record is not None:
                found[vm_id] = record
    return found
