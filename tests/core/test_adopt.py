"""An adopted VM is what it was: nothing of it, and nothing beside it, is replaced because of that."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reconciler.core.adopt import CannotAdopt, adopt, condemned
from reconciler.core.expand import expand, with_env_keys
from reconciler.core.invariants import violations
from reconciler.core.model import EnvIntent, VmIntent
from specs.desired import EnvSpec, VmSpec, spec_hash
from specs.names import EnvId, HostId, VmId
from specs.wire import AgentVm, CreateVmReq
from tests.core.worlds import CLUSTER, entries, env_intent, ids

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIBJbDrk6WHYGFqkzL1M2t3gYKEcvXYo6ZS1lnzFDpq8J me@here"
OTHER = KEY.replace("me@here", "you@there")


def seen(spec: VmSpec, **changes: Any) -> AgentVm:
    """A machine as its agent reports it."""
    told = spec.model_dump(include={"image", "engine", "cpu", "mem", "disk"})
    ports = {str(port): 20000 + port for port in spec.all_ports}
    return AgentVm(id="vm-1", env_id="web", port_map=ports, **{**told, "state": "running", **changes})


def asked(spec: VmSpec, keys: tuple[str, ...]) -> CreateVmReq:
    """What the agent was asked for when it made that machine."""
    told = with_env_keys(spec, keys).model_dump(
        include={"image", "engine", "cpu", "mem", "disk", "deny_outgoing", "user_data", "ssh_keys"}
    )
    return CreateVmReq(vm_id="vm-1", env_id="web", ports=spec.all_ports, name="a", **told)


def adopted(
    vm: AgentVm, request: CreateVmReq | None = None, env: EnvIntent | None = None, name: str | None = None, **changes: Any
) -> tuple[EnvIntent, VmIntent]:
    options: dict[str, Any] = {"env_id": EnvId("web"), "taken": (), "host_id": HostId("h1"), "cluster": CLUSTER, "now": 7}
    return adopt(vm, request, env, name=name, **(options | changes))


specs = st.builds(
    lambda spec, ports, keys, closed: spec.model_copy(
        update={"count": 1, "ports": ports, "ssh_keys": keys, "deny_outgoing": closed}
    ),
    entries,
    st.sampled_from([(), (80,), (22, 443)]),
    st.sampled_from([(), (OTHER,)]),
    st.booleans(),
)


@given(specs, st.sampled_from([(), (KEY,)]), st.booleans())
def test_the_spec_that_made_a_vm_once_replaces_nothing_after_its_adoption(
    spec: VmSpec, keys: tuple[str, ...], grown: bool
) -> None:
    there = (
        env_intent(EnvSpec(id="web", ssh_keys=keys, vms=(spec.model_copy(update={"name": "z"}),)), rolled=1) if grown else None
    )
    env, vm = adopted(seen(spec), asked(spec, keys), there)
    assert (vm.name, vm.host_id, vm.desired, vm.env_id, env.rolled) == ("a", "h1", "running", "web", env.generation)
    new_id = ids("new")
    again = expand(env, [vm], new_id, 9)  # type: ignore[arg-type]
    assert [line.action for line in again.plan if line.name == "a"] == ["keep"]
    original = EnvSpec(id="web", ssh_keys=keys, vms=(spec.model_copy(update={"name": "a"}),))
    plan = expand(replace(env, spec=original), [vm], new_id, 9).plan  # type: ignore[arg-type]
    assert [line.action for line in plan] in (["keep"], ["update"])
    assert vm.spec_hash == spec_hash(with_env_keys(spec, keys), ())


@given(specs.filter(lambda spec: not spec.deny_outgoing and not spec.ssh_keys))
def test_a_plain_agents_word_makes_a_spec_that_keeps_the_vm(spec: VmSpec) -> None:
    env, vm = adopted(seen(spec, created_at=5), name="b")
    assert (vm.created_at, env.expires_at, env.power) == (5, 0, "running")
    assert [line.action for line in expand(env, [vm], ids(), 9).plan] == ["keep"]  # type: ignore[arg-type]
    assert violations({env.id: env}, [vm], {}) == ()


def test_a_stopped_vm_stays_stopped() -> None:
    env, vm = adopted(seen(VmSpec(image="tiny"), state="stopped"))
    assert (env.power, vm.desired, vm.name) == ("stopped", "stopped", "vm-1")
    assert adopted(seen(VmSpec(image="tiny"), state="stopped", reason="crashed"))[1].desired == "running"


WEB = env_intent(EnvSpec(id="web", ssh_keys=(KEY,), vms=(VmSpec(image="tiny", name="z"),)))


@pytest.mark.parametrize(
    ("vm", "env", "options", "code", "why"),
    [
        ({"cluster_id": "theirs"}, None, {}, "foreign_vm", "belongs to cluster theirs"),
        ({"state": "failed", "reason": "create_failed"}, None, {}, "not_adoptable", "nothing of VM vm-1 is left"),
        ({"image": "", "cpu": 0}, None, {}, "not_adoptable", "makes no spec"),
        ({}, replace(WEB, deleting=True), {}, "terminating", "is being deleted"),
        ({}, WEB, {"name": "z", "taken": ("z",)}, "name_taken", "has a VM z already"),
        ({}, replace(WEB, power="stopped"), {}, "not_adoptable", "start the environment"),
        ({}, WEB, {"request": CreateVmReq.model_validate(asked(VmSpec(image="tiny"), (OTHER,)))}, "spec_differs", "ssh keys"),
    ],
)
def test_what_cannot_be_adopted_says_why(
    vm: dict[str, Any], env: EnvIntent | None, options: dict[str, Any], code: str, why: str
) -> None:
    with pytest.raises(CannotAdopt, match=why) as caught:
        adopted(seen(VmSpec(image="tiny"), **vm), env=env, **options)
    assert caught.value.code == code


@pytest.mark.parametrize("odd", [{}, {"image": "", "cpu": 0, "mem": 0, "disk": 0}])
def test_whatever_a_host_has_can_be_condemned(odd: dict[str, Any]) -> None:
    vm = condemned(seen(VmSpec(image="tiny"), **odd), HostId("h1"), 7)
    assert (vm.id, vm.desired, vm.host_id, vm.gone_at) == (VmId("vm-1"), "absent", "h1", 0)
    assert violations({}, [vm], {HostId("h1"): (0, 0, 0)}) == ()


def test_an_adopted_vm_is_recorded_as_it_is() -> None:
    request = asked(VmSpec(image="tiny", ports=(22, 80), user_data="#!/bin/sh\n"), ())
    env, vm = adopted(seen(VmSpec(image="tiny"), cluster_id=CLUSTER), request)
    assert (vm.id, vm.generation, vm.spec.user_data, vm.spec.ports) == ("vm-1", 1, "#!/bin/sh\n", (80,))
    assert (env.generation, env.rolled, env.created_at, vm.created_at) == (1, 1, 7, 7)
    grown, second = adopted(seen(VmSpec(image="tiny")), request, replace(env, generation=4, rolled=4), name="b")
    assert (grown.generation, grown.rolled, second.generation) == (5, 5, 5)
    behind, _ = adopted(seen(VmSpec(image="tiny")), request, replace(env, generation=4, rolled=3), name="b")
    assert (behind.generation, behind.rolled) == (5, 3), "a roll-out that is under way goes on"


def test_what_a_plain_agent_tells_becomes_the_spec() -> None:
    vm = AgentVm.model_validate(
        {
            **{"id": "vm-1", "env_id": "e", "image": "app", "engine": "docker", "cpu": 3, "mem": 5, "disk": 7},
            **{"state": "running", "port_map": {"443": 2, "22": 1, "80": 3, "odd": 4}},
        }
    )
    _, made = adopted(vm, name="a")
    told = made.spec
    assert (told.image, told.engine, told.cpu, told.mem, told.disk, told.ports) == ("app", "docker", 3, 5, 7, (80, 443))
    with pytest.raises(CannotAdopt, match=r"\(cpu: Input should be greater than 0\)"):
        adopted(vm.model_copy(update={"cpu": 0}), name="a")
    with pytest.raises(CannotAdopt, match=r"ports\.0"):
        adopted(vm.model_copy(update={"port_map": {"70000": 1}}), name="a")


def test_a_condemned_vm_takes_the_room_it_has_and_keeps_its_age() -> None:
    whole = condemned(seen(VmSpec(image="tiny", cpu=3, mem=5, disk=7), created_at=3), HostId("h1"), 7)
    assert (whole.name, whole.created_at, whole.spec.cpu, whole.spec.mem, whole.spec.disk) == ("vm-1", 3, 3, 5, 7)
    assert whole.spec_hash == spec_hash(whole.spec, ()) and whole.spec.name is None
    odd = seen(VmSpec(image="tiny"), image="", cpu=5, mem=0, disk=8)
    half = condemned(odd, HostId("h1"), 7)
    assert (half.spec.image, half.spec.cpu, half.spec.mem, half.spec.disk, half.created_at) == ("unknown", 5, 1, 8, 7)
    least = condemned(odd.model_copy(update={"cpu": 0, "disk": 0}), HostId("h1"), 7).spec
    assert (least.cpu, least.mem, least.disk) == (1, 1, 1)
