"""Many hosts in one process: production agents over drivers in memory. Called by `muster agent --simulate N`.

Requests, records, leases, room and long polls are those of a real host; only machines, disks and links are pretended.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import resource
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from random import Random
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from agent.engines.fake import FakeEngine, FakeEngines
from agent.errors import AgentError
from agent.faults import Faults
from agent.machine import Disk, DiskKind, Lease
from agent.main import Agent, until_signalled
from agent.network.fake import FakeHost, FakeNetwork
from agent.readiness import Target
from agent.records import Loaded, Terms, VmRecord
from agent.runtime import Drivers
from agent.settings import AgentSettings, listed
from agent.storage.fake import FakeDisks, FakeStorage
from specs.logs import set_up_logs
from specs.names import Engine, Name, VmId, check_name
from specs.serving import Listen

_CPU, _MEM, _DISK = 64, 256 * 1024, 4 * 1024 * 1024  # of a host, in vCPUs and MiB, where nothing else is said
_ENGINES = (Engine.QEMU, Engine.FIRECRACKER, Engine.DOCKER)
_CONTAINER_IMAGE = "muster/busybox"
_IMAGE_MIB = 64
_RESYNC = timedelta(minutes=10)  # machines in memory tell every end by themselves: looking is only a second net
_FILES_A_HOST = 16  # descriptors: its socket, and a controller's and some people's connections
_WORK = frozenset({"start", "stop", "destroy"})
_MOMENT = 0.5  # seconds after which the number of machines that may crash is taken anew
_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "": 1.0}


def _span(value: object) -> object:
    """`50ms`, `0.2s` or `10ms-200ms` as (least, most) in seconds."""
    if not isinstance(value, str):
        return value
    parts = [re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(us|ms|s|)\s*", part) for part in value.split("-")]
    if len(parts) not in (1, 2) or not all(parts):
        raise ValueError("must be a time such as 50ms or 0.2s, or a range such as 10ms-200ms")
    seconds = [float(part[1]) * _UNITS[part[2]] for part in parts if part]
    if seconds[0] > seconds[-1]:
        raise ValueError("must begin with the shorter time")
    return (seconds[0], seconds[-1])


def _hourly(value: object) -> object:
    """`2/h` as 2."""
    return value.strip().removesuffix("/h") if isinstance(value, str) else value


class Simulation(BaseModel):
    """How many hosts there are, and what trouble they make; the same `seed` draws the same trouble for each host."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    simulate: Annotated[int, Field(ge=1, le=5000)]
    """Hosts."""
    seed: int = 1
    latency: Annotated[tuple[float, float], BeforeValidator(_span)] = (0.0, 0.0)
    """Seconds (least, most) that starting, stopping and removing a machine take each."""
    fail_rate: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The share of those that fail, half of them when their work is already done."""
    crash_rate: Annotated[float, BeforeValidator(_hourly), Field(ge=0, le=3600)] = 0.0
    """How often a running machine crashes, an hour."""
    zones: Annotated[int, Field(ge=0, le=1000)] = 0
    """Hosts get the labels zone=zone-1, zone=zone-2, … in turn; 0: none."""
    images: Annotated[tuple[Name, ...], BeforeValidator(listed), Field(min_length=1)] = ("tiny", "debian", "alpine-cloud")
    """Base images that every host has."""


class MemoryRecords:
    """Records that end with the process."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, vm_id: VmId) -> Path:
        """Where files would be. Raises ValueError on an id that could point elsewhere."""
        return self.root / check_name(vm_id)

    async def open(self) -> tuple[Terms, Loaded]:
        """Nothing: there was no earlier process."""
        return Terms(None), Loaded()

    async def save(self, record: VmRecord) -> None:
        """The runtime itself holds the record."""

    async def remove(self, vm_id: VmId) -> None:
        """Nothing is kept."""

    async def clear_trash(self) -> tuple[str, ...]:
        """There is none."""
        return ()


class Trouble(Faults):
    """What befalls the engines of one simulated host, drawn at each step. Keeps no list of steps: a host may run for months."""

    def __init__(self, simulation: Simulation, random: Random) -> None:
        super().__init__()
        self._least, self._most = simulation.latency
        self._share = simulation.fail_rate / 2
        self._random = random

    async def reach(self, step: str, vm_id: str = "") -> None:
        """Takes time at the beginning of work, and fails at its beginning or end."""
        work = step.removesuffix(".done")
        if work not in _WORK:
            return
        if self._most and work == step:
            await asyncio.sleep(self._random.uniform(self._least, self._most))
        if self._share and self._random.random() < self._share:
            raise AgentError(f"simulated fault at step {step} of VM {vm_id}")


class Peace(Faults):
    """Nothing ever happens, and nothing is remembered."""

    async def reach(self, step: str, vm_id: str = "") -> None:
        """Goes on."""


class SimulatedStorage(FakeStorage):
    """Disks in memory. The runtime looks whether a disk's path exists before it boots it again."""

    async def ensure_disk(
        self, vm_id: VmId, folder: Path, image: str, size_mib: int, kind: DiskKind = "any", *, cluster: str = ""
    ) -> Disk:
        """A disk of which there is only the size."""
        await super().ensure_disk(vm_id, folder, image, size_mib, kind)
        return Disk(Path(os.devnull), "raw")


class SimulatedNetwork(FakeNetwork):
    """Rules in memory. Unlike the test's network it does not look for leases that clash: that costs a walk over all of them."""

    async def apply(self, leases: Mapping[VmId, Lease]) -> None:
        """Keeps a copy."""
        self.host.rules = dict(leases)
        self.host.applied += 1


