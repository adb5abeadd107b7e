"""What every network driver must do, whatever it drives. A driver's test module subclasses `NetworkContract` with a rig."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from ipaddress import IPv4Address
from typing import Protocol

from agent.machine import Lease, Usable
from agent.network.base import Network
from agent.network.pool import allocate
from specs.names import Engine, VmId

WEB, DATABASE = VmId("web"), VmId("database")


class NetworkRig(Protocol):
    """A host of its own with one driver on it."""

    network: Network

    def restarted(self) -> Network:
        """A second driver on the same host, as after a restart of the agent."""
        ...

    def left(self) -> frozenset[str]:
        """Everything on the host that a driver made, by name."""
        ...

    def busy(self, port: int) -> contextlib.AbstractContextManager[None]:
        """A service of the host listens on a TCP port."""
        ...


def lease_for(network: Network, vm_id: VmId, *others: Lease, deny: bool = False, env: str = "env") -> Lease:
    """The lease the runtime would give."""
    return allocate(
        others, vm_id, [22, 80], deny, env, subnet=network.subnet, gateway=network.gateway, is_free=network.port_is_free
    )


class NetworkContract:
    """Inherit with a fixture `rig`. `engines` are those whose machines the driver can plug in, QEMU's always."""

    engines: tuple[Engine, ...] = (Engine.QEMU, Engine.DOCKER)

    async def test_a_host_with_everything_is_usable_and_probing_leaves_nothing(self, rig: NetworkRig) -> None:
        before = rig.left()
        probe = await rig.network.probe()
        assert isinstance(probe, Usable), probe
        assert rig.left() == before

    def test_the_gateway_is_the_lowest_address_of_the_subnet(self, rig: NetworkRig) -> None:
        assert rig.network.gateway == rig.network.subnet.network_address + 1

    async def test_setup_twice_makes_the_same_as_once(self, rig: NetworkRig) -> None:
        await rig.network.setup()
        once = rig.left()
        await rig.network.setup()
        assert rig.left() == once

    async def test_a_nic_carries_the_lease_and_is_the_same_every_time(self, rig: NetworkRig) -> None:
        await rig.network.setup()
        lease = lease_for(rig.network, WEB)
        for engine in self.engines:
            nic = await rig.network.ensure(WEB, lease, engine)
            assert (nic.lease, nic.subnet, nic.gateway) == (lease, rig.network.subnet, rig.network.gateway)
            assert await rig.network.ensure(WEB, lease, engine) == nic
            assert await rig.restarted().ensure(WEB, lease, engine) == nic
            assert all(IPv4Address(server) != lease.ip for server in nic.dns)

    async def test_a_nic_can_be_had_before_anybody_called_setup(self, rig: NetworkRig) -> None:
        lease = lease_for(rig.network, WEB)
        nic = await rig.network.ensure(WEB, lease, Engine.QEMU)
        await rig.network.setup()
        assert await rig.network.ensure(WEB, lease, Engine.QEMU) == nic

    async def test_removing_a_vm_removes_its_link_alone_and_may_be_repeated(self, rig: NetworkRig) -> None:
        await rig.network.setup()
        web = lease_for(rig.network, WEB)
        await rig.network.ensure(WEB, web, Engine.QEMU)
        with_web = rig.left()
        await rig.network.ensure(DATABASE, lease_for(rig.network, DATABASE, web), Engine.QEMU)
        await rig.network.remove(DATABASE)
        assert rig.left() == with_web
        await rig.network.remove(DATABASE)
        await rig.network.remove(VmId("never-heard-of"))
        assert rig.left() == with_web

    async def test_links_of_unknown_vms_are_removed_after_a_restart_and_named(self, rig: NetworkRig) -> None:
        await rig.network.setup()
        web = lease_for(rig.network, WEB)
        await rig.network.ensure(WEB, web, Engine.QEMU)
        with_web = rig.left()
        database = lease_for(rig.network, DATABASE, web)
        await rig.network.ensure(DATABASE, database, Engine.QEMU)
        extra = rig.left() - with_web
        network = rig.restarted()
        removed = await network.leftovers(frozenset({WEB}))
        assert len(removed) == len(extra)
        assert all(any(link in told for told in removed) for link in extra)
        assert rig.left() == with_web
        assert await network.leftovers(frozenset({WEB})) == ()

    async def test_applying_the_same_leases_again_changes_nothing(self, rig: NetworkRig) -> None:
        await rig.network.setup()
        web = lease_for(rig.network, WEB)
        leases = {WEB: web, DATABASE: lease_for(rig.network, DATABASE, web, deny=True)}
        await rig.network.apply(leases)
        once = rig.left()
        await rig.network.apply(leases)
        await rig.restarted().apply(dict(reversed(leases.items())))
        assert rig.left() == once

    async def test_no_leases_leave_no_rules(self, rig: NetworkRig) -> None:
        await rig.network.setup()
        bare = rig.left()
        await rig.network.apply({})
        assert rig.left() == bare
        await rig.network.apply({WEB: lease_for(rig.network, WEB)})
        await rig.network.apply({})
        assert rig.left() == bare

    async def test_a_port_where_a_service_listens_is_not_free(self, rig: NetworkRig) -> None:
        first = lease_for(rig.network, WEB).ports[22]
        assert rig.network.port_is_free(first)
        with rig.busy(first):
            assert not rig.network.port_is_free(first)
            assert first not in lease_for(rig.network, WEB).ports.values()
        assert rig.network.port_is_free(first)

    async def test_teardown_leaves_nothing_may_be_repeated_and_setup_starts_anew(self, rig: NetworkRig) -> None:
        bare = rig.left()
        await rig.network.teardown()
        assert rig.left() == bare
        await rig.network.setup()
        full = rig.left()
        await rig.network.ensure(WEB, lease_for(rig.network, WEB), Engine.QEMU)
        await rig.network.apply({WEB: lease_for(rig.network, WEB)})
        await rig.network.teardown()
        await rig.network.teardown()
        assert rig.left() == bare
        await rig.network.setup()
        assert rig.left() == full


@contextlib.contextmanager
def in_set(ports: set[int], port: int) -> Iterator[None]:
    """`busy` for a host in memory."""
    ports.add(port)
    try:
        yield
    finally:
        ports.discard(port)
