"""One host whose disks, machines and network live in memory and survive the agent, for tests of the runtime and its API."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from agent.engines.fake import FakeEngine, FakeEngines
from agent.entry import Caller
from agent.faults import Faults
from agent.inventory import Capacity
from agent.machine import Disk, DiskKind
from agent.network.fake import FakeHost, FakeNetwork
from agent.records import TERMS, RecordStore
from agent.runtime import Drivers, Runtime
from agent.storage.fake import FakeDisks, FakeStorage
from specs.names import ClusterId, Engine, VmId
from specs.wire import AgentVm, CreateVmReq

NOBODY = Caller()
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIBJbDrk6WHYGFqkzL1M2t3gYKEcvXYo6ZS1lnzFDpq8J me@here"


def controller(term: int = 1, cluster: str = "prod") -> Caller:
    """A controller's calls."""
    return Caller(ClusterId(cluster), term)


def request(vm_id: str = "vm-a", **changes: Any) -> CreateVmReq:
    """A small VM."""
    fields = {
        "vm_id": vm_id,
        "env_id": "env",
        "image": "tiny",
        "engine": "qemu",
        "cpu": 1,
        "mem": 128,
        "disk": 256,
        "ports": (80,),
        "ssh_keys": (KEY,),
    }
    return CreateVmReq.model_validate(fields | changes)


class FileBackedFake(FakeStorage):
    """The fake storage with a file where the disk is said to be, as the runtime may rely on."""

    async def ensure_disk(
        self, vm_id: VmId, folder: Path, image: str, size_mib: int, kind: DiskKind = "any", *, cluster: str = ""
    ) -> Disk:
        """Makes the file once the clone is whole."""
        disk = await super().ensure_disk(vm_id, folder, image, size_mib, kind, cluster=cluster)
        disk.path.touch()
        return disk


@dataclass
class Rig:
    """The host. `boot` starts an agent on it; an agent that is only closed was as good as killed: nothing is undone."""

    folder: Path
    capacity: Capacity = field(default_factory=lambda: Capacity(cpu=1000, mem=1_000_000, disk=1_000_000))
    machines: FakeEngines = field(default_factory=FakeEngines)
    containers: FakeEngines = field(default_factory=lambda: FakeEngines(images=("muster/busybox",)))
    disks: FakeDisks = field(default_factory=FakeDisks)
    host: FakeHost = field(default_factory=FakeHost)
    agents: list[Runtime] = field(default_factory=list)
    engines: tuple[FakeEngine, ...] = ()

    def drivers(self) -> Drivers:
        """Fresh drivers over what is there."""
        self.engines = (FakeEngine(self.machines), FakeEngine(self.containers, Engine.DOCKER))
        by_kind = {engine.kind: engine for engine in self.engines}
        return Drivers(by_kind, FileBackedFake(self.disks), FakeNetwork(self.host), {})

    async def boot(self, *, settle: bool = True, **settings: Any) -> Runtime:
        """An agent, re-adopted unless `settle` is off."""
        store = RecordStore(self.folder)
        runtime = Runtime(
            host_id="host-1",
            store=store,
            drivers=self.drivers(),
            capacity=self.capacity,
            **{"stop_grace": timedelta(seconds=1), "resync": timedelta(hours=1), **settings},
        )
        self.agents.append(runtime)
        await runtime.start()
        if settle:
            await until(lambda: runtime.complete)
        return runtime

    async def kill(self, runtime: Runtime) -> None:
        """Ends an agent in the middle of whatever it does."""
        await runtime.close()
        for engine in self.engines:
            await engine.close()
        self.agents.remove(runtime)

    @property
    def faults(self) -> tuple[Faults, ...]:
        """The faults of every driver."""
        return (self.machines.faults, self.containers.faults, self.disks.faults, self.host.faults)

    def traces(self) -> dict[str, object]:
        """What is on the host of any VM; empty of everything when nothing is left."""
        return {
            "machines": sorted(self.machines.machines),
            "containers": sorted(self.containers.machines),
            "disks": sorted(self.disks.disks),
            "links": sorted(self.host.links),
            "rules": sorted(self.host.rules),
            "folders": sorted(path.name for path in self.folder.iterdir() if path.name not in (".lock", TERMS)),
        }

    NOTHING = {"machines": [], "containers": [], "disks": [], "links": [], "rules": [], "folders": []}  # noqa: RUF012


async def until(true: Callable[[], object], limit: float = 10.0) -> None:
    """Lets the loop run until a condition holds."""
    async with asyncio.timeout(limit):
        while not true():  # noqa: ASYNC110 the conditions span parts that share no event
            await asyncio.sleep(0.002)


async def reached(faults: Faults, step: str, vm_id: str = "") -> None:
    """Lets the loop run until a driver's step is reached."""
    await until(lambda: any(name == step and vm_id in ("", at) for name, at in faults.steps))


def outline(vm: AgentVm) -> tuple[str, str, str]:
    """(state, reason, step)."""
    return vm.state, vm.reason, vm.step
