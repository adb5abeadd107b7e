"""The storage contract's rig for ZFS, real or stood in for."""

from __future__ import annotations

import os
from pathlib import Path

from agent import zfs
from agent.machine import Disk
from agent.run import run
from agent.storage.zvol import ZvolStorage
from specs.names import VmId
from tests.contract.storage_contract import StorageRig

MIB = 1024 * 1024


class ZvolRig(StorageRig):
    """`base` is a qcow2 file, `other` a raw one; each begins with its name. Datasets are below `parent`."""

    base_mib = 4

    def __init__(self, folder: Path, parent: str, devices: Path = zfs.DEVICES) -> None:
        super().__init__(folder / "runtime")
        self.image_dir = folder / "images"
        self.images, self.runtime = f"{parent}/images", f"{parent}/vms"
        self.devices = devices

    async def set_up(self) -> None:
        self.image_dir.mkdir()
        for name in ("base", "other"):
            (self.image_dir / f"{name}.raw").write_bytes(name.encode().ljust(self.base_mib * MIB, b"\0"))
        raw = self.image_dir / "base.raw"
        await run("qemu-img", "convert", "-q", "-f", "raw", "-O", "qcow2", raw, self.image_dir / "base.qcow2")
        raw.unlink()
        for dataset in (self.images, self.runtime):
            await zfs.zfs("create", "-p", "-o", "mountpoint=none", dataset)

    def new_storage(self) -> ZvolStorage:
        return ZvolStorage(self.image_dir, self.images, self.runtime, devices=self.devices)

    async def contents(self, disk: Disk) -> tuple[str, int]:
        assert disk.format == "raw"
        with disk.path.open("rb") as device:
            name = device.read(16).rstrip(b"\0").decode()
            size = device.seek(0, os.SEEK_END)
        return name, size // MIB

    async def leave_half_made(self, vm_id: VmId) -> None:
        storage = self.new_storage()
        other = VmId("half")
        await storage.ensure_disk(other, self.folder(other), "base", 64)
        await storage.remove_disk(other, self.folder(other))
        await zfs.clone(f"{self.images}/base@base", f"{self.runtime}/{vm_id}", {"muster:vm": vm_id, "muster:making": "yes"})

    async def remains(self, vm_id: VmId) -> list[str]:
        names = [name for (name,) in await zfs.table("all", self.runtime, "name", depth=9)]
        return [name for name in names if name.removeprefix(f"{self.runtime}/").partition("@")[0].partition(":")[0] == vm_id]
