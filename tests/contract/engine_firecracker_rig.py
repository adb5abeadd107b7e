"""The firecracker driver with a guest of its own: real jailed Firecracker processes under KVM, in a network namespace."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from agent.engines import firecracker_api
from agent.engines.firecracker import FirecrackerEngine
from agent.machine import Machine, short_hash
from agent.storage.file import FileStorage
from tests.contract.engine_contract import EngineRig, until
from tests.contract.engine_guest import boots_on
from tests.firecracker_fixture import firecracker_binary
from tests.netns import Lab, command, inside

SOURCE = Path(__file__).with_name("firecracker_guest.s")
MODES = {"guest": 0, "deaf": 1, "brief": 2}


@contextlib.contextmanager
def own_namespace() -> Iterator[None]:
    """A namespace for the taps of a test; whatever the test starts is born in it."""
    lab = Lab()
    try:
        with inside(lab.namespace("fc")):
            yield
    finally:
        lab.close()


def assemble(folder: Path, mode: int) -> Path:
    """The guest's kernel, an ELF executable, as `<folder>/vmlinux`."""
    part = folder / "guest.o"
    subprocess.run(["as", "--defsym", f"MODE={mode}", "-o", part, SOURCE], check=True, timeout=30)
    subprocess.run(
        ["ld", "-n", "-Ttext", "0x100000", "-z", "noexecstack", "-o", folder / "vmlinux", part], check=True, timeout=30
    )
    part.unlink()
    return folder / "vmlinux"


def write_image(folder: Path, mode: int = 0, size_mib: int = 4) -> Path:
    """An image with the guest's kernel and an empty root filesystem."""
    folder.mkdir()
    assemble(folder, mode)
    rootfs = folder / "rootfs.ext4"
    subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", rootfs, f"{size_mib}M"], check=True, timeout=30)
    return folder


class FirecrackerRig(EngineRig):
    """Images: `guest`, and `deaf`, which ignores Ctrl-Alt-Del, and `brief`, which ends as soon as it is up."""

    image = "guest"

    def __init__(self, runtime_dir: Path) -> None:
        self.image_dir = runtime_dir.parent / f"{runtime_dir.name}-images"
        runtime_dir.mkdir(parents=True)
        self.image_dir.mkdir()
        for name, mode in MODES.items():
            write_image(self.image_dir / name, mode)
        self.storage = FileStorage(self.image_dir, runtime_dir)
        super().__init__(runtime_dir)

    def new_engine(self) -> FirecrackerEngine:
        return FirecrackerEngine(self.runtime_dir, self.image_dir, self.storage.images, binary=firecracker_binary())

    async def make_machine(self, vm_id: str, image: str = "guest") -> Machine:
        folder = self.runtime_dir / vm_id
        folder.mkdir()
        plain = self.machine(vm_id, folder, engine="firecracker")
        request = plain.request.model_copy(update={"image": image})
        tap = f"fct{short_hash(plain.id)[:6]}{len(self.machines) % 10}{self.runtime_dir.name[0]}"
        command("ip", "tuntap", "add", tap, "mode", "tap")
        disk = await self.storage.ensure_disk(plain.id, folder, image, request.disk, "rootfs")
        machine = Machine(plain.id, folder, request, replace(plain.nic, kind="tap", link=tap), disk)
        self.machines.append(machine)
        return machine

    async def crash(self, machine: Machine, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)
        await until(lambda: not self.is_alive(pid))

    async def power_off(self, machine: Machine) -> None:
        await firecracker_api.act(self.root(machine), "SendCtrlAltDel")

    async def boots(self, machine: Machine) -> int:
        await until(lambda: boots_on(self.console(machine)) > 0)
        return boots_on(self.console(machine))

    def root(self, machine: Machine) -> Path:
        """What the machine's Firecracker sees as `/`."""
        return next((machine.folder / "jail").glob("*/*/root"))

    def console(self, machine: Machine) -> str:
        """What has been said since the last start."""
        log = machine.folder / "console.log"
        return log.read_text(errors="replace") if log.exists() else ""
