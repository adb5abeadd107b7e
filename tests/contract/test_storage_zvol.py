"""The zvol driver keeps its promises towards a stand-in of `zfs`. tests/zfs runs the same on real ZFS."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agent.machine import Unusable
from tests.contract.storage_zvol_promises import ZvolPromises
from tests.contract.storage_zvol_rig import MIB, ZvolRig
from tests.standins import zfs as standin

pytestmark = pytest.mark.real  # qemu-img


@pytest.fixture
async def storage_rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ZvolRig:
    state = tmp_path / "zfs"
    program = standin.install(tmp_path / "bin")
    standin.make_pool(state, "tank")
    monkeypatch.setenv(standin.ROOT, str(state))
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
    rig = ZvolRig(tmp_path, "tank", state / "dev")
    await rig.set_up()
    return rig


class TestZvolStorage(ZvolPromises):
    """All of them."""

    async def leave_room(self, storage_rig: ZvolRig, mib: int, dataset: str) -> None:
        """The stand-in's pool is full when a volume would not fit; files cannot be."""
        file = storage_rig.devices.parent / "state.json"
        state = json.loads(file.read_text())
        file.write_text(json.dumps({**state, "size": mib * MIB, "thick": True}))

    async def test_without_zfs_the_storage_says_what_to_install(
        self, storage_rig: ZvolRig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PATH", "/nonexistent")
        probe = await storage_rig.new_storage().probe()
        assert isinstance(probe, Unusable)
        assert "zfs is not installed" in probe.why
