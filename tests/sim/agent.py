"""A model of the agent: its contract towards controllers, step by step as agent/runtime.py keeps it, over a simulated machine.

The rules that decide (terms, leases, equal specs) are the production ones. Everything that waits or could be cut off is a
task of the agent's process, so that a kill leaves exactly what the machine had at that moment.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from agent.entry import same_spec
from agent.errors import AgentError
from reconciler.agents import Listing, Refused, Reply
from specs.names import ClusterId, VmId
from specs.wire import AgentInfo, AgentVm, CreateVmReq, Resource
from tests.sim.host import EngineState, Host, Record
from tests.sim.loop import Handle, Process, SimLoop

SETTLE = 0.003  # seconds, as agent/watch.py
RESTING = 64  # ports released last


@dataclass(eq=False, slots=True)
class Entry:
    """A VM in the agent's memory; without a record, the memory of a creation that failed."""

    id: VmId
    request: CreateVmReq
    cluster: str
    created_at: int
    record: Record | None
    step: str = ""
    failure: str = ""
    start_error: str = ""
    removal_error: str = ""
    looked: bool = False
    seen: EngineState | None = None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    tasks: dict[asyncio.Task[None], None] = field(default_factory=dict)
    recorded: asyncio.Event = field(default_factory=asyncio.Event)
    creation: asyncio.Task[None] | None = None
    removal: asyncio.Task[None] | None = None
    power: tuple[str, asyncio.Task[None]] | None = None
    shown: AgentVm | None = None
    face: tuple[object, ...] = ()

    @property
    def is_going(self) -> bool:
        """Whether its removal has begun."""
        return self.removal is not None or bool(self.removal_error) or (self.record is not None and self.record.deleting)


@dataclass(frozen=True, slots=True)
class Weather:
    """What the agent's surroundings do to it. All are asked at the moment they matter."""

    pace: Callable[[], float]
    """Seconds a small step takes now."""
    fails: Callable[[str, CreateVmReq], str]
    """(step, request) → why the engine refuses, or ""."""
    wall: Callable[[], float]


