"""The docker driver keeps its promises with real containers."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from agent.engines.docker import DockerEngine
from agent.machine import Machine, Running
from specs.names import VmId
from tests.contract.engine_contract import EngineContract, EngineRig, until
from tests.docker_fixture import IMAGE, DockerDaemon, docker_daemon  # noqa: F401

pytestmark = pytest.mark.real


class DockerRig(EngineRig):
    """Containers of the box image on a daemon that several rigs share."""

    image = IMAGE

    def __init__(self, runtime_dir: Path, docker: DockerDaemon) -> None:
        self.docker = docker
        self._told: dict[str, tuple[int, int]] = {}
        runtime_dir.mkdir(parents=True)
        super().__init__(runtime_dir)

    def new_engine(self) -> DockerEngine:
        return DockerEngine(self.runtime_dir, self.docker.argv)

    async def make_machine(self, vm_id: str) -> Machine:
        folder = self.runtime_dir / vm_id
        folder.mkdir()
        plain = self.machine(vm_id, folder, engine="docker")
        # Denied containers need a bridge; what they may reach is no part of this contract.
        machine = replace(plain, nic=replace(plain.nic, lease=replace(plain.nic.lease, deny_outgoing=False)))
        self.machines.append(machine)
        return machine

    async def crash(self, machine: Machine, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)
        await until(lambda: self._inspect(machine, ".State.Running") == "false")

    async def power_off(self, machine: Machine) -> None:
        os.kill(int(self._inspect(machine, ".State.Pid")), signal.SIGTERM)
        await until(lambda: self._inspect(machine, ".State.Running") == "false")

    async def boots(self, machine: Machine) -> int:
        pid = await self.pid(machine)
        before = self._told.get(machine.id, (0, 0))
        await until(lambda: before[0] == pid or self._boots(machine) > before[1])
        told = self._boots(machine)
        self._told[machine.id] = (pid, told)
        return told

    async def say(self, machine: Machine) -> None:
        said = "echo spoken > /proc/1/fd/1; echo and complained > /proc/1/fd/2"
        self.docker("exec", f"muster-{machine.id}", "sh", "-c", said)

    async def next_exit(self) -> VmId:
        """Passes over hints: a new connection to the daemon says "look again" for every VM."""
        while True:
            vm_id = await super().next_exit()
            if not isinstance(await self.engine.state(vm_id, self.runtime_dir / vm_id), Running):
                return vm_id

    def half_made(self) -> dict[str, Callable[[Machine], Awaitable[None]]]:
        async def without_keys(machine: Machine) -> None:
            await self.engine.prepare(machine)
            (machine.folder / "docker.id").unlink()

        async def marker_half_written(machine: Machine) -> None:
            await self.engine.prepare(machine)
            (machine.folder / "docker.id").rename(machine.folder / "docker.id.new")

        async def stop_only_asked(machine: Machine) -> None:
            await self.engine.prepare(machine)
            await self.engine.start(machine)
            (machine.folder / "docker.stop-asked").touch()

        own = {"without keys": without_keys, "marker half written": marker_half_written, "stop only asked": stop_only_asked}
        return {**super().half_made(), **own}

    def _boots(self, machine: Machine) -> int:
        return len(self.docker("exec", f"muster-{machine.id}", "sh", "-c", "cat /boots 2>/dev/null || :").split())

    def _inspect(self, machine: Machine, field: str) -> str:
        return self.docker("inspect", "-f", f"{{{{{field}}}}}", f"muster-{machine.id}")


@pytest.fixture
async def rig(docker: DockerDaemon, tmp_path: Path) -> AsyncIterator[DockerRig]:
    rig = DockerRig(tmp_path / "runtime", docker)
    yield rig
    await rig.close()
    assert docker.containers() == []


@pytest.fixture
async def neighbour(rig: DockerRig, tmp_path: Path) -> AsyncIterator[DockerRig]:
    rig = DockerRig(tmp_path / "neighbour", rig.docker)
    yield rig
    await rig.close()


class TestDockerEngine(EngineContract):
    """All of the contract."""
