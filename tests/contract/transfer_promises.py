"""What moving a disk between two agents over HTTP promises. Run on files, on ZFS and on its stand-in."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import os
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from agent.engines.fake import FakeEngine
from agent.main import Agent
from agent.network.fake import FakeNetwork
from agent.run import run
from agent.runtime import Drivers
from agent.settings import AgentSettings
from agent.storage.base import Storage
from api.client import ApiError
from api.disks import AgentDisks, Moved
from specs.names import Engine
from specs.wire import CreateVmReq

MIB = 1024 * 1024
KEY = "a-key-that-is-long-enough"
BEARER = {"Authorization": f"Bearer {KEY}"}


@dataclass
class Host:
    """One running agent with a fake engine and real disks."""

    agent: Agent
    folder: Path

    def http(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.agent.url, trust_env=False, timeout=120, headers=BEARER)

    @property
    def runtime_dir(self) -> Path:
        return self.folder / "vms"

    async def make(self, vm_id: str, image: str, disk: int) -> Path:
        """Creates a VM and stops it; returns where its disk is."""
        body = CreateVmReq(vm_id=vm_id, env_id="env", image=image, engine=Engine.QEMU, cpu=1, mem=64, disk=disk)
        async with self.http() as http:
            made = await http.post("/api/vms", json=body.wire())
            assert made.status_code == 201, made.text
            assert (await http.post(f"/api/vms/{vm_id}/stop")).json() == {"ok": True}
        return await self.disk(vm_id)

    async def disk(self, vm_id: str) -> Path:
        entry = self.agent.runtime._inventory.find(vm_id)
        assert entry.record is not None and entry.record.disk is not None
        return entry.record.disk.path

    async def begins_with(self, vm_id: str) -> bytes:
        """The first bytes of the disk, as its guest would read them."""
        path = await self.disk(vm_id)
        flat = self.folder / "flat"
        form = "qcow2" if path.suffix == ".qcow2" else "raw"
        await run("qemu-img", "convert", "-f", form, "-O", "raw", path, flat)
        with flat.open("rb") as file:
            head = file.read(16).rstrip(b"\0")
        flat.unlink()
        return head

    async def export(self, vm_id: str) -> tuple[Moved, bytes]:
        target = io.BytesIO()

        def call() -> Moved:
            with AgentDisks(self.agent.url, KEY) as disks:
                return disks.export(vm_id, target)

        return await asyncio.to_thread(call), target.getvalue()

    async def import_(self, vm_id: str, data: bytes) -> Moved:
        def call() -> Moved:
            with AgentDisks(self.agent.url, KEY) as disks:
                return disks.import_(vm_id, io.BytesIO(data))

        return await asyncio.to_thread(call)

    def transfers(self) -> list[Path]:
        return list(self.runtime_dir.glob(".transfer-*"))


async def start_host(folder: Path, storage: Storage) -> Host:
    """An agent over this storage; its runtime folder is `folder/vms`."""
    await asyncio.to_thread(folder.mkdir, exist_ok=True)
    settings = AgentSettings.model_validate(
        {"listen": "127.0.0.1:0", "data_dir": folder, "host_id": folder.name, "api_key": KEY, "disk_total": 100_000}
    )
    agent = Agent(settings, drivers=Drivers({Engine.QEMU: FakeEngine()}, storage, FakeNetwork()))
    await agent.start()
    return Host(agent, folder)


class TransferPromises:
    """Inherit with a fixture `hosts`: two agents with images `base` and `other` of 4 MiB that begin with their names."""

    native: str

    async def test_a_disk_exported_from_one_agent_is_the_disk_of_a_larger_vm_on_another(self, hosts: tuple[Host, Host]) -> None:
        here, there = hosts
        await here.make("vm-a", "base", 16)
        target = await there.make("vm-b", "other", 32)
        moved, data = await here.export("vm-a")
        assert (moved.format, moved.size, moved.sha256) == (self.native, len(data), hashlib.sha256(data).hexdigest())
        assert await there.import_("vm-b", data) == moved
        assert await there.begins_with("vm-b") == b"base"
        assert await there.disk("vm-b") == target
        assert await self.size_of(target) == 32 * MIB
        assert here.transfers() == there.transfers() == []
        async with there.http() as http:
            assert (await http.post("/api/vms/vm-b/start")).json() == {"ok": True}
            assert (await http.delete("/api/vms/vm-b")).json() == {"ok": True}

    async def test_a_disk_larger_than_the_vms_is_refused_and_the_old_one_stays(self, hosts: tuple[Host, Host]) -> None:
        here, there = hosts
        await here.make("vm-a", "base", 32)
        await there.make("vm-b", "other", 16)
        _, data = await here.export("vm-a")
        with pytest.raises(ApiError, match="32 MiB large and does not fit this VM's disk of 16 MiB"):
            await there.import_("vm-b", data)
        assert await there.begins_with("vm-b") == b"other"
        assert there.transfers() == []

    async def test_a_damaged_or_unfinished_disk_is_refused_and_the_old_one_stays(self, hosts: tuple[Host, Host]) -> None:
        here, there = hosts
        await here.make("vm-a", "base", 16)
        await there.make("vm-b", "other", 16)
        _, data = await here.export("vm-a")
        with pytest.raises(ApiError):
            await there.import_("vm-b", data[: len(data) // 2])
        headers = self.headers(data)
        async with there.http() as http:
            other = await http.put("/api/vms/vm-b/disk", content=data[:-1] + b"x", headers=headers)
            assert (other.status_code, other.json()["code"]) == (400, "bad_transfer")
        _, writer = await asyncio.open_connection("127.0.0.1", int(there.agent.url.rpartition(":")[2]))
        words = {**headers, **BEARER, "Host": "127.0.0.1", "Content-Length": str(len(data))}
        head = "".join(f"{name}: {value}\r\n" for name, value in words.items())
        writer.write(f"PUT /api/vms/vm-b/disk HTTP/1.1\r\n{head}\r\n".encode() + data[: len(data) // 2])
        await writer.drain()
        writer.close()  # the sender is gone in the middle
        async with asyncio.timeout(60):
            while there.transfers():  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        assert await there.begins_with("vm-b") == b"other"

    async def test_a_running_vms_disk_is_neither_read_nor_replaced(self, hosts: tuple[Host, Host]) -> None:
        here, _ = hosts
        await here.make("vm-a", "base", 16)
        _, data = await here.export("vm-a")
        async with here.http() as http:
            await http.post("/api/vms/vm-a/start")
        for call in (here.export("vm-a"), here.import_("vm-a", data)):
            with pytest.raises(ApiError, match="VM vm-a runs; stop it first"):
                await call
        with pytest.raises(ApiError, match="no VM absent"):
            await here.export("absent")
        assert here.transfers() == []

    async def test_without_the_key_or_the_headers_nothing_is_taken(self, hosts: tuple[Host, Host]) -> None:
        here, _ = hosts
        await here.make("vm-a", "base", 16)
        headers = self.headers(b"x")
        async with here.http() as http:
            for call, status in (
                ({"headers": {**headers, "Authorization": "Bearer wrong"}}, 401),
                ({"headers": {**headers, "Repr-Digest": ""}}, 400),
                ({"headers": {**headers, "X-Muster-Disk-Format": "vmdk"}}, 400),
                ({"headers": {**headers, "Content-Type": "application/json"}}, 415),
            ):
                answer = await http.put("/api/vms/vm-a/disk", content=b"x", **call)  # type: ignore[arg-type]
                assert (answer.status_code, answer.json()["ok"]) == (status, False)
            assert (await http.get("/api/vms/vm-a/disk", headers={"Authorization": "Bearer no"})).status_code == 401
        assert here.transfers() == []

    async def test_what_a_killed_agent_left_of_transfers_is_removed(self, hosts: tuple[Host, Host]) -> None:
        here, _ = hosts
        await here.agent.stop()
        (here.runtime_dir / ".transfer-left").write_bytes(b"half")
        await here.agent.start()
        assert here.transfers() == []

    def headers(self, data: bytes) -> dict[str, str]:
        return {
            "Content-Type": "application/octet-stream",
            "X-Muster-Disk-Format": self.native,
            "Repr-Digest": f"sha-256=:{base64.b64encode(hashlib.sha256(data).digest()).decode()}:",
        }

    async def size_of(self, disk: Path) -> int:
        if disk.suffix == ".qcow2":
            told = await run("qemu-img", "info", "-f", "qcow2", "--output=json", disk)
            return int(json.loads(told)["virtual-size"])
        with disk.open("rb") as device:
            return device.seek(0, os.SEEK_END)
