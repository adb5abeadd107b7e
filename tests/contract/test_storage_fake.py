"""The fake storage keeps the promises of the real ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.machine import Disk
from agent.storage.base import Storage
from agent.storage.fake import FakeDisk, FakeDisks, FakeStorage
from specs.names import VmId
from tests.contract.storage_contract import StorageContract, StorageRig


class FakeRig(StorageRig):
    """The world stays when the agent goes."""

    base_mib = 64

    def __init__(self, runtime_dir: Path) -> None:
        super().__init__(runtime_dir)
        self.world = FakeDisks(images={"base": 64, "other": 64})

    def new_storage(self) -> Storage:
        return FakeStorage(self.world)

    async def contents(self, disk: Disk) -> tuple[str, int]:
        held = self.world.disks[VmId(disk.path.parent.name)]
        assert held.whole
        return held.image, held.size_mib

    async def leave_half_made(self, vm_id: VmId) -> None:
        self.world.disks[vm_id] = FakeDisk("base", 80, whole=False)

    async def remains(self, vm_id: VmId) -> list[str]:
        return [vm_id] if vm_id in self.world.disks else []


@pytest.fixture
def storage_rig(tmp_path: Path) -> FakeRig:
    return FakeRig(tmp_path / "runtime")


class TestFakeStorage(StorageContract):
    """All of the contract."""
