"""What every storage driver must do: the same tests for the fake and the real ones."""

from __future__ import annotations

import abc
import asyncio
from pathlib import Path

import pytest

from agent.errors import AgentError, ImageMissing, ImageRefused
from agent.machine import Disk, Usable
from agent.storage.base import Storage
from specs.names import VmId

VM = VmId("vm-a")
OTHER = VmId("vm-b")


class StorageRig(abc.ABC):
    """One agent's storage. It has an image `base` of `base_mib` and an image `other`."""

    base_mib: int

    def __init__(self, runtime_dir: Path) -> None:
        self.runtime_dir = runtime_dir

    @abc.abstractmethod
    def new_storage(self) -> Storage:
        """A driver over the same host, as a new agent process would make it."""

    @abc.abstractmethod
    async def contents(self, disk: Disk) -> tuple[str, int]:
        """The image a disk was cloned from (`base` or `other`) and its size in MiB, as its guest would see them."""

    @abc.abstractmethod
    async def leave_half_made(self, vm_id: VmId) -> None:
        """What an agent killed while cloning `base` leaves behind."""

    @abc.abstractmethod
    async def remains(self, vm_id: VmId) -> list[str]:
        """Everything that still takes room for this VM."""

    def folder(self, vm_id: VmId = VM) -> Path:
        """The VM's folder, made if need be."""
        folder = self.runtime_dir / vm_id
        folder.mkdir(parents=True, exist_ok=True)
        return folder


