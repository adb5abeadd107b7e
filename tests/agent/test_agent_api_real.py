"""The composed agent with real QEMU and real files: what `muster agent` does, in one process."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from agent.errors import AgentError
from agent.main import Agent, serve
from agent.settings import AgentSettings
from tests.agent.runtime_rig import KEY, until
from tests.images_fixture import tiny  # noqa: F401

pytestmark = pytest.mark.real


def settings(folder: Path, **more: Any) -> AgentSettings:
    """An agent for QEMU without acceleration whose forwards stay on loopback."""
    fields = {
        "listen": "127.0.0.1:0",
        "data_dir": folder,
        "engines": "qemu",
        "network": "user",
        "accel": "tcg",
        "port_range": "21200-21299",
        "forward_addrs": "127.0.0.1",
    }
    return AgentSettings.model_validate({**fields, **more})


@pytest.fixture
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder."""
    return tmp_path_factory.mktemp("agent")


async def test_a_vm_outlives_its_agent_and_leaves_nothing_when_deleted(short: Path, tiny: Path) -> None:  # noqa: F811
    body = {
        "vm_id": "vm-a",
        "env_id": "e",
        "image": "tiny",
        "engine": "qemu",
        "cpu": 1,
        "mem": 128,
        "disk": 512,
        "ssh_keys": [KEY],
    }
    first = Agent(settings(short, image_dir=tiny.parent))
    await first.start()
    async with httpx.AsyncClient(base_url=first.url, trust_env=False, timeout=60) as client:
        created = await client.post("/api/vms", json=body)
    assert created.status_code == 201
    vm = created.json()["data"]["vm"]
    assert (vm["state"], psutil.Process(vm["pid"]).name()[:11]) == ("running", "qemu-system")
    await first.stop()
    assert psutil.pid_exists(vm["pid"])

    second = Agent(settings(short, image_dir=tiny.parent))
    await second.start()
    await until(lambda: second.runtime.complete)
    async with httpx.AsyncClient(base_url=second.url, trust_env=False, timeout=60) as client:
        assert (await client.get("/api/vms")).json()["data"] == [vm]
        os.kill(vm["pid"], signal.SIGKILL)
        await until(lambda: second.runtime.get("vm-a").state == "stopped")
        assert second.runtime.get("vm-a").reason == "crashed"
        assert (await client.post("/api/vms/vm-a/start")).json() == {"ok": True}
        again = second.runtime.get("vm-a")
        assert (again.state, again.port_map, again.pid != vm["pid"]) == ("running", vm["port_map"], True)
        assert (await client.delete("/api/vms/vm-a")).json() == {"ok": True}
    assert again.pid is not None
    assert not psutil.pid_exists(again.pid)
    await second.stop()
    assert sorted(path.name for path in (short / "vms").iterdir()) == [".lock"]


async def test_a_real_guest_is_ready_once_its_sshd_speaks_and_not_before(short: Path, tiny: Path) -> None:  # noqa: F811
    body = {"vm_id": "vm-a", "env_id": "e", "image": "tiny", "engine": "qemu", "cpu": 1, "mem": 128, "disk": 512}
    agent = Agent(settings(short, image_dir=tiny.parent))
    await agent.start()
    async with httpx.AsyncClient(base_url=agent.url, trust_env=False, timeout=60) as client:
        refused = await client.post("/api/vms", json={**body, "ready": {"tcp": 22}})
        assert (refused.status_code, "accepts connections in the guest's place" in refused.text) == (422, True)
        created = await client.post("/api/vms", json={**body, "ready": {"ssh-banner": 22, "timeout": 600}})
        ready = created.json()["data"]["vm"]["ready"]
        assert (ready["status"], ready["reason"]) == (False, "Probing"), "QEMU's forward accepts from the first moment on"
        await until(lambda: agent.runtime.get("vm-a").ready.status, limit=60)  # type: ignore[union-attr]
        port = agent.runtime.get("vm-a").port_map["22"]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        assert (await reader.readline()).startswith(b"SSH-")
        writer.close()
        await writer.wait_closed()
        await client.delete("/api/vms/vm-a")
    await agent.stop()


async def test_serving_says_when_it_is_ready_and_ends_on_sigterm(short: Path) -> None:
    urls: list[str] = []
    serving = asyncio.create_task(serve(settings(short), ready=urls.append))
    await until(lambda: urls or serving.done(), limit=60)
    async with httpx.AsyncClient(base_url=urls[0], trust_env=False) as client:
        info = (await client.get("/api/info")).json()["data"]
        assert (info["engines"], info["storage"], info["network"], info["images"]) == (["qemu"], "file", "user", [])
        assert info["host_id"] == (short / "host-id").read_text().strip()
        assert min(info["resource"][total] for total in ("cpu_total", "mem_total", "disk_total")) > 0
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.wait_for(serving, 10)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"engines": "docker", "docker": "no-such-docker"}, "engine docker does not work here: .*no-such-docker"),
        ({"engines": "bhyve"}, "no driver for bhyve; it has qemu, "),
        ({"storage": "zfs"}, "`zfs list .*/images` is not installed"),
        (
            {"storage": "zvol", "zfs_images": "tank/a", "zfs_runtime": "tank/b"},
            "storage zvol does not work here: zfs is not inst",
        ),
    ],
)
async def test_what_was_named_and_does_not_work_keeps_the_agent_from_starting(
    short: Path, wrong: dict[str, str], why: str
) -> None:
    with pytest.raises(AgentError, match=why):
        await Agent(settings(short, **wrong)).start()


async def test_without_names_every_engine_that_works_is_offered(short: Path) -> None:
    agent = Agent(settings(short, engines="auto", docker="no-such-docker"))
    await agent.start()
    assert agent.runtime.usable == ("qemu",)
    await agent.stop()
