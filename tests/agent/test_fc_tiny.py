"""The fc-tiny image as its guest sees it: what Firecracker would get, booted by QEMU without KVM."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import AsyncIterator
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import lz4.block
import pytest

from agent import process
from agent.engines.firecracker_config import kernel_arguments
from agent.errors import AgentError
from agent.images.catalogue import find_image
from agent.images.kernel import uncompressed
from agent.machine import Lease, Machine, Nic, mac_of
from agent.run import run
from agent.seed import write_seed
from agent.storage.file import FileStorage
from specs.names import VmId
from specs.wire import CreateVmReq
from tests.images_fixture import SshKey, fc_tiny, ssh_key  # noqa: F401

VM = VmId("vm-1")
SCRIPT = "#!/bin/sh\ntouch /persist/script-ran\n"


class Guest:
    """One boot of the image, its disk and seed made as for Firecracker."""

    def __init__(self, folder: Path, machine: Machine, port: int, key: SshKey) -> None:
        self._folder, self._machine, self.port, self.key = folder, machine, port, key
        self._running: process.ProcessRecord | None = None

    async def boot(self, image: Path) -> None:
        # What differs from Firecracker is the bus the devices are on: QEMU has none without PCI that this kernel finds.
        arguments = kernel_arguments(self._machine).replace(" pci=off", "")
        assert self._machine.disk is not None
        drives = [("disk", self._machine.disk.path, False), ("seed", self._folder / "seed.iso", True)]
        words: list[str] = []
        for name, path, read_only in drives:
            node = {
                "driver": "raw",
                "node-name": name,
                "read-only": read_only,
                "file": {"driver": "file", "filename": str(path)},
            }
            words += ["-blockdev", json.dumps(node), "-device", f"virtio-blk-pci,drive={name}"]
        forward = f"hostfwd=tcp:127.0.0.1:{self.port}-{self._machine.nic.lease.ip}:22"
        network = f"user,id=net,net={self._machine.nic.subnet},host={self._machine.nic.gateway},restrict=on,{forward}"
        argv = [
            "qemu-system-x86_64",
            *("-M", "q35", "-accel", "tcg,thread=multi", "-cpu", "max", "-m", "128M"),
            *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"),
            *("-kernel", str(image / "vmlinux"), "-initrd", str(image / "initrd"), "-append", arguments),
            *words,
            *("-netdev", network, "-device", f"virtio-net-pci,netdev=net,romfile=,mac={self._machine.nic.lease.mac}"),
            *("-device", "virtio-rng-pci", "-chardev", "file,id=console,path=console.log", "-serial", "chardev:console"),
        ]
        self._running = process.spawn(argv, cwd=self._folder, log=self._folder / "qemu.log")
        await self.says("muster: ready web-1")

    async def says(self, line: str) -> None:
        async with asyncio.timeout(120):
            while line not in self.console():
                assert self._running and process.alive(self._running), self.console()
                await asyncio.sleep(0.05)

    def console(self) -> str:
        path = self._folder / "console.log"
        return path.read_text(errors="replace") if path.exists() else ""

    async def ssh(self, command: str) -> str:
        return await asyncio.to_thread(self.key.run, self.port, command)

    async def ended(self) -> bool:
        assert self._running
        return await process.wait_gone(self._running, 60)

    async def close(self) -> None:
        if self._running:
            await process.kill(self._running)


@pytest.fixture
async def guest(tmp_path: Path, fc_tiny: Path, ssh_key: SshKey) -> AsyncIterator[Guest]:  # noqa: F811
    request = CreateVmReq(
        vm_id=VM,
        env_id="env",
        image="fc-tiny",
        engine="firecracker",
        cpu=1,
        mem=128,
        disk=512,
        ssh_keys=(ssh_key.public,),
        name="Web.1",
        user_data=SCRIPT,
    )
    lease = Lease(IPv4Address("10.99.0.7"), mac_of(VM), {}, True, "env")
    nic = Nic("tap", lease, IPv4Network("10.99.0.0/24"), IPv4Address("10.99.0.1"), dns=("10.99.0.3",), link="tap0")
    disk = await FileStorage(fc_tiny.parent, tmp_path).ensure_disk(VM, tmp_path, "fc-tiny", 512, "rootfs")
    machine = Machine(VM, tmp_path, request, nic, disk)
    write_seed(tmp_path / "seed.iso", machine)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    made = Guest(tmp_path, machine, port, ssh_key)
    yield made
    await made.close()


@pytest.mark.real
async def test_a_guest_has_its_key_name_address_disk_and_script_and_ctrl_alt_del_ends_it(guest: Guest, fc_tiny: Path) -> None:  # noqa: F811
    await guest.boot(fc_tiny)
    assert (await guest.ssh("hostname")).strip() == "web-1"
    assert "inet 10.99.0.7/24" in await guest.ssh("ip addr show eth0")
    assert "default via 10.99.0.1" in await guest.ssh("ip route")
    assert await guest.ssh("cat /etc/resolv.conf") == "nameserver 10.99.0.3\n"
    blocks = int((await guest.ssh("df -k / | tail -n1")).split()[1])
    assert 480 * 1024 < blocks <= 512 * 1024
    assert (await guest.ssh("stat -c '%u:%g %a' /root /root/.ssh /tmp /bin/busybox /etc/shadow")).split("\n")[:-1] == [
        "0:0 700",
        "0:0 700",
        "0:0 1777",
        "0:0 755",
        "0:0 600",
    ]
    await guest.says("muster: user data script exited with 0")
    assert await guest.ssh("ls /persist") == "script-ran\n"
    # Init gets this signal from the kernel when Ctrl-Alt-Del is pressed (reboot(2), LINUX_REBOOT_CMD_CAD_OFF).
    await guest.ssh("sync; kill -INT 1")
    assert await guest.ended()
    assert guest._machine.disk is not None
    assert await run("debugfs", "-R", "stat /persist/script-ran", guest._machine.disk.path)
    assert "clean" in await run("e2fsck", "-n", guest._machine.disk.path)


@pytest.mark.real
async def test_the_image_is_one_for_firecracker_with_drivers_for_its_devices(fc_tiny: Path) -> None:  # noqa: F811
    image = find_image(fc_tiny.parent, "fc-tiny")
    assert image is not None and image.format == "firecracker"
    assert (fc_tiny / "vmlinux").read_bytes()[:4] == b"\x7fELF"
    packed = await run("sh", "-c", f"gzip -dc {fc_tiny / 'initrd'} | cpio -t")
    assert {"lib/modules/virtio_mmio.ko", "lib/modules/virtio_blk.ko", "lib/modules/isofs.ko"} <= set(packed.split())


def bzimage(kernel: bytes, payload: bytes | None = None) -> bytes:
    """A kernel file as Linux' own build makes it: one setup sector, then the payload with its size behind it."""
    block = lz4.block.compress(kernel, store_size=False)
    packed = payload or b"\x02\x21\x4c\x18" + struct.pack("<I", len(block)) + block + struct.pack("<I", len(kernel))
    setup = bytearray(1024)
    setup[0x1F1] = 1
    setup[0x202:0x206] = b"HdrS"
    setup[0x248:0x250] = struct.pack("<II", 16, len(packed))
    return bytes(setup) + bytes(16) + packed + b"what follows the payload"


def test_a_kernel_is_unpacked_to_the_byte() -> None:
    kernel = b"\x7fELF" + b"code" * 1000
    assert uncompressed(bzimage(kernel)) == kernel


@pytest.mark.parametrize(
    ("file", "why"),
    [
        (b"MZ" * 1000, "no bzImage"),
        (bzimage(b"", b"\x28\xb5\x2f\xfd" + bytes(20)), "begins with 28b52ffd"),
        (bzimage(b"", b"\x02\x21\x4c\x18" + struct.pack("<I", 4) + b"\xff\xff\xff\xff" + bytes(4)), "damaged"),
        (bzimage(b"no elf"), "damaged"),
    ],
)
def test_another_kernel_is_refused_with_the_reason(file: bytes, why: str) -> None:
    with pytest.raises(AgentError, match=why):
        uncompressed(file)
