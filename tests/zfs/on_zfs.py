"""The zvol driver keeps its promises with real ZFS. Run by `ops/lab/zfs run`; the guest has an empty pool `tank`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agent import zfs
from tests.contract.storage_zvol_promises import ZvolPromises
from tests.contract.storage_zvol_rig import ZvolRig


@pytest.fixture
async def storage_rig(tmp_path: Path) -> AsyncIterator[ZvolRig]:
    rig = ZvolRig(tmp_path, "tank/contract")
    await rig.set_up()
    yield rig
    for dataset in (rig.runtime, rig.images):
        await zfs.destroy(dataset)
    await zfs.destroy("tank/contract")


class TestZvolStorage(ZvolPromises):
    """All of them."""
