"""An agent with the real Firecracker, files and bridge, in a namespace: killed at every step, it leaves nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

import httpx
import pytest

from agent.engines.firecracker import FirecrackerEngine
from agent.engines.firecracker_folder import find_processes
from agent.engines.firecracker_jail import stray_cgroups
from agent.errors import AgentError
from agent.inventory import Capacity
from agent.main import Agent
from agent.network.linux import BridgeNetwork
from agent.records import TERMS, RecordStore
from agent.runtime import Drivers, Runtime
from agent.settings import AgentSettings
from agent.storage.file import FileStorage
from specs.names import Engine, VmId
from tests.agent.runtime_rig import NOBODY, request, until
from tests.contract.engine_firecracker_rig import own_namespace, write_image
from tests.contract.engine_guest import boots_on
from tests.firecracker_fixture import firecracker_binary
from tests.netns import command

pytestmark = pytest.mark.real
A = VmId("vm-a")
LIMIT = 60.0


class Host:
    """The runtime folder, images and bridge of one namespace; `boot` starts an agent on it, `kill` ends it undoing nothing."""

    def __init__(self, folder: Path) -> None:
        self.vms, self.images = folder / "vms", folder / "images"
        self.vms.mkdir()
        self.images.mkdir()
        write_image(self.images / "guest")
        self._engine: FirecrackerEngine | None = None
        self.network: BridgeNetwork | None = None
        self.runtime: Runtime | None = None

    async def boot(self) -> Runtime:
        storage = FileStorage(self.images, self.vms)
        self._engine = FirecrackerEngine(self.vms, self.images, storage.images, binary=firecracker_binary())
        self.network = BridgeNetwork("mtf0", IPv4Network("10.93.0.0/24"), docker_user=False)
        self.runtime = Runtime(
            host_id="host-1",
            store=RecordStore(self.vms),
            drivers=Drivers({Engine.FIRECRACKER: self._engine}, storage, self.network, {}),
            capacity=Capacity(100, 100_000, 100_000),
            stop_grace=timedelta(seconds=20),
            resync=timedelta(hours=1),
        )
        await self.runtime.start()
        return self.runtime

    async def kill(self) -> None:
        if self.runtime is not None and self._engine is not None:
            await self.runtime.close()
            await self._engine.close()
            self.runtime = None

    def create(self, runtime: Runtime) -> asyncio.Task[Any]:
        asked = request(image="guest", engine="firecracker", mem=64, disk=16, ports=())
        return asyncio.create_task(runtime.create(asked, NOBODY, wait=True))

    def console(self) -> str:
        return (self.vms / A / "console.log").read_text(errors="replace")

    def traces(self) -> dict[str, object]:
        """What is on the host of any VM."""
        links = [line.split()[0] for line in command("ip", "-br", "link").splitlines()]
        return {
            "processes": find_processes(self.vms.resolve()),
            "groups": stray_cgroups(self.vms.resolve(), frozenset()),
            "folders": [path.name for path in self.vms.iterdir() if path.name not in (".lock", TERMS)],
            "links": [name for name in links if name not in ("lo", "mtf0")],
            "rules": [line for line in command("nft", "list", "ruleset").splitlines() if "10.93.0.2" in line],
        }

    NOTHING = {"processes": {}, "groups": [], "folders": [], "links": [], "rules": []}  # noqa: RUF012


@pytest.fixture
def namespace() -> Iterator[None]:
    with own_namespace():
        yield


@pytest.fixture
async def host(tmp_path: Path, namespace: None) -> AsyncIterator[Host]:
    host = Host(tmp_path)
    yield host
    runtime = host.runtime or await host.boot()
    await runtime.delete(A, NOBODY)
    await host.kill()
    assert host.traces() == Host.NOTHING


async def test_a_vm_is_made_stopped_started_again_and_removed_without_a_trace(host: Host) -> None:
    runtime = await host.boot()
    vm, _ = await host.create(runtime)
    assert (vm.state, vm.ip) == ("running", "10.93.0.2")
    await until(lambda: boots_on(host.console()) == 1, LIMIT)
    tap = next(line for line in command("ip", "-br", "link", "show", "master", "mtf0").splitlines())
    assert "UP" in tap
    await runtime.set_power(A, "stopped", NOBODY, wait=True)
    assert (runtime.get(A).state, find_processes(host.vms.resolve())) == ("stopped", {})
    await runtime.set_power(A, "running", NOBODY, wait=True)
    await until(lambda: boots_on(host.console()) == 2, LIMIT)
    pid = runtime.get(A).pid
    await host.kill()
    runtime = await host.boot()
    await until(lambda: runtime.complete, LIMIT)
    assert (runtime.get(A).state, runtime.get(A).pid) == ("running", pid)
    await runtime.delete(A, NOBODY)
    assert host.traces() == Host.NOTHING


@pytest.mark.parametrize("step", ["disk", "network", "prepare", "booting"])
async def test_a_creation_cut_off_at_any_step_is_continued(host: Host, step: str) -> None:
    runtime = await host.boot()
    creating = host.create(runtime)
    await until(lambda: any(vm.step == step or vm.state == "running" for vm in runtime.list()), LIMIT)
    await host.kill()
    with contextlib.suppress(AgentError):
        await creating
    runtime = await host.boot()
    await until(lambda: runtime.get(A).state == "running", LIMIT)
    assert set(find_processes(host.vms.resolve())) == {A}


@pytest.mark.parametrize("delay", [0, 0.002, 0.01, 0.03])
async def test_a_removal_cut_off_at_any_moment_is_finished(host: Host, delay: float) -> None:
    runtime = await host.boot()
    await host.create(runtime)
    removing = asyncio.create_task(runtime.delete(A, NOBODY))
    await asyncio.sleep(delay)
    await host.kill()
    with contextlib.suppress(AgentError):
        await removing
    runtime = await host.boot()
    await until(lambda: runtime.complete, LIMIT)
    if delay:
        await until(lambda: runtime.list() == [] or runtime.get(A).state == "running", LIMIT)
    await runtime.delete(A, NOBODY)
    await until(lambda: host.traces() == Host.NOTHING, LIMIT)


async def test_a_composed_agent_offers_the_engine_with_its_images_and_says_why_where_it_cannot(
    tmp_path: Path, namespace: None
) -> None:
    def settings(**more: Any) -> AgentSettings:
        given = {"listen": "127.0.0.1:0", "data_dir": tmp_path, "engines": "fc", "firecracker_bin": firecracker_binary()}
        return AgentSettings.model_validate({**given, "network": "bridge", "bridge": "mtf0", "subnet": "10.93.0.0/24", **more})

    (tmp_path / "images").mkdir()
    write_image(tmp_path / "images" / "guest")
    agent = Agent(settings())
    await agent.start()
    try:
        async with httpx.AsyncClient(base_url=agent.url, trust_env=False, timeout=60) as client:
            info = (await client.get("/api/info")).json()["data"]
            images = (await client.get("/api/images")).json()["data"]
    finally:
        await agent.stop()
    assert (info["engines"], info["images_by_engine"], images) == (["firecracker"], {"firecracker": ["guest"]}, ["guest"])
    with pytest.raises(AgentError, match=r"engine firecracker does not work here: .*--network bridge"):
        await Agent(settings(network="user")).start()
    with pytest.raises(AgentError, match=r"engine firecracker does not work here: .*give --firecracker-bin"):
        await Agent(settings(firecracker_bin="/nonexistent/firecracker")).start()
