"""The firecracker driver keeps its promises with real Firecracker processes."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from agent.engines.firecracker_jail import stray_cgroups
from tests.contract.engine_contract import EngineContract
from tests.contract.engine_firecracker_rig import FirecrackerRig, own_namespace

pytestmark = pytest.mark.real


@pytest.fixture
def namespace() -> Iterator[None]:
    """With the umask an agent has in one process with a controller: nothing may rest on a wider one."""
    before = os.umask(0o077)
    try:
        with own_namespace():
            yield
    finally:
        os.umask(before)


@pytest.fixture
async def rig(tmp_path: Path, namespace: None) -> AsyncIterator[FirecrackerRig]:
    rig = FirecrackerRig(tmp_path / "runtime")
    yield rig
    await rig.close()
    assert stray_cgroups(rig.runtime_dir, frozenset()) == []


@pytest.fixture
async def neighbour(tmp_path: Path, namespace: None) -> AsyncIterator[FirecrackerRig]:
    rig = FirecrackerRig(tmp_path / "neighbour")
    yield rig
    await rig.close()
    assert stray_cgroups(rig.runtime_dir, frozenset()) == []


class TestFirecrackerEngine(EngineContract):
    """All of the contract."""
