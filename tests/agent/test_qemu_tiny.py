"""A whole Linux guest under the qemu driver, on the user-mode network, as an agent without root runs it."""

from __future__ import annotations

import asyncio
import socket
import subprocess
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import psutil
import pytest

from agent.accel import boots
from agent.engines.qemu import QemuEngine
from agent.errors import CommandFailed
from agent.images import build
from agent.images.recipe import default_cache
from agent.machine import Lease, Machine, Running, Stopped, mac_of
from agent.network.pool import first_address
from agent.network.user import UserNetwork
from agent.run import run
from agent.storage.file import FileStorage
from specs.names import Engine as EngineKind
from specs.names import VmId
from specs.wire import CreateVmReq

pytestmark = pytest.mark.real
VM = VmId("vm-tiny")


@pytest.fixture
async def image_dir() -> Path:
    """Where the tiny image is, built once and kept outside the checkout."""
    folder = default_cache() / "test-images"
    await build("tiny", folder, progress=lambda _: None)
    return folder


class Guest:
    """One VM, as the runtime would make it, and the way into it."""

    def __init__(self, engine: QemuEngine, machine: Machine, key: Path) -> None:
        self.engine = engine
        self.machine = machine
        self.key = key

    async def start(self) -> int:
        await self.engine.prepare(self.machine)
        await self.engine.start(self.machine)
        state = await self.engine.state(VM, self.machine.folder)
        assert isinstance(state, Running)
        return state.pid

    async def ssh(self, command: str) -> str:
        """Runs a command in the guest, waiting until it lets us in."""
        port = self.machine.nic.lease.ports[22]
        options = "-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR -o ConnectTimeout=5"
        options += " -o IdentitiesOnly=yes -o BatchMode=yes"
        async with asyncio.timeout(90):
            while True:
                try:
                    return await run("ssh", *options.split(), "-i", self.key, "-p", str(port), "root@127.0.0.1", command)
                except CommandFailed as error:
                    if error.exit_status != 255:
                        raise
                    await asyncio.sleep(0.2)


async def _guest(tmp_path: Path, image_dir: Path, *, deny_outgoing: bool) -> Guest:
    key = tmp_path / "key"
    await run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key)
    folder = tmp_path / "runtime" / VM
    folder.mkdir(parents=True)
    network = UserNetwork(forward_addrs=("127.0.0.1",))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    lease = Lease(first_address(network.subnet) + 1, mac_of(VM), {22: port}, deny_outgoing, "env")
    request = CreateVmReq(
        vm_id=VM,
        env_id="env",
        image="tiny",
        engine="qemu",
        cpu=1,
        mem=256,
        disk=256,
        name="web",
        ssh_keys=((key.with_suffix(".pub")).read_text().strip(),),
    )
    storage = FileStorage(image_dir, tmp_path / "runtime")
    disk = await storage.ensure_disk(VM, folder, "tiny", request.disk)
    engine = QemuEngine(tmp_path / "runtime", storage.images, "tcg", tmp_path / "state")
    return Guest(engine, Machine(VM, folder, request, await network.ensure(VM, lease, EngineKind.QEMU), disk), key)


@pytest.fixture
async def guest(tmp_path: Path, image_dir: Path) -> AsyncIterator[Guest]:
    guest = await _guest(tmp_path, image_dir, deny_outgoing=True)
    yield guest
    await guest.engine.destroy(VM, guest.machine.folder)
    await guest.engine.close()


async def test_one_can_log_in_stop_it_gracefully_and_find_the_same_disk_again(guest: Guest) -> None:
    pid = await guest.start()
    lease = guest.machine.nic.lease
    assert await guest.ssh("hostname") == "web\n"
    assert f"inet {lease.ip}/16 " in await guest.ssh("ip -4 addr show dev eth0")
    assert lease.mac in await guest.ssh("cat /sys/class/net/eth0/address")
    assert int((await guest.ssh("cat /sys/block/vda/size")).strip()) * 512 == 256 * 1024 * 1024
    await guest.ssh("echo kept > /root/note && sync")
    await guest.engine.stop(guest.machine, timedelta(seconds=60))
    assert not psutil.pid_exists(pid)
    assert "reason=6" in (guest.machine.folder / "ending.log").read_text(), "the guest shut itself down"
    assert await guest.engine.state(VM, guest.machine.folder) == Stopped()
    assert await guest.start() != pid
    assert await guest.ssh("cat /root/note") == "kept\n"


async def test_poweroff_inside_the_guest_is_an_exit(guest: Guest) -> None:
    ended = asyncio.Event()
    guest.engine.on_exit = lambda _: ended.set()
    await guest.start()
    await guest.ssh("(sleep 1; poweroff) >/dev/null 2>&1 &")
    async with asyncio.timeout(60):
        await ended.wait()
    assert await guest.engine.state(VM, guest.machine.folder) == Stopped("exited", "the guest powered itself off")


async def test_a_guest_that_may_not_call_out_is_still_reached_through_its_forward(guest: Guest) -> None:
    with socket.socket() as service:
        service.bind(("127.0.0.1", 0))
        service.listen()
        port = service.getsockname()[1]
        await guest.start()
        gateway = guest.machine.nic.gateway
        tried = await guest.ssh(f"nc -w 3 {gateway} {port} </dev/null; echo status $?")
        assert tried.strip() != "status 0"
        looked_up = await guest.ssh("nslookup localhost.example >/dev/null 2>&1; echo status $?")
        assert looked_up.strip() != "status 0"
        assert await guest.ssh("hostname") == "web\n"
        service.setblocking(False)
        with pytest.raises(BlockingIOError):
            service.accept()


async def test_the_image_that_proves_kvm_is_ready_without_a_seed_and_without_a_network(tmp_path: Path, image_dir: Path) -> None:
    work = tmp_path / "proof"
    assert await boots(image_dir / "tiny.qcow2", "tcg", binary="qemu-system-x86_64", work_dir=work, limit=90)
    listing = await asyncio.to_thread(subprocess.run, ["ls", str(tmp_path)], capture_output=True, text=True, check=True)
    assert listing.stdout == ""
