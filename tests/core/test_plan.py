"""What plan_vm decides, and what it must never decide."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
from reconciler.core.plan import plan_vm
from specs.desired import VmSpec
from specs.wire import Readiness
from tests.core.worlds import CLUSTER, intents, observations, presents, retries, vm_intent

NEVER_TRIED = Retry()
ANSWERED = Readiness(status=True, reason="Answered")
PROBING = Readiness(status=False, reason="Probing", message="no answer yet")
TIMED_OUT = Readiness(status=False, reason="TimedOut", message="no answer in time")


def plan(intent: VmIntent, seen: Observation, retry: Retry = NEVER_TRIED, now: float = 1000.0) -> Step:
    return plan_vm(intent, seen, retry, CLUSTER, now)


@given(intents, observations, retries, st.floats(0, 200))
def test_the_same_question_has_the_same_answer(intent: VmIntent, seen: Observation, retry: Retry, now: float) -> None:
    assert plan(intent, seen, retry, now) == plan(intent, seen, retry, now)


@given(intents, st.booleans(), retries)
def test_unknown_never_leads_to_a_call(intent: VmIntent, silent: bool, retry: Retry) -> None:
    assert not isinstance(plan(intent, Unknown("silent", silent), retry), Call)


@given(intents, observations, retries, st.floats(0, 200))
def test_nothing_is_called_before_its_time(intent: VmIntent, seen: Observation, retry: Retry, now: float) -> None:
    step = plan(intent, seen, retry, now)
    if now < retry.not_before:
        assert not isinstance(step, Call)
    if isinstance(step, Wait):
        assert step.why, "every wait has its reason"


@given(intents, observations)
def test_only_a_retired_vm_is_destroyed_and_only_an_absent_one_forgotten(intent: VmIntent, seen: Observation) -> None:
    step = plan(intent, seen)
    if isinstance(step, Destroy | Forget):
        assert intent.desired == "absent"
    if isinstance(step, Forget) and intent.host_id is not None:
        assert seen == Absent()
    if isinstance(step, Stop):
        assert intent.desired == "stopped"


@given(intents.filter(lambda intent: intent.host_id is not None), presents)
def test_another_clusters_vm_is_left_alone(intent: VmIntent, seen: Present) -> None:
    assert not isinstance(plan(intent, replace(seen, cluster_id="theirs")), Call | Forget)


def _carry_out(seen: Observation, step: Step) -> Observation:
    """A host that does as it is told."""
    match step:
        case Create() | Start():
            return Present("running")
        case Stop():
            return Present("stopped")
        case Destroy():
            return Absent()
        case _:
            return seen


@given(intents.filter(lambda intent: intent.host_id is not None), observations.filter(lambda o: not isinstance(o, Unknown)))
def test_an_obedient_host_reaches_what_is_wanted_and_then_is_left_in_peace(intent: VmIntent, seen: Observation) -> None:
    if isinstance(seen, Present) and seen.state == "creating":
        seen = Present("running")
    for _ in range(4):
        seen = _carry_out(seen, plan(intent, seen))
    last = plan(intent, seen)
    assert isinstance(last, Forget if intent.desired == "absent" else Done)
    if intent.desired == "running" and intent.spec.restart == "always":
        assert last == Done("ready") or (isinstance(last, Done) and last.phase == "ready")
    if intent.desired == "stopped":
        assert isinstance(last, Done) and last.phase == "stopped"


@pytest.mark.parametrize(
    ("restart", "seen", "step"),
    [
        ("always", Present("stopped", "exited"), Start()),
        ("always", Present("failed", "crashed", "killed"), Start()),
        ("on-failure", Present("stopped", "exited"), Done("stopped", "the guest powered itself off; restart is on-failure")),
        ("on-failure", Present("failed", "crashed", "killed"), Start()),
        ("never", Present("stopped", "exited"), Done("stopped", "the guest powered itself off; restart is never")),
        ("never", Present("failed", "crashed", "killed"), Done("degraded", "killed; restart is never")),
        ("never", Present("failed", "create_failed", "no disk"), Create()),
        ("never", Present("stopped"), Start()),
        ("always", Present("paused"), Start()),
        ("always", Present("creating", step="disk"), Wait("the host is at step disk")),
        ("always", Present("running"), Done("ready")),
        ("always", Present("running", ready=ANSWERED), Done("ready")),
        ("always", Present("running", ready=PROBING), Wait("no answer yet")),
        ("always", Present("running", ready=TIMED_OUT), Wait("no answer in time", phase="degraded")),
        ("never", Present("stopped", "crashed", "killed"), Done("degraded", "killed; restart is never")),
        ("always", Absent(), Create()),
    ],
)
def test_a_vm_that_should_run(restart: str, seen: Observation, step: Step) -> None:
    intent = vm_intent(spec=VmSpec(image="tiny", restart=restart))
    assert plan(intent, seen) == step


@pytest.mark.parametrize(
    ("seen", "step"),
    [
        (Present("running"), Stop()),
        (Present("stopped"), Done("stopped")),
        (Present("paused"), Done("stopped")),
        (Present("stopped", "exited"), Stop()),
        (Present("failed", "crashed"), Stop()),
        (Present("failed", "create_failed"), Done("stopped", "not created on a host yet")),
        (Present("creating"), Wait("the host is creating it")),
        (Absent(), Done("stopped", "not created on a host yet")),
    ],
)
def test_a_vm_that_should_be_stopped(seen: Observation, step: Step) -> None:
    assert plan(vm_intent("stopped"), seen) == step


@pytest.mark.parametrize(
    ("desired", "step"),
    [("running", Place()), ("stopped", Done("stopped", "not created on a host yet")), ("absent", Forget())],
)
def test_a_vm_without_a_host(desired: str, step: Step) -> None:
    assert plan(vm_intent(desired, host=None), Unknown("no host is chosen yet")) == step


def test_a_held_back_call_says_why_and_until_when() -> None:
    retry = Retry(3, 1030.0, "create on host h1 failed: disk full")
    assert plan(vm_intent(), Absent(), retry) == Wait("create on host h1 failed: disk full", 1030.0, "degraded")
    failed = Present("failed", "create_failed", "image is broken")
    assert plan(vm_intent(), failed, retry) == Wait("image is broken", 1030.0, "degraded")
    assert plan(vm_intent("absent"), Present("running"), retry) == Wait(
        "create on host h1 failed: disk full", 1030.0, "terminating"
    )


@pytest.mark.parametrize("reason", ["state_unknown", "remove_failed"])
def test_a_vm_its_host_cannot_speak_for_is_left_alone_but_may_be_destroyed(reason: str) -> None:
    for state in ("running", "stopped", "failed"):
        seen = Present(state, reason, "the daemon does not answer")
        for desired in ("running", "stopped"):
            assert plan(vm_intent(desired), seen) == Wait("the daemon does not answer", phase="degraded")
        assert plan(vm_intent("absent"), seen) == Destroy()


def test_waits_say_what_phase_they_are_of() -> None:
    for silent, running in ((True, "degraded"), (False, "progressing")):
        seen = Unknown("no report yet", silent)
        assert plan(vm_intent(), seen) == Wait("no report yet", phase=running)  # type: ignore[arg-type]
        assert plan(vm_intent("absent"), seen) == Wait("no report yet", phase="terminating")
    theirs = Present("running", cluster_id="theirs")
    assert plan(vm_intent(), theirs) == Wait("host h1 keeps this VM for another cluster (theirs)", phase="degraded")
    assert plan(vm_intent(), Present("running", cluster_id=CLUSTER)) == Done("ready")
    assert plan(vm_intent(), Present("failed", "state_unknown")) == Wait("the host cannot say how it is", phase="degraded")
    assert plan(vm_intent(), Present("creating")) == Wait("the host is creating it")
    assert plan(vm_intent("stopped"), Present("creating", step="disk")) == Wait("the host is at step disk; it stops afterwards")


def test_a_try_is_due_at_its_time_and_not_before() -> None:
    assert plan(vm_intent(), Absent(), Retry(1, 1000.0), now=1000.0) == Create()
    assert plan(vm_intent(), Absent(), Retry(1, 1000.0), now=999.9) == Wait("waiting before the next try", 1000.0, "degraded")


def test_what_failed_or_crashed_without_a_word_is_told_all_the_same() -> None:
    never = vm_intent(spec=VmSpec(image="tiny", restart="never"))
    for seen in (Present("failed"), Present("stopped", "crashed")):
        assert plan(never, seen) == Done("degraded", "it failed; restart is never")
    assert plan(vm_intent(), Present("running", message="it was restarted")) == Done("ready", "it was restarted")
