"""Renders the whole nftables rule set of one agent from its leases. Pure; called by the Linux bridge network alone.

Two tables named after the bridge carry everything. `table bridge` believes of every frame only what the lease says, and
hands all of it to the host: nothing is ever switched from guest to guest. So `table inet` sees every packet of
every guest and decides with connection tracking. Syntax: nft(8), version 1.0.6 and later.

    guest ──frame──► bridge/prerouting ──► inet: guard, forwards (DNAT) ──► input   the host itself: ping alone
             sender's port, MAC and address                             └─► forward outside, own environment, forwards
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network

from agent.machine import Lease, short_hash
from agent.network.leases import check_leases, environments, is_mac
from specs.names import VmId

DEFAULT_BRIDGE = "muster0"
_LINK_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,14}")  # fits a kernel link (15 characters) and an nft identifier
_PREFIX = "muster_"


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
    """The network that the rules guard. `mac` is the bridge's own address."""

    bridge: str
    subnet: IPv4Network
    gateway: IPv4Address
    mac: str

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


def _inet_table(site: Site, vms: list[tuple[VmId, Lease]]) -> str:
    bridge, subnet, gateway = f'"{site.bridge}"', site.subnet, site.gateway
    shared = environments(vms)
    forwards = (f"{host} : {vm.ip} . {guest}" for _, vm in vms for guest, host in sorted(vm.ports.items()))
    quiet = (str(vm.ip) for _, vm in vms if vm.deny_outgoing)
    neighbours = (f"{ip} : jump env_{number}" for number, ips in enumerate(shared) for ip in ips)
    env_chains = "".join(
        f"\tchain env_{number} {{\n\t\tip daddr {{ {', '.join(map(str, ips))} }} accept\n\t}}\n"
        for number, ips in enumerate(shared)
    )
    # The order of hooks: guard (raw) sees the address as sent, so that a reply to 127.0.0.1 through a forward, which is
    # translated back later, passes, and a guest's own packet to 127.0.0.1 does not.
    return f"""table inet {site.table} {{
{_set("map forwards", "inet_service : ipv4_addr . inet_service", forwards)}\
{_set("set deny_outgoing", "ipv4_addr", quiet)}\
{env_chains}\
{_set("map neighbours", "ipv4_addr : verdict", neighbours)}\
	chain guard {{
		type filter hook prerouting priority raw; policy accept;
		iifname != "lo" ip daddr 127.0.0.0/8 drop
	}}
	chain prerouting {{
		type nat hook prerouting priority dstnat; policy accept;
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
    taps = (f'"{tap_name(vm_id)}"' for vm_id, _ in vms)
    macs = (vm.mac for _, vm in vms)
    links = (f'"{tap_name(vm_id)}" . {vm.mac} . {vm.ip}' for vm_id, vm in vms)
    owners = (f"{vm.mac} . {vm.ip}" for _, vm in vms)
    # A container's port has a name of Docker's choosing, so its frames are known by their MAC, which a container without
    # NET_ADMIN and NET_RAW cannot change. `meta ibrname` would know them all, but not every kernel is built with it.
    return f"""table bridge {site.table} {{
{_set("set taps", "ifname", taps)}\
{_set("set macs", "ether_addr", macs)}\
{_set("set links", "ifname . ether_addr . ipv4_addr", links)}\
{_set("set owners", "ether_addr . ipv4_addr", owners)}\
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
