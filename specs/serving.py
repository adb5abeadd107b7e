"""Where a server listens, who may call it, and how much it bears. Called by the composition roots; knows no endpoint."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import re
import socket
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import structlog
from tornado.httpserver import HTTPServer
from tornado.iostream import IOStream
from tornado.web import Application, RequestHandler

from specs.failures import Failure

log = structlog.get_logger(__name__)

MAX_DRAIN = 8 * 1024 * 1024  # bytes read and thrown away so that the client gets to see the 413
_MAX_HEADERS = 32 * 1024
_TIMEOUT = 10.0  # seconds for the headers of a request (idle time included), and again for its body
_MAX_CONNECTIONS = 2048
_FAREWELL = 0.5  # seconds for requests under way when the server ends
_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


@dataclass(frozen=True, slots=True)
class Access:
    """Who may call. Without a `key` everybody may; without `hosts` any Host header will do (lower case, without port)."""

    key: bytes | None = None
    hosts: frozenset[str] | None = None

    def check_key(self, authorization: str) -> None:
        """Raises Failure 401 unless the header is `Bearer <key>`; takes the same time however much of it is right."""
        if self.key is None:
            return
        scheme, _, given = authorization.partition(" ")
        if not hmac.compare_digest(given.strip().encode("latin-1", "replace"), self.key) or scheme.lower() != "bearer":
            raise Failure(
                401,
                "unauthorized",
                "a valid API key is required: send it as 'Authorization: Bearer <key>'",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def check_host(self, host: str) -> None:
        """Raises Failure 403 on a name a web page could have pointed at this machine (DNS rebinding)."""
        if self.hosts is not None and _without_port(host) not in self.hosts:
            raise Failure(403, "host_not_allowed", f"this server answers to {', '.join(sorted(self.hosts))} only")


def _without_port(host: str) -> str:
    match = re.fullmatch(r"\[([^\]]*)\](?::\d*)?|([^:]*)(?::\d*)?", host)
    return ((match[1] if match[1] is not None else match[2]) if match else host).lower()


@dataclass(frozen=True, slots=True)
class Listen:
    """Where a server listens. Port 0 takes a free one."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Listen:
        """Reads `host:port`, `[ipv6]:port` or `:port` (every address). Raises ValueError."""
        match = re.fullmatch(r"(?:\[(?P<six>[0-9A-Fa-f:.]+)\]|(?P<plain>[^\[\]:]*)):(?P<port>[0-9]{1,5})", text)
        if not match or int(match["port"]) > 65535:
            raise ValueError(f"{text!r} must be host:port, such as 127.0.0.1:9100")
        return cls(match["six"] or match["plain"] or "0.0.0.0", int(match["port"]))  # noqa: S104 `:port` asks for it

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it. A name other than localhost may resolve to anything, so it is not."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def allowed_hosts(self) -> frozenset[str] | None:
        """The Host names to accept: on loopback a fixed few, elsewhere any (a key is needed there)."""
        return _LOOPBACK_NAMES | {self.host.lower()} if self.is_loopback else None

    def check_access(self, *, has_key: bool, insecure: bool) -> None:
        """Raises ValueError for a server that anybody on the network could command."""
        if not self.is_loopback and not has_key and not insecure:
            raise ValueError(
                f"refusing to listen on {self.host}:{self.port} without an API key, because everybody who reaches it could "
                "run machines here; give a key, listen on 127.0.0.1, or spell out --insecure-no-auth"
            )


class Server(HTTPServer):
    """An HTTP server with the caps and time-outs above. `url` is where it can be reached once `open` has returned."""

    url: str
    busy: WeakSet[RequestHandler]

    @classmethod
    def of(cls, app: Application) -> Server:
        """A server for `app` that does not listen yet."""
        server = cls(
            app,
            idle_connection_timeout=_TIMEOUT,
            body_timeout=_TIMEOUT,
            max_header_size=_MAX_HEADERS,
            max_body_size=MAX_DRAIN,
        )
        server.busy = app.settings["busy"]
        return server

    async def drain(self) -> None:
        """Stops to listen, gives requests under way a moment to be answered, then closes every connection."""
        self.stop()
        deadline = asyncio.get_running_loop().time() + _FAREWELL
        while self.busy and asyncio.get_running_loop().time() < deadline:  # noqa: ASYNC110 once per process, and bounded
            await asyncio.sleep(0.005)
        await self.close_all_connections()

    def open(self, listen: Listen) -> None:
        """Begins to serve. Raises OSError if the address cannot be had."""
        sockets = _bind(listen)
        port = sockets[0].getsockname()[1]
        self.url = f"http://[{listen.host}]:{port}" if ":" in listen.host else f"http://{listen.host}:{port}"
        self.add_sockets(sockets)

    def handle_stream(self, stream: IOStream, address: Any) -> None:
        """Refuses connections above the cap, so that idle ones cannot use up all file descriptors."""
        if len(self._connections) >= _MAX_CONNECTIONS:
            log.warning("too_many_connections", limit=_MAX_CONNECTIONS)
            stream.close()
            return
        super().handle_stream(stream, address)


def _bind(listen: Listen) -> list[socket.socket]:
    """One listening socket for each address the name stands for, all on one port; none stays open if one fails."""
    sockets: list[socket.socket] = []
    found = socket.getaddrinfo(listen.host, listen.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    try:
        for family, address in dict.fromkeys((family, address[0]) for family, _, _, _, address in found):
            port = sockets[0].getsockname()[1] if sockets else listen.port
            made = socket.create_server((str(address), port), family=family, backlog=1024)
            made.setblocking(False)
            sockets.append(made)
    except OSError:
        for made in sockets:
            made.close()
        raise
    return sockets
