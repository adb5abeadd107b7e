"""The fleet in memory: durable intents with their indexes, what agents last reported, and what the loop is waiting for.

Called by the loop and the API on one event loop; knows nothing of HTTP or SQL. Every change is told twice: VM ids that
should be looked at go to `wake`, objects whose visible state may differ go to `changed`.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from reconciler.core.events import Reason
from reconciler.core.explain import ACCEPTED
from reconciler.core.model import (
    Absent,
    Change,
    EnvIntent,
    HostIntent,
    Observation,
    Present,
    Retry,
    Unknown,
    VmIntent,
)
from reconciler.core.place import HostRoom, Placement, Unplaceable, place
from reconciler.core.rooms import Rooms
from reconciler.events import EventLog
from specs.desired import VmSpec
from specs.names import ClusterId, EnvId, HostId, VmId
from specs.wire import AgentInfo, AgentVm, Phase

Kind = Literal["env", "host", "vm", "event"]
BOOTS_REMEMBERED = 16  # agent processes remembered a host; a reply older than that is long past every time limit


@dataclass(frozen=True, slots=True)
class VmStatus:
    """What the loop last decided about a VM. Times in monotonic seconds.

    `settled`: nothing is left to do for it, since `settled_at`. `since`: when it was first looked at and not where it should
    be; None before. `tried`: the last call, in words.
    """

    phase: Phase = "pending"
    message: str = ACCEPTED
    retry: Retry = field(default_factory=Retry)
    next_at: float | None = None
    settled: bool = False
    settled_at: float = 0.0
    since: float | None = None
    tried: str = ""


NEW = VmStatus()  # of a VM nobody has looked at


@dataclass(frozen=True, slots=True)
class Report:
    """A host's list of VMs. `asked_at` is the tick at which it was asked for; `boot_id` is "" on a plain agent."""

    vms: Mapping[VmId, AgentVm]
    asked_at: int
    boot_id: str = ""
    seq: int = 0
    complete: bool = True


@dataclass(frozen=True, slots=True)
class _Touch:
    """The last call about a VM ended at `tick`; `boot_id`/`seq` as the reply told, if it did."""

    tick: int
    boot_id: str = ""
    seq: int = 0

    def is_covered_by(self, report: Report) -> bool:
        if self.boot_id and self.boot_id == report.boot_id:
            return report.seq >= self.seq
        return report.asked_at > self.tick


@dataclass(frozen=True, slots=True)
class DrainProgress:
    """How far a drain is: `left` VMs are bound to the host, `moving` of them are on their way out, `blocked` say why not."""

    left: int
    moving: int
    blocked: tuple[tuple[VmId, str], ...] = ()


@dataclass(slots=True)
class HostState:
    """What is known of a registered host; nothing of it is durable but `intent`."""

    intent: HostIntent
    online: bool = False
    why: str = "has not answered yet"
    heard_at: float | None = None
    offline_since: float | None = None
    info: AgentInfo | None = None
    report: Report | None = None
    vms: dict[VmId, AgentVm] = field(default_factory=dict)
    touched: dict[VmId, _Touch] = field(default_factory=dict)
    boots: deque[str] = field(default_factory=lambda: deque(maxlen=BOOTS_REMEMBERED))
    """The agent processes that have reported, the present one last."""
    drain: DrainProgress | None = None
    answered: asyncio.Event = field(default_factory=asyncio.Event)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while a change of `intent` is being committed: two at once would undo each other."""
    leaving: bool = False
    """Its removal is being committed: nothing may be placed on it any more."""

    def has_report(self, boot_id: str, seq: int) -> bool:
        """Whether the last report is of that agent process and at least as new as `seq`."""
        return self.report is not None and bool(boot_id) and self.report.boot_id == boot_id and self.report.seq >= seq

    def has_outlived(self, boot_id: str) -> bool:
        """Whether a later agent process than that one has reported."""
        return boot_id in self.boots and self.boots[-1] != boot_id

    @property
    def shown_id(self) -> str:
        """The agent's own id, or the address until it has told one."""
        return self.intent.id or self.intent.addr


@dataclass(slots=True)
class Load:
    """The sum of what is placed on a host."""

    cpu: int = 0
    mem: int = 0
    disk: int = 0
    count: int = 0

    def add(self, spec: VmSpec, sign: int) -> None:
        """Counts a VM in (`sign` 1) or out (-1)."""
        self.cpu += sign * spec.cpu
        self.mem += sign * spec.mem
        self.disk += sign * spec.disk
        self.count += sign


