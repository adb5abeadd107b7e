"""What must never happen (S1–S9, L5), checked at the moment it would: on the hosts, at the store, at the wire.

Told by hosts, disks and clients what really happens. A violation is a sentence; the first one ends the schedule.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from agent.machine import Lease
from reconciler.agents import AgentFailure, Refused, Reply
from reconciler.core.invariants import violations
from reconciler.core.model import Change
from reconciler.fleet import Fleet, Report
from reconciler.loop.reconciler import CALLS_PER_HOST
from specs.names import EnvId, HostId, VmId
from specs.wire import AgentVm
from tests.sim.host import Host
from tests.sim.loop import Process
from tests.sim.store import Mirror

if TYPE_CHECKING:
    from tests.sim.world import World

BURST, BURST_SECONDS = 12, 5.0  # mutating calls for one VM by one controller
WRITE_SECONDS = 10.0  # a decision may have been on its way to a slow store for so long when it is written
SMALL_JUMP = 600.0  # seconds of wall clock that need not be told from time really passing


@dataclass(frozen=True, slots=True)
class Sight:
    """A list that has reached a controller, and what was really on the host when it was made."""

    when: float
    boot_id: str
    seq: int
    complete: bool
    ids: frozenset[VmId]


@dataclass
class Seen:
    """What one controller process has been told, and what it has under way."""

    fleet: Fleet | None = None
    mirror: Mirror | None = None
    listings: defaultdict[str, deque[Sight]] = field(default_factory=lambda: defaultdict(lambda: deque(maxlen=64)))
    last_sent: dict[VmId, float] = field(default_factory=dict)
    sent_before: dict[VmId, float] = field(default_factory=dict)
    replies: dict[tuple[str, VmId], Reply] = field(default_factory=dict)
    boots: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    in_flight: Counter[str] = field(default_factory=Counter)
    bursts: defaultdict[VmId, deque[float]] = field(default_factory=lambda: defaultdict(lambda: deque(maxlen=BURST)))
    started_in_a_jump: bool = False


class Checks:
    """The safety checks of one schedule."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.found: list[str] = []
        self.wished: defaultdict[VmId, set[str]] = defaultdict(set)
        self.alive: dict[VmId, str] = {}
        self.made_on: Counter[VmId] = Counter()
        self.removed_from: Counter[VmId] = Counter()
        self.excused: Counter[VmId] = Counter()
        self.tolerates_copies: set[VmId] = set()
        self.forked = False
        """Whether some controller works on an older copy of the store than another one has worked on."""
        self.mutating = 0
        self._terms: dict[tuple[str, str], int] = {}
        self._seen: dict[Process, Seen] = {}

    def violated(self, rule: str, what: str) -> None:
        """A check has failed."""
        self.found.append(f"{rule}: {what} (at {self._world.loop.now:.3f} s)")
        self._world.note("VIOLATION", rule, what)

    def excuse(self, vm_id: VmId) -> None:
        """A fault may make one more creation of this VM necessary or possible."""
        self.excused[vm_id] += 1

    def fork(self, mirror: Mirror) -> None:
        """A controller will work on a copy of the store that knows nothing of what is committed elsewhere from now on.

        A VM that is placed nowhere in that copy may have been placed and made by the other branch, on a host that says nothing
        when the copy's controller places it anew: no controller can know of it. All else must hold.
        """
        self.forked = True
        for vm in mirror.vms.values():
            self.excuse(vm.id)
            if not vm.gone_at and vm.host_id is None:
                self.tolerates_copies.add(vm.id)

    # ---- on hosts (host.Witness)

    def booted(self, host: Host, vm_id: VmId) -> None:
        """S1."""
        self._world.note("booted", vm_id, host.name)
        if vm_id in self.alive and vm_id not in self.tolerates_copies:
            self.violated("S1", f"VM {vm_id} is started on {host.name} while it runs on {self.alive[vm_id]}")
        self.alive[vm_id] = host.name

    def halted(self, host: Host, vm_id: VmId, why: str) -> None:
        """S2."""
        self._world.note("halted", vm_id, host.name, why)
        if self.alive.get(vm_id) == host.name:
            del self.alive[vm_id]
        if why == "stop" and not self.wished[vm_id] & {"stopped", "absent"}:
            self.violated("S2", f"VM {vm_id} is stopped on {host.name}, and nobody ever asked for that")
        if why == "undo" and host.records[vm_id].complete:
            self.violated("S2", f"VM {vm_id} on {host.name} is undone though it was complete")

    def made(self, host: Host, vm_id: VmId) -> None:
        """S7, on the host's own records."""
        self._world.note("made", vm_id, host.name)
        self.made_on[vm_id] += 1
        mine = host.records[vm_id].lease
        for other_id, other in host.records.items():
            if other_id != vm_id and _overlap(mine, other.lease):
                self.violated("S7", f"VMs {vm_id} and {other_id} share an address or a port on {host.name}")
        sums = [sum(getattr(r.request, what) for r in host.records.values()) for what in ("cpu", "mem", "disk")]
        if any(used > total for used, total in zip(sums, (host.cpu, host.mem, host.disk), strict=True)):
            self.violated("S7", f"host {host.name} holds {sums} of {(host.cpu, host.mem, host.disk)}")

    def removed(self, host: Host, vm_id: VmId, why: str) -> None:
        """S2."""
        self._world.note("removed", vm_id, host.name, why)
        self.removed_from[vm_id] += 1
        if why != "destroy":
            self.excuse(vm_id)
        elif "absent" not in self.wished[vm_id]:
            self.violated("S2", f"VM {vm_id} is destroyed on {host.name}, and nobody ever asked for that")

    def leased(self, host: Host, vm_id: VmId, lease: Lease) -> None:
        """S7, against everything whose rules may still be in force."""
        for other_id, other in host.records.items():
            if other_id != vm_id and _overlap(lease, other.lease):
                self.violated("S7", f"VM {vm_id} is given an address or a port on {host.name} that {other_id} still has")

    def acted(self, host: Host, cluster: str, term: int) -> None:
        """S6."""
        highest = self._terms.get((host.name, cluster), -1)
        if term < highest:
            self.violated("S6", f"a call of term {term} takes effect on {host.name}, which has seen term {highest}")
        self._terms[host.name, cluster] = max(term, highest)

    # ---- in controllers

    def begin(self, process: Process, fleet: Fleet, mirror: Mirror) -> None:
        """A controller process has its fleet; what it accepts is checked from now on (S5)."""
        seen = self._seen[process] = Seen(fleet, mirror, started_in_a_jump=self._world.jump != 0.0)
        observe = fleet.observe

        def checked(addr: str, report: Report, now: float) -> bool:
            before = fleet.hosts[addr].report
            accepted = observe(addr, report, now)
            if accepted and process.alive:
                self._check_observation(seen, fleet, addr, report, before)
            return accepted

        fleet.observe = checked  # type: ignore[method-assign]
        observe_reply = fleet.observe_reply

        def checked_reply(addr: str, vm_id: VmId, vm: AgentVm | None, boot_id: str, seq: int) -> None:
            host = fleet.hosts.get(addr)
            before = host.vms.get(vm_id) if host else None
            is_held = bool(host and vm_id in host.touched)
            observe_reply(addr, vm_id, vm, boot_id, seq)
            if not process.alive or host is None or host.report is None or not boot_id or is_held:
                return
            is_older = host.report.boot_id == boot_id and host.report.seq > seq
            if is_older and host.vms.get(vm_id) is not before:
                self.violated("S5", f"a reply of {addr} older than the last report replaced what that says of {vm_id}")

        fleet.observe_reply = checked_reply  # type: ignore[method-assign]

    def _check_observation(self, seen: Seen, fleet: Fleet, addr: str, report: Report, before: Report | None) -> None:
        if not report.boot_id:
            return
        boots = seen.boots[addr]
        if not boots or boots[-1] != report.boot_id:
            if report.boot_id in boots:
                self.violated("S5", f"a report of {addr} from an agent process that has ended was accepted")
            boots.append(report.boot_id)
        if before is not None and before.boot_id == report.boot_id and report.seq < before.seq:
            self.violated("S5", f"report {report.seq} of {addr} was accepted after {before.seq}")
        held = fleet.hosts[addr].vms
        for (host, vm_id), reply in seen.replies.items():
            if host != addr or reply.boot_id != report.boot_id or report.seq >= reply.seq:
                continue
            if (held.get(vm_id) is None) != (reply.vm is None) or (reply.vm is not None and held.get(vm_id) is not reply.vm):
                self.violated("S5", f"a report of {addr} from before the last call about {vm_id} replaced the call's outcome")

    def listed(self, process: Process, host: Host, sight: Sight) -> None:
        """A list has reached a controller."""
        seen = self._seen.get(process)
        if seen is not None:
            seen.listings[host.name].append(sight)

    def sending(self, process: Process, host: Host, verb: str, vm_id: VmId) -> None:
        """S3 and L5."""
        seen = self._seen[process]
        now = self._world.loop.now
        assert seen.mirror is not None and seen.fleet is not None
        self.mutating += 1
        self._world.note("sends", verb, vm_id, host.name)
        wish = {"create": "running", "start": "running", "stop": "stopped", "destroy": "absent"}[verb]
        if wish not in seen.mirror.wished.get(vm_id, ()):
            self.violated("S3", f"{verb} of VM {vm_id} is sent to {host.name}, and {wish} was never recorded")
        if host.name not in seen.mirror.hosted.get(vm_id, ()):
            self.violated("S3", f"{verb} of VM {vm_id} is sent to {host.name}, and that place was never recorded")
        state = seen.fleet.host(host.name)
        if state is None or not state.online:
            self.violated("L5", f"{verb} of VM {vm_id} is sent to {host.name}, which is offline")
        seen.in_flight[host.name] += 1
        if seen.in_flight[host.name] > CALLS_PER_HOST:
            self.violated("L5", f"{seen.in_flight[host.name]} calls at once to {host.name}")
        burst = seen.bursts[vm_id]
        if len(burst) == BURST and now - burst[0] < BURST_SECONDS:
            self.violated("L5", f"{BURST + 1} calls for VM {vm_id} within {BURST_SECONDS:g} s")
        burst.append(now)
        seen.sent_before[vm_id] = seen.last_sent.get(vm_id, -1.0)
        seen.last_sent[vm_id] = now

    def answered(
        self, process: Process, host: Host, vm_id: VmId, reply: Reply | None, error: AgentFailure | None = None
    ) -> None:
        """A mutating call has ended; None without an answer or refused."""
        seen = self._seen[process]
        if isinstance(error, Refused) and error.code in ("stale_term", "does_not_fit"):  # nothing has come of it
            seen.last_sent[vm_id] = seen.sent_before.get(vm_id, -1.0)
        seen.in_flight[host.name] -= 1
        if reply is not None:
            seen.replies[host.addr, vm_id] = reply
        else:
            seen.replies.pop((host.addr, vm_id), None)

    def calls_under_way(self, process: Process) -> int:
        """Mutating calls a controller waits for."""
        return sum(self._seen[process].in_flight.values())

    # ---- at the store

    def committing(self, process: Process, change: Change, mirror: Mirror) -> None:
        """S4, S5 and S9, before the mirror follows the change."""
        seen = self._seen.get(process)
        for vm_id, host_id in change.placed:
            if seen is not None and seen.fleet is not None:
                self._check_placement(seen.fleet, vm_id, host_id)
        for vm_id, _ in change.gone:
            vm = mirror.vms.get(vm_id)
            if vm is not None and vm.host_id and seen is not None:
                self._check_gone(seen, vm_id, vm.host_id)
        for env in change.envs:
            old = mirror.envs.get(env.id)
            if old is None:
                continue
            if env.generation < old.generation or env.rolled < old.rolled:
                self.violated("S5", f"environment {env.id} goes back from generation {old.generation} to {env.generation}")
            if env.deleting and not old.deleting and seen is not None:
                self._check_expiry(seen, env.id, old.expires_at)

    def committed(self, change: Change, mirror: Mirror) -> None:
        """S7 and the core's own invariants, on what is recorded now."""
        for vm in change.vms:
            self.wished[vm.id].add(vm.desired)
        # What the other branch has made is bound to where it is, room or not; the rest then goes elsewhere.
        found = {mirror.vms[vm_id].host_id for vm_id in self.tolerates_copies if vm_id in mirror.vms}
        rooms = {HostId(h.name): (h.cpu, h.mem, h.disk) for h in self._world.hosts if h.name not in found}
        for what in violations(mirror.envs, mirror.vms.values(), rooms):
            self.violated("S7", what)

    def loaded(self, difference: str) -> None:
        """S8."""
        if difference:
            self.violated("S8", f"what was committed is not what is there after a restart: {difference}")

    def acknowledged(self, what: str, is_recorded: bool) -> None:
        """S8: a person has been told that something is recorded."""
        if not is_recorded:
            self.violated("S8", f"{what} was acknowledged and is not recorded")

    def _check_placement(self, fleet: Fleet, vm_id: VmId, host_id: str) -> None:
        for state in fleet.hosts.values():
            other = state.intent.id
            if other and other != host_id and state.online and vm_id in state.vms and other in self._told_before(fleet, vm_id):
                self.violated("S1", f"VM {vm_id} is placed on {host_id} while {other} shows it")

    def _told_before(self, fleet: Fleet, vm_id: VmId) -> set[str]:
        """The hosts whose lists a controller has had for long enough to heed them, and which show the VM."""
        seen = next(seen for seen in self._seen.values() if seen.fleet is fleet)
        long_ago = self._world.loop.now - WRITE_SECONDS
        return {host for host, sights in seen.listings.items() if any(s.when < long_ago and vm_id in s.ids for s in sights)}

    def _check_gone(self, seen: Seen, vm_id: VmId, host_id: str) -> None:
        sent = seen.last_sent.get(vm_id, -1.0)
        reply = seen.replies.get((self._world.addr_of(host_id), vm_id))

        def is_proof(sight: Sight) -> bool:
            is_newer = sight.when >= sent
            if reply is not None and reply.boot_id == sight.boot_id:  # the agent numbers what it says
                is_newer = is_newer or sight.seq >= reply.seq
            return sight.complete and is_newer and vm_id not in sight.ids

        if not any(map(is_proof, seen.listings[host_id])):
            self.violated("S4", f"the tombstone of VM {vm_id} ends without a complete, newer list of {host_id} that lacks it")

    def _check_expiry(self, seen: Seen, env_id: EnvId, expires_at: int) -> None:
        world = self._world
        if env_id in world.users.deleting or seen.started_in_a_jump:
            return
        jumps = [world.jump] + [world.last_jump] * (world.loop.now < world.jump_ended_at + WRITE_SECONDS)
        slack = max((abs(jump) for jump in jumps if abs(jump) <= SMALL_JUMP), default=0.0)
        if not expires_at or world.true_wall() + slack + 1 < expires_at:
            self.violated("S9", f"environment {env_id} expires {expires_at - world.true_wall():.0f} s early")

    # ---- at the end

    def check_counts(self) -> None:
        """O1: nothing was created or destroyed more often than the faults made necessary."""
        for vm_id, times in self.made_on.items():
            if times > 1 + self.excused[vm_id]:
                self.violated("O1", f"VM {vm_id} was created {times} times, {1 + self.excused[vm_id]} would do")


def _overlap(one: Lease, other: Lease) -> bool:
    return one.ip == other.ip or bool({*one.ports.values()} & {*other.ports.values()})
