"""Grows the root filesystem on a raw disk to the size of the disk. Called by storage drivers for disks of kind `rootfs`.

The guest of such a disk finds no partition table to grow, and many have no tools to grow a filesystem with.
"""

from __future__ import annotations

from pathlib import Path

from agent.errors import CommandFailed, ImageRefused
from agent.run import run

LIMIT = 600.0  # seconds, for a large filesystem on a slow disk
_CORRECTED = 1  # e2fsck(8): errors were found and mended
_C = {"LC_ALL": "C"}


async def grow_filesystem(disk: Path, image: str) -> None:
    """Checks the ext4 filesystem on `disk` (a file or block device nobody has mounted) and makes it fill the disk.

    Safe to repeat after a cut-off. Raises ImageRefused, naming `image`, for what is no ext2, 3 or 4 filesystem or is broken
    beyond what e2fsck mends by itself; CommandFailed where the tools are missing.
    """
    try:
        await run("e2fsck", "-f", "-p", disk, limit=LIMIT, env=_C)
    except CommandFailed as error:
        if error.exit_status is None:
            raise
        if error.exit_status != _CORRECTED:
            raise ImageRefused(
                f"the root filesystem of image {image} is no sound ext4 filesystem: {error.message}; make it anew"
            ) from error
    await run("resize2fs", disk, limit=LIMIT, env=_C)
