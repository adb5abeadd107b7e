"""The tiny image under real QEMU, with the real drivers around it: what a person who starts it gets."""

from __future__ import annotations

import asyncio
import socket
import urllib.request
from collections.abc import AsyncIterator
from datetime import timedelta
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest

from agent import accel
from agent.engines.qemu import QemuEngine
from agent.images.catalogue import find_image, inspect
from agent.machine import Lease, Machine, Nic, Stopped, mac_of
from agent.run import run
from agent.seed import user_data
from agent.storage.file import FileStorage
from specs.names import VmId
from specs.wire import CreateVmReq
from tests.images_fixture import SshKey, ssh_key, tiny  # noqa: F401

pytestmark = pytest.mark.real

SCRIPT = """#!/bin/sh
echo "$(hostname) $(id -u)" >>/persist/script
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Guest:
    """One VM of the tiny image on QEMU's user network."""

    def __init__(self, folder: Path, image_dir: Path, key: SshKey) -> None:
        self.key, self.folder = key, folder
        self.storage = FileStorage(image_dir, folder)
        self.engine = QemuEngine(folder, self.storage.images, "tcg", folder / "state")
        self.machine: Machine | None = None
        self.boots = 0

    async def create(self, *, user_data: str = SCRIPT, disk: int = 512) -> None:
        vm_id = VmId("vm-1")
        (self.folder / vm_id).mkdir()
        request = CreateVmReq(
            vm_id=vm_id,
            env_id="env",
            image="tiny",
            engine="qemu",
            cpu=1,
            mem=128,
            disk=disk,
            ssh_keys=(self.key.public,),
            name="Web.1",
            user_data=user_data,
        )
        lease = Lease(IPv4Address("10.99.0.7"), mac_of(vm_id), {22: free_port(), 80: free_port()}, True, "env")
        subnet = IPv4Network("10.99.0.0/24")
        nic = Nic("user", lease, subnet, IPv4Address("10.99.0.1"), dns=("10.99.0.3",), forward_addrs=("127.0.0.1",))
        clone = await self.storage.ensure_disk(vm_id, self.folder / vm_id, "tiny", disk)
        self.machine = Machine(vm_id, self.folder / vm_id, request, nic, clone)
        await self.engine.prepare(self.machine)

    async def boot(self) -> None:
        """Starts it and waits for the ready line of this boot."""
        assert self.machine
        self.boots += 1
        await self.engine.start(self.machine)
        await self.says("muster: ready web-1", times=self.boots)

    async def says(self, line: str, times: int = 1) -> None:
        async with asyncio.timeout(90):
            while self.console().count(line) < times:  # noqa: ASYNC110 nothing in this process could set an event
                await asyncio.sleep(0.05)

    def console(self) -> str:
        path = self.folder / "vm-1" / "console.log"
        return path.read_text(errors="replace") if path.exists() else ""

    async def ssh(self, command: str) -> str:
        assert self.machine
        return await asyncio.to_thread(self.key.run, self.machine.nic.lease.ports[22], command)

    async def page(self) -> str:
        assert self.machine
        url = f"http://127.0.0.1:{self.machine.nic.lease.ports[80]}/"
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        reply = await asyncio.to_thread(lambda: opener.open(url, timeout=20).read())
        return str(reply.decode())

    async def power_button(self) -> object:
        """Presses it and gives the guest a minute; how the VM then is."""
        assert self.machine
        await self.engine.stop(self.machine, timedelta(seconds=60))
        return await self.engine.state(self.machine.id, self.machine.folder)


@pytest.fixture
async def guest(tmp_path: Path, tiny: Path, ssh_key: SshKey) -> AsyncIterator[Guest]:  # noqa: F811
    made = Guest(tmp_path, tiny.parent, ssh_key)
    yield made
    await made.engine.destroy(VmId("vm-1"), tmp_path / "vm-1")
    await made.engine.close()


async def test_the_image_is_small_stands_alone_and_fits_the_smallest_disk(tiny: Path) -> None:  # noqa: F811
    facts = await inspect(tiny)
    assert (facts.format, facts.virtual_size) == ("qcow2", 64 * 1024 * 1024)
    assert (await asyncio.to_thread(tiny.stat)).st_size < 64 * 1024 * 1024
    assert find_image(tiny.parent, "tiny") is not None


async def test_a_guest_without_seed_and_network_is_ready_too(tiny: Path, tmp_path: Path) -> None:  # noqa: F811
    assert await accel.boots(tiny, "tcg", binary="qemu-system-x86_64", work_dir=tmp_path / "work", limit=90)


async def test_the_guest_is_what_its_seed_says(guest: Guest) -> None:
    await guest.create()
    await guest.boot()
    await guest.says("muster: user data script exited with 0")
    assert guest.machine
    assert await guest.ssh("hostname; cat /persist/script; cat /root/.ssh/authorized_keys") == (
        f"web-1\nweb-1 0\n{guest.key.public}\n"
    )
    assert (await guest.ssh("ip -o -4 addr show eth0")).split()[3] == "10.99.0.7/24"
    assert (await guest.ssh("ip route | grep default")).strip() == "default via 10.99.0.1 dev eth0"
    assert await guest.ssh("cat /etc/resolv.conf") == "nameserver 10.99.0.3\n"
    assert await guest.page() == "<!doctype html><title>web-1</title><h1>web-1</h1>\n"


async def test_the_power_button_ends_the_guest_and_the_next_boot_has_the_same_disk(guest: Guest) -> None:
    await guest.create()
    await guest.boot()
    await guest.says("muster: user data script exited with 0")
    keys = await guest.ssh("echo kept >/persist/note; echo kept >/root/note; md5sum /etc/dropbear/*")

    assert await guest.power_button() == Stopped("")
    assert guest.console().count("reboot: Power down") == 1

    await guest.boot()
    assert await guest.ssh("cat /persist/note /root/note; md5sum /etc/dropbear/*") == f"kept\nkept\n{keys}"
    assert await guest.ssh("cat /persist/script") == "web-1 0\n"
    assert guest.console().count("muster: first boot") == 1


async def test_a_guest_killed_in_its_first_boot_starts_that_boot_over(guest: Guest) -> None:
    await guest.create()
    assert guest.machine
    await guest.engine.start(guest.machine)
    await guest.says("muster: first boot")
    await guest.engine.stop(guest.machine, timedelta())

    await guest.boot()
    assert guest.console().count("muster: first boot") == 2
    assert await guest.ssh("mount | grep -c 'vda2 on / type ext4'") == "1\n"


async def test_the_root_filesystem_has_the_disks_size_and_grows_with_it(guest: Guest) -> None:
    await guest.create(disk=64)
    await guest.boot()
    size = "df -m / | awk 'END {print $2}'"
    assert 30 <= int(await guest.ssh(size)) <= 39
    await guest.ssh("echo kept >/persist/note")
    await guest.power_button()

    assert guest.machine and guest.machine.disk
    await run("qemu-img", "resize", "-q", "-f", "qcow2", guest.machine.disk.path, "3G")
    await guest.boot()
    assert 2900 <= int(await guest.ssh(size)) <= 3047
    assert await guest.ssh("cat /persist/note") == "kept\n"


async def test_a_guest_says_that_it_cannot_run_a_cloud_config(guest: Guest) -> None:
    await guest.create(user_data="#cloud-config\npackages: [nginx]\n")
    assert guest.machine and user_data(guest.machine).startswith(b"Content-Type: multipart/mixed")
    await guest.boot()
    await guest.says("muster: the user data is not a script and was not run")
    assert await guest.ssh("hostname") == "web-1\n"
