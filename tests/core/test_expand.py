"""How an environment becomes VMs, and how it changes."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from reconciler.core.expand import expand
from reconciler.core.expiry import clock_jumped, expired
from reconciler.core.model import EnvIntent, VmIntent
from specs.desired import EnvSpec, VmSpec
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
