"""The judge of every fleet test is itself judged: each wrong is found, alone and beside others, and right is called right."""

from __future__ import annotations

from dataclasses import replace

from reconciler.core.adopt import NO_ENV
from reconciler.core.invariants import violations
from specs.desired import EnvSpec, VmSpec
from specs.names import EnvId, HostId, VmId
from tests.core.worlds import env_intent, vm_intent

WEB = env_intent(EnvSpec(id="web", ssh_keys=(), vms=(VmSpec(image="tiny"),)))
ENVS = {EnvId("web"): WEB}
SMALL = VmSpec(image="tiny", cpu=2, mem=3, disk=4)
VM = vm_intent(spec=SMALL)
H1 = HostId("h1")


def test_a_sound_fleet_has_none() -> None:
    tombstone = vm_intent("absent", id=VmId("vm-old"), gone_at=5)
    retired = vm_intent("absent", id=VmId("vm-out"), spec=SMALL)
    by_hand = vm_intent("absent", id=VmId("vm-hand"), env_id=NO_ENV, name="vm-hand", spec=SMALL)
    other = replace(VM, id=VmId("vm-2"), host_id=HostId("h2"), name="b")
    assert violations(ENVS, [VM, tombstone, retired, by_hand, other], {H1: (4, 6, 8), HostId("h2"): (2, 3, 4)}) == ()


def test_two_of_one_name_are_found_and_a_retired_one_is_not_counted() -> None:
    twin = replace(VM, id=VmId("vm-2"))
    assert violations(ENVS, [VM, twin], {}) == ("2 VMs are named a in web",)
    assert violations(ENVS, [VM, replace(twin, desired="absent")], {}) == ()
    assert violations(ENVS, [VM, replace(twin, desired="absent", gone_at=9)], {}) == ()


def test_vms_without_environment_are_found_also_after_one_that_needs_none() -> None:
    by_hand = vm_intent("absent", id=VmId("vm-hand"), env_id=NO_ENV, name="vm-hand")
    assert violations({}, [by_hand, VM], {}) == ("VM vm-1 has no environment web",)
    assert violations({}, [replace(VM, desired="absent")], {}) == ("VM vm-1 has no environment web",)
    assert violations({}, [replace(by_hand, desired="running")], {}) == ("VM vm-hand has no environment ",)


def test_what_a_deleting_environment_still_wants_is_found() -> None:
    going = {EnvId("web"): replace(WEB, deleting=True)}
    assert violations(going, [VM], {}) == ("VM vm-1 is running though web is being deleted",)
    assert violations(going, [replace(VM, desired="absent")], {}) == ()


def test_a_tombstone_that_is_wanted_is_found_beside_another_wrong() -> None:
    risen = replace(VM, id=VmId("vm-2"), gone_at=1)
    assert violations({}, [VM, risen], {}) == (
        "VM vm-1 has no environment web",
        "VM vm-2 is a tombstone but desired running",
    )


def test_every_measure_of_a_host_is_watched() -> None:
    two = [VM, replace(VM, id=VmId("vm-2"), name="b")]
    assert violations(ENVS, two, {H1: (3, 5, 7)}) == (
        "host h1 has cpu 4 of 3 placed",
        "host h1 has mem 6 of 5 placed",
        "host h1 has disk 8 of 7 placed",
    )
    assert violations(ENVS, [*two, replace(two[1], id=VmId("vm-3"))], {H1: (99, 99, 11)}) == (
        "2 VMs are named b in web",
        "host h1 has disk 12 of 11 placed",
    )
