"""A whole fleet in one process over real HTTP: the production controller and production agents with in-memory drivers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from agent.engines.fake import FakeEngine, FakeEngines
from agent.main import Agent
from agent.network.fake import FakeHost, FakeNetwork
from agent.readiness import GuestProbe, Target
from agent.runtime import Drivers
from agent.settings import AgentSettings
from agent.storage.fake import FakeDisks
from api.main import ControllerApp
from api.settings import ControllerSettings
from reconciler.core.invariants import violations
from specs.names import Engine
from tests.agent.runtime_rig import FileBackedFake

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIBJbDrk6WHYGFqkzL1M2t3gYKEcvXYo6ZS1lnzFDpq8J me@here"


def vm(**changes: Any) -> dict[str, Any]:
    """A small VM entry."""
    return {"image": "tiny", "cpu": 1, "mem": 128, "disk": 256, **changes}


def env(env_id: str = "web", *vms: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A request body."""
    return {"id": env_id, "ssh_keys": [KEY], "vms": list(vms) or [vm()], **changes}


async def answers_at_once(target: Target, limit: float) -> str:
    """A guest without a network that counts as ready."""
    return ""


@dataclass
class FakeHostMachine:
    """A machine with an agent: what it runs survives the agent's end."""

    name: str
    folder: Path
    size: dict[str, int]
    machines: FakeEngines = field(default_factory=FakeEngines)
    containers: FakeEngines = field(default_factory=lambda: FakeEngines(images=("muster/busybox",)))
    disks: FakeDisks = field(default_factory=FakeDisks)
    network: FakeHost = field(default_factory=FakeHost)
    agent: Agent | None = None
    addr: str = "127.0.0.1:0"
    port_range: tuple[int, int] = (20000, 32767)
    probe: GuestProbe = answers_at_once

    async def boot(self) -> None:
        """Starts the agent, on the same port as before."""
        settings = AgentSettings(
            listen=self.addr,
            data_dir=self.folder,
            host_id=self.name,
            cpu_total=self.size["cpu"],
            mem_total=self.size["mem"],
            disk_total=self.size["disk"],
            port_range=self.port_range,
        )
        engines = {Engine.QEMU: FakeEngine(self.machines), Engine.DOCKER: FakeEngine(self.containers, Engine.DOCKER)}
        drivers = Drivers(engines, FileBackedFake(self.disks), FakeNetwork(self.network), {}, self.probe)
        self.agent = Agent(settings, drivers=drivers)
        await self.agent.start()
        self.addr = self.agent.url.removeprefix("http://")

    async def halt(self) -> None:
        """Ends the agent; its machines go on."""
        if self.agent is not None:
            await self.agent.stop()
            self.agent = None

    def running(self) -> dict[str, int]:
        """Every living VM with its pid."""
        return {**self.machines.running(), **self.containers.running()}

    def there(self) -> set[str]:
        """Every VM of which anything is left."""
        return {*self.machines.machines, *self.containers.machines, *self.disks.disks}


class FleetRig:
    """`async with FleetRig(tmp_path, hosts=2) as rig`."""

    def __init__(self, folder: Path, hosts: int = 1, *, key: str | None = None, **size: int) -> None:
        self.folder = folder
        self.key = key
        self.host_loss_grace = 300.0
        capacity = {"cpu": 64, "mem": 64_000, "disk": 640_000} | size
        self.hosts = [FakeHostMachine(f"host-{n}", folder / f"host-{n}", capacity) for n in range(hosts)]
        self.app: ControllerApp
        self.http: httpx.AsyncClient
        self._listen = "127.0.0.1:0"

    async def __aenter__(self) -> FleetRig:
        for host in self.hosts:
            await host.boot()
        await self.start_controller()
        for host in self.hosts:
            await self.call("POST", "/api/hosts", {"addr": host.addr})
        return self

    async def __aexit__(self, *_: object) -> None:
        fleet = self.app.controller.fleet
        totals = {host.name: (host.size["cpu"], host.size["mem"], host.size["disk"]) for host in self.hosts}
        found = violations(fleet.envs, list(fleet.vms.values()), totals)  # type: ignore[arg-type]
        found += tuple(
            f"two processes of one VM ran on {host.name}"
            for host in self.hosts
            if max(host.machines.most_alive, host.containers.most_alive) > 1
        )
        if fleet.rooms() != [fleet._room(host) for host in fleet.hosts.values()]:
            found += ("placement sees hosts other than they are",)
        await self.stop_controller()
        for host in self.hosts:
            await host.halt()
        assert found == ()

    async def start_controller(self) -> None:
        """Starts the controller on its folder, on the same port as before."""
        data = self.folder / "controller"
        data.mkdir(exist_ok=True)
        self.app = ControllerApp(
            ControllerSettings(
                listen=self._listen,
                data_dir=data,
                api_key=self.key,
                agent_key=self.key,
                heartbeat=0.5,
                host_loss_grace=self.host_loss_grace,
            )
        )
        url = await self.app.start()
        self._listen = url.removeprefix("http://")
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        self.http = httpx.AsyncClient(base_url=url, headers=headers, trust_env=False, timeout=30)

    async def stop_controller(self) -> None:
        """Ends the controller."""
        await self.http.aclose()
        await self.app.stop()

    async def call(self, method: str, path: str, body: object = None, **options: Any) -> httpx.Response:
        """One request, JSON if there is a body."""
        if body is not None:
            options["json"] = body
        return await self.http.request(method, path, **options)

    async def data(self, path: str) -> Any:
        """What a GET answers."""
        answer = await self.call("GET", path)
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]

    async def until(self, reached: Callable[[], bool], what: str = "") -> None:
        """Waits for something to become true; the test's own time limit ends a vain wait."""
        async with asyncio.timeout(60):
            while not reached():  # noqa: ASYNC110 what is waited for lies outside this program
                await asyncio.sleep(0.01)
