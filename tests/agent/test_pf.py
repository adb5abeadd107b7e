"""The PF rules mean what the leases say, packet by packet, and their text is what pfctl takes."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network

import pytest

from agent.errors import Conflict
from agent.machine import Lease, Unusable, Usable, mac_of
from agent.network.freebsd import PfNetwork
from agent.network.pf import PfSite, epair_names, render, tap_name
from specs.names import Engine, VmId
from tests.agent.pf_packets import Direction, Filter, Packet
from tests.freebsd_fixture import FreeBsd, freebsd  # noqa: F401
from tests.standins.pf import parse

BRIDGE, OUTSIDE = "mtt0", "em0"
SITE = PfSite(BRIDGE, IPv4Network("10.91.0.0/16"), IPv4Address("10.91.0.1"), "02:00:00:00:00:01")
HOST, CLIENT, SERVER = "192.0.2.10", "192.0.2.77", "198.51.100.7"
WEB, MATE, QUIET, STRANGER = "10.91.0.2", "10.91.0.3", "10.91.0.4", "10.91.0.5"
VMS = {VmId(name): address for name, address in (("web", WEB), ("mate", MATE), ("quiet", QUIET), ("stranger", STRANGER))}
LEASES = {
    vm_id: Lease(IPv4Address(ip), mac_of(vm_id), {22: 20000 + number, 80: 20100 + number}, vm_id == "quiet", env)
    for number, ((vm_id, ip), env) in enumerate(zip(VMS.items(), ("a", "a", "a", "b"), strict=True))
}
LINKS = {address: tap_name(vm_id) for vm_id, address in VMS.items()}


@pytest.fixture
def pf() -> Filter:
    """The rules of four guests: three of one environment, one of them with deny_outgoing, and a stranger."""
    rules = parse(render(SITE, LEASES, [OUTSIDE]))
    return Filter(rules, {SITE.group: set(LINKS.values())}, {HOST, "10.91.0.1", "127.0.0.1"})


def walk(pf: Filter, packet: Packet, *hooks: tuple[str, Direction]) -> Packet | None:
    """The packet after every hook on its way, or None if one dropped it."""
    for link, way in hooks:
        passed = pf.pass_(packet, link, way)
        if passed is None:
            return None
        packet = passed
    return packet


def from_outside(pf: Filter, port: int) -> Packet | None:
    return walk(pf, Packet(CLIENT, HOST, port), (OUTSIDE, "in"), (BRIDGE, "out"))


def switched(pf: Filter, packet: Packet) -> Packet | None:
    """From one guest to another over the bridge alone."""
    return walk(pf, packet, (LINKS[packet.source], "in"), (LINKS[packet.target], "out"))


def to_host(pf: Filter, link: str, packet: Packet) -> Packet | None:
    return walk(pf, packet, (link, "in"), (BRIDGE, "in"))


def leaving(pf: Filter, packet: Packet) -> Packet | None:
    return walk(pf, packet, (LINKS[packet.source], "in"), (BRIDGE, "in"), (OUTSIDE, "out"))


@pytest.mark.parametrize(("number", "guest"), [(0, WEB), (2, QUIET), (3, STRANGER)])
def test_a_forward_reaches_its_guest_and_the_answer_gets_out_even_with_deny_outgoing(
    pf: Filter, number: int, guest: str
) -> None:
    arrived = from_outside(pf, 20100 + number)
    assert arrived is not None
    assert (arrived.target, arrived.port) == (guest, 80)
    assert leaving(pf, arrived.reply) is not None


def test_a_guest_reaches_the_outside_under_the_hosts_address_and_is_answered(pf: Filter) -> None:
    seen = leaving(pf, Packet(WEB, SERVER, 443))
    assert seen is not None
    assert (seen.source, seen.target) == (HOST, SERVER)
    assert walk(pf, Packet(SERVER, WEB), (BRIDGE, "out")) is not None


def test_deny_outgoing_opens_no_connection_by_any_protocol_to_anybody(pf: Filter) -> None:
    for packet in (Packet(QUIET, SERVER), Packet(QUIET, "192.0.2.53", 53, "udp"), Packet(QUIET, SERVER, 0, "icmp")):
        assert leaving(pf, packet) is None
    assert to_host(pf, LINKS[QUIET], Packet(QUIET, HOST, 20100)) is None
    assert switched(pf, Packet(QUIET, WEB)) is None
    assert switched(pf, Packet(QUIET, STRANGER)) is None


def test_guests_of_one_environment_speak_to_each_other_and_the_silent_one_answers(pf: Filter) -> None:
    assert switched(pf, Packet(WEB, MATE)) is not None
    assert switched(pf, Packet(MATE, WEB)) is not None
    assert switched(pf, Packet(QUIET, MATE)) is None
    asked = switched(pf, Packet(MATE, QUIET))
    assert asked is not None
    assert switched(pf, asked.reply) is not None


def test_environments_do_not_see_each_other_neither_switched_nor_through_the_host(pf: Filter) -> None:
    assert switched(pf, Packet(WEB, STRANGER)) is None
    assert switched(pf, Packet(STRANGER, WEB)) is None
    assert to_host(pf, LINKS[WEB], Packet(WEB, STRANGER)) is None


def test_a_guest_uses_another_environments_forward_like_anybody_else(pf: Filter) -> None:
    arrived = walk(pf, Packet(WEB, HOST, 20103), (LINKS[WEB], "in"), (BRIDGE, "in"), (BRIDGE, "out"))
    assert arrived is not None
    assert (arrived.source, arrived.target, arrived.port) == ("10.91.0.1", STRANGER, 80)


def test_nothing_of_the_host_but_its_ping_is_open_to_guests(pf: Filter) -> None:
    for own in (HOST, "10.91.0.1"):
        for port in (22, 9100, 9200):
            assert to_host(pf, LINKS[WEB], Packet(WEB, own, port)) is None
    assert to_host(pf, LINKS[WEB], Packet(WEB, "10.91.0.1", 0, "icmp")) is not None
    assert to_host(pf, LINKS[QUIET], Packet(QUIET, "10.91.0.1", 0, "icmp")) is None


def test_nobody_sends_from_or_receives_for_an_address_that_is_not_leased_to_him(pf: Filter) -> None:
    for forged in (MATE, STRANGER, SERVER, "10.91.0.1", "10.91.0.200"):
        assert to_host(pf, LINKS[WEB], Packet(forged, SERVER)) is None
        assert walk(pf, Packet(CLIENT, forged), (LINKS[WEB], "out")) is None


def test_guest_addresses_are_not_open_from_outside_but_the_host_itself_reaches_them(pf: Filter) -> None:
    assert walk(pf, Packet(CLIENT, WEB, 22), (OUTSIDE, "in"), (BRIDGE, "out")) is None
    assert walk(pf, Packet("10.91.0.1", WEB, 22), (BRIDGE, "out")) is not None


def test_a_link_without_a_lease_passes_nothing(pf: Filter) -> None:
    pf.groups[SITE.group].add("tapstray")
    assert to_host(pf, "tapstray", Packet(WEB, SERVER)) is None
    assert walk(pf, Packet(SERVER, WEB), ("tapstray", "out")) is None


def test_two_leases_with_one_address_or_port_are_refused() -> None:
    one = LEASES[VmId("web")]
    with pytest.raises(Conflict, match="both hold"):
        render(SITE, {VmId("a"): one, VmId("b"): one}, [])


async def test_a_jails_epair_is_described_before_it_is_named_and_found_again_half_made(freebsd: FreeBsd) -> None:  # noqa: F811
    network = PfNetwork(BRIDGE, SITE.subnet)
    web = VmId("web")
    await network.setup()
    bare = freebsd.links()
    with freebsd.changing() as host:  # an agent killed between making and naming
        host["interfaces"]["epair0a"] = {"family": "epair", "unit": 0, "flags": [], "inet": [], "ether": "", "groups": []}
        host["interfaces"]["epair0b"] = dict(host["interfaces"]["epair0a"])
        host["interfaces"]["epair0a"]["descr"] = SITE.describe(web)
    nic = await network.ensure(web, LEASES[web], Engine.JAIL)
    assert (nic.kind, nic.link) == ("vnet", epair_names(web)[1])
    assert freebsd.links() - bare == set(epair_names(web))
    assert freebsd.state["interfaces"][nic.link]["ether"] == LEASES[web].mac
    members = freebsd.state["interfaces"][BRIDGE]["members"]
    assert members == {epair_names(web)[0]: {"learn": False, "static": [LEASES[web].mac]}}
    await network.remove(web)
    assert freebsd.links() == bare


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"enabled": False}, "PF is not enabled"),
        ({"calls": False}, "pf.conf does not call"),
        ({"loaded": False}, "does not answer"),
    ],
)
async def test_a_host_whose_pf_would_not_carry_the_rules_is_unusable_and_told_what_to_do(
    freebsd: FreeBsd,  # noqa: F811
    change: dict[str, bool],
    why: str,
) -> None:
    freebsd.change(pf=change)
    probe = await PfNetwork(BRIDGE, SITE.subnet).probe()
    assert isinstance(probe, Unusable)
    assert why in probe.why
    freebsd.change(pf={"enabled": True, "calls": True, "loaded": True})
    assert isinstance(await PfNetwork(BRIDGE, SITE.subnet).probe(), Usable)


async def test_the_bridge_of_somebody_else_is_left_alone(freebsd: FreeBsd) -> None:  # noqa: F811
    with freebsd.changing() as host:
        host["interfaces"][BRIDGE] = {
            **{"family": "bridge", "unit": 7, "flags": ["UP"], "inet": [], "ether": "", "descr": "uplink"},
            **{"groups": ["bridge"], "members": {"em0": {"learn": True, "static": []}}},
        }
    before = freebsd.state["interfaces"]
    network = PfNetwork(BRIDGE, SITE.subnet)
    with pytest.raises(Conflict, match="carries em0"):
        await network.setup()
    await network.teardown()
    assert freebsd.state["interfaces"] == before


async def test_an_interface_that_a_dead_jail_gave_back_with_its_address_hinders_nothing(freebsd: FreeBsd) -> None:  # noqa: F811
    network = PfNetwork(BRIDGE, SITE.subnet)
    await network.setup()
    vm, lease = VmId("gone"), Lease(SITE.gateway + 1, "52:54:00:00:00:01", {22: 20000}, False, "env")
    nic = await network.ensure(vm, lease, Engine.JAIL)
    assert nic.link is not None
    with freebsd.changing() as host:
        host["interfaces"][nic.link]["inet"] = [f"{lease.ip}/24"]
    await network.setup()
    await network.apply({VmId("other"): replace(lease, ip=lease.ip + 1)})
    assert nic.link not in freebsd.state["pf"]["anchors"][SITE.anchor]
    await network.teardown()
    assert nic.link not in freebsd.links()
