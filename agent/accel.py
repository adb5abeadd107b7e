"""Which accelerator QEMU uses here. Called by the qemu driver's probe; decides by starting guests, not by a device's look.

/dev/kvm can open and run a few real-mode instructions where a stock Linux kernel hangs for ever (KVM nested in a para-virtual
guest), so `auto` believes in KVM only after the `tiny` image has booted under it to its ready line.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from agent import process
from agent.engines.qemu_argv import SANDBOX, Accel, accel_argv
from agent.errors import AgentError, CommandFailed
from agent.images.catalogue import inspect
from agent.run import run

Wanted = Literal["auto", "kvm", "tcg"]

KVM_DEVICE = Path("/dev/kvm")
PROOF_IMAGE = "tiny.qcow2"
PROOF_LINE = b"muster: ready"
PROOF_LIMIT = 20.0  # seconds; a guest that runs under KVM at all is up in two
_LOOK_EVERY = 0.05  # seconds
# mov dx,0xf4; mov al,0x10; out dx,al; hlt: isa-debug-exit makes QEMU exit with (0x10 << 1) | 1.
_BOOT_SECTOR = (b"\xba\xf4\x00\xb0\x10\xee\xf4").ljust(510, b"\0") + b"\x55\xaa"
_BOOT_SECTOR_STATUS = 33


@dataclass(frozen=True, slots=True)
class Choice:
    """The accelerator to use, and for people how that came: `kvm`, `tcg: /dev/kvm does not boot a guest (…)`."""

    accel: Accel
    detail: str


async def choose(
    wanted: Wanted,
    *,
    binary: str,
    image_dir: Path | None,
    state_dir: Path,
    device: Path = KVM_DEVICE,
    limit: float = PROOF_LIMIT,
) -> Choice:
    """Proves what is wanted by starting guests and says which accelerator works. Takes up to `limit` seconds the first time.

    The outcome for KVM is kept in `state_dir/accel.json` until the host boots again or QEMU, host kernel or image change.
    Raises AgentError if QEMU cannot run a guest at all, or KVM was demanded and does not work.
    """
    version = (await run(binary, "--version", limit=20)).partition("\n")[0].strip()
    if wanted != "tcg":
        why_not = await _why_not_kvm(binary, version, image_dir, state_dir, device, limit)
        if not why_not:
            return Choice("kvm", f"kvm, {version}")
        if wanted == "kvm":
            raise AgentError(f"KVM was asked for with --accel kvm but does not work here: {why_not}")
    else:
        why_not = "as asked"
    trouble = await _boot_sector_trouble(binary, "tcg", limit)
    if trouble:
        raise AgentError(f"{version} cannot run a guest even without KVM: {trouble}")
    return Choice("tcg", f"tcg: {why_not}; {version}")


async def _why_not_kvm(binary: str, version: str, image_dir: Path | None, state_dir: Path, device: Path, limit: float) -> str:
    """Empty if KVM boots a guest, else why it does not."""
    if closed := _why_closed(device):
        return closed
    image = await asyncio.to_thread(_proof_image, image_dir)
    key = _cache_key(version, image, device)
    cache = state_dir / "accel.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        kept = json.loads(cache.read_text())
        if kept["key"] == key:
            return str(kept["why_not_kvm"])
    why_not = await _boot_sector_trouble(binary, "kvm", limit)
    if why_not:
        why_not = f"{device} does not run a guest ({why_not})"
    elif image is not None:
        try:
            booted = await boots(image, "kvm", binary=binary, work_dir=state_dir / "accel-proof", limit=limit)
        except AgentError as error:  # not kept: this says nothing about KVM
            return f"{device} could not be proven: {error.message}"
        why_not = "" if booted else f"{device} does not boot a guest (no ready line of {image.name} within {limit:g} s)"
    elif runs_under_hypervisor():
        # Not kept: as soon as the image is there, the next start of the agent can find out.
        return f"{device} is unproven inside a virtual machine; run `muster image build tiny` and restart the agent"
    await asyncio.to_thread(_keep, cache, {"key": key, "why_not_kvm": why_not})
    return why_not


def _why_closed(device: Path) -> str:
    if not device.exists():
        return f"there is no {device}"
    if not os.access(device, os.R_OK | os.W_OK):
        return f"{device} may not be opened by this user; add the user to the group `kvm`"
    return ""


def _proof_image(image_dir: Path | None) -> Path | None:
    image = image_dir.absolute() / PROOF_IMAGE if image_dir else None
    return image if image is not None and image.is_file() else None


def _keep(cache: Path, value: dict[str, str]) -> None:
    cache.parent.mkdir(parents=True, exist_ok=True)
    process.write_json(cache, value)


def _cache_key(version: str, image: Path | None, device: Path) -> str:
    facts = [process.boot_id(), version, os.uname().release, str(device)]
    if image is not None:
        status = image.stat()
        facts += [str(image), str(status.st_size), str(status.st_mtime_ns)]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()


def runs_under_hypervisor() -> bool:
    """Whether this host is itself a virtual machine, by the processor's `hypervisor` flag."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return "hypervisor" in line.split()
    return False


