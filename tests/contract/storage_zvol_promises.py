"""What the zvol driver promises beyond the contract; the same tests on real ZFS and on its stand-in."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from agent import zfs
from agent.errors import AgentError, Conflict, DoesNotFit, ImageMissing, ImageRefused
from agent.machine import Unusable, Usable
from agent.run import run
from agent.storage.zvol import ZvolStorage
from specs.names import VmId
from tests.contract.cut_off import cut_off
from tests.contract.storage_contract import OTHER, VM, StorageContract
from tests.contract.storage_zvol_rig import MIB, ZvolRig


class ZvolPromises(StorageContract):
    """The contract and more."""

    async def test_properties_of_a_disk_name_its_vm_cluster_and_image(self, storage_rig: ZvolRig) -> None:
        await storage_rig.new_storage().ensure_disk(VM, storage_rig.folder(), "base", 64, cluster="prod")
        found = await zfs.facts(
            f"{storage_rig.runtime}/{VM}", "muster:vm", "muster:cluster", "muster:image", "volmode", "volsize"
        )
        assert found == {
            "muster:vm": VM, "muster:cluster": "prod", "muster:image": "base", "volmode": "dev", "volsize": str(64 * MIB),
        }  # fmt: skip

    async def test_an_image_is_imported_once_and_is_read_only(self, storage_rig: ZvolRig) -> None:
        storage = storage_rig.new_storage()
        await storage.ensure_disk(VM, storage_rig.folder(), "base", 64)
        before = await zfs.facts(f"{storage_rig.images}/base", "guid", "readonly")
        await storage.ensure_disk(OTHER, storage_rig.folder(OTHER), "base", 64)
        assert await zfs.facts(f"{storage_rig.images}/base", "guid", "readonly") == before
        assert before is not None and before["readonly"] == "on"

    async def test_an_image_built_anew_does_not_change_the_disks_made_before(self, storage_rig: ZvolRig) -> None:
        storage = storage_rig.new_storage()
        old = await storage.ensure_disk(VM, storage_rig.folder(), "other", 64)
        anew = storage_rig.image_dir / ".other.new"
        anew.write_bytes(b"changed".ljust(MIB, b"\0"))
        anew.rename(storage_rig.image_dir / "other.raw")
        new = await storage.ensure_disk(OTHER, storage_rig.folder(OTHER), "other", 64)
        assert await storage_rig.contents(old) == ("other", 64)
        assert await storage_rig.contents(new) == ("changed", 64)
        assert await storage.images() == ("base", "other")

    async def test_an_outdated_image_goes_with_the_last_vm_that_stands_on_it(self, storage_rig: ZvolRig) -> None:
        storage = storage_rig.new_storage()
        await storage.ensure_disk(VM, storage_rig.folder(), "other", 64)
        os.utime(storage_rig.image_dir / "other.raw", (1, 1))
        await storage.ensure_disk(OTHER, storage_rig.folder(OTHER), "other", 64)
        assert len(await self._volumes(storage_rig.images)) == 2
        await storage.remove_disk(VM, storage_rig.folder())
        assert await self._volumes(storage_rig.images) == [f"{storage_rig.images}/other"]

    async def test_an_image_whose_file_is_gone_goes_with_its_last_vm(self, storage_rig: ZvolRig) -> None:
        storage = storage_rig.new_storage()
        await storage.ensure_disk(VM, storage_rig.folder(), "other", 64)
        (storage_rig.image_dir / "other.raw").unlink()
        assert await storage.images() == ("base",)
        with pytest.raises(ImageMissing, match=r"there: base\)"):
            await storage.ensure_disk(OTHER, storage_rig.folder(OTHER), "other", 64)
        await storage.remove_disk(VM, storage_rig.folder())
        assert await self._volumes(storage_rig.images) == []

    async def test_a_volume_somebody_put_among_the_images_is_an_image(self, storage_rig: ZvolRig) -> None:
        storage = storage_rig.new_storage()
        await zfs.create_volume(f"{storage_rig.images}/golden", 8 * MIB, {"volmode": "dev"})
        device = await zfs.device_of(f"{storage_rig.images}/golden", storage_rig.devices)
        await asyncio.to_thread(_write, device, b"golden")
        assert await storage.images() == ("base", "golden", "other")
        disk = await storage.ensure_disk(VM, storage_rig.folder(), "golden", 16)
        assert await storage_rig.contents(disk) == ("golden", 16)
        await storage.remove_disk(VM, storage_rig.folder())
        assert await storage.images() == ("base", "golden", "other")

    async def test_an_image_in_use_is_not_deleted_and_the_vms_are_named(self, storage_rig: ZvolRig) -> None:
        storage = storage_rig.new_storage()
        for vm in (VM, OTHER):
            await storage.ensure_disk(vm, storage_rig.folder(vm), "base", 64)
        with pytest.raises(Conflict, match=f"image base is in use by VMs {VM}, {OTHER}; delete them first"):
            await storage.remove_image("base")
        for vm in (VM, OTHER):
            await storage.remove_disk(vm, storage_rig.folder(vm))
        await storage.remove_image("base")
        assert await storage.images() == ("other",)
        assert await self._volumes(storage_rig.images) == []
        with pytest.raises(ImageMissing, match="image base is neither in"):
            await storage.remove_image("base")

    async def test_a_disk_that_was_promoted_over_its_image_can_be_removed(self, storage_rig: ZvolRig) -> None:
        storage = storage_rig.new_storage()
        await storage.ensure_disk(VM, storage_rig.folder(), "base", 64)
        other = await storage.ensure_disk(OTHER, storage_rig.folder(OTHER), "base", 64)
        await zfs.zfs("promote", f"{storage_rig.runtime}/{VM}")
        await storage.remove_disk(VM, storage_rig.folder())
        assert await storage_rig.remains(VM) == []
        assert await storage_rig.contents(other) == ("base", 64)
        third = VmId("third")
        disk = await storage.ensure_disk(third, storage_rig.folder(third), "base", 64)
        assert await storage_rig.contents(disk) == ("base", 64)

    async def test_a_foreign_dataset_of_a_vms_name_is_neither_used_nor_removed(self, storage_rig: ZvolRig) -> None:
        storage = storage_rig.new_storage()
        await zfs.create_volume(f"{storage_rig.runtime}/{VM}", 8 * MIB, {})
        with pytest.raises(AgentError, match=f"is not the disk of VM {VM}.*rename it"):
            await storage.ensure_disk(VM, storage_rig.folder(), "base", 64)
        await storage.remove_disk(VM, storage_rig.folder())
        assert await storage_rig.remains(VM) == [f"{storage_rig.runtime}/{VM}"]

    async def test_what_a_guest_writes_stays_in_its_own_disk(self, storage_rig: ZvolRig) -> None:
        storage = storage_rig.new_storage()
        mine = await storage.ensure_disk(VM, storage_rig.folder(), "base", 64)
        await asyncio.to_thread(_write, mine.path, b"mine!")
        theirs = await storage.ensure_disk(OTHER, storage_rig.folder(OTHER), "base", 64)
        assert await storage_rig.contents(theirs) == ("base", 64)
        again = await storage.ensure_disk(VM, storage_rig.folder(), "base", 64)
        assert await storage_rig.contents(again) == ("mine!", 64)

    async def test_a_disk_in_use_is_a_failure_that_names_it_and_stays(
        self, storage_rig: ZvolRig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(zfs, "_PATIENCE", 0.5)
        storage = storage_rig.new_storage()
        disk = await storage.ensure_disk(VM, storage_rig.folder(), "base", 64)
        with disk.path.open("rb"), pytest.raises(zfs.DatasetBusy, match=rf"zfs destroy -r {storage_rig.runtime}/{VM}.*busy"):
            await storage.remove_disk(VM, storage_rig.folder())
        await storage.remove_disk(VM, storage_rig.folder())
        assert await storage_rig.remains(VM) == []

    async def test_somebody_who_looks_at_a_new_disk_as_udev_does_only_delays_it(self, storage_rig: ZvolRig) -> None:
        await storage_rig.new_storage().ensure_disk(OTHER, storage_rig.folder(OTHER), "base", 16)  # imports the image
        making = asyncio.ensure_future(storage_rig.new_storage().ensure_disk(VM, storage_rig.folder(), "base", 64))
        device = storage_rig.devices / storage_rig.runtime / VM
        async with asyncio.timeout(60):
            while not device.exists():  # noqa: ASYNC110
                await asyncio.sleep(0.002)
        with device.open("rb"):
            await asyncio.sleep(1)
        assert await storage_rig.contents(await making) == ("base", 64)

    async def test_an_image_that_opens_other_files_is_refused(self, storage_rig: ZvolRig) -> None:
        evil = storage_rig.image_dir / "evil.qcow2"
        await run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", storage_rig.image_dir / "other.raw", evil)
        with pytest.raises(ImageRefused, match="backing file"):
            await storage_rig.new_storage().ensure_disk(VM, storage_rig.folder(), "evil", 64)
        assert await self._volumes(storage_rig.images) == []

    async def test_a_root_filesystem_fills_its_volume(self, storage_rig: ZvolRig) -> None:
        image = storage_rig.image_dir / "kernel-and-root"
        image.mkdir()
        (image / "vmlinux").write_bytes(b"\x7fELF")
        await run("mke2fs", "-q", "-t", "ext4", image / "rootfs.ext4", "8M")
        storage = storage_rig.new_storage()
        assert await storage.images("rootfs") == ("kernel-and-root",)
        disk = await storage.ensure_disk(VM, storage_rig.folder(), "kernel-and-root", 32, "rootfs")
        told = dict(line.split(":", 1) for line in (await run("dumpe2fs", "-h", disk.path)).splitlines() if ":" in line)
        assert int(told["Block count"]) * int(told["Block size"]) == 32 * MIB
        await storage.remove_disk(VM, storage_rig.folder())
        await storage.remove_image("kernel-and-root")
        assert not image.exists()

    async def test_no_room_for_an_image_is_said_and_leaves_nothing(self, storage_rig: ZvolRig) -> None:
        big = storage_rig.image_dir / "big.raw"
        await asyncio.to_thread(big.write_bytes, os.urandom(12 * MIB))
        await self.leave_room(storage_rig, 8, storage_rig.images)
        with pytest.raises(DoesNotFit, match=r"no room for big|out of space"):
            await storage_rig.new_storage().ensure_disk(VM, storage_rig.folder(), "big", 64)
        assert await self._volumes(storage_rig.images) == []
        assert await storage_rig.remains(VM) == []

    async def test_killed_while_a_disk_is_made_or_removed_the_next_agent_does_it_whole(
        self, storage_rig: ZvolRig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder, image, name = storage_rig.folder(), f"{storage_rig.images}/base", f"{storage_rig.runtime}/{VM}"
        for before in ("qemu-img convert", f"zfs inherit muster:making {image}", f"zfs inherit muster:making {name}"):
            await cut_off(monkeypatch, before, storage_rig.new_storage().ensure_disk(VM, folder, "base", 64))
            disk = await storage_rig.new_storage().ensure_disk(VM, folder, "base", 64)
            assert (before, await storage_rig.contents(disk)) == (before, ("base", 64))
            await cut_off(monkeypatch, "zfs destroy", storage_rig.new_storage().remove_disk(VM, folder))
            await storage_rig.new_storage().remove_disk(VM, folder)
            assert (before, await storage_rig.remains(VM)) == (before, [])
            assert await self._everything_in(storage_rig.images) == ["base", "base@base"]
            await zfs.destroy(image)

    async def test_killed_while_a_disk_is_imported_it_is_the_old_or_the_new_one(
        self, storage_rig: ZvolRig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        storage, folder, name = storage_rig.new_storage(), storage_rig.folder(), f"{storage_rig.runtime}/{VM}"
        sent = tmp_path / "sent"
        other = await storage.ensure_disk(OTHER, storage_rig.folder(OTHER), "other", 16)
        assert await storage.export_disk(OTHER, storage_rig.folder(OTHER), other, sent) == "zfs"
        disk = await storage.ensure_disk(VM, folder, "base", 32)
        for before, expected in (
            ("zfs set volsize=", "base"),
            (f"zfs rename {name} {name}:replaced", "base"),
            (f"zfs rename {name}:import", "other"),
            (f"zfs destroy -r {name}:replaced", "other"),
        ):
            coming = storage_rig.new_storage().import_disk(VM, folder, disk, 32, sent, "zfs")
            await cut_off(monkeypatch, before, coming)
            await storage_rig.new_storage().restore_disk(VM, folder)
            assert (before, await storage_rig.contents(disk)) == (before, (expected, 32))
            assert (before, await storage_rig.remains(VM)) == (before, [name])

    async def test_no_room_for_a_disk_that_was_sent_leaves_the_old_one(self, storage_rig: ZvolRig, tmp_path: Path) -> None:
        storage, sent = storage_rig.new_storage(), tmp_path / "sent"
        other = await storage.ensure_disk(OTHER, storage_rig.folder(OTHER), "other", 32)
        await asyncio.to_thread(_write, other.path, os.urandom(24 * MIB))
        await storage.export_disk(OTHER, storage_rig.folder(OTHER), other, sent)
        await storage.remove_disk(OTHER, storage_rig.folder(OTHER))
        disk = await storage.ensure_disk(VM, storage_rig.folder(), "base", 32)
        await self.leave_room(storage_rig, 12, storage_rig.runtime)
        with pytest.raises(DoesNotFit, match=r"out of space|quota exceeded"):
            await storage.import_disk(VM, storage_rig.folder(), disk, 32, sent, "zfs")
        assert await storage_rig.contents(disk) == ("base", 32)
        assert await storage_rig.remains(VM) == [f"{storage_rig.runtime}/{VM}"]

    async def test_missing_datasets_are_made_if_their_pool_is_there(self, storage_rig: ZvolRig) -> None:
        pool = storage_rig.images.partition("/")[0]
        storage = ZvolStorage(storage_rig.image_dir, f"{pool}/a/images", f"{pool}/a/vms", devices=storage_rig.devices)
        assert isinstance(await storage.probe(), Usable)
        assert (await zfs.facts(f"{pool}/a/vms", "type")) == {"type": "filesystem"}
        await zfs.destroy(f"{pool}/a")

    async def test_a_pool_that_is_not_there_is_named(self, storage_rig: ZvolRig) -> None:
        storage = ZvolStorage(storage_rig.image_dir, "nopool/images", "nopool/vms", devices=storage_rig.devices)
        probe = await storage.probe()
        assert isinstance(probe, Unusable) and "nopool" in probe.why

    async def test_a_volume_cannot_be_the_parent_of_disks(self, storage_rig: ZvolRig) -> None:
        await zfs.create_volume(f"{storage_rig.runtime}/vol", 8 * MIB, {})
        storage = ZvolStorage(
            storage_rig.image_dir, storage_rig.images, f"{storage_rig.runtime}/vol", devices=storage_rig.devices
        )
        probe = await storage.probe()
        assert isinstance(probe, Unusable) and "is a volume" in probe.why

    async def leave_room(self, storage_rig: ZvolRig, mib: int, dataset: str) -> None:
        """Makes a dataset so small that no more than `mib` fit."""
        await zfs.zfs("set", f"quota={mib}M", dataset)

    @staticmethod
    async def _everything_in(dataset: str) -> list[str]:
        rows = await zfs.table("all", dataset, "name", depth=9)
        return sorted(name.removeprefix(f"{dataset}/") for (name,) in rows if name != dataset)

    @staticmethod
    async def _volumes(below: str) -> list[str]:
        return sorted(name for (name,) in await zfs.table("volume", below, "name"))


def _write(device: Path, data: bytes) -> None:
    with device.open("r+b") as file:
        file.write(data.ljust(512, b"\0"))
        file.flush()
        os.fsync(file.fileno())