class Agent:
    """One run of the agent process on a machine."""

    def __init__(self, host: Host, loop: SimLoop, boot_id: str, weather: Weather, on_death: Callable[[str], None]) -> None:
        self.host = host
        self.boot_id = boot_id
        self.seq = 1
        self.adopted = False
        self.process = Process(loop, f"agent {host.name}", on_death)
        self.entries: dict[VmId, Entry] = {}
        self._loop = loop
        self._weather = weather
        self._resting: list[int] = []
        self._polls: list[tuple[Callable[[Any], None], Handle]] = []
        self._is_settling = False
        self._term_lock = asyncio.Lock()
        host.on_exit = self._exited
        for vm_id, record in host.records.items():
            entry = Entry(vm_id, record.request, record.cluster, record.created_at, record)
            entry.step = "deleting" if record.deleting else "" if record.complete else "accepted"
            entry.recorded.set()
            self.entries[vm_id] = entry
            self._publish(entry)
        self.process.spawn(self._adopt(), "adopt")

    # ---- what is read

    @property
    def position(self) -> dict[str, Any]:
        """Where in the order of changes an answer stands."""
        return {"boot_id": self.boot_id, "seq": self.seq}

    def info(self) -> AgentInfo:
        """GET /api/info."""
        held = [entry.request for entry in self.entries.values() if entry.record is not None]
        host = self.host
        return AgentInfo(
            host_id=host.name,
            resource=Resource(
                cpu_total=host.cpu,
                cpu_used=sum(r.cpu for r in held),
                mem_total=host.mem,
                mem_used=sum(r.mem for r in held),
                disk_total=host.disk,
                disk_used=sum(r.disk for r in held),
                vm_count=len(held),
            ),
            engines=("qemu",),  # type: ignore[arg-type]  # the name is parsed
            storage="file",  # type: ignore[arg-type]
            images=tuple(sorted(host.images)),
            boot_id=self.boot_id,
        )

    def listing(self) -> Listing:
        """GET /api/vms. Until everything is adopted the list may lack what is there, and says so."""
        shown = {vm_id: entry.shown for vm_id, entry in self.entries.items() if entry.shown is not None}
        if not self.adopted:
            shown = dict(list(shown.items())[::2])
        return Listing(shown, self.boot_id, self.seq, self.adopted)

    def poll(self, watch: float, after: str, answer: Callable[[Any], None]) -> None:
        """GET /api/vms?watch&after: answers at once, at the next change, or after `watch` seconds."""
        if watch <= 0 or after != f"{self.boot_id}:{self.seq}":
            answer(self.listing())
            return
        timer = self._loop.call_later(watch, self._let_go)
        self._polls.append((answer, timer))

    def _let_go(self) -> None:
        polls, self._polls = self._polls, []
        self._is_settling = False
        if not self.process.alive:
            return
        for answer, timer in polls:
            timer.cancel()
            answer(self.listing())

    def _changed(self) -> None:
        self.seq += 1
        if self._polls and not self._is_settling:
            self._is_settling = True
            self._loop.call_later(SETTLE, self._let_go)

    def is_busy(self, excepting: Collection[VmId]) -> bool:
        """Whether it has begun something with a VM, those in `excepting` left out, and not ended it."""
        return any(e.tasks or e.removal is not None for e in self.entries.values() if e.id not in excepting)

    # ---- what is asked for

    async def create(self, request: CreateVmReq, cluster: ClusterId, term: int) -> Reply:
        """POST /api/vms with Prefer: respond-async. Raises Refused."""
        await self._fence(cluster, term)
        vm_id = VmId(request.vm_id)
        while (entry := self.entries.get(vm_id)) is not None and entry.record is not None:
            self._check_owner(entry, cluster)
            if not entry.is_going:
                if not same_spec(entry.request, request):
                    raise Refused(409, "conflict", f"VM {vm_id} exists with another spec")
                if entry.creation is not None:
                    await self._until_recorded(entry, entry.creation)
                return self._reply(entry)
            await self._remove_and_wait(entry)
            self._check_term(cluster, term)
        self._check_room(request)
        self.host.witness.acted(self.host, cluster, term)
        taken = [e.record.lease for e in self.entries.values() if e.record is not None]
        try:
            lease = self.host.lease(request, taken, self._resting)
        except AgentError as error:
            raise Refused(507, "does_not_fit", str(error)) from None
        record = Record(request, cluster, int(self._weather.wall()), lease)
        entry = Entry(vm_id, request, cluster, record.created_at, record, step="accepted")
        self.entries.pop(vm_id, None)
        self.entries[vm_id] = entry
        self._publish(entry)
        entry.creation = self._operate(entry, self._create(entry))
        await self._until_recorded(entry, entry.creation)
        return self._reply(entry)

    async def _until_recorded(self, entry: Entry, creation: asyncio.Task[None]) -> None:
        if not entry.recorded.is_set():
            recorded = self._spawn(_event(entry.recorded))
            await asyncio.wait([recorded, creation], return_when=asyncio.FIRST_COMPLETED)
            recorded.cancel()
        if not entry.recorded.is_set():
            raise Refused(409, "conflict", f"VM {entry.id} was deleted while it was being created")

    async def power_to(self, power: Literal["running", "stopped"], vm_id: VmId, cluster: ClusterId, term: int) -> Reply:
        """POST /api/vms/{id}/stop or start with Prefer: respond-async. Raises Refused."""
        await self._fence(cluster, term)
        entry = self.entries.get(vm_id)
        if entry is None:
            raise Refused(404, "not_found", f"no VM {vm_id} on host {self.host.name}")
        self._check_owner(entry, cluster)
        if entry.record is None or entry.is_going or not entry.record.complete:
            raise Refused(409, "conflict", f"VM {vm_id} is not settled (step {entry.step or entry.failure})")
        self.host.witness.acted(self.host, cluster, term)
        if entry.power is None or entry.power[0] != power:
            if (entry.seen == "running") != (power == "running") and not entry.step:
                self._note_step(entry, "starting" if power == "running" else "stopping")
            entry.power = (power, self._operate(entry, self._set_power(entry, power)))
        return self._reply(entry)

    async def destroy(self, vm_id: VmId, cluster: ClusterId, term: int) -> Reply:
        """DELETE /api/vms/{id}: answers when nothing is left. Raises Refused."""
        await self._fence(cluster, term)
        entry = self.entries.get(vm_id)
        if entry is not None:
            self._check_owner(entry, cluster)
            self.host.witness.acted(self.host, cluster, term)
            if entry.record is not None:
                entry.failure = ""
            await self._remove_and_wait(entry)
        return Reply(None, self.boot_id, self.seq)

    def _reply(self, entry: Entry) -> Reply:
        return Reply(entry.shown, self.boot_id, self.seq)

    def _check_term(self, cluster: ClusterId, term: int) -> None:
        try:
            self.host.terms.check(cluster, term)
        except AgentError as error:
            raise Refused(409, "stale_term", str(error)) from None

    async def _fence(self, cluster: ClusterId, term: int) -> None:
        self._check_term(cluster, term)
        if term != self.host.terms.highest(cluster):
            async with self._term_lock:
                await self._point("term")
                try:
                    self.host.terms.admit(cluster, term)
                except AgentError as error:
                    raise Refused(409, "stale_term", str(error)) from None

    @staticmethod
    def _check_owner(entry: Entry, cluster: ClusterId) -> None:
        if entry.cluster and entry.cluster != cluster:
            raise Refused(409, "foreign_vm", f"VM {entry.id} belongs to cluster {entry.cluster}")

    def _check_room(self, request: CreateVmReq) -> None:
        host, held = self.host, [entry.request for entry in self.entries.values() if entry.record is not None]
        if (
            sum(r.cpu for r in held) + request.cpu > host.cpu
            or sum(r.mem for r in held) + request.mem > host.mem
            or sum(r.disk for r in held) + request.disk > host.disk
        ):
            raise Refused(507, "does_not_fit", f"VM {request.vm_id} does not fit on host {self.host.name}")

    # ---- what goes on

    async def _point(self, label: str) -> None:
        """A step that takes time and at whose ends a crash makes a difference."""
        self.process.point(label)
        await asyncio.sleep(self._weather.pace())
        self.process.point(f"{label} done")

    async def _create(self, entry: Entry) -> None:
        try:
            async with entry.lock:
                await self._build(entry)
                entry.step, entry.looked, entry.seen = "", True, self.host.engine.get(entry.id)
                self._publish(entry)
        except Refused as error:
            entry.failure = str(error)
            async with entry.lock:
                if await self._dismantle(entry, "undo"):
                    self._drop(entry, remember=True)

    async def _build(self, entry: Entry) -> None:
        record = entry.record
        assert record is not None
        is_continued = entry.recorded.is_set()
        if not is_continued:
            await self._point("record")
            self.host.record(entry.id, record)
            entry.recorded.set()
        for step, parts in (("disk", self.host.disks), ("network", self.host.taps)):
            self._note_step(entry, step)
            await self._point(step)
            self._fail_if(step, entry.request)
            parts.add(entry.id)
        if not (is_continued and self.host.engine.get(entry.id) == "running"):
            self._note_step(entry, "booting")
            await self._point("boot")
            self._fail_if("boot", entry.request)
            self.host.boot(entry.id)
        await self._point("complete")
        self._save(entry, replace(record, complete=True))

    def _fail_if(self, step: str, request: CreateVmReq) -> None:
        why = self._weather.fails(step, request)
        if why:
            raise Refused(500, "engine_failed", why)

    async def _set_power(self, entry: Entry, power: Literal["running", "stopped"]) -> None:
        me = asyncio.current_task()
        async with entry.lock:
            if entry.record is not None and not entry.is_going:
                entry.start_error = ""
                if entry.record.power != power:
                    await self._point("record")
                    self._save(entry, replace(entry.record, power=power))
                if power == "stopped" and self.host.engine.get(entry.id) == "running":
                    self._note_step(entry, "stopping")
                    await self._point("halt")
                    self.host.halt(entry.id, "off", "stop")
                elif power == "running" and self.host.engine.get(entry.id) != "running":
                    self._note_step(entry, "booting")
                    await self._point("boot")
                    entry.start_error = self._weather.fails("boot", entry.request)
                    if not entry.start_error:
                        self.host.boot(entry.id)
                entry.step, entry.looked, entry.seen = "", True, self.host.engine.get(entry.id)
                self._publish(entry)
        if entry.power is not None and entry.power[1] is me:
            entry.power = None

    async def _remove_and_wait(self, entry: Entry) -> None:
        if entry.removal is None:
            entry.removal = self._spawn(self._remove(entry))
        await asyncio.wait([entry.removal])
        if entry.removal_error:
            raise Refused(500, "remove_failed", entry.removal_error)

    async def _remove(self, entry: Entry) -> None:
        if entry.tasks:
            for task in tuple(entry.tasks):
                task.cancel()
            await asyncio.wait(tuple(entry.tasks))
        async with entry.lock:
            is_there = self.entries.get(entry.id) is entry
            if is_there and (entry.record is None or await self._dismantle(entry, "destroy")):
                self._drop(entry, remember=False)
        entry.removal = None

    async def _dismantle(self, entry: Entry, why: str) -> bool:
        self._note_step(entry, "deleting")
        record = entry.record
        assert record is not None
        if not record.complete:
            why = "undo"
        if not record.deleting and entry.recorded.is_set():
            await self._point("record")
            record = replace(record, deleting=True)
            self._save(entry, record)
        await self._point("kill")
        entry.removal_error = self._weather.fails("remove", entry.request)
        if entry.removal_error:
            self._note_step(entry, "")
            return False
        self.host.halt(entry.id, "off", why)
        self.host.engine.pop(entry.id, None)
        await self._point("unplug")
        self.host.taps.discard(entry.id)
        self.host.disks.discard(entry.id)
        await self._point("discard")
        self.host.discard(entry.id, why)
        return True

    def _drop(self, entry: Entry, *, remember: bool) -> None:
        if entry.record is not None:
            self._resting = [*self._resting, *entry.record.lease.ports.values()][-RESTING:]
        entry.record, entry.step, entry.removal_error = None, "", ""
        if remember:
            self._publish(entry)
        else:
            del self.entries[entry.id]
            self._changed()

    def _save(self, entry: Entry, record: Record) -> None:
        self.host.record(entry.id, record)
        entry.record = record

    async def _adopt(self) -> None:
        for entry in tuple(self.entries.values()):
            self._resume(entry)
        await self._point("adopt")
        for entry in self.entries.values():
            self._look(entry)
        self.adopted = True
        self._changed()
        while True:
            await asyncio.sleep(30.0)
            for entry in tuple(self.entries.values()):
                self._resume(entry)
                self._look(entry)

    def _resume(self, entry: Entry) -> None:
        if entry.removal is not None or entry.tasks or entry.record is None:
            return
        if entry.is_going:
            entry.removal = self._spawn(self._remove(entry))
        elif not entry.record.complete:
            entry.creation = self._operate(entry, self._create(entry))

    def _exited(self, vm_id: VmId) -> None:
        entry = self.entries.get(vm_id)
        if self.process.alive and entry is not None:
            self._look(entry)

    def _look(self, entry: Entry) -> None:
        record = entry.record
        if record is not None and record.complete and not entry.is_going and not entry.lock.locked():
            entry.looked, entry.seen = True, self.host.engine.get(entry.id)
            self._publish(entry)

    # ---- what is shown

    def _note_step(self, entry: Entry, step: str) -> None:
        entry.step = step
        self._publish(entry)

    def _publish(self, entry: Entry) -> None:
        state, reason, message = self._condition(entry)
        face = (state, reason, message, entry.step, entry.record is None)
        if face == entry.face:
            return
        request, lease = entry.request, entry.record.lease if entry.record else None
        is_same_vm = entry.shown is not None and entry.face and entry.face[-1] == face[-1]
        entry.face = face
        if entry.shown is not None and is_same_vm:
            news = {"state": state, "reason": reason, "message": message, "step": entry.step}
            entry.shown = entry.shown.model_copy(update=news)
            self._changed()
            return
        entry.shown = AgentVm.model_construct(
            id=entry.id,
            env_id=request.env_id,
            host_id=self.host.name,
            image=request.image,
            engine=request.engine,
            cpu=request.cpu,
            mem=request.mem,
            disk=request.disk,
            ip=str(lease.ip) if lease else "",
            port_map={str(guest): port for guest, port in lease.ports.items()} if lease else {},
            state=state,
            created_at=entry.created_at,
            reason=reason,
            message=message,
            cluster_id=entry.cluster,
            spec_hash=request.spec_hash,
            step=entry.step,
        )
        self._changed()

    @staticmethod
    def _condition(entry: Entry) -> tuple[str, str, str]:
        record = entry.record
        if entry.removal_error:
            return "failed", "remove_failed", entry.removal_error
        if record is None:
            return "failed", "create_failed", entry.failure or "its creation failed"
        if not record.complete or (entry.step and entry.step != "deleting"):
            return "creating", "", ""
        if entry.start_error:
            return "failed", "start_failed", entry.start_error
        if not entry.looked:
            return record.power, "", ""
        if entry.seen == "running":
            return "running", "", ""
        if record.power == "stopped":
            return "stopped", "", ""
        return "stopped", "exited" if entry.seen == "exited" else "crashed", ""

    def _operate(self, entry: Entry, work: Any) -> asyncio.Task[None]:
        task = self._spawn(work)
        entry.tasks[task] = None
        task.add_done_callback(lambda done: entry.tasks.pop(done, None))
        return task

    def _spawn(self, work: Any) -> asyncio.Task[None]:
        return self.process.spawn(work)


async def _event(event: asyncio.Event) -> None:
    await event.wait()
