"""Disks in memory, for tests of the runtime. Keeps the same promises as the real drivers (one contract suite runs on all)."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path

from agent.errors import DoesNotFit, ImageMissing, ImageRefused
from agent.faults import Faults
from agent.machine import Disk, DiskKind, Probe, StreamFormat, Usable
from specs.names import Storage as StorageKind
from specs.names import VmId


@dataclass(slots=True)
class FakeDisk:
    """One clone. `whole` is False for what an interrupted clone left."""

    image: str
    size_mib: int
    whole: bool = False


@dataclass(slots=True)
class FakeDisks:
    """What survives an agent restart: the disks of one host. `images` and `rootfs_images` map a base image to its size
    in MiB.
    """

    images: dict[str, int] = field(default_factory=lambda: {"tiny": 64})
    rootfs_images: dict[str, int] = field(default_factory=lambda: {"fc-tiny": 64})
    disks: dict[VmId, FakeDisk] = field(default_factory=dict)
    total_mib: int = 1_000_000
    faults: Faults = field(default_factory=Faults)

    @property
    def free_mib(self) -> int:
        """As if every disk were written full."""
        return self.total_mib - sum(disk.size_mib for disk in self.disks.values())


class FakeStorage:
    """A storage driver over `FakeDisks`. Its faults' steps: ensure_disk, ensure_disk.half, ensure_disk.done, remove_disk, …."""

    def __init__(self, world: FakeDisks | None = None, kind: StorageKind = StorageKind.FILE) -> None:
        self.world = world if world is not None else FakeDisks()
        self.kind = kind

    async def probe(self) -> Probe:
        """Usable always."""
        await self.world.faults.reach("probe")
        return Usable("in memory")

    async def images(self, kind: DiskKind = "any") -> tuple[str, ...]:
        """The names given to the world."""
        await self.world.faults.reach("images")
        return tuple(sorted(self._images(kind)))

    async def ensure_disk(
        self, vm_id: VmId, folder: Path, image: str, size_mib: int, kind: DiskKind = "any", *, cluster: str = ""
    ) -> Disk:
        """Clones in two moves, so that it can be cut off between them."""
        world = self.world
        await world.faults.reach("ensure_disk", vm_id)
        disk = world.disks.get(vm_id)
        if disk is None or not disk.whole:
            world.disks.pop(vm_id, None)
            images = self._images(kind)
            if image not in images:
                raise ImageMissing(f"image {image} is not on this host (there: {', '.join(sorted(images)) or 'none at all'})")
            if images[image] > size_mib:
                raise ImageRefused(f"image {image} is {images[image]} MiB large and does not fit a disk of {size_mib} MiB")
            if size_mib > world.free_mib:
                raise DoesNotFit(f"there is no room for a disk of {size_mib} MiB")
            disk = world.disks[vm_id] = FakeDisk(image, size_mib)
            await world.faults.reach("ensure_disk.half", vm_id)
            disk.whole = True
        await world.faults.reach("ensure_disk.done", vm_id)
        return Disk(folder / "disk.qcow2", "qcow2") if kind == "any" else Disk(folder / "disk.raw", "raw")

    def _images(self, kind: DiskKind) -> dict[str, int]:
        return self.world.rootfs_images if kind == "rootfs" else self.world.images

    async def export_disk(self, vm_id: VmId, folder: Path, disk: Disk, target: Path) -> StreamFormat:
        """Writes the name of the image."""
        await self.world.faults.reach("export_disk", vm_id)
        await asyncio.to_thread(target.write_text, self.world.disks[vm_id].image)
        return "qcow2"

    async def import_disk(
        self, vm_id: VmId, folder: Path, disk: Disk, size_mib: int, source: Path, format_: StreamFormat
    ) -> None:
        """Takes the file's text for the name of the image."""
        await self.world.faults.reach("import_disk", vm_id)
        if format_ != "qcow2":
            raise ImageRefused(f"this storage cannot read a disk as {format_}")
        self.world.disks[vm_id] = FakeDisk(await asyncio.to_thread(source.read_text), size_mib, whole=True)

    async def restore_disk(self, vm_id: VmId, folder: Path) -> None:
        """Imports happen at once."""

    async def remove_disk(self, vm_id: VmId, folder: Path) -> None:
        """Forgets the disk."""
        await self.world.faults.reach("remove_disk", vm_id)
        self.world.disks.pop(vm_id, None)
        await self.world.faults.reach("remove_disk.done", vm_id)

    async def capacity_mib(self) -> tuple[int, int]:
        """The world's totals."""
        await self.world.faults.reach("capacity")
        return self.world.total_mib, self.world.free_mib
