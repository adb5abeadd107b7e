"""Which VMs leave their host for another one: those it refuses, and those on a host that is being drained.

A move retires the VM and makes a successor of its name under a new uid; the disk stays behind and is lost.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from reconciler.core.model import Absent, Observation, Present, Retry, VmIntent
from reconciler.core.place import HostRoom, Placement, Unplaceable, place
from reconciler.core.plan import CREATE_FAILED
from specs.names import HostId, VmId

# An agent's slugs for what another host may well be able to do.
_ELSEWHERE_MAYBE = frozenset({"does_not_fit", "image_missing", "unsupported"})
REFUSAL_KEPT = 300.0  # seconds a host that refused a VM is not asked again for it


def means_elsewhere(status: int, code: str) -> bool:
    """Whether a refused create says that this host cannot take the VM now (HTTP 507, or the slug of a reason)."""
    return status == 507 or code in _ELSEWHERE_MAYBE


def is_refused(intent: VmIntent, seen: Observation, retry: Retry) -> bool:
    """Whether the VM's host cannot take it and nothing of it is there: it should run elsewhere.

    Never true while a copy may live on the host: it must have said, after the refusal or with it, that there is none.
    """
    if intent.desired != "running" or intent.host_id is None:
        return False
    if isinstance(seen, Present):
        return seen.state == "failed" and seen.reason == CREATE_FAILED and seen.cause in _ELSEWHERE_MAYBE
    return isinstance(seen, Absent) and retry.refused


def elsewhere(vm: VmIntent, rooms: Iterable[HostRoom], avoid: Collection[HostId] = ()) -> Placement | Unplaceable:
    """Another host than the VM's own for it; those in `avoid` have refused it lately."""
    others = []
    reasons = []
    for room in rooms:
        if room.id in avoid and room.id != vm.host_id:
            reasons.append((str(room.id), "has refused it a moment ago"))
        elif room.id != vm.host_id:
            others.append(room)
    decision = place(vm.env_id, vm.spec, others)
    return Unplaceable((*decision.reasons, *reasons)) if isinstance(decision, Unplaceable) else decision


@dataclass(frozen=True, slots=True)
class DrainStep:
    """What a drain does next in one environment. `waiting` VMs have their turn later; `blocked` ones say why they cannot go."""

    moves: tuple[tuple[VmIntent, HostId], ...] = ()
    blocked: tuple[tuple[VmIntent, str], ...] = ()
    waiting: tuple[VmIntent, ...] = ()


def drain_step(
    live: Sequence[VmIntent],
    host_id: HostId,
    rooms: Sequence[HostRoom],
    *,
    settled: Collection[VmId],
    stuck: Collection[VmId] = (),
    silent: str = "",
) -> DrainStep:
    """The VMs of one environment that leave `host_id` now, each with its new host.

    `live` are the environment's VMs that are wanted; `settled` those where they should be; `stuck` those of the others that
    need somebody's help. The roll-out rule holds: a settled VM moves only while every other one is settled. `silent` says
    why the host cannot be asked: then nothing moves, because what it runs cannot be stopped.
    """
    here = [vm for vm in live if vm.host_id == host_id]
    if silent:
        return DrainStep(blocked=tuple((vm, silent) for vm in here))
    unsettled = [vm for vm in live if vm.id not in settled]
    moves: list[tuple[VmIntent, HostId]] = []
    blocked: list[tuple[VmIntent, str]] = []
    waiting: list[VmIntent] = []
    for vm in sorted(here, key=lambda vm: (vm.id in settled, vm.name, vm.id)):
        others = [other for other in unsettled if other.id != vm.id]
        decision = elsewhere(vm, rooms)
        if isinstance(decision, Unplaceable):
            blocked.append((vm, f"no other host can take it: {decision.sentence()}"))
        elif moves:
            waiting.append(vm)
        elif vm.id in settled and others:
            hindrance = next((other for other in others if other.id in stuck), None)
            if hindrance is None:
                waiting.append(vm)
            else:
                blocked.append(
                    (vm, f"one VM of an environment moves at a time, and {hindrance.name} is not where it should be")
                )
        else:
            moves.append((vm, decision.host_id))
    return DrainStep(tuple(moves), tuple(blocked), tuple(waiting))
