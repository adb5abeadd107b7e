"""Renders the whole nftables rule set of one agent from its leases. Pure; called by the Linux bridge network alone.

Two tables named after the bridge carry everything. `table bridge` believes of every frame only what the lease says, and
hands all of it to the host: nothing is ever switched from guest to guest. So `table inet` sees every packet of
every guest and decides with connection tracking. Syntax: nft(8), version 1.0.6 and later.

    guest ──frame──► bridge/prerouting ──► inet: guard, forwards (DNAT) ──► input   the host itself: ping alone
             sender's port, MAC and address                             └─► forward outside, own environment, forwards
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from ipaddress import IPv4Address, IPv4Network

from agent.machine import Lease, short_hash
from agent.network.leases import check_leases, is_mac, shared
from specs.names import VmId

DEFAULT_BRIDGE = "muster0"
_LINK_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,14}")  # fits a kernel link (15 characters) and an nft identifier
_PREFIX = "muster_"
_FEW = 64  # VMs; a change of more is written as a whole


def tap_name(vm_id: VmId) -> str:
    """The name of a VM's tap: 14 of the 15 characters a link name may have."""
    return f"mt{short_hash(vm_id)}"


def is_tap_name(name: str) -> bool:
    """Whether `tap_name` could have made this name."""
    return re.fullmatch(r"mt[0-9a-f]{12}", name) is not None


def is_table_name(name: str) -> bool:
    """Whether a table belongs to some agent of this product."""
    return name.startswith(_PREFIX)


@dataclass(frozen=True, slots=True)
class Site:
    """The network that the rules guard. `mac` is the bridge's own address, `names_port` where its name server listens (UDP)."""

    bridge: str
    subnet: IPv4Network
    gateway: IPv4Address
    mac: str
    names_port: int = 0

    def __post_init__(self) -> None:
        if not _LINK_NAME.fullmatch(self.bridge):
            raise ValueError(f"bridge {self.bridge!r} must be 1-15 of A-Z a-z 0-9 _ - and start with a letter")
        if not is_mac(self.mac):
            raise ValueError(f"{self.mac!r} is no MAC address")

    @property
    def table(self) -> str:
        """The name of both tables."""
        return _PREFIX + self.bridge


def clear(site: Site) -> str:
    """The transaction that leaves neither table, whether they were there or not."""
    # `destroy table` came with 1.0.7; adding first makes the deletion succeed everywhere.
    return "".join(f"{verb} table {family} {site.table}\n" for family in ("inet", "bridge") for verb in ("add", "delete"))


def render(site: Site, leases: Mapping[VmId, Lease]) -> str:
    """The transaction that replaces both tables by what `leases` say; without leases, `clear`.

    Raises Conflict when two leases hold the same address, MAC or host port: the rules could not honour both.
    """
    if not leases:
        return clear(site)
    vms = sorted(leases.items(), key=lambda item: item[1].ip)
    check_leases(site.subnet, site.gateway, vms)
    return clear(site) + _inet_table(site, vms) + _bridge_table(site, vms)


def change(site: Site, before: Mapping[VmId, Lease], leases: Mapping[VmId, Lease]) -> str:
    """The transaction that makes of the tables of `before` those of `leases`: short where little differs. Raises Conflict."""
    gone = [(vm_id, lease) for vm_id, lease in before.items() if leases.get(vm_id) != lease]
    new = [(vm_id, lease) for vm_id, lease in leases.items() if before.get(vm_id) != lease]
    if not before or not leases or len(gone) + len(new) > _FEW:
        return render(site, leases)
    check_leases(site.subnet, site.gateway, leases.items())
    table = site.table
    first, last = shared(before.items()), shared(leases.items())
    over = [_env_name(env) for env in first if env not in last]
    begun = [_env_name(env) for env in last if env not in first]
    # What is referred to is made before and removed after what refers to it; an address may change its owner in between.
    return "".join(
        [
            *_element_lines("delete", table, _elements(gone)),
            *_element_lines("delete", table, _env_elements(first, last)),
            *(f"flush chain inet {table} {env}\ndelete chain inet {table} {env}\n" for env in over),
            *(f"delete set inet {table} {env}\n" for env in over),
            *(f"add set inet {table} {env} {{ type ipv4_addr; }}\n" for env in begun),
            *(f"add chain inet {table} {env}\nadd rule inet {table} {env} ip daddr @{env} accept\n" for env in begun),
            *_element_lines("add", table, _elements(new)),
            *_element_lines("add", table, _env_elements(last, first)),
        ]
    )


