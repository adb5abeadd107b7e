"""Disks as ZFS volumes: each a clone of its base image's snapshot, handed to the engine as a raw block device.

Called by the runtime. With datasets IMAGES and RUNTIME:

- `IMAGES/NAME` is the image NAME, read-only, with the snapshot `@base`. It is made from the file of that name in the image
  folder when first used, and made anew when the file has changed. A volume somebody put there (zfs recv) is used as it is.
- `IMAGES/NAME:old-…` is what such an image was before; it goes with the last VM that stands on it. No name of an image or VM
  can hold a colon, so nothing is ever taken for something else.
- `RUNTIME/VM` is a VM's disk. User properties name whose it is: `muster:vm`, `muster:cluster`, `muster:image`.
- A volume with the property `muster:making` is half-made. It bears its final name from the start, since the link to its device
  does not follow when a volume is renamed.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Literal

import structlog

from agent import zfs
from agent.errors import AgentError, CommandFailed, Conflict, DoesNotFit, ImageMissing, ImageRefused
from agent.images.catalogue import ImageFile, find_image, inspect, list_images
from agent.machine import Disk, DiskKind, Probe, StreamFormat, Unusable, Usable
from agent.run import run
from agent.storage.rootfs import grow_filesystem
from agent.storage.streams import check_stream
from specs.names import Storage as StorageKind
from specs.names import VmId

log = structlog.get_logger(__name__)

MIB = 1024 * 1024
BASE = "@base"
OLD = ":old-"
COMING = ":import"
GOING = ":replaced"
VM = "muster:vm"
CLUSTER = "muster:cluster"
IMAGE = "muster:image"
MAKING = "muster:making"
SOURCE = "muster:source"
# The guest's partitions are no business of the host: without `dev` it would read their tables and make nodes for them.
_VOLMODE = {"volmode": "dev"}
_IMPORT_LIMIT = 3600.0  # seconds; a large image on a slow disk
_STREAM_LIMIT = 3600.0
_NO_ROOM = 32 * MIB  # a write that is refused may be this long
_TRIES = 3  # of cloning, should the image be replaced in between


class ZvolStorage:
    """The zvol driver (see agent/storage/base.py for what each method promises). `devices` holds the volumes' nodes."""

    kind = StorageKind.ZVOL

    def __init__(self, image_dir: Path, images: str, runtime: str, *, devices: Path = zfs.DEVICES) -> None:
        self._image_dir = image_dir
        self._images = images
        self._runtime = runtime
        self._devices = devices

    async def probe(self) -> Probe:
        """Usable where a volume can really be made: tools, datasets (made if their pool is there), permission, device."""
        for tool, package in (("zfs", "zfsutils-linux"), ("qemu-img", "qemu-utils")):
            if shutil.which(tool) is None:
                return Unusable(f"{tool} is not installed; apt-get install {package}")
        trial = f"{self._runtime}/trial:{os.getpid()}"
        try:
            for dataset in (self._images, self._runtime):
                await self._ensure_parent(dataset)
            await zfs.create_volume(trial, MIB, _VOLMODE)
            try:
                await zfs.device_of(trial, self._devices)
            finally:
                await zfs.destroy(trial)
        except AgentError as error:
            return Unusable(error.message)
        return Usable(detail=f"ZFS volumes in {self._runtime}, images in {self._images}")

    async def images(self, kind: DiskKind = "any") -> tuple[str, ...]:
        """Those of the image folder, and for other than `rootfs` the volumes that others have put into the images' dataset."""
        files = await asyncio.to_thread(list_images, self._image_dir)
        names = {image.name for image in files if _suits(image, kind)}
        if kind != "rootfs":
            rows = await zfs.table("volume", self._images, "name", SOURCE)
            own = {name.rpartition("/")[2] for name, source in rows if source == "-"}
            names |= {name for name in own if ":" not in name}
        return tuple(sorted(names))

    async def ensure_disk(
        self, vm_id: VmId, folder: Path, image: str, size_mib: int, kind: DiskKind = "any", *, cluster: str = ""
    ) -> Disk:
        """Makes the volume `RUNTIME/<vm_id>`, `size_mib` large. An existing one of this VM is kept as it is."""
        disk = f"{self._runtime}/{vm_id}"
        if not await self._is_there(vm_id):
            for left in reversed(range(_TRIES)):
                try:
                    await self._clone(disk, vm_id, image, size_mib, kind, cluster)
                    break
                except zfs.DatasetMissing:
                    if not left:
                        raise
        return Disk(await zfs.device_of(disk, self._devices), "raw")

    async def export_disk(self, vm_id: VmId, folder: Path, disk: Disk, target: Path) -> StreamFormat:
        """Writes the stream of a snapshot that is taken for it and removed again."""
        dataset = f"{self._runtime}/{vm_id}"
        await self._drop_snapshots(dataset)
        snapshot = f"{dataset}@export"
        await zfs.zfs("snapshot", snapshot)
        try:
            with target.open("wb") as file:
                await zfs.send(snapshot, file, _STREAM_LIMIT)
        finally:
            await zfs.destroy(snapshot)
        return "zfs"

    async def import_disk(
        self, vm_id: VmId, folder: Path, disk: Disk, size_mib: int, source: Path, format_: StreamFormat
    ) -> None:
        """Makes a second volume `RUNTIME/<vm_id>:import` and lets it take the first one's place."""
        await self.restore_disk(vm_id, folder)
        name = f"{self._runtime}/{vm_id}"
        found = await zfs.facts(name, CLUSTER, IMAGE, "origin")
        if found is None:
            raise AgentError(f"the disk {name} of VM {vm_id} is gone; delete the VM and create it again")
        coming = name + COMING
        # No device for what may still be refused, and none whose link would have to follow the rename.
        properties = {VM: vm_id, CLUSTER: found[CLUSTER], IMAGE: found[IMAGE], "readonly": "off", "volmode": "none"}
        try:
            if format_ == "zfs":
                with source.open("rb") as file:
                    await zfs.receive(file, coming, properties, _STREAM_LIMIT)
            else:
                await check_stream(source, format_, size_mib)
                await zfs.create_volume(coming, size_mib * MIB, {**properties, **_VOLMODE})
                await self._fill(source, "qcow2", coming)
            await self._drop_snapshots(coming)
            got = await zfs.facts(coming, "type", "volsize")
            if got is None or got["type"] != "volume":
                raise ImageRefused("what was sent is the stream of a filesystem, not of a disk")
            if int(got["volsize"]) > size_mib * MIB:
                mib = -(-int(got["volsize"]) // MIB)
                raise ImageRefused(f"the disk sent is {mib} MiB large and does not fit this VM's disk of {size_mib} MiB")
            await zfs.patiently("set", f"volsize={size_mib * MIB}", "refreservation=none", "volmode=none", coming)
            await zfs.patiently("rename", name, name + GOING)
        except BaseException:
            with contextlib.suppress(AgentError):
                await zfs.destroy(coming)
            raise
        await zfs.patiently("rename", coming, name)
        await zfs.patiently("set", "volmode=dev", name)
        await self._destroy_unchained(name + GOING)
        await self._collect(found["origin"].partition("@")[0])
        await zfs.device_of(name, self._devices)

    async def restore_disk(self, vm_id: VmId, folder: Path) -> None:
        """Brings an import to its end, or takes it back, by what there is."""
        name = f"{self._runtime}/{vm_id}"
        there, coming, going = [await zfs.facts(f"{name}{suffix}", VM, "volmode") for suffix in ("", COMING, GOING)]
        if there is None and going is not None:
            await zfs.patiently("rename", name + (COMING if coming else GOING), name)
            there, coming = {VM: vm_id, "volmode": "none"}, None
        if coming is not None:
            await zfs.destroy(name + COMING)
        if there is None:
            return
        await self._destroy_unchained(name + GOING)
        if there["volmode"] == "none":
            await zfs.patiently("set", "volmode=dev", name)
        await zfs.device_of(name, self._devices)

    async def _drop_snapshots(self, dataset: str) -> None:
        for (snapshot,) in await zfs.table("snapshot", dataset, "name"):
            await zfs.destroy(snapshot)

    async def remove_disk(self, vm_id: VmId, folder: Path) -> None:
        """Destroys the volume, whole or half-made, and an outdated image that nothing else stands on."""
        for suffix in (COMING, GOING, ""):
            disk = f"{self._runtime}/{vm_id}{suffix}"
            found = await zfs.facts(disk, VM, "origin")
            if found is None or found[VM] != vm_id:
                continue  # another's dataset: it was refused as a disk, and nothing of ours is in it
            await self._destroy_unchained(disk)
            await self._collect(found["origin"].partition("@")[0])

    async def remove_image(self, name: str) -> None:
        """Removes an image: its file and its volume. Raises ImageMissing, and Conflict that names the VMs standing on it."""
        file = await asyncio.to_thread(find_image, self._image_dir, name)
        dataset = f"{self._images}/{name}"
        if await zfs.facts(dataset, "type") is not None:
            await self._refuse_if_used(name, dataset)
            try:
                await zfs.destroy(dataset)
            except zfs.HasClones:  # a VM was made from it this very moment
                await self._refuse_if_used(name, dataset)
                raise
        elif file is None:
            raise ImageMissing(f"image {name} is neither in {self._image_dir} nor in {self._images}")
        if file is not None:
            await asyncio.to_thread(shutil.rmtree if file.path.is_dir() else os.unlink, file.path)

    async def capacity_mib(self) -> tuple[int, int]:
        """Of the runtime dataset: its quota or its pool. Volumes are sparse, so free is what is not written yet."""
        found = await zfs.facts(self._runtime, "used", "available")
        if found is None:
            raise AgentError(f"the dataset {self._runtime} is gone; import its pool, or create it again")
        used, free = int(found["used"]), int(found["available"])
        return (used + free) // MIB, free // MIB

    async def _ensure_parent(self, dataset: str) -> None:
        found = await zfs.facts(dataset, "type")
        if found is None:
            await zfs.zfs("create", "-p", "-o", "mountpoint=none", "-o", "canmount=off", dataset)
        elif found["type"] != "filesystem":
            raise AgentError(f"{dataset} is a {found['type']}; volumes can only be made below a filesystem")

    async def _is_there(self, vm_id: VmId) -> bool:
        disk = f"{self._runtime}/{vm_id}"
        found = await zfs.facts(disk, "type", VM, MAKING)
        if found is None:
            return False
        if found[VM] == vm_id and found[MAKING] != "-":
            await zfs.destroy(disk)
            return False
        if found["type"] != "volume" or found[VM] != vm_id:
            raise AgentError(
                f"the dataset {disk} is there but is not the disk of VM {vm_id} (type {found['type']}, {VM} is {found[VM]}); "
                f"rename it, or if it is that disk: zfs set {VM}={vm_id} {disk}"
            )
        return True

    async def _clone(self, disk: str, vm_id: VmId, image: str, size_mib: int, kind: DiskKind, cluster: str) -> None:
        base, base_size = await self._base(image, kind)
        if size_mib * MIB < base_size:
            needed = -(-base_size // MIB)
            raise ImageRefused(
                f"image {image} is {needed} MiB large and does not fit a disk of {size_mib} MiB; ask for disk: {needed}"
            )
        properties = {VM: vm_id, CLUSTER: cluster or "-", IMAGE: image, MAKING: "yes", "readonly": "off", **_VOLMODE}
        await zfs.clone(base + BASE, disk, properties)
        try:
            if size_mib * MIB > base_size:
                await zfs.patiently("set", f"volsize={size_mib * MIB}", disk)
            if kind == "rootfs":
                await grow_filesystem(await zfs.device_of(disk, self._devices), image)
            await zfs.zfs("inherit", MAKING, disk)
        except AgentError:
            await zfs.destroy(disk)
            raise

    async def _base(self, image: str, kind: DiskKind) -> tuple[str, int]:
        """The image's dataset, with its snapshot made, and its size in bytes."""
        dataset = f"{self._images}/{image}"
        file = await asyncio.to_thread(find_image, self._image_dir, image)
        if file is not None and not _suits(file, kind):
            file = None
        found = await zfs.facts(dataset, "type", "volsize", SOURCE, MAKING)
        if found is not None and found["type"] != "volume":
            raise ImageRefused(f"image {image}: {dataset} is a {found['type']}, not a volume")
        if found is None or found[SOURCE] != "-" or kind == "rootfs":  # ours, so the file decides
            if file is None:
                have = ", ".join(await self.images(kind)) or "none at all"
                raise ImageMissing(
                    f"image {image} is neither in {self._image_dir} nor in {self._images} (there: {have}); "
                    "put it there or build it"
                )
            if found is None or found[SOURCE] != _identity(file) or found[MAKING] != "-":
                await self._import(file, dataset)
                found = await zfs.facts(dataset, "volsize")
                if found is None:
                    raise zfs.DatasetMissing(f"the image's volume {dataset} is gone again")
        if await zfs.facts(dataset + BASE, "type") is None:
            with contextlib.suppress(zfs.DatasetExists):
                await zfs.zfs("snapshot", dataset + BASE)
        return dataset, int(found["volsize"])

    async def _import(self, file: ImageFile, dataset: str) -> None:
        """Makes the image's volume from the file, whole or not at all; one agent on this host does it at a time."""
        source = file.path / "rootfs.ext4" if file.format == "firecracker" else file.path
        async with _holding(source):
            identity = _identity(file)
            found = await zfs.facts(dataset, SOURCE, MAKING)
            if found is not None and found[SOURCE] == identity and found[MAKING] == "-":
                return
            format_: Literal["qcow2", "raw"] = "qcow2" if file.format == "qcow2" else "raw"
            size = -(-(await inspect(source, format_)).virtual_size // MIB) * MIB
            if found is not None:
                await self._retire(dataset)
            await zfs.create_volume(dataset, size, {IMAGE: file.name, SOURCE: identity, MAKING: "yes", **_VOLMODE})
            try:
                await self._fill(source, format_, dataset)
                await zfs.zfs("snapshot", dataset + BASE)
                await zfs.patiently("set", "readonly=on", dataset)
                await zfs.zfs("inherit", MAKING, dataset)
            except AgentError:
                await zfs.destroy(dataset)
                raise
            log.info("image_imported", image=file.name, dataset=dataset, mib=size // MIB)

    async def _fill(self, file: Path, format_: str, volume: str) -> None:
        """Writes a disk file's contents onto a new, empty volume that is large enough."""
        device = await zfs.device_of(volume, self._devices)
        # Past the page cache (-t none): what it cannot write back later, as to a full pool, is lost without qemu-img failing.
        words = ("qemu-img", "convert", "-n", "--target-is-zero", "-t", "none", "-f", format_, "-O", "raw")
        try:
            await run(*words, file, device, limit=_IMPORT_LIMIT)
        except CommandFailed as error:
            if await self._is_full(volume):
                raise DoesNotFit(f"there is no room for {file.name} in {volume}") from error
            raise

    async def _is_full(self, volume: str) -> bool:
        """Whether a failed write can be for want of room; a quota that is reached reads as an input/output error."""
        found = await zfs.facts(volume, "available")
        return found is not None and int(found["available"]) < _NO_ROOM

    async def _retire(self, dataset: str) -> None:
        """Takes an outdated image out of the way; VMs that stand on it keep it."""
        try:
            await zfs.destroy(dataset)
        except zfs.HasClones:
            found = await zfs.facts(dataset, "guid")
            await zfs.patiently("rename", dataset, f"{dataset}{OLD}{found['guid'] if found else ''}")

    async def _collect(self, image: str) -> None:
        """Removes an image that no VM can be made from any more, if none stands on it either."""
        if image.rpartition("/")[0] != self._images:
            return
        found = await zfs.facts(image, SOURCE)
        if found is None or found[SOURCE] == "-":
            return
        if OLD not in image and await asyncio.to_thread(find_image, self._image_dir, image.rpartition("/")[2]) is not None:
            return
        with contextlib.suppress(zfs.HasClones):
            await zfs.destroy(image)

    async def _destroy_unchained(self, disk: str) -> None:
        """Destroys a VM's disk also if somebody promoted it over its image (zfs-promote(8)): the snapshot goes back first."""
        for _ in range(_TRIES):
            try:
                await zfs.destroy(disk)
                return
            except zfs.HasClones:
                dependents = await zfs.clones_of(disk)
                heir = min(dependents, key=lambda name: not name.startswith(f"{self._images}/"), default=None)
                if heir is None:
                    continue
                log.warning("disk_was_promoted", disk=disk, heir=heir)
                await zfs.zfs("promote", heir)
        await zfs.destroy(disk)

    async def _refuse_if_used(self, image: str, dataset: str) -> None:
        try:
            clones = await zfs.clones_of(dataset)
        except zfs.DatasetMissing:
            return
        if clones:
            names = ", ".join(name.rpartition("/")[2] for name in clones[:20])
            more = f" and {len(clones) - 20} more" if len(clones) > 20 else ""
            raise Conflict(f"image {image} is in use by VMs {names}{more}; delete them first", "image_in_use")


def _suits(image: ImageFile, kind: DiskKind) -> bool:
    return (image.format == "firecracker") == (kind == "rootfs")


def _identity(file: ImageFile) -> str:
    """Changes whenever the file is replaced or written to."""
    found = (file.path / "rootfs.ext4" if file.format == "firecracker" else file.path).stat()
    return f"{found.st_size}-{found.st_mtime_ns}-{found.st_ino}"


@contextlib.asynccontextmanager
async def _holding(file: Path) -> AsyncIterator[None]:
    """Holds the file against other imports of it, by this agent or another one on this host."""
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                await asyncio.sleep(0.05)
        yield
    finally:
        os.close(descriptor)
