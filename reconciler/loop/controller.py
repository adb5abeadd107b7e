"""Puts fleet, store, reconciler, watchers and timers together, and runs them. Called by the composition root."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Coroutine
from typing import Any

import structlog

from reconciler.agents import AgentClient, AgentFailure
from reconciler.events import EventLog
from reconciler.fleet import Fleet, HostState
from reconciler.loop.clock import Clock
from reconciler.loop.intents import Intents, make_vm_id
from reconciler.loop.moves import drain_forever
from reconciler.loop.quarantine import Quarantine
from reconciler.loop.reconciler import Reconciler
from reconciler.loop.timers import expire_forever, keep_events_forever, recreate_forever, resync_forever, save_events
from reconciler.loop.watchers import Watchers, WatchSettings
from reconciler.store.database import Database
from specs.names import HostId, VmId

log = structlog.get_logger()

HOST_LOSS_GRACE = 300.0  # seconds offline before `on_host_loss: recreate` takes effect
REGISTER_WAIT = 2.0  # seconds a new host has to answer before it is registered as offline


class Controller:
    """The running controller but for its HTTP face."""

    def __init__(
        self,
        store: Database,
        *,
        agent_key: str | None = None,
        watch: WatchSettings | None = None,
        host_loss_grace: float = HOST_LOSS_GRACE,
        clock: Clock | None = None,
    ) -> None:
        clock = clock or Clock()
        self.clock = clock
        self.store = store
        store.open()
        cluster, term = store.begin_term(clock.wall())
        self.term = term
        self.fleet = Fleet(cluster, events=EventLog(clock.wall, term))
        self.watchers = Watchers(self.fleet, store, lambda addr: AgentClient(addr, cluster, term, agent_key), clock, watch)

        def new_vm_id() -> VmId:
            return make_vm_id(secrets.token_hex)

        self.reconciler = Reconciler(self.fleet, store, self.watchers.client, new_vm_id, clock)
        self.intents = Intents(self.fleet, store, self.reconciler, new_vm_id, clock)
        self.quarantine = Quarantine(self.fleet, store, self.reconciler.env_locks, self.watchers.client, clock)
        self._agent_key = agent_key
        self._host_loss_grace = host_loss_grace
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Loads what is recorded, and begins to watch and to reconcile."""
        self.fleet.wake = self.reconciler.queue.add
        recorded = self.store.load()
        self.fleet.events.load(recorded.events)
        self.fleet.apply(recorded)
        for addr in self.fleet.hosts:
            self.watchers.add(addr)
        self._spawn(self.reconciler.run(), "reconciler")
        self._spawn(expire_forever(self.fleet, self.intents.expire_env, self.clock), "expiry")
        self._spawn(recreate_forever(self.fleet, self.intents.recreate_lost, self.clock, self._host_loss_grace), "host loss")
        self._spawn(resync_forever(self.fleet, self.store, self.clock), "resync")
        self._spawn(drain_forever(self.fleet, self.reconciler.moves), "drain")
        self._spawn(keep_events_forever(self.fleet, self.store), "events")
        for env_id in list(self.fleet.envs):
            await self.reconciler.resume(env_id)
        log.info("controller started", cluster=self.fleet.cluster, term=self.term, envs=len(self.fleet.envs))

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        task.add_done_callback(_note_end)
        self._tasks.append(task)

    async def stop(self) -> None:
        """Ends everything; what runs on the hosts goes on."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.watchers.close()
        await save_events(self.fleet, self.store)
        self.store.close()

    async def add_host(self, addr: str) -> tuple[HostState, bool]:
        """Registers a host (see Intents.add_host) and waits a moment for it to come online."""
        known = self.fleet.hosts.get(addr)
        if known is not None:
            return known, False
        told_id = await self._ask_id(addr)
        created = await self.intents.add_host(addr, told_id)
        self.watchers.add(addr)
        host = self.fleet.hosts[addr]
        if told_id:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REGISTER_WAIT):
                    await host.answered.wait()
        return host, created

    async def _ask_id(self, addr: str) -> HostId | None:
        client = AgentClient(addr, self.fleet.cluster, self.term, self._agent_key)
        try:
            async with asyncio.timeout(REGISTER_WAIT):
                return HostId((await client.info()).host_id)
        except (AgentFailure, TimeoutError):
            return None
        finally:
            await client.close()

    async def remove_host(self, host_id: str) -> None:
        """Unregisters a host and ends its watcher. Raises what Intents.remove_host does."""
        addr = await self.intents.remove_host(host_id)
        await self.watchers.remove(addr)


def _note_end(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("background work has ended and stays so until a restart", task=task.get_name(), exc_info=error)
