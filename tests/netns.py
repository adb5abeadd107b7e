"""Hosts and guests for network tests: network namespaces, with servers and clients as plain sockets of this process.

A socket stays in the namespace it was made in, so `inside` a namespace is needed only while making it. Nothing here touches
the namespace the test run was started in.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import itertools
import os
import select
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

_CLONE_NEWNET = 0x40000000  # linux/sched.h
_TUNSETIFF = 0x400454CA  # linux/if_tun.h
_TAP_WITHOUT_INFO = 0x0002 | 0x1000  # IFF_TAP, IFF_NO_PI
_libc = ctypes.CDLL(None, use_errno=True)
_numbers = itertools.count()


@contextlib.contextmanager
def inside(namespace: str) -> Iterator[None]:
    """Moves the calling thread into a named network namespace. What it starts meanwhile is born there."""
    with Path("/proc/thread-self/ns/net").open() as back, Path("/run/netns", namespace).open() as there:
        _setns(there.fileno())
        try:
            yield
        finally:
            _setns(back.fileno())


def _setns(fd: int) -> None:
    if _libc.setns(fd, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


def command(*argv: str, stdin: str = "") -> str:
    """Runs a command in the calling thread's namespace; a failure shows its standard error."""
    done = subprocess.run(argv, input=stdin, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 0, f"{argv}: {done.stderr}"
    return done.stdout


def sysctl(name: str, value: str) -> None:
    """Sets `/proc/sys/<name>` in the calling thread's namespace."""
    Path("/proc/sys", name).write_text(value)


@dataclass
class Lab:
    """Namespaces, servers and frame pumps that all end with `close`."""

    namespaces: list[str] = field(default_factory=list)
    heard: list[str] = field(default_factory=list)
    """What callers said in their datagrams to the servers of this lab."""
    _ends: list[Callable[[], object]] = field(default_factory=list)

    def namespace(self, label: str) -> str:
        """A new namespace with loopback up."""
        name = f"mtt{os.getpid()}x{next(_numbers)}{label}"
        command("ip", "netns", "add", name)
        self.namespaces.append(name)
        command("ip", "-n", name, "link", "set", "lo", "up")
        return name

    def cable(self, one: str, one_cidr: str, two: str, two_cidr: str) -> None:
        """A veth pair between two namespaces with an address at each end."""
        a, b = f"c{next(_numbers)}", f"c{next(_numbers)}"
        command("ip", "-n", one, "link", "add", a, "type", "veth", "peer", "name", b, "netns", two)
        for namespace, link, cidr in ((one, a, one_cidr), (two, b, two_cidr)):
            command("ip", "-n", namespace, "addr", "add", cidr, "dev", link)
            command("ip", "-n", namespace, "link", "set", link, "up")

    def container(self, host: str, bridge: str, mac: str, cidr: str, gateway: str) -> str:
        """A guest as Docker attaches it: a veth on the bridge, its other end `eth0` of a new namespace."""
        guest, port = self.namespace("g"), f"veth{next(_numbers)}"
        command("ip", "-n", host, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", guest)
        command("ip", "-n", host, "link", "set", port, "master", bridge, "up")
        self._address(guest, mac, cidr, gateway)
        return guest

    def machine(self, host: str, tap: str, mac: str, cidr: str, gateway: str) -> str:
        """A guest as QEMU attaches it: frames are carried between the host's existing tap and `eth0` of a new namespace."""
        guest = self.namespace("g")
        with inside(host):
            outer = _open_tap(tap)
        with inside(guest):
            inner = _open_tap("eth0")
        self._carry(outer, inner)
        self._address(guest, mac, cidr, gateway)
        return guest

    def _address(self, guest: str, mac: str, cidr: str, gateway: str) -> None:
        with inside(guest):
            sysctl("net/ipv6/conf/eth0/accept_dad", "0")
        command("ip", "-n", guest, "link", "set", "eth0", "address", mac)
        command("ip", "-n", guest, "addr", "add", cidr, "dev", "eth0")
        command("ip", "-n", guest, "link", "set", "eth0", "up")
        command("ip", "-n", guest, "route", "add", "default", "via", gateway)

    def _carry(self, one: int, two: int) -> None:
        stop, stopped = os.pipe()

        def carry() -> None:
            while True:
                ready, _, _ = select.select([one, two, stop], [], [])
                if stop in ready:
                    return
                for source, sink in ((one, two), (two, one)):
                    if source in ready:
                        with contextlib.suppress(OSError):  # the other end is down
                            os.write(sink, os.read(source, 65536))

        thread = threading.Thread(target=carry, daemon=True)
        thread.start()

        def end() -> None:
            os.write(stopped, b".")
            thread.join()
            for fd in (one, two, stop, stopped):
                os.close(fd)

        self._ends.append(end)

    def serve(self, namespace: str, address: str, port: int, name: str, *, udp: bool = False) -> None:
        """Answers every TCP connection (or datagram) with `<name> <the caller's address>`."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with inside(namespace):
            server = socket.socket(family, socket.SOCK_DGRAM if udp else socket.SOCK_STREAM)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((address, port))
        if not udp:
            server.listen(16)
        thread = threading.Thread(target=_answer, args=(server, name, self.heard if udp else None), daemon=True)
        thread.start()

        def end() -> None:
            with contextlib.suppress(OSError):
                server.shutdown(socket.SHUT_RDWR)
            server.close()
            thread.join()

        self._ends.append(end)

    def close(self) -> None:
        """Ends everything, newest first."""
        while self._ends:
            self._ends.pop()()
        while self.namespaces:
            subprocess.run(["ip", "netns", "delete", self.namespaces.pop()], check=False, capture_output=True)


def _answer(server: socket.socket, name: str, heard: list[str] | None) -> None:
    with contextlib.suppress(OSError):
        while True:
            if heard is not None:
                data, caller = server.recvfrom(1500)
                if not data:
                    return  # shut down
                heard.append(data.decode(errors="replace"))
                server.sendto(f"{name} {caller[0]}".encode(), caller)
            else:
                connection, caller = server.accept()
                with connection, contextlib.suppress(OSError):
                    connection.sendall(f"{name} {caller[0]}".encode())


def _open_tap(name: str) -> int:
    fd = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _TAP_WITHOUT_INFO))
    return fd


def call(namespace: str, address: str, port: int, *, udp: bool = False, source: str = "", patience: float = 3.0) -> str | None:
    """What a server of `Lab.serve` answers to a caller in `namespace`; None when it cannot be reached.

    A datagram says the source address it claims.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with inside(namespace):
        client = socket.socket(family, socket.SOCK_DGRAM if udp else socket.SOCK_STREAM)
    with client:
        client.settimeout(patience)
        try:
            if source:
                client.bind((source, 0))
            client.connect((address, port))
            if udp:
                client.send(f"from {source}".encode())
            return client.recv(1500).decode() or None
        except OSError:
            return None


def pings(namespace: str, address: str, *, patience: float = 0.4) -> bool:
    """Whether one ICMP echo request is answered (RFC 792)."""
    with inside(namespace):
        sender = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
    with sender:
        sender.settimeout(patience)
        payload = struct.pack("!HH", os.getpid() & 0xFFFF, 1)
        checksum = 0xFFFF - (0x0800 + sum(struct.unpack("!HH", payload))) % 0xFFFF
        try:
            sender.connect((address, 0))
            sender.send(struct.pack("!BBH", 8, 0, checksum) + payload)
            answer = sender.recv(1500)
        except OSError:
            return False
        return answer[20] == 0 and answer[24:28] == payload


def claim_address(namespace: str, link: str, sender_mac: str, mac: str, address: str) -> None:
    """Broadcasts one gratuitous ARP reply (RFC 826): `address` is at `mac`."""
    hardware, protocol = bytes.fromhex(mac.replace(":", "")), socket.inet_aton(address)
    frame = (
        b"\xff" * 6
        + bytes.fromhex(sender_mac.replace(":", ""))
        + struct.pack("!HHHBBH", 0x0806, 1, 0x0800, 6, 4, 2)
        + (hardware + protocol) * 2
    )
    with inside(namespace), socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sender:
        sender.bind((link, 0x0806))
        sender.send(frame)
