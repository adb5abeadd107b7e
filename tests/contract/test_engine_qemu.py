"""The qemu driver keeps its promises with real QEMU processes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.contract.engine_contract import EngineContract
from tests.contract.engine_qemu_rig import QemuRig

pytestmark = pytest.mark.real


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[QemuRig]:
    rig = QemuRig(tmp_path / "runtime")
    yield rig
    await rig.close()


@pytest.fixture
async def neighbour(tmp_path: Path) -> AsyncIterator[QemuRig]:
    rig = QemuRig(tmp_path / "neighbour")
    yield rig
    await rig.close()


class TestQemuEngine(EngineContract):
    """All of the contract."""
