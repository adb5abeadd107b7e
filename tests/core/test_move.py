"""Which VMs leave their host: never while a copy may live there, one at a time, and only to where they fit."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reconciler.core.expand import recreate
from reconciler.core.model import Absent, Observation, Present, Retry, Unknown, VmIntent
from reconciler.core.move import drain_step, elsewhere, is_refused, means_elsewhere
from reconciler.core.place import HostRoom, Placement, Unplaceable, refusal
from specs.desired import EnvSpec, VmSpec
from specs.names import EnvId, HostId, VmId
from tests.core.worlds import entries, env_intent, fleets, ids, intents, observations, vm_intent

H1 = HostId("h1")
lives = st.lists(
    st.builds(
        vm_intent,
        desired=st.sampled_from(["running", "stopped"]),
        host=st.sampled_from([None, "h0", "h1", "h2"]),
        id=st.integers(0, 30).map(lambda number: VmId(f"vm-{number}")),
        name=st.sampled_from("abcdefgh"),
        spec=entries,
    ),
    max_size=6,
    unique_by=(lambda vm: vm.id, lambda vm: vm.name),
)


@given(intents, observations, st.booleans())
def test_a_vm_leaves_a_host_that_refuses_it_only_when_nothing_of_it_is_there(
    intent: VmIntent, seen: Observation, refused: bool
) -> None:
    if is_refused(intent, seen, Retry(refused=refused)):
        assert intent.desired == "running" and intent.host_id
        assert not isinstance(seen, Unknown)
        assert (isinstance(seen, Absent) and refused) or (isinstance(seen, Present) and seen.reason == "create_failed")


@pytest.mark.parametrize(
    ("seen", "refused", "leaves"),
    [
        (Absent(), True, True),
        (Absent(), False, False),
        (Unknown("silent"), True, False),
        (Present("running"), True, False),
        (Present("failed", "create_failed", cause="does_not_fit"), False, True),
        (Present("failed", "create_failed", cause="image_missing"), False, True),
        (Present("failed", "create_failed", cause="engine_failed"), True, False),
        (Present("failed", "start_failed", cause="does_not_fit"), True, False),
    ],
)
def test_when_a_refused_vm_leaves(seen: Observation, refused: bool, leaves: bool) -> None:
    assert is_refused(vm_intent(), seen, Retry(refused=refused)) is leaves
    assert not is_refused(vm_intent("absent"), seen, Retry(refused=refused))
    assert not is_refused(vm_intent("stopped"), seen, Retry(refused=refused))


def test_what_another_host_may_be_able_to_do() -> None:
    assert means_elsewhere(507, "") and means_elsewhere(422, "image_missing") and means_elsewhere(422, "unsupported")
    assert not means_elsewhere(500, "engine_failed") and not means_elsewhere(409, "conflict") and not means_elsewhere(422, "")


@given(
    intents.filter(lambda vm: vm.host_id is not None), fleets, st.sets(st.sampled_from([f"h{n}" for n in range(9)]).map(HostId))
)
def test_elsewhere_is_another_host_that_fits_or_every_reason(vm: VmIntent, rooms: list[HostRoom], avoid: set[HostId]) -> None:
    decision = elsewhere(vm, rooms, avoid)
    if isinstance(decision, Placement):
        assert decision.host_id != vm.host_id and decision.host_id not in avoid
        assert refusal(vm.spec, next(room for room in rooms if room.id == decision.host_id)) == ""
    else:
        assert {host for host, _ in decision.reasons} == {room.id for room in rooms if room.id != vm.host_id}
        assert all(why for _, why in decision.reasons)


@given(lives, fleets, st.sets(st.integers(0, 30).map(lambda number: VmId(f"vm-{number}"))), st.sampled_from(["", "offline"]))
def test_a_drain_moves_one_vm_at_a_time_forgets_none_and_says_why(
    live: list[VmIntent], rooms: list[HostRoom], settled: set[VmId], silent: str
) -> None:
    step = drain_step(live, H1, rooms, settled=settled, silent=silent)
    here = sorted(vm.id for vm in live if vm.host_id == H1)
    told = [vm.id for vm, _ in step.moves] + [vm.id for vm, _ in step.blocked] + [vm.id for vm in step.waiting]
    assert sorted(told) == here, "each VM of the host is in exactly one place of the plan"
    assert len(step.moves) <= 1 and all(why for _, why in step.blocked)
    assert not (silent and step.moves)
    for vm, target in step.moves:
        assert target != H1 and refusal(vm.spec, next(room for room in rooms if room.id == target)) == ""
        if vm.id in settled:
            assert all(other.id in settled for other in live)
    if here and not step.moves and not silent and settled >= {vm.id for vm in live}:
        assert len(step.blocked) == len(here), "with everything settled only want of a host holds a drain up"


@given(st.lists(entries, min_size=1, max_size=5), fleets)
def test_a_drain_ends_with_an_empty_host_or_only_vms_no_other_host_takes(specs: list[VmSpec], rooms: list[HostRoom]) -> None:
    env = env_intent(EnvSpec(id="web", ssh_keys=(), vms=tuple(specs)))
    live = [vm_intent(id=VmId(f"old-{n}"), name=f"m{n}", spec=spec) for n, spec in enumerate(specs)]
    new_id = ids("new")
    for _ in range(len(live) + 1):
        step = drain_step(live, H1, rooms, settled={vm.id for vm in live})
        if not step.moves:
            break
        ((vm, target),) = step.moves
        _, successor = recreate(env, [vm], new_id, 2)  # type: ignore[arg-type]
        assert successor.name == vm.name and successor.id != vm.id and successor.host_id is None
        live = [other for other in live if other.id != vm.id] + [
            vm_intent(id=successor.id, name=vm.name, host=target, spec=vm.spec)
        ]
    left = [vm for vm in live if vm.host_id == H1]
    assert not step.moves and [vm.id for vm, _ in step.blocked] == [vm.id for vm in left]
    assert all(isinstance(elsewhere(vm, rooms), Unplaceable) for vm in left)


def test_a_stuck_sibling_holds_a_drain_up_by_name() -> None:
    rooms = [
        HostRoom(HostId(name), "", True, False, frozenset({"qemu"}), {None: frozenset({"tiny"})}, {}, 64, 0, 9999, 0, 999999, 0)
        for name in ("h1", "h2")
    ]
    stuck = vm_intent(id=VmId("vm-2"), name="b", host=None)
    step = drain_step([vm_intent(), stuck], H1, rooms, settled={VmId("vm-1")}, stuck={VmId("vm-2")})
    assert (
        step.moves == () and step.blocked[0][1] == "one VM of an environment moves at a time, and b is not where it should be"
    )
    step = drain_step([vm_intent(), stuck], H1, rooms, settled={VmId("vm-1")})
    assert step.moves == () and step.blocked == () and [vm.id for vm in step.waiting] == ["vm-1"]


def test_a_host_that_refused_lately_is_left_out_with_that_reason() -> None:
    rooms = [
        HostRoom(HostId(name), "", True, False, frozenset({"qemu"}), {None: frozenset({"tiny"})}, {}, 64, 0, 9999, 0, 999999, 0)
        for name in ("h1", "h2")
    ]
    assert elsewhere(vm_intent(), rooms, {HostId("h2")}) == Unplaceable((("h2", "has refused it a moment ago"),))
    assert elsewhere(vm_intent(), rooms) == Placement(HostId("h2"))


def test_the_environments_spread_counts_elsewhere_too() -> None:
    room = HostRoom(
        HostId("h2"), "", True, False, frozenset({"qemu"}), {None: frozenset({"tiny"})}, {}, 64, 0, 9999, 0, 999999, 0
    )
    rooms = [replace(room, env_vms={EnvId("web"): 1}), replace(room, id=HostId("h3"), cpu_total=99)]
    spread = vm_intent(spec=VmSpec(image="tiny", spread="hosts"))
    assert elsewhere(spread, rooms) == Placement(HostId("h3"))


def test_what_is_out_of_service_anyway_leaves_first() -> None:
    rooms = [
        HostRoom(HostId("h2"), "", True, False, frozenset({"qemu"}), {None: frozenset({"tiny"})}, {}, 64, 0, 9999, 0, 999999, 0)
    ]
    settled, broken = vm_intent(name="a"), vm_intent(id=VmId("vm-2"), name="b")
    step = drain_step([settled, broken], H1, rooms, settled={settled.id})
    assert step.moves == ((broken, "h2"),) and step.waiting == (settled,)
