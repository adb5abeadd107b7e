"""The qemu driver with the boot-sector guest: real QEMU processes under emulation."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from agent.engines import qemu_qmp
from agent.engines.qemu import QemuEngine
from agent.machine import Machine
from agent.storage.file import FileStorage
from tests.contract.engine_contract import EngineRig, until
from tests.contract.engine_guest import boots_on, write_image


class QemuRig(EngineRig):
    """Images: `guest`, and `deaf`, which ignores the power button, and `brief`, which powers off as soon as it is up."""

    image = "guest"

    def __init__(self, runtime_dir: Path) -> None:
        self.image_dir = runtime_dir.parent / f"{runtime_dir.name}-images"
        self.state_dir = runtime_dir.parent / f"{runtime_dir.name}-state"
        runtime_dir.mkdir(parents=True)
        self.image_dir.mkdir()
        write_image(self.image_dir / "guest.raw")
        write_image(self.image_dir / "deaf.raw", deaf=True)
        write_image(self.image_dir / "brief.raw", powers_off=True)
        self.storage = FileStorage(self.image_dir, runtime_dir)
        self._told: dict[str, tuple[int, int]] = {}
        super().__init__(runtime_dir)

    def new_engine(self) -> QemuEngine:
        return QemuEngine(self.runtime_dir, self.storage.images, "tcg", self.state_dir)

    async def make_machine(self, vm_id: str, image: str = "guest") -> Machine:
        folder = self.runtime_dir / vm_id
        folder.mkdir()
        plain = self.machine(vm_id, folder, engine="qemu")
        disk = await self.storage.ensure_disk(plain.id, folder, image, plain.request.disk)
        machine = Machine(plain.id, folder, plain.request, plain.nic, disk)
        self.machines.append(machine)
        return machine

    async def crash(self, machine: Machine, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)
        await until(lambda: not self.is_alive(pid))

    async def power_off(self, machine: Machine) -> None:
        await qemu_qmp.execute(machine.folder, "system_powerdown")

    async def boots(self, machine: Machine) -> int:
        """Waits for a line newer than the ones an earlier boot left in the console log."""
        pid = await self.pid(machine)
        seen = self._told.get(machine.id, (0, 0))
        await until(lambda: seen[0] == pid or boots_on(self.console(machine)) > seen[1])
        told = boots_on(self.console(machine))
        self._told[machine.id] = (pid, told)
        return told

    def console(self, machine: Machine) -> str:
        """What the guest has said so far."""
        log = machine.folder / "console.log"
        return log.read_text(errors="replace") if log.exists() else ""

    async def spoken(self, machine: Machine, text: str) -> None:
        """Waits until the guest has said `text`."""
        await until(lambda: text in self.console(machine))
