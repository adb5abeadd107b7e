"""Asks guests whether they answer yet, as their spec's `ready` says. Called by the operations whenever a VM was looked at.

A guest that has answered once counts as ready until its process ends: this is about having booted, not about health.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Literal

import structlog

from agent.entry import Entry
from agent.errors import AgentError, Unsupported
from agent.inventory import Inventory
from agent.lifecycle import Lifecycle
from agent.machine import Running
from agent.network.base import Network
from agent.records import ReadyMark
from specs.desired import Ready
from specs.wire import CreateVmReq, Readiness

log = structlog.get_logger(__name__)

ATTEMPT = 5.0  # seconds one probe may take
_AT_ONCE = 64  # probes under way on one host
_SOONEST, _LATEST = 0.2, 5.0  # seconds between two probes of one guest
_ANSWER = 4096  # bytes read of what a guest says
_EVERY_ADDRESS = "0.0.0.0"  # noqa: S104 read, not listened on


@dataclass(frozen=True, slots=True)
class Target:
    """Where a probe connects, from this host, and what it expects there. `path` is for `http` alone."""

    kind: Literal["tcp", "ssh-banner", "http"]
    host: str
    port: int
    path: str = "/"


GuestProbe = Callable[[Target, float], Awaitable[str]]
"""(target, seconds) -> "" if the guest answers, else why not. Never raises."""


async def probe_guest(target: Target, limit: float = ATTEMPT) -> str:
    """Connects once and reads at most 4 KiB: "" if that is the answer wanted, else what was wrong."""
    try:
        async with asyncio.timeout(limit):
            reader, writer = await asyncio.open_connection(target.host, target.port, limit=_ANSWER)
            try:
                return await _converse(target, reader, writer)
            finally:
                writer.transport.abort()
    except TimeoutError:
        return f"nothing came within {limit:g} s"
    except OSError as error:
        return os.strerror(error.errno).lower() if error.errno else str(error)


async def _converse(target: Target, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str:
    if target.kind == "tcp":
        return ""
    if target.kind == "http":
        # RFC 9112: only the status line of the answer is read.
        ask = f"GET {target.path} HTTP/1.1\r\nHost: {target.host}:{target.port}\r\nConnection: close\r\nAccept: */*\r\n\r\n"
        writer.write(ask.encode())
        await writer.drain()
        line = await _line(reader)
        status = re.match(rb"HTTP/1\.[01] ([0-9]{3})(?: |$)", line)
        if status is None:
            return "what came is no HTTP answer" if line else "the connection was closed without an answer"
        return "" if 200 <= int(status[1]) < 400 else f"HTTP status {int(status[1])}"
    heard = 0
    # RFC 4253, 4.2: a server may send other lines before the one that begins with SSH-.
    while (line := await _line(reader)) and (heard := heard + len(line)) <= _ANSWER:
        if line.startswith(b"SSH-"):
            return ""
    return "what came is no SSH banner" if heard else "the connection was closed without a banner"


async def _line(reader: asyncio.StreamReader) -> bytes:
    """The next line without its end, b"" at the end of the stream; one that is too long is cut."""
    try:
        line = await reader.readuntil(b"\n")
    except asyncio.IncompleteReadError as error:
        return error.partial
    except asyncio.LimitOverrunError:
        return await reader.read(_ANSWER)
    return line.rstrip(b"\r\n") or b" "


def check_ready(request: CreateVmReq, network: Network) -> None:
    """Raises Unsupported for a probe that could tell nothing on this host's network."""
    ready = request.ready
    if ready is None or network.name != "user":
        return
    if ready.tcp is not None:
        # QEMU's and Docker's forwards accept a connection before they know whether the guest does.
        raise Unsupported(
            "ready.tcp cannot be probed on this host: its user-mode network accepts connections in the guest's place; "
            "use ssh-banner or http, or a host with the bridge network"
        )
    if ready.port not in (22, *request.ports):
        raise Unsupported(
            f"ready cannot probe port {ready.port} on this host: its user-mode network reaches forwarded ports alone; "
            "list it under ports, or use a host with the bridge network"
        )


