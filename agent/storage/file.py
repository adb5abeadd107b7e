"""Disks as qcow2 files: each a copy-on-write overlay of its base image, made in milliseconds on any filesystem.

Called by the runtime. The base is hard-linked into the VM's folder and the overlay stands on that link: an image that is
built anew under the same name must not change the disks of VMs that were cloned from the old one. Where the image directory
is on another filesystem there can be no such link, and the overlay names the image itself.
"""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
from pathlib import Path

from agent.errors import AgentError, CommandFailed, DoesNotFit, ImageMissing, ImageRefused
from agent.images.catalogue import find_image, inspect, list_images
from agent.machine import Disk, Probe, Unusable, Usable
from agent.run import run
from specs.names import Storage as StorageKind
from specs.names import VmId

MIB = 1024 * 1024
DISK = "disk.qcow2"
# A name of its own until the clone is whole: a half-made file is never taken for a disk.
PARTIAL = ".disk.qcow2.new"
BASE = "base"


class FileStorage:
    """The file driver (see agent/storage/base.py for what each method promises)."""

    kind = StorageKind.FILE

    def __init__(self, image_dir: Path, runtime_dir: Path) -> None:
        self._image_dir = image_dir
        self._runtime_dir = runtime_dir

    async def probe(self) -> Probe:
        """Usable where qemu-img is installed and the runtime folder can be written."""
        if shutil.which("qemu-img") is None:
            return Unusable("qemu-img is not installed; apt-get install qemu-utils")
        try:
            await asyncio.to_thread(_try_writing, self._runtime_dir)
        except OSError as error:
            return Unusable(f"the runtime folder {self._runtime_dir} cannot be written: {error.strerror}")
        return Usable(detail=f"qcow2 files in {self._runtime_dir}")

    async def images(self) -> tuple[str, ...]:
        """The disk images of the image directory; those that are not disks (kernel and root filesystem) are not ours."""
        found = await asyncio.to_thread(list_images, self._image_dir)
        return tuple(image.name for image in found if image.format != "firecracker")

    async def ensure_disk(self, vm_id: VmId, folder: Path, image: str, size_mib: int) -> Disk:
        """Makes `<folder>/disk.qcow2` over the image, `size_mib` large. An existing disk is kept as it is."""
        disk = Disk(folder / DISK, "qcow2")
        if await asyncio.to_thread(disk.path.is_file):
            return disk
        base = await asyncio.to_thread(find_image, self._image_dir, image)
        if base is None or base.format == "firecracker":
            have = ", ".join(await self.images()) or "none at all"
            raise ImageMissing(f"image {image} is not in {self._image_dir} (there: {have}); put it there or build it")
        facts = await inspect(base.path, base.format)
        if size_mib * MIB < facts.virtual_size:
            needed = -(-facts.virtual_size // MIB)
            raise ImageRefused(
                f"image {image} is {needed} MiB large and does not fit a disk of {size_mib} MiB; ask for disk: {needed}"
            )
        try:
            backing = await asyncio.to_thread(_link_base, base.path.absolute(), folder / f"{BASE}.{base.format}")
        except OSError as error:
            raise AgentError(f"image {image} cannot be linked into {folder}: {error}") from error
        await self._clone(backing, base.format, folder, size_mib)
        return disk

    async def _clone(self, base: Path | str, base_format: str, folder: Path, size_mib: int) -> None:
        partial = folder / PARTIAL
        try:
            partial.unlink(missing_ok=True)
            await run(
                "qemu-img", "create", "-q", "-f", "qcow2", "-F", base_format, "-b", base, partial, f"{size_mib}M", limit=60
            )
            await asyncio.to_thread(_settle, partial, folder / DISK)
        except CommandFailed as error:
            partial.unlink(missing_ok=True)
            if "No space left on device" in error.stderr:
                raise DoesNotFit(f"there is no room for a disk in {folder}") from error
            raise
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise AgentError(f"the disk in {folder} cannot be written: {error}") from error

    async def remove_disk(self, vm_id: VmId, folder: Path) -> None:
        """Removes the overlay, whole or half-made; the base image stays."""
        for name in (DISK, PARTIAL, f"{BASE}.qcow2", f"{BASE}.raw"):
            # Off the loop: freeing a large file takes seconds on some filesystems.
            await asyncio.to_thread((folder / name).unlink, missing_ok=True)

    async def capacity_mib(self) -> tuple[int, int]:
        """Of the filesystem that holds the runtime folder; free is what this user may still write."""
        facts = await asyncio.to_thread(os.statvfs, self._runtime_dir)
        return facts.f_blocks * facts.f_frsize // MIB, facts.f_bavail * facts.f_frsize // MIB


def _try_writing(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    trial = folder / f".trial-{os.getpid()}"
    trial.write_bytes(b"x")
    trial.unlink()


def _link_base(image: Path, link: Path) -> Path | str:
    """What the overlay is to name: the link, relative to the overlay, or the image where it cannot be linked."""
    link.unlink(missing_ok=True)
    try:
        os.link(image, link)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK):
            raise
        return image
    return link.name


def _settle(partial: Path, final: Path) -> None:
    """Gives a finished file its name so that it survives a power cut whole or not at all."""
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.rename(final)
    folder = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