async def _boot_sector_trouble(binary: str, accel: Accel, limit: float) -> str:
    """Starts a guest of seven bytes; empty if it ran, else what QEMU says."""
    with tempfile.TemporaryDirectory(prefix="muster-accel-") as folder:
        disk = Path(folder) / "boot.raw"
        # The BIOS does not boot a disk smaller than one of its cylinders (16 heads of 63 sectors).
        disk.write_bytes(_BOOT_SECTOR.ljust(1024 * 1024, b"\0"))
        try:
            await run(
                *_proof_argv(binary, accel, disk, "raw", 32), "-device", "isa-debug-exit,iobase=0xf4,iosize=4", limit=limit
            )
        except CommandFailed as error:
            # QEMU's first complaint is the cause; the ones after it are what became of that.
            complaint = error.stderr.strip().partition("\n")[0].removeprefix(f"{Path(binary).name}: ")
            return "" if error.exit_status == _BOOT_SECTOR_STATUS else complaint or error.message
    return "the guest ended without having run"


async def boots(image: Path, accel: Accel, *, binary: str, work_dir: Path, limit: float) -> bool:
    """Boots a copy-on-write clone of a qcow2 image; whether its serial console says it is ready within `limit` seconds.

    `image` is absolute; `work_dir` holds the clone and the identity of the process, so that one an earlier agent left
    behind is ended first. Raises ImageRefused for an unsafe image, AgentError if QEMU or qemu-img cannot be run.
    """
    record_file, disk, serial = work_dir / "process.json", work_dir / "disk.qcow2", work_dir / "serial.log"
    stale = process.read_record(record_file)
    if stale is not None:
        await process.kill(stale)
    await asyncio.to_thread(_empty, work_dir)
    await inspect(image, "qcow2")
    await run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", image, disk)
    argv = [
        *_proof_argv(binary, accel, disk, "qcow2", 256),
        *("-device", "virtio-rng-pci"),
        *("-chardev", f"file,id=console,path={serial.name}", "-serial", "chardev:console"),
    ]
    record = process.spawn(argv, cwd=work_dir, log=work_dir / "qemu.log")
    try:
        await asyncio.to_thread(process.write_record, record_file, record)
        return await _says_ready(serial, record, limit)
    finally:
        await process.kill(record)
        await asyncio.to_thread(shutil.rmtree, work_dir)


def _empty(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


async def _says_ready(serial: Path, record: process.ProcessRecord, limit: float) -> bool:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(limit):
            while process.alive(record):
                if _holds_ready_line(serial):
                    return True
                await asyncio.sleep(_LOOK_EVERY)
    return _holds_ready_line(serial)


def _holds_ready_line(serial: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return PROOF_LINE in serial.read_bytes()
    return False


def _proof_argv(binary: str, accel: Accel, disk: Path, disk_format: str, mem_mib: int) -> list[str]:
    node = {"driver": disk_format, "node-name": "root", "file": {"driver": "file", "filename": str(disk)}}
    return [
        binary,
        *("-nodefaults", "-no-user-config", "-no-reboot"),
        *("-display", "none"),
        *("-sandbox", SANDBOX),
        *accel_argv(accel),
        *("-m", f"{mem_mib}M"),
        *("-blockdev", json.dumps(node)),
        *("-device", "virtio-blk-pci,drive=root,bootindex=1"),
    ]
