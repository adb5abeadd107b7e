"""Answers guests' DNS queries for the names of their own environment's VMs, and no others. Called by the Linux bridge network.

A query's source address says whose it is: the bridge believes no guest another one. What is not such a name is refused, so that
a resolver goes on to its next server (resolv.conf(5)); nothing is forwarded, so nothing gets past `deny_outgoing` here.
"""

from __future__ import annotations

import asyncio
import socket
from collections import defaultdict
from collections.abc import Iterable
from ipaddress import IPv4Address
from typing import Any

import dns.exception
import dns.flags
import dns.message
import dns.opcode
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import dns.rrset

from agent.machine import Lease

DOMAIN = "internal"
"""`web` is also `web.ENVIRONMENT.internal`; ICANN keeps this domain for private use."""
_TTL = 5  # seconds; a replaced VM has another address
_PORTS = (10053, 0)  # below Linux' ephemeral range; 0: any free one
_IP_FREEBIND = 15  # linux/in.h: the bridge may come later, and again


class Names:
    """Who is called what in which environment."""

    def __init__(self) -> None:
        self._envs: dict[str, str] = {}
        self._addresses: dict[tuple[str, str], list[str]] = {}

    def learn(self, leases: Iterable[Lease]) -> None:
        """From now on these and no others."""
        envs: dict[str, str] = {}
        addresses: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
        for lease in leases:
            envs[str(lease.ip)] = lease.env_id
            if lease.name:
                addresses[lease.env_id, lease.name.lower()].append(str(lease.ip))
        self._envs, self._addresses = envs, dict(addresses)

    def find(self, client: str, name: str) -> tuple[str, ...]:
        """The addresses that a name means to the guest at address `client`; none if it has no such neighbour."""
        env = self._envs.get(client)
        if env is None:
            return ()
        return tuple(self._addresses.get((env, name.lower().removesuffix(f".{env}.{DOMAIN}".lower())), ()))


def answer(query: bytes, client: str, names: Names) -> bytes | None:
    """The reply to a DNS message (RFC 1035) from `client`; None for what is no query."""
    try:
        asked = dns.message.from_wire(query)
        if asked.flags & dns.flags.QR or asked.opcode() != dns.opcode.QUERY or len(asked.question) != 1:
            return None
        reply = dns.message.make_response(asked)
        question = asked.question[0]
        found = names.find(client, question.name.to_text(omit_final_dot=True))
        if not found or question.rdclass != dns.rdataclass.IN:
            reply.set_rcode(dns.rcode.REFUSED)
        else:
            reply.flags |= dns.flags.AA
            if question.rdtype == dns.rdatatype.A:
                reply.answer.append(dns.rrset.from_text(question.name, _TTL, dns.rdataclass.IN, dns.rdatatype.A, *found))
        return reply.to_wire()
    except (dns.exception.DNSException, ValueError):
        return None


class NameServer(asyncio.DatagramProtocol):
    """A socket that answers out of `names` until it is closed."""

    def __init__(self, names: Names) -> None:
        self._names = names
        self._transport: asyncio.DatagramTransport | None = None

    async def open(self, address: IPv4Address) -> int:
        """Begins to answer at an address that may not be there yet; returns the UDP port. Raises OSError."""
        sock = _bound(str(address))
        await asyncio.get_running_loop().create_datagram_endpoint(lambda: self, sock=sock)
        return int(sock.getsockname()[1])

    def close(self) -> None:
        """Answers no more."""
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: Any) -> None:
        """Called by asyncio."""
        self._transport = transport

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        """Called by asyncio."""
        reply = answer(data, addr[0], self._names)
        if reply is not None and self._transport is not None:
            self._transport.sendto(reply, addr)


def _bound(address: str) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        sock.setsockopt(socket.IPPROTO_IP, _IP_FREEBIND, 1)
        sock.setblocking(False)
        try:
            sock.bind((address, _PORTS[0]))
        except OSError:
            sock.bind((address, _PORTS[1]))
    except BaseException:
        sock.close()
        raise
    return sock
