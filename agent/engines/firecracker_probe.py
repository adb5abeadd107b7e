"""Whether Firecracker works on this host: starts a guest of seven bytes in a jail like a VM's. Called by the driver's probe."""

from __future__ import annotations

import asyncio
import os
import shutil
import struct
from pathlib import Path

from agent.accel import runs_under_hypervisor
from agent.engines.firecracker_config import KERNEL
from agent.engines.firecracker_jail import (
    UID_FIRST,
    Binaries,
    Jail,
    agent_mark,
    find_binaries,
    find_cgroups,
    remove_cgroup,
    remove_parent_cgroup,
)
from agent.errors import AgentError, CommandFailed
from agent.machine import Probe, Unusable, Usable
from agent.run import run

_KVM = Path("/dev/kvm")
_TAP = Path("/dev/net/tun")
_LIMIT = 20.0  # seconds
_FOLDER = ".firecracker-probe"
# mov al,0xfe; out 0x64,al; hlt; jmp back: the reset line of the keyboard controller ends Firecracker with status 0.
_GUEST = bytes.fromhex("b0fee664f4ebfd")
_ADDRESS = 0x100000


async def probe(binary: str, runtime_dir: Path, network: str) -> Probe:
    """Usable once the guest has run and ended; else the first reason against it, with what to do."""
    if why := _why_not(network):
        return Unusable(why)
    try:
        binaries = await asyncio.to_thread(find_binaries, binary)
        version = (await run(binaries.firecracker, "--version", limit=_LIMIT)).partition("\n")[0].strip()
        await _try_guest(binaries, runtime_dir)
    except AgentError as error:
        return Unusable(error.message)
    return Usable(version, _warnings())


def _why_not(network: str) -> str:
    if os.geteuid() != 0:
        return "Firecracker needs root, for its jailer and its network devices; run the agent as root"
    if network == "user":
        return "Firecracker has no user-mode network; run the agent with --network bridge"
    if not _KVM.exists():
        return f"there is no {_KVM}: Firecracker runs under KVM alone; turn virtualization on in the firmware"
    if not _TAP.exists():
        return f"there is no {_TAP}; load the kernel module tun"
    return ""


async def _try_guest(binaries: Binaries, runtime_dir: Path) -> None:
    folder = runtime_dir / _FOLDER
    jail = Jail(folder, f"{agent_mark(runtime_dir)}-probe")
    config = {
        "boot-source": {"kernel_image_path": f"/{KERNEL}"},
        "machine-config": {"vcpu_count": 1, "mem_size_mib": 16},
        "drives": [],
    }

    def build() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / KERNEL).write_bytes(kernel(_GUEST))
        (folder / KERNEL).chmod(0o444)
        jail.build(binaries, UID_FIRST, {KERNEL: folder / KERNEL}, ("probe.json", config))

    await asyncio.to_thread(build)
    try:
        await run(
            *jail.argv(binaries, UID_FIRST, memory=16, arguments=("--no-api", "--config-file", "/probe.json")), limit=_LIMIT
        )
    except CommandFailed as error:
        raise AgentError(
            f"Firecracker cannot run a guest in its jail in {runtime_dir} (which must allow device nodes): {error.message}"
        ) from error
    finally:
        await remove_cgroup(jail.cgroup())
        await asyncio.to_thread(remove_parent_cgroup)
        await asyncio.to_thread(shutil.rmtree, folder)


def kernel(code: bytes) -> bytes:
    """A 64-bit ELF executable of one segment at 1 MiB that begins with its code (elf(5))."""
    offset = 64 + 56
    identity = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    header = struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, _ADDRESS, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 5, offset, _ADDRESS, _ADDRESS, len(code), len(code), 4096)
    return identity + header + segment + code


def _warnings() -> tuple[str, ...]:
    warnings = []
    if runs_under_hypervisor():
        warnings.append("this host is itself a virtual machine: where its KVM is incomplete, Firecracker's guests may hang")
    if find_cgroups() is None:
        warnings.append("no control group limits memory here: Firecracker's own memory is not bounded")
    return tuple(warnings)
