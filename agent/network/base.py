"""What a network driver must do. `ensure` and `remove` are called per VM, `apply` for the host as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import IPv4Address, IPv4Network
from typing import Protocol, runtime_checkable

from agent.machine import Lease, Nic, Probe
from specs.names import Engine, VmId


class Network(Protocol):
    """How VMs reach and are reached. The rules of the host always equal what the leases say."""

    name: str
    subnet: IPv4Network
    """Addresses of VMs come from here; the first usable one is the gateway."""
    gateway: IPv4Address

    async def probe(self) -> Probe:
        """Says whether this network works here, really trying (root, tools, kernel parts)."""
        ...

    async def setup(self) -> None:
        """Makes what all VMs share (bridge, sysctls, table). Repeatable; mends what somebody removed."""
        ...

    async def ensure(self, vm_id: VmId, lease: Lease, engine: Engine) -> Nic:
        """Makes the VM's link as its engine needs it and says how to plug in. Repeatable."""
        ...

    async def apply(self, leases: Mapping[VmId, Lease]) -> None:
        """Replaces the host's whole rule set by what these leases say, in one transaction. No leases: nothing is left."""
        ...

    async def remove(self, vm_id: VmId) -> None:
        """Removes the VM's link; nothing there is fine. The rules go with the next `apply`."""
        ...

    async def leftovers(self, known: frozenset[VmId]) -> tuple[str, ...]:
        """Removes links on this driver's bridge whose derived names belong to none of `known`; says what it removed."""
        ...

    def port_is_free(self, port: int) -> bool:
        """Whether a forward could take this host TCP port now: no service of the host listens there."""
        ...

    async def teardown(self) -> None:
        """Removes what `setup` made. Called when the agent ends with no VM on the host."""
        ...


@runtime_checkable
class NamesServed(Protocol):
    """A network that tells guests the addresses of their environment's VMs while its agent runs."""

    async def open_names(self) -> None:
        """Begins to answer."""
        ...

    async def close_names(self) -> None:
        """Answers no more."""
        ...
