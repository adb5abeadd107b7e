"""Names of one environment's VMs as its guests ask for them."""

from __future__ import annotations

import asyncio
import socket
from ipaddress import IPv4Address

import dns.message
import dns.rcode
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.machine import Lease, mac_of
from agent.network.names import Names, NameServer, answer
from specs.names import VmId


def lease(number: int, env: str, name: str) -> Lease:
    return Lease(IPv4Address(f"10.91.0.{number}"), mac_of(VmId(f"vm-{number}")), {}, False, env, name)


def names() -> Names:
    known = Names()
    known.learn([lease(2, "blue", "web"), lease(3, "blue", "db"), lease(4, "red", "web"), lease(5, "blue", "")])
    return known


def asked(name: str, client: str = "10.91.0.2", kind: str = "A") -> tuple[str, list[str]]:
    """(rcode, addresses) of the answer."""
    reply = answer(dns.message.make_query(name, kind).to_wire(), client, names())
    assert reply is not None
    message = dns.message.from_wire(reply)
    return dns.rcode.to_text(message.rcode()), [item.to_text() for rrset in message.answer for item in rrset]


@pytest.mark.parametrize("name", ["db", "DB", "db.", "db.blue.internal", "Db.Blue.Internal."])
def test_a_guest_finds_a_vm_of_its_environment_by_short_and_full_name(name: str) -> None:
    assert asked(name) == ("NOERROR", ["10.91.0.3"])


def test_the_same_name_means_to_each_environment_its_own_vm() -> None:
    assert asked("web", "10.91.0.3") == ("NOERROR", ["10.91.0.2"])
    assert asked("web", "10.91.0.4") == ("NOERROR", ["10.91.0.4"])


def test_there_is_no_ipv6_address_but_the_name_exists() -> None:
    assert asked("db", kind="AAAA") == ("NOERROR", [])


@pytest.mark.parametrize(
    ("name", "client"),
    [
        ("web.red.internal", "10.91.0.2"),
        ("db", "10.91.0.4"),
        ("db", "198.51.100.2"),
        ("example.org", "10.91.0.2"),
        (".", "10.91.0.5"),
    ],
)
def test_other_names_and_other_askers_are_refused(name: str, client: str) -> None:
    assert asked(name, client) == ("REFUSED", [])


@given(st.binary(max_size=600))
def test_what_is_no_query_gets_no_answer_and_does_no_harm(data: bytes) -> None:
    reply = answer(data, "10.91.0.2", names())
    assert reply is None or dns.message.from_wire(reply).rcode() in (dns.rcode.REFUSED, dns.rcode.NOERROR)


async def test_the_server_answers_on_its_socket_until_it_is_closed() -> None:
    known = Names()
    known.learn([Lease(IPv4Address("127.0.0.1"), mac_of(VmId("vm")), {}, False, "env", "vm")])
    server = NameServer(known)
    port = await server.open(IPv4Address("127.0.0.1"))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.setblocking(False)
        client.connect(("127.0.0.1", port))
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(client, b"nonsense")
        await loop.sock_sendall(client, dns.message.make_query("vm", "A").to_wire())
        reply = dns.message.from_wire(await asyncio.wait_for(loop.sock_recv(client, 1500), 30))
    assert [item.to_text() for rrset in reply.answer for item in rrset] == ["127.0.0.1"]
    server.close()
