"""How an environment becomes VMs, and how it changes."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from reconciler.core.expand import EnvChange, expand, recreate, with_env_keys
from reconciler.core.expiry import MAX_JUMP, clock_jumped, expired
from reconciler.core.model import EnvIntent, VmIntent
from specs.desired import EnvSpec, VmSpec
from specs.names import VmId
from tests.core.worlds import env_intent, ids, specs


def apply(existing: list[VmIntent], put: tuple[VmIntent, ...]) -> list[VmIntent]:
    rows = {vm.id: vm for vm in existing} | {vm.id: vm for vm in put}
    return [vm for vm in rows.values() if vm.desired != "absent"]


def roll_out(env: EnvIntent, vms: list[VmIntent], new_id: object) -> tuple[list[VmIntent], int]:
    """Goes on until nothing is pending; returns the VMs and how many rounds it took."""
    for round_ in range(50):
        change = expand(env, vms, new_id, 7, settled={vm.id for vm in vms})  # type: ignore[arg-type]
        vms = apply(vms, change.put)
        if not change.pending:
            return vms, round_ + 1
    raise AssertionError("the roll-out does not end")


@given(specs)
def test_a_new_environment_gets_exactly_its_machines(spec: EnvSpec) -> None:
    vms, rounds = roll_out(env_intent(spec), [], ids())
    assert rounds == 1
    assert [vm.name for vm in vms] == list(spec.vm_names())
    assert len({vm.id for vm in vms}) == len(vms)
    assert all(vm.desired == "running" and vm.host_id is None for vm in vms)


@given(specs)
def test_the_same_again_changes_nothing(spec: EnvSpec) -> None:
    env = env_intent(spec)
    vms, _ = roll_out(env, [], ids())
    again = expand(env, vms, ids("new"), 8, settled={vm.id for vm in vms})  # type: ignore[arg-type]
    assert again.put == () and again.pending == 0
    assert {line.action for line in again.plan} == {"keep"}


@given(specs, specs)
def test_any_change_ends_with_what_was_asked_and_no_reused_uid(old: EnvSpec, new: EnvSpec) -> None:
    new_id = ids()
    before, _ = roll_out(env_intent(old), [], new_id)
    after, _ = roll_out(env_intent(new, generation=2), before, new_id)
    fresh, _ = roll_out(env_intent(new, generation=2), [], ids("x"))
    assert sorted((vm.name, vm.spec_hash) for vm in after) == sorted((vm.name, vm.spec_hash) for vm in fresh)
    kept = {vm.id: vm.spec_hash for vm in before}
    assert all(kept[vm.id] == vm.spec_hash for vm in after if vm.id in kept), "another spec hash needs another uid"


@given(st.integers(2, 9))
def test_settled_vms_are_replaced_one_at_a_time(count: int) -> None:
    def spec(mem: int) -> EnvSpec:
        return EnvSpec(id="web", ssh_keys=(), vms=(VmSpec(image="tiny", count=count, mem=mem),))

    new_id = ids()
    vms, _ = roll_out(env_intent(spec(64)), [], new_id)
    env = env_intent(spec(65), generation=2)
    first = expand(env, vms, new_id, 7, settled={vm.id for vm in vms})  # type: ignore[arg-type]
    assert (len(first.put), first.pending) == (2, count - 1)
    vms = apply(vms, first.put)
    new = next(vm for vm in vms if vm.spec.mem == 65)
    waiting = expand(env, vms, new_id, 7, settled={vm.id for vm in vms} - {new.id})  # type: ignore[arg-type]
    assert (waiting.put, waiting.pending) == ((), count - 1)
    broken = expand(env_intent(spec(66), generation=3), vms, new_id, 7, settled=set())  # type: ignore[arg-type]
    assert broken.pending == 0, "what is out of service anyway need not take turns"


def test_what_is_the_controllers_business_alone_changes_in_place() -> None:
    old = EnvSpec(id="web", ssh_keys=(), vms=(VmSpec(image="tiny"),))
    vms, _ = roll_out(env_intent(old), [], ids())
    new = EnvSpec(id="web", ssh_keys=(), vms=(VmSpec(image="tiny", restart="never", host_labels={"zone": "a"}),))
    change = expand(env_intent(new, generation=2), vms, ids("x"), 7, settled=set())  # type: ignore[arg-type]
    assert [(line.action, line.fields) for line in change.plan] == [("update", ("restart", "host_labels"))]
    assert [(vm.id, vm.spec.restart) for vm in change.put] == [(vms[0].id, "never")]


def test_power_is_taken_over_by_every_vm() -> None:
    spec = EnvSpec(id="web", ssh_keys=(), vms=(VmSpec(image="tiny", count=2),))
    vms, _ = roll_out(env_intent(spec), [], ids())
    change = expand(env_intent(spec, power="stopped"), vms, ids("x"), 7, settled=set())  # type: ignore[arg-type]
    assert {vm.desired for vm in change.put} == {"stopped"} and {line.action for line in change.plan} == {"stop"}


def test_lifetimes_end_on_time_and_not_twice() -> None:
    spec = EnvSpec(id="web", ssh_keys=(), vms=(VmSpec(image="tiny"),))
    env = env_intent(spec, expires_at=100)
    assert expired([env], 99) == () and expired([env], 100) == ("web",)
    assert expired([replace(env, deleting=True), env_intent(spec)], 1_000_000) == ()


def test_a_clock_that_leaps_is_noticed() -> None:
    assert clock_jumped(700, 1) and not clock_jumped(600, 1) and not clock_jumped(-5000, 1)


def told(change: EnvChange) -> list[tuple[str, str, str | None, tuple[str, ...]]]:
    return [(line.action, line.name, line.vm_id, line.fields) for line in change.plan]


def web(*vms: VmSpec, **changes: object) -> EnvIntent:
    return env_intent(EnvSpec(id="web", ssh_keys=(), vms=vms), **changes)


A, B = VmSpec(image="tiny", name="a"), VmSpec(image="tiny", name="b")


def test_the_plan_names_every_vm_with_its_action_uid_and_differing_fields() -> None:
    vms, _ = roll_out(web(A, B), [], ids())
    new = expand(web(A), [], ids(), 7)  # type: ignore[arg-type]
    assert told(new) == [("create", "a", "vm-0", ())]
    assert [(vm.env_id, vm.created_at, vm.generation, vm.spec.count, vm.spec.name) for vm in new.put] == [
        ("web", 7, 1, 1, None)
    ]
    bigger = A.model_copy(update={"mem": 7, "cpu": 9})
    change = expand(web(bigger, generation=2), vms, ids("x"), 8, settled={vm.id for vm in vms})  # type: ignore[arg-type]
    assert told(change) == [("destroy", "b", "vm-1", ()), ("replace", "a", "vm-0", ("cpu", "mem"))]
    assert [(vm.id, vm.desired, vm.created_at, vm.generation) for vm in change.put] == [
        ("vm-1", "absent", 7, 1),
        ("vm-0", "absent", 7, 1),
        ("x-0", "running", 8, 2),
    ]


def test_power_and_generation_are_taken_over_and_told() -> None:
    vms, _ = roll_out(web(A, power="stopped"), [], ids())
    change = expand(web(A, generation=5), vms, ids("x"), 8)  # type: ignore[arg-type]
    assert told(change) == [("start", "a", "vm-0", ())]
    assert [(vm.desired, vm.generation) for vm in change.put] == [("running", 5)]
    assert change.put[0].spec is vms[0].spec, "what is equal is shared"


def test_vms_out_of_service_already_count_against_those_that_may_go() -> None:
    names = [VmSpec(image="tiny", name=name) for name in "abcd"]
    vms, _ = roll_out(web(*names), [], ids())
    new = web(names[0], names[1], *(entry.model_copy(update={"mem": 7}) for entry in names[2:]), generation=2)
    settled = {vm.id for vm in vms}

    def replaced(out: set[str], at_most: int) -> int:
        change = expand(new, vms, ids("x"), 8, settled=settled - out, max_replaced=at_most)  # type: ignore[arg-type]
        assert sum(vm.desired == "absent" for vm in change.put) == 2 - change.pending
        return 2 - change.pending

    assert [replaced(set(), 1), replaced({"vm-0"}, 1), replaced({"vm-0", "vm-1"}, 2), replaced({"vm-0"}, 2)] == [1, 0, 0, 1]
    assert replaced({"vm-0", "vm-1"}, 4) == 2 and replaced({"vm-0", "vm-1"}, 3) == 1


def test_lost_vms_are_retired_and_have_successors_of_their_name() -> None:
    env = web(A, B, generation=3)
    vms, _ = roll_out(env, [], ids())
    rows = recreate(env, vms, ids("x"), 9)  # type: ignore[arg-type]
    assert rows[::2] == tuple(replace(vm, desired="absent") for vm in vms)
    assert rows[1::2] == tuple(replace(vm, id=VmId(f"x-{number}"), created_at=9, host_id=None) for number, vm in enumerate(vms))
    assert recreate(env, [], ids(), 9) == ()  # type: ignore[arg-type]


def test_equal_machines_share_one_specification() -> None:
    change = expand(web(VmSpec(image="tiny", count=3), A), [], ids(), 7)  # type: ignore[arg-type]
    assert len({id(vm.spec) for vm in change.put}) == 2 and len({vm.spec_hash for vm in change.put}) == 1


def test_the_environments_keys_come_first_and_once() -> None:
    entry = VmSpec.model_construct(**{**A.model_dump(), "ssh_keys": ("k2", "k1"), "count": 4})
    full = with_env_keys(entry, ("k1", "k3"))
    assert (full.ssh_keys, full.count, full.name) == (("k1", "k3", "k2"), 1, None)


def test_a_lifetime_of_one_second_ends_and_none_never_does() -> None:
    assert expired([web(A, expires_at=1)], 1) == ("web",)
    assert clock_jumped(MAX_JUMP + 1.5, 1) and not clock_jumped(MAX_JUMP + 1, 1)
