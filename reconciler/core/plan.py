"""Decides the next step of one VM. Called by the loop for every VM id it takes from the queue."""

from __future__ import annotations

from reconciler.core.model import (
    Absent,
    Call,
    Create,
    Destroy,
    Done,
    Forget,
    Observation,
    Place,
    Present,
    Retry,
    Start,
    Step,
    Stop,
    Unknown,
    VmIntent,
    Wait,
)
from specs.names import ClusterId
from specs.wire import Phase

CREATE_FAILED = "create_failed"
# `remove_failed`: the agent goes on clearing up by itself and refuses every other call until then. `state_unknown`: it is on
# the host, but whether it runs nobody can say; a second start would write to the same disk.
_NOT_FOR_US = frozenset({"remove_failed", "state_unknown"})
EXITED = "exited"
# A stop asked of a VM in one of these clears the reason on the agent, so that a later start is not taken for a restart.
_ENDED_UNASKED = frozenset({EXITED, "crashed", "start_failed"})


def plan_vm(intent: VmIntent, seen: Observation, retry: Retry, cluster: ClusterId, now: float) -> Step:
    """The one step that brings this VM nearer to its intent; deterministic.

    `seen` must come from the host the intent is bound to. A call is held back until `retry.not_before`.
    """
    step = _next_step(intent, seen, cluster)
    if isinstance(step, Call) and now < retry.not_before:
        why = seen.message if isinstance(seen, Present) and seen.message else retry.error
        return Wait(why or "waiting before the next try", until=retry.not_before, phase=_troubled(intent))
    return step


def _troubled(intent: VmIntent) -> Phase:
    return "terminating" if intent.desired == "absent" else "degraded"


def _under_way(intent: VmIntent) -> Phase:
    return "terminating" if intent.desired == "absent" else "progressing"


def _next_step(intent: VmIntent, seen: Observation, cluster: ClusterId) -> Step:
    if intent.host_id is None:
        return _unplaced(intent)
    if isinstance(seen, Unknown):
        return Wait(seen.why, phase=_troubled(intent) if seen.silent else _under_way(intent))
    if isinstance(seen, Present) and seen.cluster_id not in ("", cluster):
        # Its owner would undo whatever we do: two controllers would fight over one machine.
        return Wait(f"host {intent.host_id} keeps this VM for another cluster ({seen.cluster_id})", phase="degraded")
    if isinstance(seen, Present) and seen.reason in _NOT_FOR_US and intent.desired != "absent":
        return Wait(seen.message or "the host cannot say how it is", phase="degraded")
    if intent.desired == "absent":
        return Forget() if isinstance(seen, Absent) else Destroy()
    if isinstance(seen, Absent):
        return Create() if intent.desired == "running" else Done("stopped", "not created on a host yet")
    return _toward_running(intent, seen) if intent.desired == "running" else _toward_stopped(seen)


def _unplaced(intent: VmIntent) -> Step:
    match intent.desired:
        case "running":
            return Place()
        case "stopped":
            return Done("stopped", "not created on a host yet")
        case _:
            return Forget()


def _toward_running(intent: VmIntent, seen: Present) -> Step:
    if seen.state == "running":
        return _once_it_answers(seen)
    if seen.state == "creating":
        return Wait(f"the host is at step {seen.step}" if seen.step else "the host is creating it")
    if seen.reason == CREATE_FAILED:
        return Create()
    if seen.state == "failed" or seen.reason == "crashed":
        if intent.spec.restart == "never":
            return Done("degraded", f"{seen.message or 'it failed'}; restart is never")
        return Start()
    if seen.reason == EXITED and intent.spec.restart != "always":
        return Done("stopped", f"the guest powered itself off; restart is {intent.spec.restart}")
    return Start()


def _once_it_answers(seen: Present) -> Step:
    """A host that tells nothing of readiness was not asked to probe, or is a plain one: its running process must do."""
    if seen.ready is None or seen.ready.status:
        return Done("ready", seen.message)
    return Wait(
        seen.ready.message or "the guest does not answer yet",
        phase="degraded" if seen.ready.reason == "TimedOut" else "progressing",
    )


def _toward_stopped(seen: Present) -> Step:
    if seen.state == "creating":
        return Wait(f"the host is at step {seen.step}; it stops afterwards" if seen.step else "the host is creating it")
    if seen.state == "running" or seen.reason in _ENDED_UNASKED:
        return Stop()
    if seen.reason == CREATE_FAILED:
        return Done("stopped", "not created on a host yet")
    return Done("stopped")