_Elements = dict[tuple[str, str], list[str]]
"""(family, name of the set or map) to elements."""


def _elements(vms: Iterable[tuple[VmId, Lease]]) -> _Elements:
    """What each VM brings into the sets and maps, whatever the others do."""
    found: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for vm_id, vm in vms:
        ip, tap = str(vm.ip), f'"{tap_name(vm_id)}"'
        found["inet", "forwards"] += [f"{host} : {ip} . {guest}" for guest, host in sorted(vm.ports.items())]
        if vm.deny_outgoing:
            found["inet", "deny_outgoing"].append(ip)
        found["bridge", "taps"].append(tap)
        found["bridge", "macs"].append(vm.mac)
        found["bridge", "links"].append(f"{tap} . {vm.mac} . {ip}")
        found["bridge", "owners"].append(f"{vm.mac} . {ip}")
    return found


def _env_elements(envs: Mapping[str, list[IPv4Address]], others: Mapping[str, list[IPv4Address]]) -> _Elements:
    """What the environments of `envs` bring and those of `others` do not."""
    found: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for env, ips in envs.items():
        name, there = _env_name(env), set(others.get(env, ()))
        added = [str(ip) for ip in ips if ip not in there]
        found["inet", "neighbours"] += [f"{ip} : jump {name}" for ip in added]
        found["inet", name] += added
    return found


def _element_lines(verb: str, table: str, elements: _Elements) -> Iterable[str]:
    for (family, name), listed in elements.items():
        if listed:
            keys = listed if verb == "add" else [each.partition(" : ")[0] for each in listed]
            yield f"{verb} element {family} {table} {name} {{ {', '.join(keys)} }}\n"


def _env_name(env: str) -> str:
    """The name of an environment's set and chain."""
    return f"env_{sha256(env.encode()).hexdigest()[:12]}"


