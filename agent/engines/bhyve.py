"""Virtual machines under FreeBSD's bhyve(8), one keeper and one bhyve process each. Called by the runtime, one call at a time.

A VM is loaded by UEFI where the firmware is installed, else by bhyveload(8), which knows FreeBSD guests alone. SIGTERM is the
ACPI power button (bhyve(8), SIGNAL HANDLING). The kernel keeps a VM, with its memory, after its process has ended until
`bhyvectl --destroy`; the keeper sees to that.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

from agent.engines.keeper import Plan
from agent.engines.kept import KeptEngine, ended_with, host_prefix, installed, uncut
from agent.errors import AgentError, CommandFailed, Unsupported
from agent.machine import Disk, DiskKind, Machine, Nic, Probe, Stopped, Unusable, Usable
from agent.run import run
from agent.seed import check_user_data, write_seed
from specs.names import Engine as EngineKind
from specs.names import VmId
from specs.wire import CreateVmReq

FIRMWARE = Path("/usr/local/share/uefi-firmware/BHYVE_UEFI.fd")
VMM = Path("/dev/vmm")
SEED = "seed.iso"
_LIMIT = 30.0  # seconds
_MAX_CPUS = "hw.vmm.maxcpu"
_REBOOTED = 0  # bhyve(8), EXIT STATUS


class BhyveEngine(KeptEngine):
    """The bhyve driver. `firmware` is the UEFI image, `vmm` where vmm(4) shows its VMs."""

    kind = EngineKind.BHYVE
    needs_disk = True
    disk_kind: DiskKind = "raw"

    def __init__(
        self,
        runtime_dir: Path,
        storage_images: Callable[[DiskKind], Awaitable[tuple[str, ...]]],
        *,
        firmware: Path = FIRMWARE,
        vmm: Path = VMM,
    ) -> None:
        super().__init__(runtime_dir)
        self._storage_images = storage_images
        self._firmware = firmware
        self._vmm = vmm
        self._max_cpus = 0

    async def probe(self) -> Probe:
        """Loads vmm(4), makes a VM without memory or processors and removes it."""
        missing = installed("bhyve", "bhyvectl", "bhyveload")
        if missing:
            return Unusable(f"{missing} not found: bhyve needs a FreeBSD host, where it is part of the base system")
        if os.geteuid() != 0:
            return Unusable("bhyve needs root; run the agent as root")
        trial = f"{host_prefix(self._runtime_dir)}probe{os.getpid()}"
        try:
            await run("kldload", "-n", "vmm", limit=_LIMIT)
            self._max_cpus = int(await run("sysctl", "-n", _MAX_CPUS, limit=_LIMIT))
            await uncut(self._try(trial))
        except (CommandFailed, ValueError) as error:
            return Unusable(f"this host does not run bhyve VMs: {error}; its processor needs VT-x with EPT, or AMD-V with NPT")
        if self._firmware.is_file():
            return Usable("UEFI")
        return Usable(
            "bhyveload", (f"no UEFI firmware at {self._firmware}: only FreeBSD guests boot; pkg install bhyve-firmware",)
        )

    async def _try(self, name: str) -> None:
        await run("bhyvectl", f"--vm={name}", "--create", limit=_LIMIT)
        await run("bhyvectl", f"--vm={name}", "--destroy", limit=_LIMIT)

    async def images(self) -> tuple[str, ...]:
        """What the storage driver can make raw disks of."""
        return await self._storage_images(self.disk_kind)

    def check(self, request: CreateVmReq) -> tuple[str, ...]:
        """Everything asked for is honoured, up to the number of processors vmm(4) allows and user data a guest knows."""
        if self._max_cpus and request.cpu > self._max_cpus:
            raise Unsupported(f"cpu {request.cpu} is more than the {self._max_cpus} processors a bhyve VM can have here")
        check_user_data(request.user_data)
        return ()

    async def prepare(self, machine: Machine) -> None:
        """Writes the seed image. A running VM keeps the one it was booted with."""
        if await self._live(machine.id, machine.folder) is None:
            await uncut(asyncio.to_thread(write_seed, machine.folder / SEED, machine))

    def _is_prepared(self, folder: Path) -> bool:
        return (folder / SEED).is_file()

    def _is_up(self, machine: Machine) -> bool:
        return (self._vmm / self.name_of(machine.id)).exists()

    def _plan(self, machine: Machine) -> Plan:
        name = self.name_of(machine.id)
        destroy = ("bhyvectl", f"--vm={name}", "--destroy")
        firmware = self._firmware if self._firmware.is_file() else None
        load = () if firmware else (load_argv(machine, name),)
        return Plan(bhyve_argv(machine, name, firmware), load=load, clean=(destroy,), again=(_REBOOTED,))

    async def destroy(self, vm_id: VmId, folder: Path) -> None:
        """What every kept VM leaves, and the seed image."""
        await super().destroy(vm_id, folder)
        (folder / SEED).unlink(missing_ok=True)

    async def _force_off(self, vm_id: VmId, folder: Path) -> None:
        # It may end, or never have begun, just now; what counts is whether its process goes.
        with contextlib.suppress(CommandFailed):
            await run("bhyvectl", f"--vm={self.name_of(vm_id)}", "--force-poweroff", limit=_LIMIT)

    async def _free(self, vm_id: VmId, folder: Path) -> None:
        await self._remove_stray(self.name_of(vm_id))

    def _ending(self, status: int, said: str) -> Stopped:
        match status:
            case 1:
                return Stopped("exited", "the guest powered itself off")
            case 2:
                return Stopped("exited", "the guest halted")
            case 0:  # only where a stop was under way and taken back
                return Stopped("exited", "the guest rebooted and was not started again")
            case 3:
                return Stopped("crashed", f"the guest made a triple fault{said}")
        return Stopped("crashed", f"bhyve {ended_with(status)}{said}")

    async def _strays(self) -> dict[str, VmId | None]:
        prefix = host_prefix(self._runtime_dir)
        found = await asyncio.to_thread(lambda: [path.name for path in self._vmm.glob(f"{prefix}*")])
        return dict.fromkeys(found)

    async def _remove_stray(self, name: str) -> None:
        if not (self._vmm / name).exists():
            return
        try:
            await run("bhyvectl", f"--vm={name}", "--destroy", limit=_LIMIT)
        except CommandFailed:
            if (self._vmm / name).exists():
                raise


def bhyve_argv(machine: Machine, name: str, firmware: Path | None) -> tuple[str, ...]:
    """The command line of one VM: the same machine gives the same words. Raises AgentError."""
    boot = ("-l", f"bootrom,{_plain(firmware)}") if firmware else ()
    return (
        *("bhyve", "-H", "-P", "-u", "-w"),
        *("-c", str(machine.request.cpu)),
        *("-m", f"{machine.request.mem}M"),
        *("-s", "0,hostbridge"),
        *("-s", f"2,virtio-blk,{_plain(_disk(machine).path)}"),
        *("-s", f"3,ahci-cd,{_plain(machine.folder / SEED)}"),
        *("-s", f"4,virtio-net,{_nic(machine.nic)}"),
        *("-s", "5,virtio-rnd"),
        *("-s", "31,lpc", "-l", "com1,stdio"),
        *boot,
        name,
    )


def load_argv(machine: Machine, name: str) -> tuple[str, ...]:
    """bhyveload(8) for a FreeBSD guest with its console on the serial port."""
    console = ("-e", "console=comconsole", "-e", "autoboot_delay=0")
    return ("bhyveload", "-m", f"{machine.request.mem}M", "-d", str(_disk(machine).path), *console, name)


def _disk(machine: Machine) -> Disk:
    if machine.disk is None or machine.disk.format != "raw":
        raise AgentError(f"VM {machine.id} has no raw disk, and bhyve boots no other")
    return machine.disk


def _nic(nic: Nic) -> str:
    if nic.kind != "tap":
        raise AgentError("bhyve needs a tap on the bridge network; run the agent as root with --network bridge")
    return f"{nic.link},mac={nic.lease.mac}" + (f",mtu={nic.mtu}" if nic.mtu != 1500 else "")


def _plain(path: Path) -> str:
    if "," in str(path):
        raise AgentError(f"{path} has a comma in its name, which bhyve takes for the end of it; choose another --data-dir")
    return str(path)
