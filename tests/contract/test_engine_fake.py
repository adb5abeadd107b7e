"""The fake engine keeps the promises of the real ones."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agent.engines.base import Engine
from agent.engines.fake import FakeEngine, FakeEngines
from agent.machine import Machine
from specs.names import Engine as EngineKind
from tests.contract.engine_contract import EngineContract, EngineRig


class FakeRig(EngineRig):
    """The world stays when the agent goes."""

    image = "tiny"

    def __init__(self, runtime_dir: Path) -> None:
        self.world = FakeEngines()
        super().__init__(runtime_dir)

    def new_engine(self) -> Engine:
        return FakeEngine(self.world, EngineKind.DOCKER)

    async def make_machine(self, vm_id: str) -> Machine:
        folder = self.runtime_dir / vm_id
        folder.mkdir(parents=True)
        machine = self.machine(vm_id, folder, engine="docker")
        self.machines.append(machine)
        return machine

    async def crash(self, machine: Machine, pid: int) -> None:
        self.world.crash(machine.id)

    async def power_off(self, machine: Machine) -> None:
        self.world.power_off(machine.id)

    async def boots(self, machine: Machine) -> int:
        return self.world.machines[machine.id].boots

    def is_alive(self, pid: int) -> bool:
        return pid in self.world.running().values()


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[FakeRig]:
    rig = FakeRig(tmp_path / "runtime")
    yield rig
    await rig.close()
    assert rig.world.machines == {}
    assert rig.world.most_alive <= 1


@pytest.fixture
async def neighbour(tmp_path: Path) -> AsyncIterator[FakeRig]:
    rig = FakeRig(tmp_path / "neighbour")
    yield rig
    await rig.close()


class TestFakeEngine(EngineContract):
    """All of the contract."""
