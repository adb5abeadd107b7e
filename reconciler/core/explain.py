"""Says in one sentence why a VM is not where it should be: what it waits for, since when, what was tried, what comes next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from reconciler.core.model import VmIntent

ACCEPTED = "accepted"


@dataclass(frozen=True, slots=True)
class Progress:
    """What the loop knows of a VM beside its intent. Times in Unix seconds.

    `why` is what it waits for in the words of whoever decided; `tried` the call made last, "" for none; `outdated`: the
    environment asks for another machine, and it is not its turn yet; `drain`: why it is still on a host that is being drained.
    """

    settled: bool
    since: int
    why: str = ""
    tried: str = ""
    attempts: int = 0
    error: str = ""
    next_at: int | None = None
    outdated: bool = False
    drain: str = ""


def is_in_place(intent: VmIntent, progress: Progress) -> bool:
    """Whether nothing is to be done about the VM any more."""
    return progress.settled and intent.desired != "absent" and not progress.outdated and not progress.drain


def explain_vm(intent: VmIntent, progress: Progress, clock: Callable[[int], str]) -> str:
    """The sentence; never empty for a VM that is not in place. For one that is, a remark or "". `clock` writes a time."""
    if is_in_place(intent, progress):
        return progress.why
    if progress.settled and intent.desired != "absent":
        reasons = [progress.why] if progress.why else []
        if progress.outdated:
            reasons.append(
                "waits to be replaced by what its environment asks for now: one VM at a time, once the others are ready"
            )
        if progress.drain:
            reasons.append(f"waits to leave host {intent.host_id}, which is being drained: {progress.drain}")
        return "; ".join(reasons)
    parts = [_waits_for(intent, progress), f"since {clock(progress.since)}"]
    if progress.attempts and progress.tried:
        times = "once" if progress.attempts == 1 else f"{progress.attempts} times"
        parts.append(f"{progress.tried} was tried {times}")
    if progress.error and progress.error not in parts[0]:
        parts.append(f"last error: {progress.error}")
    if progress.next_at is not None:
        parts.append(f"next try at {clock(progress.next_at)}")
    return "; ".join(parts)


def _waits_for(intent: VmIntent, progress: Progress) -> str:
    if progress.why and progress.why != ACCEPTED:
        return progress.why
    goal = {"running": "run", "stopped": "be stopped", "absent": "be destroyed"}[intent.desired]
    return f"recorded and about to {goal}"