@dataclass(frozen=True, slots=True)
class SimulatedHost:
    """One host: its agent, and what the agent believes to run: virtual machines and containers."""

    agent: Agent
    worlds: tuple[FakeEngines, FakeEngines]


class SimulatedHosts:
    """All hosts of one process: `start`, `stop`. `data_dir` None keeps records in memory, else each host has a folder there.

    Records in a folder outlive the process; its machines do not: they come back as after a reboot of their hosts.
    """

    def __init__(self, settings: AgentSettings, simulation: Simulation, data_dir: Path | None = None) -> None:
        self._settings = settings
        self._simulation = simulation
        self._data_dir = data_dir
        self._crashes: asyncio.Task[None] | None = None
        listen = Listen.parse(settings.listen)
        if listen.port == 0 or listen.port + simulation.simulate - 1 > 65535:
            raise AgentError(
                f"--listen {settings.listen} leaves no room for {simulation.simulate} hosts: each has a port of its own, "
                "from that one up to 65535 at most"
            )
        self._listen = listen
        self.hosts = [self._host(number) for number in range(simulation.simulate)]

    @property
    def addresses(self) -> str:
        """The first URL and the last port, for people."""
        return f"{self.hosts[0].agent.url} (and up to port {self._listen.port + len(self.hosts) - 1})"

    async def start(self) -> None:
        """Lets every agent begin to answer. Raises AgentError, and then none does."""
        _allow_files(len(self.hosts) * _FILES_A_HOST)
        try:
            for host in self.hosts:
                await host.agent.start()
        except BaseException:
            await self.stop()
            raise
        if self._simulation.crash_rate:
            self._crashes = asyncio.create_task(self._crash_forever(), name="crashes")

    async def stop(self) -> None:
        """Ends every agent, with all machines."""
        if self._crashes is not None:
            self._crashes.cancel()
            await asyncio.wait([self._crashes])
        await asyncio.gather(*(host.agent.stop() for host in self.hosts))

    def _host(self, number: int) -> SimulatedHost:
        simulation, settings = self._simulation, self._settings
        port = self._listen.port + number
        host = f"[{self._listen.host}]" if ":" in self._listen.host else self._listen.host
        host_id = f"{settings.host_id or 'sim'}-{port}"
        zone = {"zone": f"zone-{number % simulation.zones + 1}"} if simulation.zones else {}
        folder = (self._data_dir or Path("/nonexistent")) / host_id
        own = settings.model_copy(
            update={
                "listen": f"{host}:{port}",
                "host_id": host_id,
                "data_dir": folder,
                "cpu_total": settings.cpu_total or _CPU,
                "mem_total": settings.mem_total or _MEM,
                "disk_total": settings.disk_total or _DISK,
                "labels": {**zone, **settings.labels},
                "resync": _RESYNC,
            }
        )
        trouble = Trouble(simulation, Random(f"{simulation.seed}/{number}"))  # noqa: S311 trouble is to be repeatable
        machines = FakeEngines(images=simulation.images, faults=trouble)
        images = dict.fromkeys(simulation.images, _IMAGE_MIB)
        disks = FakeDisks(images=images, rootfs_images=images, total_mib=own.disk_total, faults=Peace())
        containers = FakeEngines(images=(*simulation.images, _CONTAINER_IMAGE), faults=trouble)
        engines = {
            kind: FakeEngine(containers if kind.is_container else machines, kind) for kind in settings.engines or _ENGINES
        }
        network = SimulatedNetwork(FakeHost(faults=Peace()), settings.subnet)
        drivers = Drivers(engines, SimulatedStorage(disks, settings.storage), network, probe=_answered)
        records = None if self._data_dir else MemoryRecords(folder)
        return SimulatedHost(Agent(own, drivers=drivers, records=records), (machines, containers))

    async def _crash_forever(self) -> None:
        """Every running machine crashes at the same rate, independently of the others."""
        random = Random(f"{self._simulation.seed}/crashes")  # noqa: S311 as above
        while True:
            running = [(world, vm_id) for host in self.hosts for world in host.worlds for vm_id in world.running()]
            a_second = len(running) * self._simulation.crash_rate / 3600
            wait = random.expovariate(a_second) if a_second else _MOMENT
            # The waiting time has no memory, so one that is too long may be thrown away and drawn anew.
            await asyncio.sleep(min(wait, _MOMENT))
            if wait <= _MOMENT and a_second:
                world, vm_id = random.choice(running)
                if vm_id in world.machines:
                    world.crash(vm_id, "simulated crash")


async def serve(
    settings: AgentSettings,
    simulation: Simulation,
    *,
    data_dir: Path | None = None,
    ready: Callable[[str], None] = lambda _: None,
) -> None:
    """Runs the hosts until SIGTERM, SIGINT or cancellation; `ready` gets their addresses. Raises AgentError."""
    set_up_logs()
    for quiet in ("agent", "specs"):  # every call to every host in one stream helps nobody
        logging.getLogger(quiet).setLevel(logging.ERROR if simulation.fail_rate else logging.WARNING)
    hosts = SimulatedHosts(settings, simulation, data_dir)
    await hosts.start()
    try:
        ready(hosts.addresses)
        await until_signalled()
    finally:
        await hosts.stop()


async def _answered(target: Target, limit: float) -> str:
    """Guests that are only pretended answer at once."""
    return ""


def _allow_files(wanted: int) -> None:
    """Raises the soft limit of open files as far as the hard one allows; a shortage shows up as refused connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = wanted + 256 if hard == resource.RLIM_INFINITY else min(wanted + 256, hard)
    if soft != resource.RLIM_INFINITY and soft < enough:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (enough, hard))
