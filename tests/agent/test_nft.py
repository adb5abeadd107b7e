"""The rendered rule set says what the leases say, no more and no less, and the kernel takes it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.errors import Conflict
from agent.machine import Lease, mac_of
from agent.network.host import ruleset_generation
from agent.network.linux import BridgeNetwork
from agent.network.nft import Site, change, clear, is_tap_name, render, tap_name
from specs.names import VmId
from tests.netns import Lab, command, inside

SITE = Site("mtt0", IPv4Network("10.91.0.0/16"), IPv4Address("10.91.0.1"), "02:00:00:00:00:01")


def leases_of(vms: list[tuple[str, bool, int]]) -> dict[VmId, Lease]:
    """A lease per (environment, deny_outgoing, number of ports)."""
    leases: dict[VmId, Lease] = {}
    port = 20000
    for number, (env, deny, ports) in enumerate(vms):
        vm_id = VmId(f"vm-{number}")
        forwards = {1 + guest: port + guest for guest in range(ports)}
        port += ports
        leases[vm_id] = Lease(SITE.gateway + 1 + number, mac_of(vm_id), forwards, deny, env)
    return leases


LEASES = st.lists(st.tuples(st.sampled_from("abc"), st.booleans(), st.integers(0, 4)), max_size=12).map(leases_of)


def elements(text: str, name: str) -> list[str]:
    """What a named set or map of the text holds."""
    body = re.search(rf"\b(?:set|map) {name} \{{(.*?)\n\t\}}", text, re.DOTALL)
    assert body, name
    listed = re.search(r"elements = \{(.*)\}", body[1], re.DOTALL)
    return [each.strip() for each in listed[1].split(",")] if listed else []


@given(LEASES)
def test_forwards_addresses_links_and_silence_are_those_of_the_leases_and_no_others(
    leases: dict[VmId, Lease],
) -> None:
    text = render(SITE, leases)
    if not leases:
        assert text == clear(SITE)
        return
    vms = leases.values()
    assert sorted(elements(text, "forwards")) == sorted(f"{to} : {vm.ip} . {at}" for vm in vms for at, to in vm.ports.items())
    assert sorted(elements(text, "deny_outgoing")) == sorted(str(vm.ip) for vm in vms if vm.deny_outgoing)
    assert sorted(elements(text, "owners")) == sorted(f"{vm.mac} . {vm.ip}" for vm in vms)
    assert sorted(elements(text, "macs")) == sorted(vm.mac for vm in vms)
    assert sorted(elements(text, "taps")) == sorted(f'"{tap_name(vm_id)}"' for vm_id in leases)
    assert sorted(elements(text, "links")) == sorted(
        f'"{tap_name(vm_id)}" . {vm.mac} . {vm.ip}' for vm_id, vm in leases.items()
    )


@given(LEASES)
def test_two_vms_may_speak_exactly_when_they_share_an_environment(leases: dict[VmId, Lease]) -> None:
    text = render(SITE, leases)
    chains = {name: set(elements(text, name)) for name in re.findall(r"chain (env_\w+) \{", text)}
    jumps = dict(each.split(" : jump ") for each in elements(text, "neighbours")) if leases else {}
    for one in leases.values():
        reachable = chains.get(jumps.get(str(one.ip), ""), set()) - {str(one.ip)}
        assert reachable == {str(two.ip) for two in leases.values() if two.env_id == one.env_id and two != one}


@given(LEASES, st.randoms(use_true_random=False))
def test_the_order_of_the_records_does_not_show_in_the_text(leases: dict[VmId, Lease], random: Random) -> None:
    shuffled = list(leases.items())
    random.shuffle(shuffled)
    assert render(SITE, dict(shuffled)) == render(SITE, leases)


@pytest.mark.parametrize(
    ("change", "held"),
    [
        ({"ip": IPv4Address("10.91.0.2")}, "address 10.91.0.2"),
        ({"mac": mac_of(VmId("vm-0"))}, f"MAC {mac_of(VmId('vm-0'))}"),
        ({"ports": {1: 20000}}, "host port 20000"),
    ],
)
def test_leases_that_hold_the_same_are_refused_by_name(change: dict[str, object], held: str) -> None:
    leases = leases_of([("a", False, 1), ("a", False, 1)])
    second = leases[VmId("vm-1")]
    fields = {"ip": second.ip, "mac": second.mac, "ports": second.ports, "deny_outgoing": False, "env_id": "a"}
    with pytest.raises(Conflict, match=f"vm-0 and vm-1 both hold {held}|vm-1 and vm-0 both hold {held}"):
        render(SITE, {**leases, VmId("vm-1"): Lease(**{**fields, **change})})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("lease", "why"),
    [
        (Lease(IPv4Address("10.91.0.1"), "52:54:00:00:00:01", {}, False, "a"), "not a guest address of 10.91.0.0/16"),
        (Lease(IPv4Address("10.92.0.2"), "52:54:00:00:00:01", {}, False, "a"), "not a guest address of 10.91.0.0/16"),
        (Lease(IPv4Address("10.91.0.2"), "52:54:00:00:00:01 }", {}, False, "a"), "where a MAC address belongs"),
        (Lease(IPv4Address("10.91.0.2"), "52:54:00:00:00:01", {22: 70000}, False, "a"), "which are not both ports"),
    ],
)
def test_a_lease_that_no_rule_can_honour_is_refused(lease: Lease, why: str) -> None:
    with pytest.raises(Conflict, match=why):
        render(SITE, {VmId("vm"): lease})


@pytest.mark.parametrize("bridge", ["", "0br", "sixteen-letters-", 'a"b', "a b", "a;b", "br\n"])
def test_a_bridge_name_that_neither_kernel_nor_nft_would_take_is_refused(bridge: str) -> None:
    with pytest.raises(ValueError, match="must be 1-15 of"):
        Site(bridge, SITE.subnet, SITE.gateway, SITE.mac)


def test_a_tap_name_fits_the_kernel_and_is_known_again() -> None:
    assert len(tap_name(VmId("x" * 128))) == 14
    assert is_tap_name(tap_name(VmId("vm")))
    assert not any(map(is_tap_name, ("mt0", "mt0123456789aB", "xmt0123456789ab", "mt0123456789abc", "mt0123456789ab\n")))


@pytest.fixture
def own_namespace() -> Iterator[None]:
    lab = Lab()
    try:
        with inside(lab.namespace("h")):
            yield
    finally:
        lab.close()


@pytest.mark.real
@settings(max_examples=12, deadline=None)
@given(leases=LEASES)
def test_the_kernel_takes_every_rule_set_over_any_other_and_clear_leaves_none(leases: dict[VmId, Lease]) -> None:
    lab = Lab()
    try:
        with inside(lab.namespace("h")):
            command("nft", "-f", "-", stdin=render(SITE, leases_of([("a", True, 2), ("a", False, 0)])))
            command("nft", "-f", "-", stdin=render(SITE, leases))
            first = command("nft", "list", "ruleset")
            command("nft", "-f", "-", stdin=render(SITE, leases))
            assert command("nft", "list", "ruleset") == first
            assert first.count("table") == (2 if leases else 0)
            command("nft", "-f", "-", stdin=clear(SITE))
            assert command("nft", "list", "ruleset") == ""
    finally:
        lab.close()


def parts(text: str) -> dict[tuple[str, str], list[str]]:
    """Each set, map and chain of a listing; elements sorted."""
    found: dict[tuple[str, str], list[str]] = {}
    table, name = "", ""
    for line in text.splitlines():
        if line.startswith("table"):
            table = line
        elif re.fullmatch(r"\t\w.* \{", line):
            name = line.strip()
            found[table, name] = []
        elif line.strip() not in ("", "}"):
            found[table, name].append(line.strip())
    joined = {key: " ".join(lines).partition("elements = {") for key, lines in found.items()}
    return {key: [head, *sorted(each.strip(" }") for each in listed.split(","))] for key, (head, _, listed) in joined.items()}


@pytest.mark.real
@settings(max_examples=25, deadline=None)
@given(before=LEASES, leases=LEASES)
def test_a_change_makes_of_the_rules_of_some_leases_those_of_others(
    before: dict[VmId, Lease], leases: dict[VmId, Lease]
) -> None:
    lab = Lab()
    try:
        with inside(lab.namespace("h")):
            command("nft", "-f", "-", stdin=render(SITE, before))
            command("nft", "-f", "-", stdin=change(SITE, before, leases))
            changed = command("nft", "list", "ruleset")
            command("nft", "-f", "-", stdin=render(SITE, leases))
            assert parts(changed) == parts(command("nft", "list", "ruleset"))
    finally:
        lab.close()


@pytest.mark.real
@pytest.mark.parametrize("envs", [1, 30, 300])
async def test_six_hundred_vms_with_eight_ports_are_one_transaction(own_namespace: None, envs: int) -> None:
    network = BridgeNetwork("mtt0", SITE.subnet)
    leases = leases_of([(f"env-{number % envs}", number % 3 == 0, 8) for number in range(600)])
    before = ruleset_generation()
    await network.apply(leases)
    assert before is not None
    assert ruleset_generation() == before + 1
    listed = command("nft", "list", "map", "inet", "muster_mtt0", "forwards")
    assert len(re.findall(r"\d+ : 10\.91\.", listed)) == 4800
    await network.apply(leases)
    assert ruleset_generation() == before + 1
