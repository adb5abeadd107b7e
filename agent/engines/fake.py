"""Machines in memory, for tests of the runtime. Keeps the promises of the real drivers (one contract suite runs on all)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import count
from pathlib import Path

from agent.engines.base import OnExit
from agent.errors import AgentError
from agent.faults import Faults
from agent.machine import DiskKind, EngineState, Machine, Probe, Running, Stopped, Usable
from specs.names import Engine as EngineKind
from specs.names import VmId
from specs.wire import CreateVmReq


@dataclass(slots=True)
class FakeMachine:
    """One machine. `pid` is None while nothing runs; `boots` counts starts since `prepare`."""

    machine: Machine | None
    prepared: bool = False
    pid: int | None = None
    boots: int = 0
    ended: Stopped = field(default_factory=Stopped)
    console: bytes = b""


@dataclass
class FakeEngines:
    """What survives an agent restart: the machines of one host, and the means to disturb them.

    `most_alive` is the largest number of processes one VM ever had at the same time; more than 1 is a bug.
    """

    machines: dict[VmId, FakeMachine] = field(default_factory=dict)
    images: tuple[str, ...] = ("tiny",)
    faults: Faults = field(default_factory=Faults)
    most_alive: int = 0
    watchers: list[Callable[[VmId], None]] = field(default_factory=list)
    pids: count[int] = field(default_factory=lambda: count(1_000_001))

    def running(self) -> dict[VmId, int]:
        """The living VMs with their pids."""
        return {vm_id: machine.pid for vm_id, machine in self.machines.items() if machine.pid is not None}

    def boot(self, vm_id: VmId) -> None:
        """Starts a process, whether or not one runs already: the driver must not let that happen."""
        machine = self.machines[vm_id]
        self.most_alive = max(self.most_alive, 1 if machine.pid is None else 2)
        machine.pid = next(self.pids)
        machine.boots += 1
        machine.ended = Stopped()
        machine.console += b"boot %d\r\n" % machine.boots

    def crash(self, vm_id: VmId, message: str = "the process was killed by SIGKILL") -> None:
        """Ends a VM's process as a kill -9 would."""
        self.end(vm_id, Stopped("crashed", message))

    def power_off(self, vm_id: VmId) -> None:
        """Ends a VM as its own guest would."""
        self.end(vm_id, Stopped("exited", "the guest powered itself off"))

    def end(self, vm_id: VmId, how: Stopped) -> None:
        """Ends a VM's process and tells every agent that watches."""
        machine = self.machines[vm_id]
        if machine.pid is None:
            return
        machine.pid, machine.ended = None, how
        for tell in list(self.watchers):
            tell(vm_id)


class FakeEngine:
    """An engine driver over `FakeEngines`. Its faults' steps: prepare, prepare.half, prepare.done, start, start.done, …"""

    def __init__(
        self, world: FakeEngines | None = None, kind: EngineKind = EngineKind.QEMU, *, needs_disk: bool | None = None
    ) -> None:
        self.world = world if world is not None else FakeEngines()
        self.kind = kind
        self.disk_kind: DiskKind = "any"
        self.needs_disk = not kind.is_container if needs_disk is None else needs_disk
        self.on_exit: OnExit = lambda _: None
        self.warnings: tuple[str, ...] = ()
        self.refuses: AgentError | None = None
        self._adopted: set[VmId] = set()
        self.world.watchers.append(self._ended)

    def _ended(self, vm_id: VmId) -> None:
        if vm_id in self._adopted:
            self.on_exit(vm_id)

    async def probe(self) -> Probe:
        """Usable always."""
        await self.world.faults.reach("probe")
        return Usable("in memory")

    async def images(self) -> tuple[str, ...]:
        """The names given to the world."""
        await self.world.faults.reach("images")
        return tuple(sorted(self.world.images))

    def check(self, request: CreateVmReq) -> tuple[str, ...]:
        """Raises `refuses` if a test set it, else answers `warnings`."""
        if self.refuses is not None:
            raise self.refuses
        return self.warnings

    async def prepare(self, machine: Machine) -> None:
        """Makes the machine in two moves, so that it can be cut off between them."""
        world = self.world
        await world.faults.reach("prepare", machine.id)
        if self.needs_disk and machine.disk is None:
            raise AgentError(f"VM {machine.id} has no disk")
        made = world.machines.setdefault(machine.id, FakeMachine(machine))
        await world.faults.reach("prepare.half", machine.id)
        made.machine, made.prepared = machine, True
        await world.faults.reach("prepare.done", machine.id)

    async def start(self, machine: Machine) -> None:
        """Runs the machine unless it runs."""
        world = self.world
        await world.faults.reach("start", machine.id)
        made = world.machines.get(machine.id)
        if made is None or not made.prepared:
            raise AgentError(f"VM {machine.id} was not prepared")
        self._adopted.add(machine.id)
        if made.pid is None:
            world.boot(machine.id)
        await world.faults.reach("start.done", machine.id)

    async def stop(self, machine: Machine, grace: timedelta) -> None:
        """Ends the machine as asked."""
        world = self.world
        await world.faults.reach("stop", machine.id)
        made = world.machines.get(machine.id)
        if made is not None:
            world.end(machine.id, Stopped())
            made.ended = Stopped()
        await world.faults.reach("stop.done", machine.id)

    async def destroy(self, vm_id: VmId, folder: Path) -> None:
        """Ends and forgets the machine."""
        world = self.world
        await world.faults.reach("destroy", vm_id)
        if vm_id in world.machines:
            world.end(vm_id, Stopped())
            del world.machines[vm_id]
        self._adopted.discard(vm_id)
        await world.faults.reach("destroy.done", vm_id)

    async def state(self, vm_id: VmId, folder: Path) -> EngineState | None:
        """What the world holds."""
        await self.world.faults.reach("state", vm_id)
        made = self.world.machines.get(vm_id)
        if made is None or not made.prepared:
            return None
        self._adopted.add(vm_id)
        return Running(made.pid) if made.pid is not None else made.ended

    async def console(self, vm_id: VmId, folder: Path, limit: int) -> bytes:
        """What a test had the guest say."""
        await self.world.faults.reach("console", vm_id)
        made = self.world.machines.get(vm_id)
        return made.console[-limit:] if made is not None else b""

    async def leftovers(self, known: frozenset[VmId]) -> tuple[str, ...]:
        """Forgets the machines outside `known`."""
        await self.world.faults.reach("leftovers")
        unknown = sorted(self.world.machines.keys() - known)
        for vm_id in unknown:
            await self.destroy(vm_id, Path())
        return tuple(f"machine {vm_id}" for vm_id in unknown)

    async def close(self) -> None:
        """Stops watching; the machines run on."""
        if self._ended in self.world.watchers:
            self.world.watchers.remove(self._ended)
