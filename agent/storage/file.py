"""Disks as files: qcow2 overlays of their base image, made in milliseconds on any filesystem, or raw copies of it.

Called by the runtime. The base of an overlay is hard-linked into the VM's folder and the overlay stands on that link: an image
that is built anew under the same name must not change the disks of VMs that were cloned from the old one. Where the image
directory is on another filesystem there can be no such link, and the overlay names the image itself. Raw copies are for engines
that read no qcow2; they share their blocks with the image where the filesystem can (FICLONE, ioctl_ficlonerange(2)).
"""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
from pathlib import Path

from agent.errors import AgentError, CommandFailed, DoesNotFit, ImageMissing, ImageRefused
from agent.images.catalogue import ImageFile, find_image, inspect, list_images
from agent.machine import Disk, DiskKind, Probe, StreamFormat, Unusable, Usable
from agent.run import run
from agent.storage.rootfs import grow_filesystem
from agent.storage.streams import check_stream, flatten
from specs.names import Storage as StorageKind
from specs.names import VmId

MIB = 1024 * 1024
DISK = "disk.qcow2"
RAW = "disk.raw"
# A name of its own until the clone is whole: a half-made file is never taken for a disk.
PARTIAL = ".disk.qcow2.new"
RAW_PARTIAL = ".disk.raw.new"
BASE = "base"
COPY_LIMIT = 1800.0  # seconds; a large image on a slow disk
_C = {"LC_ALL": "C"}


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
        return Usable(detail=f"files in {self._runtime_dir}")

    async def images(self, kind: DiskKind = "any") -> tuple[str, ...]:
        """The disk images of the image directory, or for `rootfs` the directories with a kernel and a root filesystem."""
        found = await asyncio.to_thread(list_images, self._image_dir)
        return tuple(image.name for image in found if _suits(image, kind))

    async def ensure_disk(
        self, vm_id: VmId, folder: Path, image: str, size_mib: int, kind: DiskKind = "any", *, cluster: str = ""
    ) -> Disk:
        """Makes `<folder>/disk.qcow2` over the image, or `<folder>/disk.raw` from it. An existing disk is kept as it is."""
        disk = Disk(folder / DISK, "qcow2") if kind == "any" else Disk(folder / RAW, "raw")
        if await asyncio.to_thread(disk.path.is_file):
            return disk
        base = await asyncio.to_thread(find_image, self._image_dir, image)
        if base is None or not _suits(base, kind):
            have = ", ".join(await self.images(kind)) or "none at all"
            raise ImageMissing(f"image {image} is not in {self._image_dir} (there: {have}); put it there or build it")
        virtual_size = base.size if base.format == "firecracker" else (await inspect(base.path, base.format)).virtual_size
        if size_mib * MIB < virtual_size:
            needed = -(-virtual_size // MIB)
            raise ImageRefused(
                f"image {image} is {needed} MiB large and does not fit a disk of {size_mib} MiB; ask for disk: {needed}"
            )
        if kind == "any":
            await self._overlay(base, folder, size_mib)
        else:
            await self._copy(base, folder, size_mib)
        return disk

    async def _overlay(self, base: ImageFile, folder: Path, size_mib: int) -> None:
        try:
            backing = await asyncio.to_thread(_link_base, base.path.absolute(), folder / f"{BASE}.{base.format}")
        except OSError as error:
            raise AgentError(f"image {base.name} cannot be linked into {folder}: {error}") from error
        partial = folder / PARTIAL
        words = ("-q", "-f", "qcow2", "-F", base.format, "-b", backing, partial, f"{size_mib}M")
        try:
            partial.unlink(missing_ok=True)
            await run("qemu-img", "create", *words, limit=60, env=_C)
            await asyncio.to_thread(_settle, partial, folder / DISK)
        except (CommandFailed, OSError) as error:
            partial.unlink(missing_ok=True)
            raise _told(error, folder) from error

    async def _copy(self, base: ImageFile, folder: Path, size_mib: int) -> None:
        partial = folder / RAW_PARTIAL
        source = base.path / "rootfs.ext4" if base.format == "firecracker" else base.path
        try:
            partial.unlink(missing_ok=True)
            if base.format == "qcow2":
                await run("qemu-img", "convert", "-q", "-f", "qcow2", "-O", "raw", source, partial, limit=COPY_LIMIT, env=_C)
            else:
                await run("cp", "--reflink=auto", "--sparse=always", source, partial, limit=COPY_LIMIT, env=_C)
            os.truncate(partial, size_mib * MIB)
            partial.chmod(0o600)
            if base.format == "firecracker":
                await grow_filesystem(partial, base.name)
            await asyncio.to_thread(_settle, partial, folder / RAW)
        except (AgentError, OSError) as error:
            partial.unlink(missing_ok=True)
            raise _told(error, folder) from error

    async def export_disk(self, vm_id: VmId, folder: Path, disk: Disk, target: Path) -> StreamFormat:
        """Writes a qcow2 file without a backing file; blocks that hold nothing take no room in it."""
        try:
            await flatten(disk.path, disk.format, target)
        except CommandFailed as error:
            raise _told(error, target.parent) from error
        return "qcow2"

    async def import_disk(
        self, vm_id: VmId, folder: Path, disk: Disk, size_mib: int, source: Path, format_: StreamFormat
    ) -> None:
        """Takes the disk's place with the file, converted if the disk is raw, by one rename."""
        await check_stream(source, format_, size_mib)
        partial = folder / (PARTIAL if disk.format == "qcow2" else RAW_PARTIAL)
        words = ("qemu-img", "convert", "-q", "-f", "qcow2", "-O", disk.format)
        try:
            partial.unlink(missing_ok=True)
            await run(*words, source, partial, limit=COPY_LIMIT, env=_C)
            await run("qemu-img", "resize", "-q", "-f", disk.format, partial, f"{size_mib}M", limit=60, env=_C)
            partial.chmod(0o600)
            await asyncio.to_thread(_settle, partial, disk.path)
        except (AgentError, OSError) as error:
            partial.unlink(missing_ok=True)
            raise _told(error, folder) from error

    async def restore_disk(self, vm_id: VmId, folder: Path) -> None:
        """A rename is never half done."""

    async def remove_disk(self, vm_id: VmId, folder: Path) -> None:
        """Removes the disk, whole or half-made; the base image stays."""
        for name in (DISK, PARTIAL, RAW, RAW_PARTIAL, f"{BASE}.qcow2", f"{BASE}.raw"):
            # Off the loop: freeing a large file takes seconds on some filesystems.
            await asyncio.to_thread((folder / name).unlink, missing_ok=True)

    async def capacity_mib(self) -> tuple[int, int]:
        """Of the filesystem that holds the runtime folder; free is what this user may still write."""
        facts = await asyncio.to_thread(os.statvfs, self._runtime_dir)
        return facts.f_blocks * facts.f_frsize // MIB, facts.f_bavail * facts.f_frsize // MIB


def _suits(image: ImageFile, kind: DiskKind) -> bool:
    return (image.format == "firecracker") == (kind == "rootfs")


def _told(error: AgentError | OSError, folder: Path) -> AgentError:
    """The failure of making a disk as the runtime wants to hear it: a full disk is DoesNotFit."""
    if "No space left on device" in str(error):
        return DoesNotFit(f"there is no room for a disk in {folder}")
    return error if isinstance(error, AgentError) else AgentError(f"the disk in {folder} cannot be written: {error}")


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