class StorageContract:
    """The promises of agent/storage/base.py."""

    async def test_a_storage_that_works_here_says_so_and_names_its_images(self, storage_rig: StorageRig) -> None:
        storage = storage_rig.new_storage()
        assert isinstance(await storage.probe(), Usable)
        assert await storage.images() == ("base", "other")

    async def test_a_disk_is_a_clone_of_its_image_grown_to_the_size_asked_for(self, storage_rig: StorageRig) -> None:
        size = storage_rig.base_mib + 16
        disk = await storage_rig.new_storage().ensure_disk(VM, storage_rig.folder(), "base", size)
        assert await storage_rig.contents(disk) == ("base", size)

    async def test_a_disk_as_large_as_its_image_is_made(self, storage_rig: StorageRig) -> None:
        disk = await storage_rig.new_storage().ensure_disk(VM, storage_rig.folder(), "base", storage_rig.base_mib)
        assert await storage_rig.contents(disk) == ("base", storage_rig.base_mib)

    async def test_an_existing_disk_is_kept_with_its_contents(self, storage_rig: StorageRig) -> None:
        size = storage_rig.base_mib + 16
        first = await storage_rig.new_storage().ensure_disk(VM, storage_rig.folder(), "other", size)
        again = await storage_rig.new_storage().ensure_disk(VM, storage_rig.folder(), "base", size + 16)
        assert again == first
        assert await storage_rig.contents(again) == ("other", size)

    async def test_a_raw_disk_has_no_format_of_its_own_and_is_kept_like_any_other(self, storage_rig: StorageRig) -> None:
        size = storage_rig.base_mib + 16
        disk = await storage_rig.new_storage().ensure_disk(VM, storage_rig.folder(), "base", size, "raw")
        assert disk.format == "raw"
        assert await storage_rig.contents(disk) == ("base", size)
        assert await storage_rig.new_storage().ensure_disk(VM, storage_rig.folder(), "other", size, "raw") == disk
        assert await storage_rig.contents(disk) == ("base", size)
        await storage_rig.new_storage().remove_disk(VM, storage_rig.folder())
        assert await storage_rig.remains(VM) == []

    async def test_a_disk_image_is_no_root_filesystem(self, storage_rig: StorageRig) -> None:
        storage = storage_rig.new_storage()
        assert not {"base", "other"} & set(await storage.images("rootfs"))
        assert await storage.images("raw") == ("base", "other")
        with pytest.raises(ImageMissing, match="base"):
            await storage.ensure_disk(VM, storage_rig.folder(), "base", 1024, "rootfs")
        assert await storage_rig.remains(VM) == []

    async def test_an_image_larger_than_the_disk_is_refused_with_both_sizes(self, storage_rig: StorageRig) -> None:
        small = storage_rig.base_mib - 1
        with pytest.raises(ImageRefused, match=f"{storage_rig.base_mib} MiB.*{small} MiB"):
            await storage_rig.new_storage().ensure_disk(VM, storage_rig.folder(), "base", small)
        assert await storage_rig.remains(VM) == []

    async def test_a_missing_image_is_named_with_those_that_are_there(self, storage_rig: StorageRig) -> None:
        with pytest.raises(ImageMissing, match=r"absent.*base, other"):
            await storage_rig.new_storage().ensure_disk(VM, storage_rig.folder(), "absent", 1024)
        assert await storage_rig.remains(VM) == []

    async def test_a_half_made_clone_is_never_taken_for_a_disk(self, storage_rig: StorageRig) -> None:
        size = storage_rig.base_mib + 16
        await storage_rig.leave_half_made(VM)
        disk = await storage_rig.new_storage().ensure_disk(VM, storage_rig.folder(), "other", size)
        assert await storage_rig.contents(disk) == ("other", size)

    async def test_a_clone_cut_off_at_any_moment_can_be_repeated(self, storage_rig: StorageRig) -> None:
        size = storage_rig.base_mib + 16
        storage = storage_rig.new_storage()
        for delay in (0, 0.001, 0.005, 0.02, 0.05):
            cloning = asyncio.ensure_future(storage.ensure_disk(VM, storage_rig.folder(), "base", size))
            await asyncio.sleep(delay)
            cloning.cancel()
            await asyncio.gather(cloning, return_exceptions=True)
            disk = await storage.ensure_disk(VM, storage_rig.folder(), "base", size)
            assert await storage_rig.contents(disk) == ("base", size)
            await storage.remove_disk(VM, storage_rig.folder())

    async def test_removing_leaves_nothing_of_that_vm_and_everything_of_others(self, storage_rig: StorageRig) -> None:
        storage = storage_rig.new_storage()
        size = storage_rig.base_mib + 16
        await storage.ensure_disk(VM, storage_rig.folder(), "base", size)
        others = await storage.ensure_disk(OTHER, storage_rig.folder(OTHER), "base", size)
        await storage.remove_disk(VM, storage_rig.folder())
        await storage.remove_disk(VM, storage_rig.folder())
        assert await storage_rig.remains(VM) == []
        assert await storage_rig.contents(others) == ("base", size)
        assert await storage.images() == ("base", "other")

    async def test_removing_a_half_made_clone_leaves_nothing(self, storage_rig: StorageRig) -> None:
        await storage_rig.leave_half_made(VM)
        await storage_rig.new_storage().remove_disk(VM, storage_rig.folder())
        assert await storage_rig.remains(VM) == []

    async def test_many_disks_are_made_at_once(self, storage_rig: StorageRig) -> None:
        storage = storage_rig.new_storage()
        size = storage_rig.base_mib + 16
        names = [VmId(f"vm-{number}") for number in range(8)]
        disks = await asyncio.gather(*(storage.ensure_disk(name, storage_rig.folder(name), "base", size) for name in names))
        assert len({disk.path for disk in disks}) == 8
        assert [await storage_rig.contents(disk) for disk in disks] == [("base", size)] * 8

    async def test_free_room_is_part_of_the_whole(self, storage_rig: StorageRig) -> None:
        storage_rig.folder()
        total, free = await storage_rig.new_storage().capacity_mib()
        assert 0 < free <= total

    async def test_failures_are_typed(self) -> None:
        assert issubclass(ImageMissing, AgentError)
        assert (ImageMissing.status, ImageRefused.status) == (422, 422)
