"""The zvol driver keeps its promises with real ZFS. Run by `ops/lab/zfs run`; the guest has an empty pool `tank`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agent import zfs
from tests.contract.storage_zvol_promises import ZvolPromises
from tests.contract.storage_zvol_rig import ZvolRig
from tests.contract.transfer_promises import Host, TransferPromises, start_host


async def _clear() -> None:
    """Empties the pool; every test begins so."""
    for (name,) in await zfs.table("filesystem", "tank", "name"):
        if name != "tank":
            await zfs.patiently("destroy", "-R", name)


@pytest.fixture
async def storage_rig(tmp_path: Path) -> ZvolRig:
    await _clear()
    rig = ZvolRig(tmp_path, "tank/contract")
    await rig.set_up()
    return rig


class TestZvolStorage(ZvolPromises):
    """All of them."""


class TestTransfers(TransferPromises):
    """Between two agents with real volumes, through their REST API."""

    native = "zfs"

    @pytest.fixture
    async def hosts(self, tmp_path: Path) -> AsyncIterator[tuple[Host, Host]]:
        await _clear()
        made = []
        for name in ("here", "there"):
            (folder := tmp_path / name).mkdir()
            rig = ZvolRig(folder, f"tank/{name}")
            await rig.set_up()
            made.append(await start_host(folder, rig.new_storage()))
        yield made[0], made[1]
        for host in made:
            await host.agent.stop()
