"""What the network drivers ask of the host: free ports, resolvers, sysctls, the rule set's generation. Linux where noted."""

from __future__ import annotations

import socket
import struct
from collections.abc import Collection, Iterable
from ipaddress import IPv4Address, ip_address
from pathlib import Path

from agent.errors import AgentError

RESOLV_CONF = Path("/etc/resolv.conf")
UPSTREAM_RESOLV_CONF = Path("/run/systemd/resolve/resolv.conf")
"""systemd-resolved(8): the real servers, where RESOLV_CONF names only its own stub on 127.0.0.53."""

_NETLINK_NETFILTER = 12  # linux/netlink.h
_GET_GENERATION = (10 << 8) | 16  # NFNL_SUBSYS_NFTABLES, NFT_MSG_GETGEN of linux/netfilter/nf_tables.h
_GENERATION_ID = 1  # NFTA_GEN_ID, 32 bits, big endian
_REPLY_LIMIT = 2.0  # seconds


def port_can_be_bound(port: int, addresses: Iterable[str]) -> bool:
    """Whether no service of this host listens on TCP `port` at any of these IPv4 addresses, by really binding it.

    0.0.0.0 also finds listeners on a single address and on dual-stack [::]. Connections in TIME_WAIT of a service that set
    SO_REUSEADDR, as servers do, do not count.
    """
    for address in addresses:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address, port))
            except OSError:
                return False
    return True


def resolvers(
    own: Collection[IPv4Address], files: Iterable[Path] = (RESOLV_CONF, UPSTREAM_RESOLV_CONF), most: int = 3
) -> tuple[str, ...]:
    """The IPv4 name servers that guests can reach: of the first file that names any that is neither loopback nor in `own`.

    At most `most`, as resolv.conf(5) uses no more than three.
    """
    for file in files:
        found = tuple(dict.fromkeys(str(server) for server in _nameservers(file) if server not in own))
        if found:
            return found[:most]
    return ()


def _nameservers(file: Path) -> Iterable[IPv4Address]:
    try:
        lines = file.read_text(errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        words = line.split()
        if len(words) < 2 or words[0] != "nameserver":
            continue
        try:
            server = ip_address(words[1])
        except ValueError:
            continue
        if isinstance(server, IPv4Address) and not server.is_loopback and not server.is_unspecified:
            yield server


def read_sysctl(name: str) -> str | None:
    """The value at `/proc/sys/<name>` (with slashes) in this thread's network namespace, None if the kernel has no such."""
    try:
        return Path("/proc/sys", name).read_text().strip()
    except OSError:
        return None


def ensure_sysctl(name: str, value: str) -> bool:
    """Sets a sysctl unless it has this value, and reads it back. True if it was changed. Raises AgentError."""
    if read_sysctl(name) == value:
        return False
    try:
        Path("/proc/sys", name).write_text(value)
    except OSError as error:
        raise AgentError(f"cannot set sysctl {name} to {value}: {error.strerror}") from error
    if read_sysctl(name) != value:
        raise AgentError(f"sysctl {name} does not keep the value {value}")
    return True


def ruleset_generation() -> int | None:
    """The number that nftables raises by one with every transaction, by whomever, in this network namespace (Linux).

    None where the kernel cannot tell. Equal numbers mean that nobody has changed any rule in between.
    """
    request = struct.pack("=IHHII", 20, _GET_GENERATION, 1, 1, 0) + bytes(4)
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER) as netlink:
            netlink.settimeout(_REPLY_LIMIT)
            netlink.bind((0, 0))
            netlink.send(request)
            reply = netlink.recv(4096)
    except OSError:
        return None
    at = 20
    while at + 4 <= len(reply):
        length, kind = struct.unpack_from("=HH", reply, at)
        if length < 4:
            return None
        if kind == _GENERATION_ID and length == 8:
            return int(struct.unpack_from(">I", reply, at + 4)[0])
        at += (length + 3) & ~3
    return None
