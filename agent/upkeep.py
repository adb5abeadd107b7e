"""Re-adopts what is on the host at agent start and keeps looking afterwards. Started by the runtime.

It never starts a VM: whether a stopped or crashed one comes back is the controller's decision.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, MutableMapping
from datetime import timedelta

import structlog

from agent.engines.base import Engine
from agent.entry import Entry
from agent.errors import AgentError
from agent.inventory import Inventory
from agent.lifecycle import Gates, Lifecycle
from agent.machine import Usable
from agent.network.base import Network
from agent.operations import Operations
from agent.rules import Rules
from agent.watch import Watch
from specs.names import Engine as EngineKind

log = structlog.get_logger(__name__)

_LOOKS_AT_ONCE = 16
_MEND_SHARE = 200  # mending the network may take one part in this many of the time


class Upkeep:
    """The background loop. `refused` maps engines that do not work here to the reason; they are tried again each round."""

    def __init__(
        self,
        *,
        engines: Mapping[EngineKind, Engine],
        refused: MutableMapping[EngineKind, str],
        network: Network,
        inventory: Inventory,
        operations: Operations,
        life: Lifecycle,
        rules: Rules,
        gates: Gates,
        watch: Watch,
        resync: timedelta,
    ) -> None:
        self.adopted = False
        self.trouble = "the network has not been set up yet"
        self._engines = engines
        self._refused = refused
        self._network = network
        self._inventory = inventory
        self._operations = operations
        self._life = life
        self._rules = rules
        self._gates = gates
        self._watch = watch
        self._resync = resync.total_seconds()
        self._unswept: set[EngineKind] = set(engines)
        self._network_unswept = True
        self._mend_at = 0.0

    async def run(self) -> None:
        """Re-adopts everything, continues what was cut off, then makes a round every `resync`."""
        for entry in tuple(self._inventory.entries.values()):
            self._operations.resume(entry)
        await self._mend_network()
        await asyncio.gather(*(self._adopt(kind) for kind in self._engines))
        self.adopted = True
        self._watch.changed()
        log.info("adopted", vms=len(self._inventory.present_ids()))
        while True:
            await asyncio.sleep(self._resync)
            try:
                await self.round()
            except Exception:
                log.exception("resync_failed")

    async def round(self) -> None:
        """Mends the network, retries what failed, and looks at every VM that is not busy."""
        if time.monotonic() >= self._mend_at:
            await self._mend_network()
        for kind in tuple(self._refused):
            await self._try_again(kind)
        for kind in tuple(self._unswept):
            if kind not in self._refused:
                await self._sweep(kind)
        for entry in tuple(self._inventory.entries.values()):
            self._operations.resume(entry)
            if not entry.lock.locked():
                await self._look(entry)

    async def _adopt(self, kind: EngineKind) -> None:
        await self._sweep(kind)
        entries = [entry for entry in self._inventory.entries.values() if entry.engine is kind]
        at_once = asyncio.Semaphore(_LOOKS_AT_ONCE)

        async def look(entry: Entry) -> None:
            async with at_once:
                await self._look(entry)

        await asyncio.gather(*(look(entry) for entry in entries))

    async def _look(self, entry: Entry) -> None:
        if entry.record is None or not entry.record.complete:
            return
        async with entry.lock:
            if entry.record is not None and not entry.is_going:
                if not entry.warnings:
                    entry.warnings = self._warnings(entry)
                await self._operations.look(entry)

    def _warnings(self, entry: Entry) -> tuple[str, ...]:
        engine = self._engines.get(entry.engine)
        if engine is None or entry.request is None:
            return ()
        try:
            return engine.check(entry.request)
        except AgentError as error:
            return (error.message,)

    async def _sweep(self, kind: EngineKind) -> None:
        """Removes the engine's leftovers. Creations of that engine wait meanwhile, or would be taken for some."""
        gate = self._gates.engines[kind]
        gate.clear()
        try:
            removed = await self._engines[kind].leftovers(self._inventory.present_ids())
        except Exception as error:
            self._unswept.add(kind)
            if kind not in self._refused:
                log.warning("leftovers_unknown", driver=kind, why=str(error))
        else:
            self._unswept.discard(kind)
            if removed:
                log.warning("leftovers_removed", driver=kind, what=removed)
        finally:
            gate.set()

    async def _try_again(self, kind: EngineKind) -> None:
        probe = await self._engines[kind].probe()
        if isinstance(probe, Usable):
            log.info("engine_usable", engine=kind, detail=probe.detail)
            self._refused.pop(kind, None)
            self._watch.changed()
        else:
            self._refused[kind] = probe.why

    async def _mend_network(self) -> None:
        began = time.monotonic()
        try:
            await self._network.setup()
            await self._rules.apply()
            if self._network_unswept:
                await self._sweep_network()
            for entry in tuple(self._inventory.entries.values()):
                if not entry.lock.locked():
                    async with entry.lock:
                        await self._life.reconnect(entry)
        except Exception as error:
            if not self.trouble or not self.adopted:
                log.error(
                    "network_failed", network=self._network.name, why=str(error), exc_info=not isinstance(error, AgentError)
                )
            self.trouble = f"the network {self._network.name} cannot be set up: {error}"
        else:
            self.trouble = ""
        self._gates.network.set()
        ended = time.monotonic()
        self._mend_at = ended + _MEND_SHARE * (ended - began)

    async def _sweep_network(self) -> None:
        self._gates.network.clear()
        removed = await self._network.leftovers(self._inventory.present_ids())
        self._network_unswept = False
        if removed:
            log.warning("leftovers_removed", driver=self._network.name, what=removed)
