"""Exported disks as qcow2 files: written flat, and judged before anything of them is used. Called by storage drivers."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from agent.errors import CommandFailed, ImageRefused
from agent.images.catalogue import inspect
from agent.machine import StreamFormat
from agent.run import run

MIB = 1024 * 1024
LIMIT = 3600.0  # seconds, for a large disk on slow hardware
_C = {"LC_ALL": "C"}


async def flatten(disk: Path, format_: str, target: Path) -> None:
    """Writes a disk, a file or device of `format_`, as a qcow2 file that needs no other file. Raises CommandFailed."""
    await run("qemu-img", "convert", "-q", "-f", format_, "-O", "qcow2", disk, target, limit=LIMIT, env=_C)


async def check_stream(source: Path, format_: StreamFormat, size_mib: int) -> None:
    """Raises ImageRefused unless the file is a qcow2 disk without other files that fits `size_mib`."""
    if format_ != "qcow2":
        raise ImageRefused("this host keeps disks as files and cannot read a ZFS stream; import it on a host with storage zvol")
    size = (await inspect(source, "qcow2")).virtual_size
    try:
        told = json.loads(await run("qemu-img", "check", "--output=json", "-f", "qcow2", source, limit=LIMIT, env=_C))
    except CommandFailed as error:
        if error.exit_status is None:
            raise
        # Clusters that nothing refers to (status 3) are refused too: a file that was cut short can look like that.
        why = error.stderr.strip()[-300:] or f"qemu-img check exited with {error.exit_status}"
        raise ImageRefused(f"the disk sent is damaged or not whole ({why}); try qemu-img check -r leaks") from error
    # A cut through the tables reads as zeros and passes the check; only the end that it found gives it away.
    if int(told["image-end-offset"]) > (await asyncio.to_thread(source.stat)).st_size:
        raise ImageRefused("the disk sent is not whole: its tables name clusters beyond its end")
    if size > size_mib * MIB:
        raise ImageRefused(f"the disk sent is {-(-size // MIB)} MiB large and does not fit this VM's disk of {size_mib} MiB")
