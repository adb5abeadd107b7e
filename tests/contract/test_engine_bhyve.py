"""The bhyve driver keeps its promises on stand-ins that keep bhyve's, bhyvectl's and bhyveload's."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from agent import process
from agent.engines.bhyve import BhyveEngine
from agent.engines.kept import KeptFolder
from agent.machine import Disk, Machine, Nic
from agent.network.pf import tap_name
from agent.run import run
from tests.contract.engine_contract import EngineContract, EngineRig, until
from tests.contract.engine_guest import boots_on
from tests.freebsd_fixture import FreeBsd, freebsd  # noqa: F401


class BhyveRig(EngineRig):
    """A host with a tap for every machine. `words` on a disk tell the guest how to behave (tests/standins/vmm.py)."""

    image = "guest"

    def __init__(self, runtime_dir: Path, host: FreeBsd, *, uefi: bool = True) -> None:
        self.host = host
        self.firmware = host.folder / "BHYVE_UEFI.fd"
        if uefi:
            self.firmware.touch()
        host.change(modules=[*host.state["modules"], "vmm"])
        runtime_dir.mkdir(parents=True)
        self._told: dict[str, tuple[int, int]] = {}
        super().__init__(runtime_dir)

    def new_engine(self) -> BhyveEngine:
        async def images(kind: str) -> tuple[str, ...]:
            return ("guest",) if kind == "raw" else ()

        return BhyveEngine(self.runtime_dir, images, firmware=self.firmware, vmm=self.host.vmm)

    async def make_machine(self, vm_id: str, words: bytes = b"") -> Machine:
        folder = self.runtime_dir / vm_id
        folder.mkdir()
        plain = self.machine(vm_id, folder, engine="bhyve")
        disk = Disk(folder / "disk.raw", "raw")
        disk.path.write_bytes(b"\0" + words.ljust(511, b"\0"))
        tap = tap_name(plain.id)
        with self.host.changing() as host:
            host["interfaces"][tap] = {"family": "tap", "unit": len(host["interfaces"]), "flags": ["UP"], "inet": []}
        nic = Nic("tap", plain.nic.lease, plain.nic.subnet, plain.nic.gateway, link=tap, bridge="muster0")
        machine = replace(plain, nic=nic, disk=disk)
        self.machines.append(machine)
        return machine

    async def crash(self, machine: Machine, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)
        await until(lambda: not self.is_alive(pid))

    async def power_off(self, machine: Machine) -> None:
        os.kill(await self.pid(machine), signal.SIGUSR1)

    async def boots(self, machine: Machine) -> int:
        pid = await self.pid(machine)
        seen = self._told.get(machine.id, (0, 0))
        await until(lambda: seen[0] == pid or boots_on(self.console(machine)) > seen[1])
        self._told[machine.id] = (pid, boots_on(self.console(machine)))
        return self._told[machine.id][1]

    def console(self, machine: Machine) -> str:
        """What the guest has said so far."""
        log = machine.folder / "console.log"
        return log.read_text(errors="replace") if log.exists() else ""

    def name(self, machine: Machine) -> str:
        """The VM's name in vmm(4)."""
        assert isinstance(self.engine, BhyveEngine)
        return self.engine.name_of(machine.id)

    async def running(self, machine: Machine) -> None:
        """Prepared and started."""
        await self.engine.prepare(machine)
        await self.engine.start(machine)

    async def kill_keeper(self, machine: Machine) -> None:
        """Leaves the guest without its keeper."""
        record = process.read_record(machine.folder / "process.json")
        assert record is not None
        await process.kill(record)

    def half_made(self) -> dict[str, Callable[[Machine], Awaitable[None]]]:
        async def made_in_the_kernel(machine: Machine) -> None:
            await self.engine.prepare(machine)
            await run("bhyvectl", f"--vm={self.name(machine)}", "--create")

        async def without_its_keeper(machine: Machine) -> None:
            await self.running(machine)
            await self.kill_keeper(machine)

        async def dead_with_its_keeper(machine: Machine) -> None:
            await self.running(machine)
            pid = await self.pid(machine)
            await self.kill_keeper(machine)
            os.kill(pid, signal.SIGKILL)
            await until(lambda: not self.is_alive(pid))

        async def record_never_written(machine: Machine) -> None:
            await self.running(machine)
            (machine.folder / "process.json").unlink()

        async def stop_only_asked(machine: Machine) -> None:
            await self.running(machine)
            KeptFolder(machine.folder).note_asked()

        own = (made_in_the_kernel, without_its_keeper, dead_with_its_keeper, record_never_written, stop_only_asked)
        return {**super().half_made(), **{each.__name__: each for each in own}}


@pytest.fixture
async def rig(freebsd: FreeBsd, tmp_path: Path) -> AsyncIterator[BhyveRig]:  # noqa: F811
    rig = BhyveRig(tmp_path / "runtime", freebsd)
    yield rig
    await rig.close()
    assert freebsd.state["vmm"] == {}
    assert list(freebsd.vmm.iterdir()) == []


@pytest.fixture
async def neighbour(rig: BhyveRig, tmp_path: Path) -> AsyncIterator[BhyveRig]:
    rig = BhyveRig(tmp_path / "neighbour", rig.host)
    yield rig
    await rig.close()


class TestBhyveEngine(EngineContract):
    """All of the contract."""
