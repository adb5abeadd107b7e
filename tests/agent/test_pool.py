"""Leases: one address and one host port per guest port, unique on the host, the same from the same records."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.errors import DoesNotFit
from agent.machine import Lease, mac_of
from agent.network.pool import DEFAULT_PORT_RANGE, DEFAULT_SUBNET, Taken, allocate, first_address
from specs.names import VmId

SMALL = IPv4Network("10.9.0.0/29")  # six addresses, of which the gateway takes one


def lease(
    vm_id: str,
    *taken: Lease,
    ports: tuple[int, ...] = (22,),
    subnet: IPv4Network = DEFAULT_SUBNET,
    port_range: range = DEFAULT_PORT_RANGE,
    busy: frozenset[int] = frozenset(),
    avoid: frozenset[int] = frozenset(),
) -> Lease:
    return allocate(
        taken,
        VmId(vm_id),
        ports,
        False,
        "env",
        subnet=subnet,
        gateway=first_address(subnet),
        is_free=lambda port: port not in busy,
        port_range=port_range,
        avoid_ports=avoid,
    )


def test_the_first_vm_gets_the_lowest_address_after_the_gateway_and_the_lowest_ports() -> None:
    assert lease("a", ports=(80, 22, 80)) == Lease(
        ip=IPv4Address("10.77.0.2"), mac=mac_of(VmId("a")), ports={22: 20000, 80: 20001}, deny_outgoing=False, env_id="env"
    )


def test_a_released_address_and_port_are_given_out_again_lowest_first() -> None:
    first, second = lease("a"), lease("b", lease("a"))
    assert (second.ip, second.ports) == (IPv4Address("10.77.0.3"), {22: 20001})
    again = lease("c", second)
    assert (again.ip, again.ports) == (first.ip, first.ports)


def test_a_port_of_a_host_service_is_passed_over() -> None:
    assert lease("a", ports=(22, 80), busy=frozenset({20000, 20002})).ports == {22: 20001, 80: 20003}


def test_a_port_released_a_moment_ago_comes_last_but_does_come() -> None:
    three = range(20000, 20003)
    assert lease("a", port_range=three, avoid=frozenset({20000})).ports == {22: 20001}
    assert lease("a", ports=(22, 80, 81), port_range=three, avoid=frozenset({20000})).ports == {22: 20001, 80: 20002, 81: 20000}


def test_a_full_port_range_is_refused_with_what_was_needed_and_left() -> None:
    with pytest.raises(DoesNotFit, match="needs 3 host ports and only 1 of 20000-20001 are free"):
        lease("a", ports=(22, 80, 443), port_range=range(20000, 20002), busy=frozenset({20001}))


def test_a_full_subnet_is_refused_and_never_gives_out_network_gateway_or_broadcast() -> None:
    taken: list[Lease] = []
    for number in range(5):
        taken.append(lease(f"vm-{number}", *taken, subnet=SMALL))
    assert [str(each.ip) for each in taken] == ["10.9.0.2", "10.9.0.3", "10.9.0.4", "10.9.0.5", "10.9.0.6"]
    with pytest.raises(DoesNotFit, match=r"all 5 addresses of 10\.9\.0\.0/29 are taken"):
        lease("one-more", *taken, subnet=SMALL)


def test_a_mac_that_another_vm_holds_is_not_given_out_twice() -> None:
    holder = lease("a")
    twin = lease("a", holder)
    assert twin.mac != holder.mac
    assert twin == lease("a", holder)


@given(
    vms=st.lists(st.sets(st.integers(1, 65535), min_size=1, max_size=8), max_size=12),
    busy=st.frozensets(st.integers(20000, 20040), max_size=20),
    gone=st.sets(st.integers(0, 11)),
)
def test_whatever_comes_and_goes_nothing_is_held_twice_and_the_same_records_give_the_same_lease(
    vms: list[set[int]], busy: frozenset[int], gone: set[int]
) -> None:
    held: dict[int, Lease] = {}
    for number, ports in enumerate(vms):
        made = lease(f"vm-{number}", *held.values(), ports=tuple(ports), busy=busy)
        assert made == lease(f"vm-{number}", *reversed(held.values()), ports=tuple(ports), busy=busy)
        assert set(made.ports) == ports
        held[number] = made
        if number in gone:
            del held[number // 2 if number // 2 in held else number]
    host_ports = [port for each in held.values() for port in each.ports.values()]
    assert len(host_ports) == len(set(host_ports))
    assert not busy.intersection(host_ports)
    assert all(port in DEFAULT_PORT_RANGE for port in host_ports)
    assert len({each.ip for each in held.values()}) == len({each.mac for each in held.values()}) == len(held)
    assert all(each.ip in DEFAULT_SUBNET and each.ip > first_address(DEFAULT_SUBNET) for each in held.values())


def test_the_six_hundredth_vm_asks_the_host_about_its_own_ports_alone() -> None:
    taken: list[Lease] = []
    asked: list[int] = []

    def is_free(port: int) -> bool:
        asked.append(port)
        return True

    for number in range(600):
        asked.clear()
        taken.append(
            allocate(
                taken,
                VmId(f"vm-{number}"),
                range(1, 9),
                False,
                "env",
                subnet=DEFAULT_SUBNET,
                gateway=first_address(DEFAULT_SUBNET),
                is_free=is_free,
            )
        )
    assert asked == list(taken[-1].ports.values()) == list(range(24792, 24800))
    assert taken[-1].ip == IPv4Address("10.77.2.89")


def test_what_is_taken_is_kept_up_and_says_the_same_as_all_leases_together() -> None:
    taken, leases = Taken(), []
    for number in range(20):
        lease = allocate(
            taken,
            VmId(f"vm-{number}"),
            {22, 80},
            False,
            "env",
            subnet=DEFAULT_SUBNET,
            gateway=first_address(DEFAULT_SUBNET),
            is_free=bool,
        )
        taken.add(lease)
        leases.append(lease)
    for lease in leases[3:8]:
        taken.remove(lease)
    again = Taken(leases[:3] + leases[8:])
    assert (taken.ips, taken.macs, taken.ports) == (again.ips, again.macs, again.ports)
