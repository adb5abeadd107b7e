"""Who a process is: its pid together with its start time and the boot it belongs to. Small, so that helpers start fast.

A pid alone is never believed: the kernel reuses it. The start time is `/proc/<pid>/stat` field 22 in clock ticks since boot
(proc(5)); where there is no such /proc, as on FreeBSD, psutil's creation time.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_HAS_PROC = sys.platform == "linux"


@dataclass(frozen=True, slots=True)
class ProcessRecord:
    """The identity of one process, for as long as the files of a host live."""

    pid: int
    start: str
    boot: str


@cache
def boot_id() -> str:
    """What changes with every boot of the host: Linux' random boot id, elsewhere the boot time in seconds."""
    if _HAS_PROC:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    import psutil  # noqa: PLC0415 takes longer to load than all the rest

    return str(int(psutil.boot_time()))


def identify(pid: int) -> ProcessRecord | None:
    """The identity of the process that has this pid now; None if there is none or only a zombie is left of it."""
    start = _start_of(pid)
    return ProcessRecord(pid, start, boot_id()) if start else None


def alive(record: ProcessRecord) -> bool:
    """Whether that very process still runs. A zombie does not: its memory is free."""
    return identify(record.pid) == record


def _start_of(pid: int) -> str:
    if _HAS_PROC:
        try:
            # The command name may hold blanks and brackets; fields are counted from the last one.
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return ""
        return "" if fields[0] in ("Z", "X") else fields[19]
    import psutil  # noqa: PLC0415

    try:
        process = psutil.Process(pid)
        return "" if process.status() == psutil.STATUS_ZOMBIE else repr(process.create_time())
    except psutil.NoSuchProcess:
        return ""
