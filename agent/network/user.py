"""The network that needs no root: QEMU (or Docker) does the networking of each VM in its own process.

Called by the runtime through the protocol of base.py. Every VM has the whole subnet to itself, with the leased address in
it, and reaches others only through forwarded ports. `deny_outgoing` is the engine's to keep (QEMU: `restrict=on`).
"""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import IPv4Address, IPv4Network

from agent.errors import Unsupported
from agent.machine import Lease, Nic, Probe, Usable
from agent.network.host import port_can_be_bound
from agent.network.pool import DEFAULT_SUBNET, first_address
from specs.names import Engine, VmId

EVERY_ADDRESS = ("0.0.0.0",)  # noqa: S104 forwards are meant to be reachable from other hosts
_ENGINES = frozenset({Engine.QEMU, Engine.DOCKER})


class UserNetwork:
    """Implements base.Network. Forwards listen on `forward_addrs`, ("127.0.0.1",) to keep them on this host."""

    name = "user"

    def __init__(self, subnet: IPv4Network = DEFAULT_SUBNET, forward_addrs: tuple[str, ...] = EVERY_ADDRESS) -> None:
        # QEMU keeps a name server at one address beside the gateway's and the guest's.
        if subnet.prefixlen > 29:
            raise ValueError(f"subnet {subnet} has no room for a gateway, a name server and a VM")
        if not forward_addrs:
            raise ValueError("forward_addrs must name at least one address, such as 0.0.0.0")
        self.subnet = subnet
        self.gateway = first_address(subnet)
        self._forward_addrs = tuple(str(IPv4Address(address)) for address in forward_addrs)

    async def probe(self) -> Probe:
        """Usable everywhere: it makes nothing on the host. Whether QEMU has user networking is its engine's probe."""
        # QEMU hands what a guest sends to the gateway address to the host's loopback and has no switch against it.
        exposed = (
            "guests without deny_outgoing reach what listens on this host's loopback, also a controller or agent without a key"
        )
        return Usable(
            f"QEMU's user-mode network, {self.subnet}, forwards on {', '.join(self._forward_addrs)}",
            (exposed, "VMs do not find each other by name: each has a network of its own"),
        )

    async def setup(self) -> None:
        """Nothing is shared between VMs."""

    async def ensure(self, vm_id: VmId, lease: Lease, engine: Engine) -> Nic:
        """No link: the engine makes it inside its process. `dns` is where QEMU's own forwarder of queries answers."""
        if engine not in _ENGINES:
            raise Unsupported(f"engine {engine} has no user-mode network; run the agent as root with --network bridge")
        last = self.subnet.broadcast_address - 1
        server = last if last != lease.ip else last - 1
        return Nic("user", lease, self.subnet, self.gateway, dns=(str(server),), forward_addrs=self._forward_addrs)

    async def apply(self, leases: Mapping[VmId, Lease]) -> None:
        """Nothing: a forward is a socket of the VM's own process and comes and goes with it."""

    async def remove(self, vm_id: VmId) -> None:
        """Nothing: the VM's link ended with its process."""

    async def leftovers(self, known: frozenset[VmId]) -> tuple[str, ...]:
        """None: links end with their processes, and those are the engine's leftovers."""
        return ()

    def port_is_free(self, port: int) -> bool:
        """Binds the port where the forward would listen."""
        return port_can_be_bound(port, self._forward_addrs)

    async def teardown(self) -> None:
        """Nothing was made."""
