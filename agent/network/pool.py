"""Chooses the address and host ports of a new VM. Called by the runtime; pure: knows nothing of links or rules.

The lowest free address and the lowest free ports are taken, so the same records always lead to the same lease.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from ipaddress import IPv4Address, IPv4Network

from agent.errors import DoesNotFit
from agent.machine import Lease, mac_of
from specs.names import VmId

DEFAULT_SUBNET = IPv4Network("10.77.0.0/16")
DEFAULT_PORT_RANGE = range(20000, 32768)
"""Host ports for forwards: below Linux' ephemeral range (ip_local_port_range, 32768 on), so no client socket sits on one."""


class Taken:
    """What the leases of a host hold, kept up with each of them: adding one must not cost a walk over all."""

    def __init__(self, leases: Iterable[Lease] = ()) -> None:
        self.ips: set[int] = set()
        self.macs: set[str] = set()
        self.ports: set[int] = set()
        for lease in leases:
            self.add(lease)

    def add(self, lease: Lease) -> None:
        """The lease is held from now on."""
        self.ips.add(int(lease.ip))
        self.macs.add(lease.mac)
        self.ports.update(lease.ports.values())

    def remove(self, lease: Lease) -> None:
        """The lease is free again."""
        self.ips.discard(int(lease.ip))
        self.macs.discard(lease.mac)
        self.ports.difference_update(lease.ports.values())


def first_address(subnet: IPv4Network) -> IPv4Address:
    """The gateway of a subnet: its lowest address after the network's own."""
    return subnet.network_address + 1


def allocate(
    taken: Taken | Collection[Lease],
    vm_id: VmId,
    ports: Collection[int],
    deny_outgoing: bool,
    env_id: str,
    *,
    subnet: IPv4Network,
    gateway: IPv4Address,
    is_free: Callable[[int], bool],
    port_range: range = DEFAULT_PORT_RANGE,
    avoid_ports: Collection[int] = (),
    name: str = "",
) -> Lease:
    """A lease for `vm_id`: one address, and one host port for each guest port in `ports`.

    `taken` are the leases of the host's other VMs. `is_free` says whether a service of the host leaves a port alone; it is
    asked only about ports that would be given out. `avoid_ports` were released a moment ago: they come last, because
    clients of the VM that had them may still call. Raises DoesNotFit when addresses or ports have run out.
    """
    held = taken if isinstance(taken, Taken) else Taken(taken)
    ip = _lowest_free_address(held.ips, subnet, gateway)
    mac = _unused_mac(held.macs, vm_id)
    wanted = sorted(set(ports))
    free = _free_ports(held.ports, port_range, is_free, avoid_ports)
    forwards = dict(zip(wanted, free, strict=False))
    if len(forwards) < len(wanted):
        raise DoesNotFit(
            f"no room for {vm_id}: it needs {len(wanted)} host ports and only {len(forwards)} of "
            f"{port_range.start}-{port_range.stop - 1} are free; delete VMs or give the agent a wider --port-range"
        )
    return Lease(ip=ip, mac=mac, ports=forwards, deny_outgoing=deny_outgoing, env_id=env_id, name=name)


def _lowest_free_address(taken: set[int], subnet: IPv4Network, gateway: IPv4Address) -> IPv4Address:
    lowest = max(int(gateway), int(subnet.network_address)) + 1
    for number in range(lowest, int(subnet.broadcast_address)):
        if number not in taken:
            return IPv4Address(number)
    raise DoesNotFit(
        f"all {max(0, int(subnet.broadcast_address) - lowest)} addresses of {subnet} are taken; "
        "delete VMs or give the agent a larger --subnet"
    )


def _free_ports(taken: set[int], ports: range, is_free: Callable[[int], bool], avoid: Collection[int]) -> Iterator[int]:
    late = []
    for port in ports:
        if port in taken:
            continue
        if port in avoid:
            late.append(port)
        elif is_free(port):
            yield port
    yield from (port for port in late if is_free(port))


def _unused_mac(taken: set[str], vm_id: VmId) -> str:
    # Two VMs with one MAC address would each pass the other's spoofing filter.
    mac = mac_of(vm_id)
    attempt = 0
    while mac in taken:
        attempt += 1
        mac = mac_of(VmId(f"{vm_id}#{attempt}"))
    return mac
