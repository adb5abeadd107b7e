"""A network in memory that passes the drivers' contract. For tests of the runtime and for simulated agents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Network

from agent.errors import Conflict
from agent.faults import Faults
from agent.machine import Lease, Nic, Probe, Usable, short_hash
from agent.network.pool import DEFAULT_SUBNET, first_address
from specs.names import Engine, VmId


@dataclass
class FakeHost:
    """What is on the host. Outlives the drivers, as a kernel outlives agents: give it to a second one to restart the first.

    `links` are tap names; `rules` the leases of the last successful `apply`; `busy_ports` what services listen on.
    `applied` counts the successful `apply` calls. Every async method reaches `faults` by its own name, as agent/faults.py says.
    """

    bridge: bool = False
    links: set[str] = field(default_factory=set)
    rules: dict[VmId, Lease] = field(default_factory=dict)
    busy_ports: set[int] = field(default_factory=set)
    applied: int = 0
    faults: Faults = field(default_factory=Faults)


class FakeNetwork:
    """Implements base.Network on a FakeHost."""

    name = "fake"

    def __init__(self, host: FakeHost | None = None, subnet: IPv4Network = DEFAULT_SUBNET) -> None:
        self.host = host or FakeHost()
        self.subnet = subnet
        self.gateway = first_address(subnet)

    async def probe(self) -> Probe:
        """Usable."""
        await self.host.faults.reach("probe")
        return Usable("in memory")

    async def setup(self) -> None:
        """Makes the bridge."""
        await self.host.faults.reach("setup")
        self.host.bridge = True
        await self.host.faults.reach("setup.done")

    async def ensure(self, vm_id: VmId, lease: Lease, engine: Engine) -> Nic:
        """A link named as the real driver's for VMs, none for containers."""
        await self.host.faults.reach("ensure", vm_id)
        self.host.bridge = True
        link = "" if engine.is_container else f"mt{short_hash(vm_id)}"
        if link:
            self.host.links.add(link)
        await self.host.faults.reach("ensure.done", vm_id)
        if not link:
            return Nic("bridge", lease, self.subnet, self.gateway, bridge="fake0")
        return Nic("tap", lease, self.subnet, self.gateway, link=link, bridge="fake0")

    async def apply(self, leases: Mapping[VmId, Lease]) -> None:
        """Keeps a copy. Raises Conflict when two leases hold the same address, MAC or host port."""
        await self.host.faults.reach("apply")
        held = [item for lease in leases.values() for item in (int(lease.ip), lease.mac, *lease.ports.values())]
        if len(held) != len(set(held)):
            raise Conflict("two leases hold the same address, MAC or host port")
        self.host.rules = dict(leases)
        self.host.applied += 1
        await self.host.faults.reach("apply.done")

    async def remove(self, vm_id: VmId) -> None:
        """Forgets the link."""
        await self.host.faults.reach("remove", vm_id)
        self.host.links.discard(f"mt{short_hash(vm_id)}")
        await self.host.faults.reach("remove.done", vm_id)

    async def leftovers(self, known: frozenset[VmId]) -> tuple[str, ...]:
        """Forgets links of VMs that are not known."""
        await self.host.faults.reach("leftovers")
        stale = sorted(self.host.links - {f"mt{short_hash(vm_id)}" for vm_id in known})
        self.host.links.difference_update(stale)
        await self.host.faults.reach("leftovers.done")
        return tuple(f"tap {link}" for link in stale)

    def port_is_free(self, port: int) -> bool:
        """Whether the port is outside `busy_ports`."""
        return port not in self.host.busy_ports

    async def teardown(self) -> None:
        """Forgets bridge, links and rules."""
        await self.host.faults.reach("teardown")
        self.host.bridge = False
        self.host.links.clear()
        self.host.rules.clear()
        await self.host.faults.reach("teardown.done")
