"""What every rule set reads from the leases, whatever firewall it is for. Pure; called by the renderers."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network

from agent.errors import Conflict
from agent.machine import Lease
from specs.names import VmId

_MAC = re.compile(r"[0-9a-f]{2}(?::[0-9a-f]{2}){5}")


def is_mac(text: str) -> bool:
    """Whether this is a MAC address as rules are written with: lower case, colons."""
    return _MAC.fullmatch(text) is not None


def check_leases(subnet: IPv4Network, gateway: IPv4Address, vms: Iterable[tuple[VmId, Lease]]) -> None:
    """Raises Conflict when two leases hold the same address, MAC or host port, or one holds what no rule could be made of."""
    holders: dict[object, VmId] = {}
    for vm_id, lease in vms:
        if not is_mac(lease.mac):
            raise Conflict(f"the lease of {vm_id} has {lease.mac!r} where a MAC address belongs")
        if lease.ip not in subnet or lease.ip == gateway:
            raise Conflict(f"the lease of {vm_id} holds {lease.ip}, which is not a guest address of {subnet}")
        for guest, host in lease.ports.items():
            if not (0 < guest < 65536 and 0 < host < 65536):
                raise Conflict(f"the lease of {vm_id} forwards {host} to {guest}, which are not both ports")
        for held in (lease.ip, lease.mac, *lease.ports.values()):
            other = holders.setdefault(held, vm_id)
            if other != vm_id:
                kind = "MAC" if held is lease.mac else "host port" if isinstance(held, int) else "address"
                raise Conflict(f"{other} and {vm_id} both hold {kind} {held}; delete one of them")


def environments(vms: Iterable[tuple[VmId, Lease]]) -> list[list[IPv4Address]]:
    """Addresses that may speak to each other, grouped; a VM alone in its environment needs no group."""
    return [ips for _, ips in sorted(shared(vms).items())]


def shared(vms: Iterable[tuple[VmId, Lease]]) -> dict[str, list[IPv4Address]]:
    """The same by environment id."""
    groups: defaultdict[str, list[IPv4Address]] = defaultdict(list)
    for _, lease in vms:
        groups[lease.env_id].append(lease.ip)
    return {env: ips for env, ips in groups.items() if len(ips) > 1}
