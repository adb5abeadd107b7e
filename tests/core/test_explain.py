"""Every VM that is not where it should be has its sentence, whatever it waits for."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from reconciler.core.explain import ACCEPTED, Progress, explain_vm, is_in_place
from reconciler.core.model import Done, Observation, Retry, VmIntent, Wait
from reconciler.core.move import elsewhere
from reconciler.core.place import HostRoom, Placement, Unplaceable, place
from reconciler.core.plan import plan_vm
from tests.core.worlds import CLUSTER, fleets, intents, observations, retries, vm_intent

words = st.sampled_from(["", ACCEPTED, "the host is at step disk", "host h1 is offline: connection refused"])
progresses = st.builds(
    Progress,
    settled=st.booleans(),
    since=st.integers(0, 10**10),
    why=words,
    tried=st.sampled_from(["", "create", "start", "destroy"]),
    attempts=st.integers(0, 9),
    error=st.sampled_from(["", "no disk", "create on host h1 failed: no disk"]),
    next_at=st.none() | st.integers(0, 10**10),
    outdated=st.booleans(),
    drain=st.sampled_from(["", "no other host can take it: h2: cordoned"]),
)


def clock(unix: int) -> str:
    return f"<{unix}>"


@given(intents, progresses)
def test_the_sentence_is_never_empty_and_leaves_nothing_out(intent: VmIntent, progress: Progress) -> None:
    sentence = explain_vm(intent, progress, clock)
    if is_in_place(intent, progress):
        assert sentence == progress.why
        return
    assert sentence.strip() and "\n" not in sentence
    if progress.why != ACCEPTED:
        assert progress.why in sentence
    if not progress.settled or intent.desired == "absent":
        assert clock(progress.since) in sentence and progress.error in sentence
        assert progress.next_at is None or clock(progress.next_at) in sentence
        assert not (progress.attempts and progress.tried) or f"{progress.tried} was tried" in sentence
    else:
        assert progress.drain in sentence and (not progress.outdated or "replaced" in sentence)


@given(intents, observations, retries, st.floats(0, 200), fleets)
def test_whatever_the_core_decides_short_of_done_can_be_told(
    intent: VmIntent, seen: Observation, retry: Retry, now: float, rooms: list[HostRoom]
) -> None:
    step = plan_vm(intent, seen, retry, CLUSTER, now)
    if isinstance(step, Done):
        return
    why = step.why if isinstance(step, Wait) else ""
    decision = place(intent.env_id, intent.spec, rooms)
    if intent.host_id is None and intent.desired == "running" and isinstance(decision, Unplaceable):
        why = f"waiting for a host: {decision.sentence()}"
    sentence = explain_vm(intent, Progress(settled=False, since=5, why=why, error=retry.error), clock)
    assert why in sentence and "since <5>" in sentence
    if isinstance(decision, Unplaceable) and intent.host_id is None and intent.desired == "running":
        assert all(f"{room.id}: " in sentence for room in rooms), "every host's reason"
    other = elsewhere(intent, rooms)
    assert isinstance(other, Placement) or other.sentence()


def test_a_failing_vm_tells_the_whole_story() -> None:
    progress = Progress(False, 60, "create on host h1 failed: no disk", "create", 3, "create on host h1 failed: no disk", 99)
    assert explain_vm(vm_intent(), progress, clock) == (
        "create on host h1 failed: no disk; since <60>; create was tried 3 times; next try at <99>"
    )
    waiting = Progress(False, 60, ACCEPTED)
    assert explain_vm(vm_intent("absent"), waiting, clock) == "recorded and about to be destroyed; since <60>"


def test_sentences_read_well() -> None:
    begun = Progress(False, 60, ACCEPTED)
    assert explain_vm(vm_intent(), begun, clock) == "recorded and about to run; since <60>"
    assert explain_vm(vm_intent("stopped"), begun, clock) == "recorded and about to be stopped; since <60>"
    once = Progress(False, 60, "waiting", "start", 1)
    assert explain_vm(vm_intent(), once, clock) == "waiting; since <60>; start was tried once"
    assert explain_vm(vm_intent(), Progress(False, 60, "waiting", "start", 0), clock) == "waiting; since <60>"
    assert explain_vm(vm_intent(), Progress(False, 60, "waiting", "", 2), clock) == "waiting; since <60>"


def test_a_settled_vm_that_must_change_or_leave_says_what_it_waits_for() -> None:
    both = Progress(True, 60, "", outdated=True, drain="h2: cordoned")
    assert explain_vm(vm_intent(), both, clock) == (
        "waits to be replaced by what its environment asks for now: one VM at a time, once the others are ready; "
        "waits to leave host h1, which is being drained: h2: cordoned"
    )
    assert explain_vm(vm_intent(), Progress(True, 60, "a remark", drain="x"), clock).startswith("a remark; waits to leave")
    assert not is_in_place(vm_intent("absent"), Progress(True, 60, ""))