def _inet_table(site: Site, vms: list[tuple[VmId, Lease]]) -> str:
    bridge, subnet, gateway = f'"{site.bridge}"', site.subnet, site.gateway
    envs = dict(sorted(shared(vms).items()))
    elements = _elements(vms) | _env_elements(envs, {})
    env_sets = "".join(_set(f"set {name}", "ipv4_addr", elements["inet", name]) for name in map(_env_name, envs))
    env_chains = "".join(f"\tchain {name} {{\n\t\tip daddr @{name} accept\n\t}}\n" for name in map(_env_name, envs))
    to_names = from_guests = ""
    if site.names_port:
        # By translation, so that never a name server of the host's own is what guests reach.
        to_names = f"\t\tiifname {bridge} ip daddr {gateway} udp dport 53 dnat ip to {gateway}:{site.names_port}\n"
        from_guests = f"\t\tip daddr {gateway} udp dport {site.names_port} ct status dnat accept\n"
    # The order of hooks: guard (raw) sees the address as sent, so that a reply to 127.0.0.1 through a forward, which is
    # translated back later, passes, and a guest's own packet to 127.0.0.1 does not.
    return f"""table inet {site.table} {{
{_set("map forwards", "inet_service : ipv4_addr . inet_service", elements["inet", "forwards"])}\
{_set("set deny_outgoing", "ipv4_addr", elements.get(("inet", "deny_outgoing"), []))}\
{env_sets}\
{env_chains}\
{_set("map neighbours", "ipv4_addr : verdict", elements.get(("inet", "neighbours"), []))}\
	chain guard {{
		type filter hook prerouting priority raw; policy accept;
		iifname != "lo" ip daddr 127.0.0.0/8 drop
	}}
	chain prerouting {{
		type nat hook prerouting priority dstnat; policy accept;
{to_names}\
		fib daddr type local dnat ip to tcp dport map @forwards
	}}
	chain output {{
		type nat hook output priority -100; policy accept;
		fib daddr type local dnat ip to tcp dport map @forwards
	}}
	chain postrouting {{
		type nat hook postrouting priority srcnat; policy accept;
		oifname {bridge} ip saddr 127.0.0.0/8 snat ip to {gateway}
		oifname {bridge} ip saddr {subnet} ip saddr != {gateway} ct status dnat snat ip to {gateway}
		oifname != {bridge} ip saddr {subnet} ip saddr != {gateway} masquerade
	}}
	chain refuse {{
		reject with icmpx type admin-prohibited
	}}
	chain replies_only {{
		ct direction reply return
		goto refuse
	}}
	chain from_guest {{
		meta nfproto ipv6 drop
		ct state invalid drop
		ip saddr @deny_outgoing jump replies_only
		oifname != {bridge} accept
		ct status dnat accept
		ip saddr vmap @neighbours
		goto refuse
	}}
	chain to_guest {{
		meta nfproto ipv6 drop
		ct state established,related accept
		ct status dnat accept
		drop
	}}
	chain forward {{
		type filter hook forward priority filter; policy accept;
		iifname {bridge} goto from_guest
		oifname {bridge} goto to_guest
	}}
	chain input {{
		type filter hook input priority filter; policy accept;
		iifname != {bridge} accept
		ct state invalid drop
{from_guests}\
		ip saddr @deny_outgoing jump replies_only
		ct state established,related accept
		icmp type echo-request accept
		goto refuse
	}}
	chain redirects {{
		type filter hook output priority filter; policy accept;
		oifname {bridge} icmp type redirect drop
	}}
}}
"""


def _bridge_table(site: Site, vms: list[tuple[VmId, Lease]]) -> str:
    elements = _elements(vms)
    # A container's port has a name of Docker's choosing, so its frames are known by their MAC, which a container without
    # NET_ADMIN and NET_RAW cannot change. `meta ibrname` would know them all, but not every kernel is built with it.
    return f"""table bridge {site.table} {{
{_set("set taps", "ifname", elements["bridge", "taps"])}\
{_set("set macs", "ether_addr", elements["bridge", "macs"])}\
{_set("set links", "ifname . ether_addr . ipv4_addr", elements["bridge", "links"])}\
{_set("set owners", "ether_addr . ipv4_addr", elements["bridge", "owners"])}\
	chain to_host {{
		ether daddr set {site.mac} meta pkttype set host accept
	}}
	chain tap {{
		ether type arp iifname . ether saddr . arp saddr ip @links goto believed_arp
		ether type ip meta pkttype {{ host, other }} iifname . ether saddr . ip saddr @links goto to_host
		drop
	}}
	chain container {{
		ether type arp ether saddr . arp saddr ip @owners goto believed_arp
		ether type ip meta pkttype {{ host, other }} ether saddr . ip saddr @owners goto to_host
		drop
	}}
	chain believed_arp {{
		arp saddr ether . arp saddr ip @owners goto to_host
		drop
	}}
	chain prerouting {{
		type filter hook prerouting priority dstnat; policy accept;
		iifname @taps goto tap
		ether saddr @macs goto container
	}}
}}
"""


def _set(kind_and_name: str, of: str, elements: Iterable[str]) -> str:
    """A named set or map; nft refuses an empty element list."""
    listed = ",\n\t\t\t".join(elements)
    body = f"\t\telements = {{\n\t\t\t{listed} }}\n" if listed else ""
    return f"\t{kind_and_name} {{\n\t\ttype {of}\n{body}\t}}\n"