class Watcher:
    """Follows the VMs of one host; `now` gives Unix seconds."""

    def __init__(
        self,
        inventory: Inventory,
        life: Lifecycle,
        network: Network,
        probe: GuestProbe = probe_guest,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._inventory = inventory
        self._life = life
        self._network = network
        self._probe = probe
        self._now = now
        self._at_once = asyncio.Semaphore(_AT_ONCE)

    def follow(self, entry: Entry) -> Coroutine[Any, Any, None] | None:
        """Called after each look at a VM, under its lock. Returns the probing to run, if its process is a new one."""
        ready = entry.request.ready if entry.request else None
        if ready is None or entry.record is None or entry.unknown:
            return None
        if not isinstance(entry.seen, Running):
            self.forget(entry)
            return None
        if entry.seen.pid == entry.probed_pid:
            return None
        self.forget(entry, but=entry.seen.pid)
        entry.probed_pid = entry.seen.pid
        if (mark := entry.record.ready) is not None:
            entry.readiness = Readiness(status=True, reason="Answered", since=mark.since)
            return None
        since = int(self._now())
        entry.readiness = Readiness(status=False, reason="Probing", message=f"{_what(ready)} was not asked yet", since=since)
        return self._until_it_answers(entry, ready, entry.seen.pid)

    def forget(self, entry: Entry, *, but: int | None = None) -> None:
        """What was known is about a process that has ended; the mark of process `but` is kept."""
        if entry.probing is not None:
            entry.probing.cancel()
        entry.probing = entry.readiness = entry.probed_pid = None
        if entry.record is not None and entry.record.ready is not None and entry.record.ready.pid != but:
            entry.record = entry.record.model_copy(update={"ready": None})

    async def _until_it_answers(self, entry: Entry, ready: Ready, pid: int) -> None:
        began = time.monotonic()
        target = await self._target(entry, ready)
        while target is not None:
            async with self._at_once:
                why = await self._probe(target, ATTEMPT)
            if entry.probed_pid != pid or entry.readiness is None:
                return
            if not why:
                break
            elapsed = time.monotonic() - began
            self._tell(entry, ready, why, is_late=elapsed >= ready.timeout)
            pause = min(_LATEST, max(_SOONEST, elapsed / 20))
            # The moment its time is up is not slept through.
            await asyncio.sleep(min(pause, ready.timeout - elapsed) if elapsed < ready.timeout else pause)
        async with entry.lock:
            await self._mark(entry, pid)

    async def _target(self, entry: Entry, ready: Ready) -> Target | None:
        if entry.record is None:
            return None
        host, port, lease = str(entry.record.lease.ip), ready.port, entry.record.lease
        if self._network.name == "user":
            nic = await self._network.ensure(entry.id, lease, entry.engine)  # makes nothing there
            host = nic.forward_addrs[0] if nic.forward_addrs[0] != _EVERY_ADDRESS else "127.0.0.1"
            port = lease.ports[port]
        if ready.http is not None:
            return Target("http", host, port, ready.http.path)
        return Target("tcp" if ready.tcp else "ssh-banner", host, port)

    def _tell(self, entry: Entry, ready: Ready, why: str, *, is_late: bool) -> None:
        since = entry.readiness.since if entry.readiness else int(self._now())
        if is_late:
            message = f"{_what(ready)} has not answered within {ready.timeout} s of the boot: {why}"
        else:
            message = f"{_what(ready)} does not answer yet: {why}"
        entry.readiness = Readiness(status=False, reason="TimedOut" if is_late else "Probing", message=message, since=since)
        self._inventory.publish(entry)

    async def _mark(self, entry: Entry, pid: int) -> None:
        """Shown at once; kept, so that the agent's next process does not take a guest long since ready for a booting one."""
        if entry.probed_pid != pid or entry.record is None or entry.is_going:
            return
        mark = ReadyMark(pid=pid, since=int(self._now()))
        entry.readiness = Readiness(status=True, reason="Answered", since=mark.since)
        self._inventory.publish(entry)
        try:
            await self._life.save(entry, entry.record.model_copy(update={"ready": mark}))
        except AgentError as error:
            log.warning("readiness_not_recorded", vm_id=entry.id, why=error.message)
        log.info("vm_ready", vm_id=entry.id)


def _what(ready: Ready) -> str:
    if ready.http is not None:
        return f"HTTP on guest port {ready.port}"
    return f"guest port {ready.port}" if ready.tcp else f"ssh on guest port {ready.port}"
