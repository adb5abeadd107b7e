"""Renders the whole PF rule set of one agent from its leases. Pure; called by the FreeBSD bridge network alone.

The rules live in one anchor, `muster/<bridge>`; the host's own pf.conf(5) calls it and stays the administrator's. if_bridge(4)
lets PF see every frame between guests on their own links (net.link.bridge.pfil_member) and what guests send to the host there
too (pfil_local_phys); what is routed passes the bridge itself. So a link believes of its guest only its leased address and
knows whom of the neighbours it may speak to, and the bridge decides on everything else with connection tracking.

    guest ──► its link (address, own environment) ──► bridge: forwards (rdr), outside (nat), nothing of the host but ping
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network

from agent.machine import Lease, short_hash
from agent.network.leases import check_leases, environments, is_mac
from specs.names import VmId

PRODUCT = "muster"
CALLS = {
    "nat": (f'nat-anchor "{PRODUCT}/*"', f'rdr-anchor "{PRODUCT}/*"'),
    "rules": (f'anchor "{PRODUCT}/*"',),
}
"""What the host's pf.conf must say, by the name under which `pfctl -s` shows it."""
_BRIDGE = re.compile(r"[A-Za-z][A-Za-z0-9]{0,11}")  # an interface name has 15 characters, and the group's has three more
_FORWARDED = "muster_forward"  # the tag of a connection to a forwarded port
_LEAVING = "muster_leaving"  # the tag of a guest's connection to the outside


def tap_name(vm_id: VmId) -> str:
    """The name of a VM's tap(4), 15 characters; bhyve(8) takes none that does not start with `tap`."""
    return f"tap{short_hash(vm_id)}"


def epair_names(vm_id: VmId) -> tuple[str, str]:
    """The names of a jail's epair(4): the end on the bridge, and the end that goes into the jail."""
    return f"mj{short_hash(vm_id)}a", f"mj{short_hash(vm_id)}b"


@dataclass(frozen=True, slots=True)
class PfSite:
    """The network that the rules guard. `mac` is the bridge's own address."""

    bridge: str
    subnet: IPv4Network
    gateway: IPv4Address
    mac: str

    def __post_init__(self) -> None:
        if not _BRIDGE.fullmatch(self.bridge):
            raise ValueError(f"bridge {self.bridge!r} must be 1-12 of A-Z a-z 0-9 and start with a letter")
        if not is_mac(self.mac):
            raise ValueError(f"{self.mac!r} is no MAC address")

    @property
    def anchor(self) -> str:
        """Where the rules are."""
        return f"{PRODUCT}/{self.bridge}"

    @property
    def group(self) -> str:
        """The interface group of all guests' links; a group's name may not end in a digit (ifconfig(8))."""
        return f"{self.bridge}_vm"

    @property
    def mark(self) -> str:
        """How the descriptions of the bridge and of all its links begin."""
        return f"{PRODUCT}:{self.bridge}:"

    def describe(self, vm_id: VmId) -> str:
        """The description every link carries from the moment it is made, by which it is found under any name."""
        return self.mark + short_hash(vm_id)


def render(site: PfSite, leases: Mapping[VmId, Lease], outside: Iterable[str]) -> str:
    """The text for `pfctl -a <anchor> -f -`; "" without leases. `outside` are the host's links towards other networks.

    Raises Conflict when two leases hold the same address, MAC or host port: the rules could not honour both.
    """
    if not leases:
        return ""
    vms = sorted(leases.items(), key=lambda item: item[1].ip)
    check_leases(site.subnet, site.gateway, vms)
    shared = environments(vms)
    lines = [*_tables(vms, shared), *_translations(site, vms, outside), *_unknown_families(site)]
    for vm_id, lease in vms:
        table = next((f"<env_{number}>" for number, ips in enumerate(shared) if lease.ip in ips), "")
        for link in (tap_name(vm_id), epair_names(vm_id)[0]):
            lines += _link_rules(site, link, lease, table)
    lines.append(f"block drop quick on {site.group} inet all")
    lines += _bridge_rules(site)
    return "\n".join(lines) + "\n"


def _tables(vms: list[tuple[VmId, Lease]], shared: list[list[IPv4Address]]) -> list[str]:
    tables = {
        "guests": [vm.ip for _, vm in vms],
        "quiet": [vm.ip for _, vm in vms if vm.deny_outgoing],
        **{f"env_{number}": ips for number, ips in enumerate(shared)},
    }
    return [f"table <{name}> const {{ {' '.join(map(str, ips))} }}" for name, ips in tables.items()]


def _translations(site: PfSite, vms: list[tuple[VmId, Lease]], outside: Iterable[str]) -> list[str]:
    subnet, forwards = site.subnet, [(host, vm.ip, guest) for _, vm in vms for guest, host in sorted(vm.ports.items())]
    return [
        f"no nat on {site.group} all",
        # A guest that calls a forward is answered by way of the host; the other guest would answer it directly.
        f"nat on {site.bridge} inet from {subnet} to {subnet} tagged {_FORWARDED} -> {site.gateway}",
        *(f"nat on {link} inet from {subnet} to ! {subnet} -> ({link}:0)" for link in sorted(outside)),
        f"no rdr on {site.group} all",
        f"no rdr on {site.bridge} inet from <quiet> to any",
        *(f"rdr inet proto tcp from any to (self) port {host} tag {_FORWARDED} -> {ip} port {to}" for host, ip, to in forwards),
    ]


def _unknown_families(site: PfSite) -> list[str]:
    return [f"block drop quick on {link} inet6 all" for link in (site.group, site.bridge)]


def _link_rules(site: PfSite, link: str, lease: Lease, neighbours: str) -> list[str]:
    """What passes a guest's link. States are kept on the link alone: one made elsewhere must not let a frame in here."""
    ip = lease.ip
    rules = [
        f"block drop in quick on {link} inet from ! {ip} to any",
        f"block drop out quick on {link} inet from any to ! {ip}",
        # Decided on the bridge, where these packets arrive next.
        f"pass in quick on {link} inet from {ip} to {site.gateway} no state",
        f"pass in quick on {link} inet from {ip} to ! {site.subnet} no state",
    ]
    if neighbours and lease.deny_outgoing:
        return [*rules, f"pass out quick on {link} inet from {neighbours} to {ip} keep state (if-bound)"]
    if neighbours:
        return [
            *rules,
            f"pass in quick on {link} inet from {ip} to {neighbours} no state",
            f"pass out quick on {link} inet from {neighbours} to {ip} no state",
        ]
    return rules


def _bridge_rules(site: PfSite) -> list[str]:
    bridge = site.bridge
    return [
        f"pass in quick inet proto tcp tagged {_FORWARDED} keep state",
        f"block drop in quick on {bridge} inet from <quiet> to any",
        f"pass in quick on {bridge} inet proto icmp from <guests> to (self) icmp-type echoreq keep state",
        f"block return in quick on {bridge} inet from any to (self)",
        f"pass in quick on {bridge} inet from <guests> to ! {site.subnet} tag {_LEAVING} keep state",
        f"block drop in quick on {bridge} inet all",
        f"pass out quick inet tagged {_LEAVING} keep state",
        f"pass out quick on {bridge} inet tagged {_FORWARDED} keep state",
        f"pass out quick on {bridge} inet from (self) to <guests> keep state",
        f"block drop out quick on {bridge} inet all",
    ]
