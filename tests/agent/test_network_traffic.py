"""What really passes and what does not: the Linux bridge network between a host, another host and guests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from ipaddress import IPv4Network

import pytest

from agent.errors import Conflict
from agent.machine import Lease
from agent.network.linux import BridgeNetwork
from agent.network.pool import allocate
from specs.names import Engine, VmId
from tests.netns import Lab, call, claim_address, command, inside, pings, sysctl

pytestmark = pytest.mark.real

BRIDGE = "mtt0"
SUBNET = IPv4Network("10.91.0.0/24")
HOST, OTHER = "198.51.100.1", "198.51.100.2"  # RFC 5737: for documentation, in namespaces alone
HOST6, OTHER6 = "fd00:51::1", "fd00:51::2"
WEB = 80
UNHEARD = 0.3  # seconds a caller waits where nothing will answer

SEEN = """table ip seen {
    counter hits { }
    chain input {
        type filter hook input priority 0
        tcp dport 80 counter name "hits"
    }
}"""


@dataclass
class Site:
    """A host with the driver under test, in whose namespace the test runs, and another host on a cable."""

    lab: Lab
    host: str
    other: str
    network: BridgeNetwork = field(default_factory=lambda: BridgeNetwork(BRIDGE, SUBNET))
    leases: dict[VmId, Lease] = field(default_factory=dict)

    async def guest(
        self,
        name: str,
        *,
        engine: Engine = Engine.DOCKER,
        env: str = "env",
        deny: bool = False,
        ports: tuple[int, ...] = (WEB,),
    ) -> tuple[str, Lease]:
        """Starts a guest with a web server on port 80 that answers with its name; its namespace and lease."""
        vm_id = VmId(name)
        lease = allocate(
            self.leases.values(),
            vm_id,
            ports,
            deny,
            env,
            subnet=SUBNET,
            gateway=self.network.gateway,
            is_free=self.network.port_is_free,
        )
        self.leases[vm_id] = lease
        nic = await self.network.ensure(vm_id, lease, engine)
        await self.network.apply(self.leases)
        cidr, gateway = f"{lease.ip}/{nic.subnet.prefixlen}", str(nic.gateway)
        if nic.kind == "tap":
            guest = self.lab.machine(self.host, nic.link, lease.mac, cidr, gateway)
        else:
            guest = self.lab.container(self.host, nic.bridge, lease.mac, cidr, gateway)
            await self.network.ensure(vm_id, lease, engine)
        self.lab.serve(guest, "0.0.0.0", WEB, name)
        return guest, lease


@pytest.fixture
def netfilter() -> str:
    """ "1" where the kernel shows bridged frames to iptables and inet tables (br_netfilter, as Docker wants it), else "0"."""
    return "1"


@pytest.fixture
async def site(netfilter: str) -> AsyncIterator[Site]:
    lab = Lab()
    try:
        host, other = lab.namespace("h"), lab.namespace("o")
        lab.cable(host, f"{HOST}/24", other, f"{OTHER}/24")
        with inside(host):
            # Settings of many hosts that forwards must get along with.
            sysctl("net/ipv4/conf/all/rp_filter", "1")
            sysctl("net/bridge/bridge-nf-call-iptables", netfilter)
            site = Site(lab, host, other)
            await site.network.setup()
            yield site
    finally:
        lab.close()


ENGINES = pytest.mark.parametrize(
    ("engine", "netfilter"),
    [(Engine.QEMU, "1"), (Engine.DOCKER, "1"), (Engine.QEMU, "0"), (Engine.DOCKER, "0")],
    ids=["tap", "container", "tap without br_netfilter", "container without br_netfilter"],
)


@ENGINES
async def test_a_forward_answers_other_hosts_the_host_itself_loopback_and_every_guest(site: Site, engine: Engine) -> None:
    web, lease = await site.guest("web", engine=engine)
    neighbour, _ = await site.guest("neighbour", engine=engine, env="another")
    port = lease.ports[WEB]
    answers = {
        "other host": call(site.other, HOST, port),
        "host": call(site.host, HOST, port),
        "loopback": call(site.host, "127.0.0.1", port),
        "loopback net": call(site.host, "127.0.3.4", port),
        "host by bridge address": call(site.host, "10.91.0.1", port),
        "guest of another environment": call(neighbour, HOST, port),
        "by bridge address": call(neighbour, "10.91.0.1", port),
        "the guest itself": call(web, HOST, port),
    }
    assert answers == {
        "other host": f"web {OTHER}",
        "host": f"web {HOST}",
        "loopback": "web 10.91.0.1",
        "loopback net": "web 10.91.0.1",
        "host by bridge address": "web 10.91.0.1",
        "guest of another environment": "web 10.91.0.1",
        "by bridge address": "web 10.91.0.1",
        "the guest itself": "web 10.91.0.1",
    }


@ENGINES
async def test_a_guest_reaches_the_outside_under_the_hosts_address(site: Site, engine: Engine) -> None:
    web, _ = await site.guest("web", engine=engine)
    site.lab.serve(site.other, OTHER, 8080, "outside")
    site.lab.serve(site.other, OTHER, 53, "names", udp=True)
    assert call(web, OTHER, 8080) == f"outside {HOST}"
    assert call(web, OTHER, 53, udp=True) == f"names {HOST}"
    assert pings(web, OTHER)


@ENGINES
async def test_a_guest_that_must_not_go_out_still_answers_who_calls(site: Site, engine: Engine) -> None:
    quiet, lease = await site.guest("quiet", engine=engine, deny=True)
    open_guest, open_lease = await site.guest("open", engine=engine)
    site.lab.serve(site.other, OTHER, 8080, "outside")
    site.lab.serve(site.other, OTHER, 53, "names", udp=True)
    site.lab.serve(site.host, "0.0.0.0", 9100, "agent")
    for namespace, address in ((site.other, OTHER6), (site.host, HOST6)):
        link = command("ip", "-n", namespace, "-br", "link", "show", "type", "veth").split("@")[0]
        command("ip", "-n", namespace, "addr", "add", f"{address}/64", "dev", link, "nodad")
    # An administrator who turns IPv6 on for the bridge and routes it must not open a way out.
    sysctl("net/ipv6/conf/all/forwarding", "1")
    sysctl(f"net/ipv6/conf/{BRIDGE}/disable_ipv6", "0")
    command("ip", "addr", "add", "fd00:91::1/64", "dev", BRIDGE, "nodad")
    command("ip", "-n", site.other, "route", "add", "fd00:91::/64", "via", HOST6)
    command("ip", "-n", quiet, "addr", "add", "fd00:91::2/64", "dev", "eth0", "nodad")
    command("ip", "-n", quiet, "route", "add", "default", "via", "fd00:91::1")
    # The neighbours are told, so that nothing but the rules stands between the two.
    bridge_mac = command("ip", "-br", "link", "show", BRIDGE).split()[2]
    command("ip", "-n", quiet, "neigh", "replace", "fd00:91::1", "lladdr", bridge_mac, "dev", "eth0")
    command("ip", "neigh", "replace", "fd00:91::2", "lladdr", lease.mac, "dev", BRIDGE)
    site.lab.serve(site.other, OTHER6, 8080, "outside6")
    assert call(site.host, OTHER6, 8080) == f"outside6 {HOST6}"

    tried = {
        "tcp": call(quiet, OTHER, 8080, patience=UNHEARD),
        "dns": call(quiet, OTHER, 53, udp=True, patience=UNHEARD),
        "ipv6": call(quiet, OTHER6, 8080, patience=UNHEARD),
        "host": call(quiet, "10.91.0.1", 9100, patience=UNHEARD),
        "guest": call(quiet, str(open_lease.ip), WEB, patience=UNHEARD),
        "forward": call(quiet, HOST, open_lease.ports[WEB], patience=UNHEARD),
        "own forward": call(quiet, HOST, lease.ports[WEB], patience=UNHEARD),
    }
    assert tried == dict.fromkeys(tried)
    assert not pings(quiet, OTHER)
    assert not pings(quiet, "10.91.0.1")
    answers = {
        "other host": call(site.other, HOST, lease.ports[WEB]),
        "host": call(site.host, "127.0.0.1", lease.ports[WEB]),
        "guest by forward": call(open_guest, HOST, lease.ports[WEB]),
        "guest directly": call(open_guest, str(lease.ip), WEB),
    }
    assert answers == {
        "other host": f"quiet {OTHER}",
        "host": "quiet 10.91.0.1",
        "guest by forward": "quiet 10.91.0.1",
        "guest directly": f"quiet {open_lease.ip}",
    }


@ENGINES
async def test_a_guest_reaches_no_service_of_its_host_but_ping(site: Site, engine: Engine) -> None:
    guest, lease = await site.guest("web", engine=engine)
    site.lab.serve(site.host, "0.0.0.0", 9100, "agent")
    site.lab.serve(site.host, "127.0.0.1", 9200, "controller")
    site.lab.serve(site.host, "0.0.0.0", 53, "names", udp=True)
    tried = {
        "agent by bridge address": call(guest, "10.91.0.1", 9100, patience=UNHEARD),
        "agent by host address": call(guest, HOST, 9100, patience=UNHEARD),
        "names": call(guest, "10.91.0.1", 53, udp=True, patience=UNHEARD),
    }
    assert pings(guest, "10.91.0.1")
    source = str(lease.ip)
    _send_loopback_to_the_gateway(guest)
    command("ip", "netns", "exec", guest, "nft", SEEN)
    tried |= {
        "loopback": call(guest, "127.0.0.1", 9200, source=source, patience=UNHEARD),
        "forward on loopback": call(guest, "127.0.0.1", lease.ports[WEB], source=source, patience=UNHEARD),
    }
    assert tried == dict.fromkeys(tried)
    assert "packets 0" in command("ip", "netns", "exec", guest, "nft", "list", "counter", "ip", "seen", "hits")
    assert call(site.host, "127.0.0.1", 9200) == "controller 127.0.0.1"


def _send_loopback_to_the_gateway(guest: str) -> None:
    """A guest that owns its kernel can send packets for 127.0.0.1 out of its network card."""
    with inside(guest):
        sysctl("net/ipv4/conf/all/route_localnet", "1")
        command("ip", "route", "del", "local", "127.0.0.0/8", "dev", "lo", "table", "local")
        command("ip", "route", "del", "local", "127.0.0.1", "dev", "lo", "table", "local")
        command("ip", "route", "add", "127.0.0.0/8", "via", "10.91.0.1", "dev", "eth0")


@ENGINES
async def test_guests_of_one_environment_reach_each_other_and_no_other_environment(site: Site, engine: Engine) -> None:
    one, one_lease = await site.guest("one", engine=engine, env="blue")
    two, two_lease = await site.guest("two", engine=Engine.DOCKER, env="blue")
    red, red_lease = await site.guest("red", engine=engine, env="red")
    assert call(one, str(two_lease.ip), WEB) == f"two {one_lease.ip}"
    assert call(two, str(one_lease.ip), WEB) == f"one {two_lease.ip}"
    assert pings(one, str(two_lease.ip))
    for caller, address in ((one, red_lease.ip), (two, red_lease.ip), (red, one_lease.ip), (red, two_lease.ip)):
        assert call(caller, str(address), WEB, patience=UNHEARD) is None
    assert not pings(red, str(one_lease.ip))


@ENGINES
async def test_a_guest_of_another_environment_is_unreachable_also_by_its_mac_address(site: Site, engine: Engine) -> None:
    blue, blue_lease = await site.guest("blue", engine=engine, env="blue")
    red, red_lease = await site.guest("red", engine=engine, env="red")
    command("ip", "-n", red, "neigh", "replace", str(blue_lease.ip), "lladdr", blue_lease.mac, "dev", "eth0")
    command("ip", "-n", blue, "neigh", "replace", str(red_lease.ip), "lladdr", red_lease.mac, "dev", "eth0")
    assert call(red, str(blue_lease.ip), WEB, patience=UNHEARD) is None
    neighbours = command("ip", "-n", blue, "neigh", "show", "dev", "eth0")
    assert red_lease.mac not in neighbours.replace(f"{red_lease.ip} lladdr {red_lease.mac} PERMANENT", "")


async def test_what_a_vm_sends_under_another_address_or_mac_is_dropped(site: Site) -> None:
    vm, vm_lease = await site.guest("vm", engine=Engine.QEMU)
    victim, victim_lease = await site.guest("victim", engine=Engine.QEMU)
    site.lab.serve(site.other, OTHER, 53, "names", udp=True)
    own, others, free = str(vm_lease.ip), str(victim_lease.ip), "10.91.0.200"
    for address in (free, others):
        command("ip", "-n", vm, "addr", "add", f"{address}/24", "dev", "eth0")
        assert call(vm, OTHER, 53, udp=True, source=address, patience=UNHEARD) is None
    assert call(vm, OTHER, 53, udp=True, source=own) == f"names {HOST}"
    command("ip", "-n", vm, "link", "set", "eth0", "address", victim_lease.mac)
    command("ip", "-n", vm, "route", "replace", "default", "via", "10.91.0.1")
    for address in (own, others):
        assert call(vm, OTHER, 53, udp=True, source=address, patience=UNHEARD) is None
    assert call(victim, OTHER, 53, udp=True, source=others) == f"names {HOST}"
    assert site.lab.heard == [f"from {own}", f"from {others}"]
    assert call(site.other, HOST, victim_lease.ports[WEB]) == f"victim {OTHER}"


async def test_a_vm_cannot_draw_another_ones_traffic_with_false_arp(site: Site) -> None:
    vm, vm_lease = await site.guest("vm", engine=Engine.QEMU)
    _, victim_lease = await site.guest("victim", engine=Engine.QEMU)
    for lease, name in ((vm_lease, "vm"), (victim_lease, "victim")):
        assert call(site.other, HOST, lease.ports[WEB]) == f"{name} {OTHER}"
    claim_address(vm, "eth0", vm_lease.mac, vm_lease.mac, str(victim_lease.ip))
    claim_address(vm, "eth0", vm_lease.mac, victim_lease.mac, str(vm_lease.ip))
    claim_address(vm, "eth0", victim_lease.mac, vm_lease.mac, str(victim_lease.ip))
    claim_address(vm, "eth0", vm_lease.mac, vm_lease.mac, "10.91.0.1")
    claim_address(vm, "eth0", victim_lease.mac, victim_lease.mac, str(victim_lease.ip))
    believed = {line.split()[0]: line.split()[2] for line in command("ip", "neigh", "show", "dev", BRIDGE).splitlines()}
    assert believed == {str(vm_lease.ip): vm_lease.mac, str(victim_lease.ip): victim_lease.mac}
    for lease, name in ((vm_lease, "vm"), (victim_lease, "victim")):
        assert call(site.other, HOST, lease.ports[WEB]) == f"{name} {OTHER}"


async def test_a_vms_own_connection_to_another_host_is_not_caught_by_a_forward_of_that_port(site: Site) -> None:
    guest, lease = await site.guest("web")
    site.lab.serve(site.other, OTHER, lease.ports[WEB], "outside")
    assert call(guest, OTHER, lease.ports[WEB]) == f"outside {HOST}"
    assert call(site.host, OTHER, lease.ports[WEB]) == f"outside {HOST}"


async def test_another_host_reaches_forwarded_ports_alone(site: Site) -> None:
    _, lease = await site.guest("web")
    command("ip", "-n", site.other, "route", "add", str(SUBNET), "via", HOST)
    assert call(site.other, str(lease.ip), WEB, patience=UNHEARD) is None
    assert not pings(site.other, str(lease.ip))
    assert call(site.host, str(lease.ip), WEB) == "web 10.91.0.1"


async def test_ports_of_a_removed_vm_are_closed_and_its_neighbours_stay_open(site: Site) -> None:
    _, gone = await site.guest("gone")
    _, stays = await site.guest("stays")
    del site.leases[VmId("gone")]
    await site.network.apply(site.leases)
    await site.network.remove(VmId("gone"))
    assert call(site.other, HOST, gone.ports[WEB], patience=UNHEARD) is None
    assert call(site.other, HOST, stays.ports[WEB]) == f"stays {OTHER}"


async def test_flushed_rules_and_a_deleted_bridge_are_rebuilt_under_a_running_vm(site: Site) -> None:
    guest, lease = await site.guest("web", engine=Engine.QEMU)
    site.lab.serve(site.other, OTHER, 8080, "outside")
    command("nft", "flush", "ruleset")
    command("ip", "link", "delete", BRIDGE)
    await site.network.setup()
    await site.network.apply(site.leases)
    assert call(site.other, HOST, lease.ports[WEB]) == f"web {OTHER}"
    assert call(guest, OTHER, 8080) == f"outside {HOST}"


async def test_rules_that_nobody_touched_are_not_written_again_and_touched_ones_are(site: Site) -> None:
    await site.guest("web")
    before = command("nft", "-a", "list", "ruleset")
    await site.network.apply(site.leases)
    assert command("nft", "-a", "list", "ruleset") == before
    command("nft", "delete", "element", "inet", f"muster_{BRIDGE}", "forwards", "{ 20000 }")
    await site.network.apply(site.leases)
    assert "20000 : 10.91.0.2 . 80" in command("nft", "list", "ruleset")


async def test_foreign_tables_and_links_are_left_alone(site: Site) -> None:
    command("nft", "-f", "-", stdin="add table inet muster\nadd chain inet muster x\nadd table ip nat\n")
    command("ip", "link", "add", "mt0123456789ab", "type", "ifb")
    command("ip", "link", "add", "foreign0", "type", "bridge")
    foreign = command("nft", "list", "ruleset")
    await site.guest("web", engine=Engine.QEMU)
    assert await site.network.leftovers(frozenset()) == (
        "tap " + (await site.network.ensure(VmId("web"), site.leases[VmId("web")], Engine.QEMU)).link,
    )
    await site.network.teardown()
    assert command("nft", "list", "ruleset") == foreign
    links = command("ip", "-br", "link")
    assert "mt0123456789ab" in links
    assert "foreign0" in links
    assert BRIDGE not in links


async def test_two_agents_in_one_namespace_do_not_disturb_each_other(site: Site) -> None:
    second = Site(site.lab, site.host, site.other, BridgeNetwork("mtt1", IPv4Network("10.92.0.0/24")))
    await second.network.setup()
    mine, mine_lease = await site.guest("mine")
    await second.network.setup()
    theirs_lease = allocate(
        (), VmId("theirs"), (WEB,), False, "env",
        subnet=second.network.subnet, gateway=second.network.gateway, is_free=second.network.port_is_free,
    )  # fmt: skip
    await second.network.ensure(VmId("theirs"), theirs_lease, Engine.DOCKER)
    await second.network.apply({VmId("theirs"): theirs_lease})
    theirs = site.lab.container(site.host, "mtt1", theirs_lease.mac, f"{theirs_lease.ip}/24", "10.92.0.1")
    site.lab.serve(theirs, "0.0.0.0", WEB, "theirs")

    assert theirs_lease.ports[WEB] != mine_lease.ports[WEB]
    assert call(site.other, HOST, mine_lease.ports[WEB]) == f"mine {OTHER}"
    assert call(site.other, HOST, theirs_lease.ports[WEB]) == f"theirs {OTHER}"
    assert call(mine, HOST, theirs_lease.ports[WEB]) == "theirs 10.92.0.1"
    assert call(mine, str(theirs_lease.ip), WEB, patience=UNHEARD) is None
    assert call(theirs, str(mine_lease.ip), WEB, patience=UNHEARD) is None
    await second.network.teardown()
    assert call(site.other, HOST, mine_lease.ports[WEB]) == f"mine {OTHER}"


async def test_forwards_pass_dockers_firewall_and_teardown_takes_the_exception_back(site: Site) -> None:
    command("iptables", "-N", "DOCKER-USER")
    command("iptables", "-A", "DOCKER-USER", "-j", "RETURN")
    command("iptables", "-A", "FORWARD", "-j", "DOCKER-USER")
    command("iptables", "-P", "FORWARD", "DROP")
    before = command("iptables", "-S")
    guest, lease = await site.guest("web", engine=Engine.QEMU)
    red, _ = await site.guest("red", env="red")
    site.lab.serve(site.other, OTHER, 8080, "outside")
    await site.network.setup()
    await site.network.setup()
    assert call(site.other, HOST, lease.ports[WEB]) == f"web {OTHER}"
    assert call(guest, HOST, lease.ports[WEB]) == "web 10.91.0.1"
    assert call(guest, OTHER, 8080) == f"outside {HOST}"
    assert call(red, str(lease.ip), WEB, patience=UNHEARD) is None
    await site.network.teardown()
    assert command("iptables", "-S") == before


async def test_forwards_pass_a_firewall_that_drops_what_is_forwarded_and_teardown_takes_the_exception_back(site: Site) -> None:
    command("iptables", "-A", "FORWARD", "-p", "icmp", "-j", "ACCEPT")
    command("iptables", "-P", "FORWARD", "DROP")
    before = command("iptables", "-S")
    guest, lease = await site.guest("web", engine=Engine.QEMU)
    site.lab.serve(site.other, OTHER, 8080, "outside")
    assert call(site.other, HOST, lease.ports[WEB], patience=UNHEARD) is None
    await site.network.setup()
    assert call(site.other, HOST, lease.ports[WEB]) == f"web {OTHER}"
    assert call(guest, OTHER, 8080) == f"outside {HOST}"
    assert not (await site.network.probe()).warnings  # type: ignore[union-attr]
    await site.network.teardown()
    assert command("iptables", "-S") == before


async def test_a_foreign_table_that_drops_forwards_is_told_with_the_commands_that_let_them_pass(site: Site) -> None:
    chain = "type filter hook forward priority 0; policy drop;"
    command("nft", "-f", "-", stdin=f"table inet fw {{ chain passing {{\n{chain}\n}}\n}}\n")
    _, lease = await site.guest("web", engine=Engine.QEMU)
    assert call(site.other, HOST, lease.ports[WEB], patience=UNHEARD) is None
    (warning,) = (await site.network.probe()).warnings  # type: ignore[union-attr]
    assert warning.startswith("table inet fw drops forwarded packets (policy of chain passing)")
    for said in warning.partition("pass: ")[2].split("; "):
        command(*said.split())
    assert call(site.other, HOST, lease.ports[WEB]) == f"web {OTHER}"


async def test_a_bridge_with_an_uplink_or_a_subnet_in_use_is_refused(site: Site) -> None:
    command("ip", "link", "add", "br0", "type", "bridge")
    command("ip", "link", "add", "uplink0", "type", "ifb")
    command("ip", "link", "set", "uplink0", "master", "br0")
    with pytest.raises(Conflict, match="bridge br0 carries uplink0"):
        await BridgeNetwork("br0", IPv4Network("10.93.0.0/24")).setup()
    with pytest.raises(Conflict, match=r"198\.51\.100\.1 of this host is inside 198\.51\.100\.0/24"):
        await BridgeNetwork("mtt2", IPv4Network("198.51.100.0/24")).setup()
    with pytest.raises(Conflict, match="link uplink0 is of kind ifb, not a bridge"):
        await BridgeNetwork("uplink0", IPv4Network("10.93.0.0/24")).setup()