class Fleet:
    """All state of one controller. Not thread-safe: everything runs on one event loop."""

    def __init__(
        self,
        cluster: ClusterId,
        *,
        wake: Callable[[VmId], None] = lambda _: None,
        changed: Callable[[Kind, str], None] = lambda *_: None,
        events: EventLog | None = None,
    ) -> None:
        self.cluster = cluster
        self.events = EventLog() if events is None else events
        self.wake = wake
        self.changed = changed
        self.envs: dict[EnvId, EnvIntent] = {}
        self.vms: dict[VmId, VmIntent] = {}
        self.hosts: dict[str, HostState] = {}  # by address
        self.status: dict[VmId, VmStatus] = {}
        self._env_vms: defaultdict[EnvId, dict[VmId, None]] = defaultdict(dict)
        self._host_vms: defaultdict[HostId, dict[VmId, None]] = defaultdict(dict)  # ordered: the same run twice
        self._host_addr: dict[HostId, str] = {}
        self._unplaced: dict[VmId, None] = {}
        self._load: defaultdict[HostId, Load] = defaultdict(Load)
        self._host_envs: defaultdict[HostId, defaultdict[EnvId, int]] = defaultdict(lambda: defaultdict(int))
        self._reserved: dict[VmId, tuple[VmIntent, HostId]] = {}
        self._rooms = Rooms()
        self._stale: dict[str, None] = {}  # addresses of hosts whose room may have changed
        self._env_hosts: defaultdict[EnvId, dict[HostId, int]] = defaultdict(dict)
        self._tick = 0

    # ---- durable state

    def apply(self, change: Change) -> None:
        """Takes over a change that the store has committed."""
        for env in change.envs:
            self.envs[env.id] = env
            self._changed_vms(self.env_vms(env.id))  # those that wait for their turn in a roll-out say so
            self.changed("env", env.id)
        for vm in change.vms:
            old = self.vms.get(vm.id)
            self._set_vm(replace(vm, host_id=old.host_id, gone_at=old.gone_at) if old else vm)
        for vm_id, host_id in change.placed:
            self._set_vm(replace(self.vms[vm_id], host_id=host_id))
        for vm_id, when in change.gone:
            self._set_vm(replace(self.vms[vm_id], gone_at=when))
        for vm_id in change.drop_vms:
            self.vms.pop(vm_id, None)
            self._stale.update(dict.fromkeys(self.hosts))  # where it still is, it is a stranger from now on
        for env_id in change.drop_envs:
            self.envs.pop(env_id, None)
            self.changed("env", env_id)
        for host in change.hosts:
            self._set_host(host)
        for addr in change.drop_hosts:
            state = self.hosts.pop(addr, None)
            self._stale[addr] = None
            if state and state.intent.id:
                self._host_addr.pop(state.intent.id, None)
            self.changed("host", state.shown_id if state else addr)
            self.wake_unplaced()

    def _set_host(self, host: HostIntent) -> None:
        self._stale[host.addr] = None
        state = self.hosts.get(host.addr)
        if state is None:
            self.hosts[host.addr] = HostState(host)
        else:
            if state.intent.id != host.id:
                self.changed("host", state.shown_id)
            if state.intent.drain_total != host.drain_total and host.id:
                self._changed_vms(self.host_vms(host.id))
            state.intent = host
            if host.drain_total is None:
                state.drain = None
        if host.id:
            self._host_addr[host.id] = host.addr
        self.changed("host", self.hosts[host.addr].shown_id)
        self.wake_unplaced()

    def _set_vm(self, vm: VmIntent) -> None:
        old = self.vms.get(vm.id)
        if old is not None and old.gone_at == 0:
            self._count(old, -1)
        if vm.host_id or vm.gone_at:  # until then its placement may be on its way to the disk, and the room is not free
            self.release(vm.id)
        if old is None or old.host_id != vm.host_id:  # where it is already, it is a stranger no more
            for addr in [addr for addr, host in self.hosts.items() if vm.id in host.vms]:
                self._stale[addr] = None
        self.vms[vm.id] = vm
        if vm.gone_at:
            self._env_vms[vm.env_id].pop(vm.id, None)
            if not self._env_vms[vm.env_id]:
                del self._env_vms[vm.env_id]
            self._unplaced.pop(vm.id, None)
            self.status.pop(vm.id, None)
            if vm.host_id:
                self._host_vms[vm.host_id].pop(vm.id, None)
                self.wake_unplaced()
        else:
            self._count(vm, 1)
            self._env_vms[vm.env_id][vm.id] = None
            self.status.setdefault(vm.id, NEW)
            if vm.host_id:
                self._host_vms[vm.host_id][vm.id] = None
                self._unplaced.pop(vm.id, None)
            else:
                self._unplaced[vm.id] = None
        if old is not None and (old.desired, old.spec) != (vm.desired, vm.spec) and vm.id in self.status:
            # A new wish starts afresh: the failures of the old one must not delay it.
            self.status[vm.id] = replace(self.status[vm.id], retry=Retry(), next_at=None, settled=False, since=None)
        self.changed("vm", vm.id)
        self.changed("env", vm.env_id)
        self.wake(vm.id)

    def _count(self, vm: VmIntent, sign: int) -> None:
        if vm.host_id:
            self._add_load(vm, vm.host_id, sign)

    def _add_load(self, vm: VmIntent, host_id: HostId, sign: int) -> None:
        self._load[host_id].add(vm.spec, sign)
        if host_id in self._host_addr:
            self._stale[self._host_addr[host_id]] = None
        envs, hosts = self._host_envs[host_id], self._env_hosts[vm.env_id]
        envs[vm.env_id] += sign
        hosts[host_id] = envs[vm.env_id]
        if not envs[vm.env_id]:
            del envs[vm.env_id], hosts[host_id]
            if not hosts:
                del self._env_hosts[vm.env_id]
        self.changed("host", host_id)

    def reserve(self, vm: VmIntent, host_id: HostId) -> None:
        """Counts a chosen host as used while the placement is being committed; the VM need not be recorded yet."""
        self._reserved[vm.id] = (vm, host_id)
        self._add_load(vm, host_id, 1)

    def release(self, vm_id: VmId) -> None:
        """Gives a reservation back; none is fine."""
        reserved = self._reserved.pop(vm_id, None)
        if reserved:
            self._add_load(*reserved, -1)

    def _changed_vms(self, vms: Iterable[VmIntent]) -> None:
        for vm in vms:
            self.changed("vm", vm.id)
            self.changed("env", vm.env_id)

    def set_drain(self, addr: str, progress: DrainProgress) -> None:
        """Records how far a drain is; tells watchers only if it differs."""
        host = self.hosts.get(addr)
        if host is not None and host.drain != progress:
            host.drain = progress
            self.changed("host", host.shown_id)
            self._changed_vms(self.host_vms(HostId(host.shown_id)))

    def note(
        self, reason: Reason, message: str, *, vm: VmIntent | None = None, env: str = "", host: str = "", news: bool = False
    ) -> None:
        """Notes an event for people; about a VM it names the VM's environment and, unless told otherwise, its host."""
        event = self.events.add(
            reason,
            message,
            env=vm.env_id if vm else env,
            vm=vm.id if vm else "",
            vm_name=vm.name if vm else "",
            host=host or (vm.host_id or "" if vm else ""),
            news=news,
        )
        if event is not None:
            self.changed("event", str(event.id))

    # ---- looking things up

    def env_vms(self, env_id: EnvId) -> list[VmIntent]:
        """The environment's VMs that are not forgotten yet, oldest first."""
        return [self.vms[vm_id] for vm_id in self._env_vms.get(env_id, ())]

    def host_vms(self, host_id: HostId) -> list[VmIntent]:
        """The VMs bound to a host, retired ones included until the host confirms they are gone."""
        return [self.vms[vm_id] for vm_id in self._host_vms.get(host_id, ())]

    def host(self, host_id_or_addr: str) -> HostState | None:
        """A host by its id or its address."""
        addr = self._host_addr.get(HostId(host_id_or_addr), host_id_or_addr)
        return self.hosts.get(addr)

    def seen(self, vm: VmIntent) -> Observation:
        """What can be said of a VM on the host it is bound to."""
        host = self.host(vm.host_id) if vm.host_id else None
        if host is None:
            return Unknown(f"host {vm.host_id} is not registered" if vm.host_id else "no host is chosen yet", silent=True)
        if not host.online:
            return Unknown(f"host {host.shown_id} is offline: {host.why}", silent=True)
        if host.report is None:
            return Unknown(f"host {host.shown_id} has not reported yet")
        there = host.vms.get(vm.id)
        if there is not None:
            return _present(there)
        if vm.id in host.touched:
            return Unknown(f"waiting for a report of host {host.shown_id} that is newer than the last call")
        if not host.report.complete:
            return Unknown(f"host {host.shown_id} is still looking at what it runs")
        return Absent()

    def holder(self, vm_id: VmId) -> HostId | None:
        """The host that shows a VM for which none is recorded: the store is older than the VM's creation."""
        for host in self.hosts.values():
            there = host.vms.get(vm_id) if host.online and host.intent.id else None
            if there is not None and there.cluster_id in ("", self.cluster):
                return host.intent.id
        return None

    def rooms(self) -> list[HostRoom]:
        """Every registered host as placement sees it, in registration order."""
        self._refresh_rooms()
        rooms = {room.addr: room for room in self._rooms}
        return [rooms[addr] for addr in self.hosts]

    def place(self, env_id: EnvId, spec: VmSpec) -> Placement | Unplaceable:
        """A host for one more VM of the environment, or why none of them can take it."""
        self._refresh_rooms()
        chosen = self._rooms.choose(spec, self._env_hosts.get(env_id, {}))
        return chosen or place(env_id, spec, self.rooms())  # which looks at every host, and tells each one's reason

    def _refresh_rooms(self) -> None:
        for addr in self._stale:
            host = self.hosts.get(addr)
            if host is None:
                self._rooms.remove(addr)
            else:
                self._rooms.put(self._room(host))
        self._stale.clear()

    def _room(self, host: HostState) -> HostRoom:
        info = host.info
        host_id = HostId(host.shown_id)
        load = self._load[host_id] if host.intent.id else Load()
        strangers = [vm for vm_id, vm in host.vms.items() if not self._is_ours(host, vm_id)]
        resource = info.resource if info else None
        images: dict[str | None, frozenset[str]] = {}
        if info and info.images_by_engine:
            images = {engine: frozenset(names) for engine, names in info.images_by_engine.items()}
        elif info:
            images = {None: frozenset(info.images)}
        return HostRoom(
            id=host_id,
            addr=host.intent.addr,
            online=host.online and host.intent.id is not None and host.report is not None and not host.leaving,
            why_offline="is being removed" if host.leaving else _why_offline(host),
            cordoned=host.intent.cordoned,
            engines=frozenset(info.engines) if info else frozenset(),
            images=images,
            labels=info.labels if info else {},
            cpu_total=resource.cpu_total if resource else 0,
            mem_total=resource.mem_total if resource else 0,
            disk_total=resource.disk_total if resource else 0,
            cpu_used=load.cpu + sum(vm.cpu for vm in strangers),
            mem_used=load.mem + sum(vm.mem for vm in strangers),
            disk_used=load.disk + sum(vm.disk for vm in strangers),
            env_vms=self._host_envs[host_id] if host.intent.id else {},
        )

    def set_leaving(self, host: HostState, leaving: bool) -> None:
        """Whether the host's removal is being committed."""
        host.leaving = leaving
        self._stale[host.intent.addr] = None

    def load(self, host_id: HostId) -> Load:
        """What is placed on a host, reservations included."""
        return self._load.get(host_id) or Load()

    def _is_ours(self, host: HostState, vm_id: VmId) -> bool:
        vm = self.vms.get(vm_id)
        return vm is not None and vm.host_id == host.intent.id

    def strangers(self, host: HostState) -> list[AgentVm]:
        """What the host runs that the store has never heard of: shown and counted, never touched."""
        return [vm for vm_id, vm in host.vms.items() if not self._is_ours(host, vm_id)]

    # ---- observations

    def tick(self) -> int:
        """A new instant of the logical clock that orders calls and reports."""
        self._tick += 1
        return self._tick

    def observe_info(self, addr: str, info: AgentInfo, now: float) -> None:
        """Takes over what an agent says of itself. Its id has been checked by the caller."""
        host = self.hosts[addr]
        self._stale[addr] = None
        came_back = not host.online
        before = host.info
        host.online, host.why, host.heard_at, host.info = True, "", now, info
        host.offline_since = None
        host.answered.set()
        if came_back:
            host.report = None
            self.note("HostOnline", f"host {host.shown_id} answers at {addr}", host=host.shown_id)
        if came_back or before != info:
            self.changed("host", host.shown_id)
            self.wake_unplaced()

    def heard(self, addr: str, now: float) -> None:
        """The host answered something."""
        host = self.hosts.get(addr)
        if host is not None:
            host.heard_at = now

    def observe(self, addr: str, report: Report, now: float) -> bool:
        """Takes over a host's list, unless it is older than the last one (False)."""
        host = self.hosts[addr]
        last = host.report
        host.heard_at = now
        if last is not None:
            if report.boot_id and report.boot_id == last.boot_id and report.seq < last.seq:
                return False
            if report.asked_at < last.asked_at:
                return False
        held = {vm_id for vm_id, touch in host.touched.items() if not touch.is_covered_by(report)}
        fresh = {vm_id: vm for vm_id, vm in report.vms.items() if vm_id not in held}
        fresh.update((vm_id, host.vms[vm_id]) for vm_id in held if vm_id in host.vms)
        look = [vm_id for vm_id in host.touched if vm_id not in held]
        look += [vm_id for vm_id in {**host.vms, **fresh} if host.vms.get(vm_id) != fresh.get(vm_id)]
        if last is None or last.complete != report.complete or last.boot_id != report.boot_id:
            bound = [vm.id for vm in self.host_vms(HostId(host.shown_id))]
            look += bound
            for vm_id in bound:  # failures of a host that was away say nothing about the one that is back
                self.status[vm_id] = replace(self.status[vm_id], retry=Retry(), next_at=None)
        if report.boot_id and report.boot_id not in host.boots:
            host.boots.append(report.boot_id)
        host.touched = {vm_id: touch for vm_id, touch in host.touched.items() if vm_id in held}
        before, host.vms, host.report = host.vms, fresh, report
        self._stale[addr] = None
        self._look_at(look)
        for vm_id in fresh.keys() - before.keys():
            if not self._is_ours(host, vm_id) and vm_id not in self._unplaced:  # those are bound to this host now
                self._note_stranger(host, fresh[vm_id])
        if last is None or any(
            before.get(key) != fresh.get(key) for key in {**before, **fresh} if not self._is_ours(host, key)
        ):
            self.wake_unplaced()
            self.changed("host", host.shown_id)
        return True

    def _note_stranger(self, host: HostState, vm: AgentVm) -> None:
        message = f"host {host.shown_id} has VM {vm.id}, which was never recorded here: adopt it or destroy it by hand"
        event = self.events.add("UnknownVmFound", message, vm=vm.id, host=host.shown_id, news=True)
        if event is not None:
            self.changed("event", str(event.id))

    def observe_reply(self, addr: str, vm_id: VmId, vm: AgentVm | None, boot_id: str, seq: int) -> None:
        """Takes over the outcome of a call: the VM as the reply shows it, or None where the reply shows none.

        Reports older than this moment say nothing about the VM any more. A reply that was long under way says nothing itself
        if what is known is newer, be it of the same agent process or of a later one: it would bring back a state that is past.
        """
        host = self.hosts.get(addr)
        if host is None:
            return
        if host.has_outlived(boot_id) or (vm_id not in host.touched and host.has_report(boot_id, seq)):
            return
        host.touched[vm_id] = _Touch(self.tick(), boot_id, seq)
        if not self._is_ours(host, vm_id):
            self._stale[addr] = None
        if vm is not None:
            host.vms[vm_id] = vm
        else:
            host.vms.pop(vm_id, None)
        self.changed("vm", vm_id)
        intent = self.vms.get(vm_id)
        if intent:
            self.changed("env", intent.env_id)

    def lost(self, addr: str, why: str, now: float) -> None:
        """The host is offline: nothing is known of its VMs until it reports again."""
        host = self.hosts.get(addr)
        if host is None:
            return
        self._stale[addr] = None
        was_online, changed = host.online, host.why != why
        host.online, host.why, host.report = False, why, None
        if host.offline_since is None:
            host.offline_since = now
        if was_online or changed:
            self.changed("host", host.shown_id)
        if was_online:
            self.note("HostOffline", f"host {host.shown_id} is offline: {why}", host=host.shown_id)
            self._look_at(vm.id for vm in self.host_vms(HostId(host.shown_id)))
            self.wake_unplaced()

    def _look_at(self, vm_ids: Iterable[VmId]) -> None:
        for vm_id in dict.fromkeys(vm_ids):
            intent = self.vms.get(vm_id)
            if intent is not None:
                self.wake(vm_id)
                self.changed("vm", vm_id)
                self.changed("env", intent.env_id)

    @property
    def has_unplaced(self) -> bool:
        """Whether some VM waits for a host."""
        return bool(self._unplaced)

    def wake_unplaced(self) -> None:
        """Room, images or hosts may have come: everything without a host is looked at again."""
        for vm_id in self._unplaced:
            self.wake(vm_id)

    def set_status(self, vm_id: VmId, status: VmStatus) -> None:
        """Records what the loop decided; tells watchers only if it differs."""
        if vm_id in self.status and self.status[vm_id] != status:
            self.status[vm_id] = status
            self.changed("vm", vm_id)
            self.changed("env", self.vms[vm_id].env_id)


def _why_offline(host: HostState) -> str:
    return "has not reported yet" if host.online else f"offline: {host.why}"


def _present(vm: AgentVm) -> Present:
    return Present(
        state=vm.state,
        reason=vm.reason,
        cause=vm.cause,
        message=vm.message,
        step=vm.step,
        ip=vm.ip,
        ports=vm.port_map,
        cluster_id=vm.cluster_id,
        warnings=vm.warnings,
        ready=vm.ready,
    )
