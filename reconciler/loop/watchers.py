"""One watcher per host: learns who the agent is, then holds a long poll; polls an agent that knows none."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import structlog
from tenacity import wait_random_exponential

from reconciler.agents import AgentClient, AgentFailure, Unreachable
from reconciler.core.model import Change
from reconciler.fleet import Fleet, HostState, Report
from reconciler.loop.backoff import backoff
from reconciler.loop.clock import Clock
from reconciler.store.database import Database, StoreUnavailable
from specs.names import HostId
from specs.wire import AgentInfo

log = structlog.get_logger()
T = TypeVar("T")


@dataclass(frozen=True)
class WatchSettings:
    """Times in seconds."""

    heartbeat: float = 10.0
    """How long a long poll is held: an agent that answers within it is alive."""
    facts: float = 3.0
    """Heartbeats after which the agent's own facts are asked again; every heartbeat while some VM waits for a host.

    Listing images costs the agent a container command.
    """
    missed: int = 3
    """Heartbeats without any answer after which a host is offline."""
    poll: float = 2.0
    """How often an agent without long poll is asked."""
    reconnect_max: float = 5.0


class WrongHost(Exception):
    """The machine that answers is not the one registered at this address; nothing it says is about our VMs."""


class Watchers:
    """Starts and ends the watcher of each registered host."""

    def __init__(
        self,
        fleet: Fleet,
        store: Database,
        make_client: Callable[[str], AgentClient],
        clock: Clock,
        settings: WatchSettings | None = None,
    ) -> None:
        self._fleet = fleet
        self._store = store
        self._make_client = make_client
        self._clock = clock
        self._settings = settings or WatchSettings()
        self._reconnect = wait_random_exponential(multiplier=0.2, max=self._settings.reconnect_max)
        self._clients: dict[str, AgentClient] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def client(self, addr: str) -> AgentClient | None:
        """The host's client, while it is registered."""
        return self._clients.get(addr)

    def add(self, addr: str) -> None:
        """Starts watching; a watched host is left alone."""
        if addr not in self._tasks:
            self._clients[addr] = self._make_client(addr)
            self._tasks[addr] = asyncio.create_task(self._watch_forever(addr), name=f"watch {addr}")

    async def remove(self, addr: str) -> None:
        """Ends watching."""
        task = self._tasks.pop(addr, None)
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        client = self._clients.pop(addr, None)
        if client is not None:
            await client.close()

    async def close(self) -> None:
        """Ends all watchers."""
        for addr in list(self._tasks):
            await self.remove(addr)

    async def _watch_forever(self, addr: str) -> None:
        failures = 0
        client = self._clients[addr]
        while True:
            try:
                await self._watch(addr, client)
            except (AgentFailure, WrongHost, StoreUnavailable) as error:
                failures = 1 if self._heard_within(addr, 1.0) else failures + 1
                self._note_failure(addr, error)
            except Exception as error:
                log.exception("watcher failed", host=addr)
                failures += 1
                self._note_failure(addr, error)
            await asyncio.sleep(0.05 + backoff(min(failures, 30), self._reconnect))

    def _heard_within(self, addr: str, seconds: float) -> bool:
        host = self._fleet.hosts.get(addr)
        return bool(host and host.heard_at is not None and self._clock.monotonic() - host.heard_at <= seconds)

    def _note_failure(self, addr: str, error: Exception) -> None:
        host = self._fleet.hosts.get(addr)
        if host is None:
            return
        tolerated = isinstance(error, AgentFailure | StoreUnavailable) and host.online
        if not tolerated or not self._heard_within(addr, self._settings.heartbeat * self._settings.missed):
            if host.online:
                log.warning("host offline", host=host.shown_id, addr=addr, error=str(error))
            self._fleet.lost(addr, str(error), self._clock.monotonic())

    async def _watch(self, addr: str, client: AgentClient) -> None:
        asked_at = await self._introduce(addr, client)
        after = ""
        while True:
            tick = self._fleet.tick()
            listing = await self._patiently(client.list_vms(watch=self._settings.heartbeat if after else 0, after=after))
            if addr not in self._fleet.hosts:
                return
            now = self._clock.monotonic()
            report = Report(listing.vms, tick, listing.boot_id, listing.seq, listing.complete)
            self._fleet.observe(addr, report, now)
            if after and listing.boot_id and not after.startswith(f"{listing.boot_id}:"):
                asked_at = await self._introduce(addr, client)
            after = f"{listing.boot_id}:{listing.seq}" if listing.boot_id else ""
            if not after:
                await asyncio.sleep(self._settings.poll)
            patience = self._settings.heartbeat * (1 if self._fleet.has_unplaced else self._settings.facts)
            if now - asked_at >= patience:
                asked_at = await self._introduce(addr, client)

    async def _introduce(self, addr: str, client: AgentClient) -> float:
        info = await self._patiently(client.info())
        await self._check_identity(addr, info)
        now = self._clock.monotonic()
        if addr in self._fleet.hosts:
            if not self._fleet.hosts[addr].online:
                log.info("host online", host=info.host_id, addr=addr)
            self._fleet.observe_info(addr, info, now)
        return now

    async def _patiently(self, answer: Coroutine[Any, Any, T]) -> T:
        """The answer, or Unreachable with the last missed heartbeat: the client's own time limit may be much longer."""
        patience = self._settings.heartbeat * self._settings.missed
        try:
            async with asyncio.timeout(patience):
                return await answer
        except TimeoutError:
            raise Unreachable(f"no answer within {patience:g} s") from None

    async def _learn_identity(self, host: HostState, info: AgentInfo) -> None:
        async with host.lock:
            if self._fleet.hosts.get(host.intent.addr) is not host:
                return  # it has been removed meanwhile
            taken = self._fleet.host(info.host_id)
            if taken is not None and taken is not host:
                raise WrongHost(f"its host id {info.host_id} is already registered under {taken.intent.addr}")
            change = Change(hosts=(replace(host.intent, id=HostId(info.host_id)),))
            await self._store.commit(change)
            self._fleet.apply(change)

    async def _check_identity(self, addr: str, info: AgentInfo) -> None:
        host = self._fleet.hosts.get(addr)
        if host is None:
            return
        if host.intent.id is None:
            await self._learn_identity(host, info)
        elif host.intent.id != info.host_id:
            raise WrongHost(f"another machine answers at {addr}: {info.host_id} instead of {host.intent.id}")
