"""The jail driver keeps its promises on stand-ins; the first process of every jail is really there, in a root of its own."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from agent import process
from agent.engines.jail import JailEngine
from agent.engines.kept import KeptFolder
from agent.machine import Machine, Nic
from agent.network.pf import epair_names
from tests.contract.engine_contract import EngineContract, EngineRig, until
from tests.contract.engine_guest import boots_on
from tests.freebsd_fixture import FreeBsd, freebsd  # noqa: F401

pytestmark = pytest.mark.real

RC = """\
n=$(cat /boots 2>/dev/null || echo 0)
n=$((n + 1))
echo $n > /boots
echo "guest: boot $n"
"""


def write_userland(folder: Path) -> Path:
    """A root filesystem that boots: a shell, and an /etc/rc that counts boots and says so."""
    (folder / "bin").mkdir(parents=True)
    (folder / "etc").mkdir()
    shutil.copy(shutil.which("busybox") or "busybox", folder / "bin" / "sh")
    for applet in ("cat", "mkdir", "mv", "sleep"):
        (folder / "bin" / applet).symlink_to("sh")
    (folder / "etc" / "rc").write_text(RC)
    return folder


class JailRig(EngineRig):
    """A host with an epair for every machine."""

    image = "base"

    def __init__(self, runtime_dir: Path, host: FreeBsd) -> None:
        self.host = host
        self.image_dir = runtime_dir.parent / f"{runtime_dir.name}-images"
        write_userland(self.image_dir / "base")
        runtime_dir.mkdir(parents=True)
        self._told: dict[str, tuple[int, int]] = {}
        super().__init__(runtime_dir)

    def new_engine(self) -> JailEngine:
        return JailEngine(self.runtime_dir, self.image_dir)

    async def make_machine(self, vm_id: str) -> Machine:
        folder = self.runtime_dir / vm_id
        folder.mkdir()
        plain = self.machine(vm_id, folder, engine="jail")
        port, inside = epair_names(plain.id)
        with self.host.changing() as host:
            for end in (port, inside):
                host["interfaces"][end] = {"family": "epair", "unit": len(host["interfaces"]), "flags": ["UP"], "inet": []}
        nic = Nic("vnet", plain.nic.lease, plain.nic.subnet, plain.nic.gateway, ("192.0.2.53",), link=inside, bridge="muster0")
        machine = replace(plain, nic=nic)
        self.machines.append(machine)
        return machine

    async def crash(self, machine: Machine, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)
        await until(lambda: not self.is_alive(pid))

    async def power_off(self, machine: Machine) -> None:
        os.kill(await self.pid(machine), signal.SIGTERM)

    async def boots(self, machine: Machine) -> int:
        pid = await self.pid(machine)
        seen = self._told.get(machine.id, (0, 0))
        await until(lambda: seen[0] == pid or boots_on(self.console(machine)) > seen[1])
        self._told[machine.id] = (pid, boots_on(self.console(machine)))
        return self._told[machine.id][1]

    def console(self, machine: Machine) -> str:
        """What the jail has said so far."""
        log = machine.folder / "console.log"
        return log.read_text(errors="replace") if log.exists() else ""

    def name(self, machine: Machine) -> str:
        """The jail's name."""
        assert isinstance(self.engine, JailEngine)
        return self.engine.name_of(machine.id)

    async def running(self, machine: Machine) -> None:
        """Prepared and started."""
        await self.engine.prepare(machine)
        await self.engine.start(machine)

    async def kill_keeper(self, machine: Machine) -> None:
        """Leaves the jail without its keeper."""
        record = process.read_record(machine.folder / "process.json")
        assert record is not None
        await process.kill(record)

    def half_made(self) -> dict[str, Callable[[Machine], Awaitable[None]]]:
        async def root_half_copied(machine: Machine) -> None:
            await self.engine.prepare(machine)
            (machine.folder / "root.complete").unlink()

        async def without_its_keeper(machine: Machine) -> None:
            await self.running(machine)
            await self.kill_keeper(machine)

        async def dead_with_its_keeper(machine: Machine) -> None:
            await self.running(machine)
            pid = await self.pid(machine)
            await self.kill_keeper(machine)
            os.kill(pid, signal.SIGKILL)
            await until(lambda: not self.is_alive(pid))

        async def stop_only_asked(machine: Machine) -> None:
            await self.running(machine)
            KeptFolder(machine.folder).note_asked()

        own = (root_half_copied, without_its_keeper, dead_with_its_keeper, stop_only_asked)
        return {**super().half_made(), **{each.__name__: each for each in own}}

    def nothing_is_left(self) -> bool:
        """Whether the host has no trace of any jail."""
        found = self.host.state
        return not (
            found["jails"] or found["rctl"] or found["mounts"] or any(x.get("jail") for x in found["interfaces"].values())
        )


@pytest.fixture
async def rig(freebsd: FreeBsd, tmp_path: Path) -> AsyncIterator[JailRig]:  # noqa: F811
    rig = JailRig(tmp_path / "runtime", freebsd)
    yield rig
    await rig.close()
    assert rig.nothing_is_left(), freebsd.state


@pytest.fixture
async def neighbour(rig: JailRig, tmp_path: Path) -> AsyncIterator[JailRig]:
    rig = JailRig(tmp_path / "neighbour", rig.host)
    yield rig
    await rig.close()


class TestJailEngine(EngineContract):
    """All of the contract."""
