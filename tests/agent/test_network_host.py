"""What the network drivers learn of the host, and which driver is picked."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest

from agent.errors import AgentError, Conflict, Unsupported
from agent.machine import Lease, Unusable
from agent.network import pick
from agent.network.host import ensure_sysctl, port_can_be_bound, read_sysctl, resolvers, ruleset_generation
from agent.network.linux import BridgeNetwork, bridge_mac
from agent.network.user import UserNetwork
from specs.names import Engine, VmId
from tests.netns import Lab, command, inside

SUBNET = IPv4Network("10.91.0.0/24")


@pytest.fixture
def own_namespace() -> Iterator[str]:
    lab = Lab()
    try:
        name = lab.namespace("h")
        with inside(name):
            yield name
    finally:
        lab.close()


def test_guests_get_resolvers_that_are_neither_loopback_nor_the_host_itself_nor_ipv6(tmp_path: Path) -> None:
    stub, upstream = tmp_path / "resolv.conf", tmp_path / "upstream.conf"
    servers = ("127.0.0.53", "::1", "192.0.2.7", "fd00::53")
    stub.write_text("# none of these\nsearch lan\n" + "".join(f"nameserver {server}\n" for server in servers))
    upstreams = ("192.0.2.1", "192.0.2.1", "not-an-address", "", "192.0.2.2", "192.0.2.3", "192.0.2.4")
    upstream.write_text("".join(f"nameserver {server}\n" for server in upstreams))
    own = {IPv4Address("192.0.2.7")}
    assert resolvers(own, (stub, upstream)) == ("192.0.2.1", "192.0.2.2", "192.0.2.3")
    assert resolvers((), (stub, upstream)) == ("192.0.2.7",)
    assert resolvers(own, (stub, tmp_path / "missing")) == ()


@pytest.mark.real
@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0", "::"])
def test_a_port_is_taken_wherever_on_the_host_a_service_listens_for_ipv4(own_namespace: str, address: str) -> None:
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as service:
        service.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        service.bind((address, 0))
        service.listen()
        port = service.getsockname()[1]
        assert not port_can_be_bound(port, ("0.0.0.0",))
        # A connection that the service ended stays in TIME_WAIT for a while.
        with socket.create_connection(("127.0.0.1", port)):
            service.accept()[0].close()
    assert port_can_be_bound(port, ("0.0.0.0",))


@pytest.mark.real
def test_a_sysctl_is_written_once_read_back_and_an_unknown_one_is_an_error(own_namespace: str) -> None:
    ensure_sysctl("net/ipv4/ip_forward", "0")
    assert ensure_sysctl("net/ipv4/ip_forward", "1")
    assert read_sysctl("net/ipv4/ip_forward") == "1"
    assert not ensure_sysctl("net/ipv4/ip_forward", "1")
    assert read_sysctl("net/ipv4/conf/no-such-link/forwarding") is None
    with pytest.raises(AgentError, match="cannot set sysctl net/ipv4/conf/no-such-link/forwarding to 1: No such file"):
        ensure_sysctl("net/ipv4/conf/no-such-link/forwarding", "1")


@pytest.mark.real
def test_the_generation_rises_with_everybodys_transaction(own_namespace: str) -> None:
    before = ruleset_generation()
    assert before is not None
    assert ruleset_generation() == before
    command("nft", "add", "table", "inet", "somebody")
    assert ruleset_generation() == before + 1


@pytest.mark.real
async def test_auto_picks_the_bridge_where_it_works_and_leaves_no_trace_of_trying(own_namespace: str) -> None:
    picked = await pick("auto", bridge="mtt0", subnet=SUBNET)
    assert isinstance(picked, BridgeNetwork)
    assert (picked.bridge, picked.subnet) == ("mtt0", SUBNET)
    assert command("ip", "-br", "link").split()[0] == "lo"
    assert len(command("ip", "-br", "link").splitlines()) <= 3  # lo, and ifb links that some kernels give every namespace
    assert command("nft", "list", "ruleset") == ""


async def test_without_root_auto_picks_the_user_network_and_bridge_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    picked = await pick("auto", subnet=SUBNET, forward_addrs=("127.0.0.1",))
    assert isinstance(picked, UserNetwork)
    assert picked.subnet == SUBNET
    with pytest.raises(Unsupported, match="--network bridge does not work here: the bridge network needs root"):
        await pick("bridge", subnet=SUBNET)


async def test_without_nft_the_bridge_says_which_package_to_install(
    own_namespace: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    probe = await BridgeNetwork("mtt0", SUBNET).probe()
    assert isinstance(probe, Unusable)
    assert "apt-get install nftables" in probe.why


async def test_the_user_network_forwards_where_it_was_told_and_keeps_the_name_server_off_the_guests_address() -> None:
    network = UserNetwork(IPv4Network("10.91.0.0/29"), ("127.0.0.1",))
    nic = await network.ensure(
        VmId("a"), Lease(IPv4Address("10.91.0.2"), "52:54:00:00:00:01", {22: 20000}, True, "e"), Engine.QEMU
    )
    assert (nic.kind, nic.link, nic.bridge, nic.dns, nic.forward_addrs) == ("user", "", "", ("10.91.0.6",), ("127.0.0.1",))
    last = Lease(IPv4Address("10.91.0.6"), "52:54:00:00:00:02", {22: 20001}, False, "e")
    assert (await network.ensure(VmId("b"), last, Engine.DOCKER)).dns == ("10.91.0.5",)
    with pytest.raises(Unsupported, match="engine jail has no user-mode network"):
        await network.ensure(VmId("c"), last, Engine.JAIL)


def test_networks_without_room_or_forward_addresses_are_refused() -> None:
    with pytest.raises(ValueError, match="has no room"):
        BridgeNetwork("mtt0", IPv4Network("10.91.0.0/31"))
    with pytest.raises(ValueError, match="has no room"):
        UserNetwork(IPv4Network("10.91.0.0/30"))
    with pytest.raises(ValueError, match="forward_addrs must name at least one"):
        UserNetwork(forward_addrs=())


@pytest.mark.real
async def test_a_container_that_must_not_go_out_is_given_no_resolver_but_the_silent_gateway(own_namespace: str) -> None:
    network = BridgeNetwork("mtt0", SUBNET)
    quiet = Lease(IPv4Address("10.91.0.2"), "52:54:00:00:00:01", {22: 20000}, True, "e")
    nic = await network.ensure(VmId("quiet"), quiet, Engine.DOCKER)
    assert (nic.kind, nic.link, nic.bridge, nic.dns) == ("bridge", "", "mtt0", ("10.91.0.1",))
    tap = await network.ensure(VmId("quiet"), quiet, Engine.QEMU)
    assert (tap.kind, tap.bridge) == ("tap", "mtt0")
    with pytest.raises(Unsupported, match="engine bhyve does not run on Linux"):
        await network.ensure(VmId("other"), quiet, Engine.BHYVE)


@pytest.mark.real
async def test_a_tap_may_be_owned_by_an_ordinary_user_and_replaces_a_link_of_another_kind(own_namespace: str) -> None:
    network = BridgeNetwork("mtt0", SUBNET, tap_owner=12345)
    lease = Lease(IPv4Address("10.91.0.2"), "52:54:00:00:00:01", {22: 20000}, False, "e")
    nic = await network.ensure(VmId("vm"), lease, Engine.QEMU)
    assert "user 12345" in command("ip", "-d", "link", "show", nic.link)
    command("ip", "link", "delete", nic.link)
    command("ip", "link", "add", nic.link, "type", "ifb")
    assert await network.ensure(VmId("vm"), lease, Engine.QEMU) == nic
    shown = command("ip", "-d", "link", "show", nic.link)
    assert "tun type tap" in shown
    assert "master mtt0" in shown
    assert "hairpin on" in shown


@pytest.mark.real
async def test_a_bridge_that_docker_made_at_boot_is_taken_over_and_somebody_elses_is_not(own_namespace: str) -> None:
    command("ip", "link", "add", "mtt0", "type", "bridge")
    command("ip", "link", "add", "veth0", "type", "veth", "peer", "name", "peer0")
    command("ip", "link", "set", "veth0", "master", "mtt0")
    await BridgeNetwork("mtt0", SUBNET).setup()
    shown = command("ip", "-br", "link", "show", "mtt0").split()
    assert shown[2] == bridge_mac("mtt0")
    assert "UP" in shown[3]
    assert "10.91.0.1/24" in command("ip", "-br", "addr", "show", "mtt0").split()
    assert "hairpin on" in command("ip", "-d", "link", "show", "veth0")
    command("ip", "link", "add", "mtt1", "type", "bridge")
    command("ip", "addr", "add", "10.92.0.9/24", "dev", "mtt1")
    before = command("ip", "-br", "addr")
    with pytest.raises(Conflict, match=r"bridge mtt1 has the address 10\.92\.0\.9/24"):
        await BridgeNetwork("mtt1", IPv4Network("10.93.0.0/24")).setup()
    assert command("ip", "-br", "addr") == before


def test_bridges_of_different_names_have_different_local_unicast_macs() -> None:
    assert bridge_mac("muster0") == bridge_mac("muster0") != bridge_mac("muster1")
    assert bridge_mac("muster0").startswith("02:")
