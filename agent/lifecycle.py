"""Makes, boots, halts and removes one VM by calling the drivers in order. Called by the runtime, which holds the VM's lock.

Every step is safe to repeat, so a creation cut off anywhere is simply run again. Knows nothing of other VMs, HTTP or terms.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path

import structlog

from agent.engines.base import Engine
from agent.entry import Entry
from agent.errors import AgentError, Conflict, Unsupported
from agent.machine import Disk, DiskKind, Machine, Nic, Running, StreamFormat
from agent.network.base import Network
from agent.records import Records, VmRecord, io_error
from agent.rules import Rules
from agent.storage.base import Storage
from specs.names import Engine as EngineKind

log = structlog.get_logger(__name__)

BOOTS_AT_ONCE = 8  # per engine: more guests booting at once make every one of them slower, not sooner

OnStep = Callable[[Entry, str], None]


class Gates:
    """What must have happened once after agent start before drivers may make anything new: their leftovers are removed.

    Without it the search for leftovers would take a VM that is just being made for one.
    """

    def __init__(self, engines: Mapping[EngineKind, Engine]) -> None:
        self.network = asyncio.Event()
        self.engines = {kind: asyncio.Event() for kind in engines}


class Lifecycle:
    """The steps of one VM's life over the drivers of this host."""

    def __init__(
        self,
        *,
        store: Records,
        engines: Mapping[EngineKind, Engine],
        storage: Storage,
        network: Network,
        rules: Rules,
        gates: Gates,
        on_step: OnStep,
    ) -> None:
        self._store = store
        self._engines = engines
        self._storage = storage
        self._network = network
        self._rules = rules
        self._gates = gates
        self._on_step = on_step
        self._boots = {kind: asyncio.Semaphore(BOOTS_AT_ONCE) for kind in engines}

    def engine(self, entry: Entry) -> Engine:
        """The VM's driver. Raises AgentError if this agent runs without it."""
        try:
            return self._engines[entry.engine]
        except KeyError:
            raise AgentError(f"engine {entry.engine} of VM {entry.id} is not enabled on this agent; enable it again") from None

    async def save(self, entry: Entry, record: VmRecord) -> None:
        """Makes the record durable, then takes it as the entry's."""
        await self._store.save(record)
        entry.record = record

    async def build(self, entry: Entry) -> None:
        """Creates the VM and boots it; run again on an incomplete record it continues. Raises AgentError; undoes nothing."""
        record = _recorded(entry)
        is_continued = entry.recorded.is_set()
        if not is_continued:
            await self.save(entry, record)
            entry.recorded.set()
        engine = self.engine(entry)
        await self._gates.network.wait()
        await self._gates.engines[engine.kind].wait()
        disk = await self._make_disk(entry, record, engine.disk_kind) if engine.needs_disk else None
        machine = await self._plug_in(entry, record, disk)
        if not (is_continued and isinstance(await engine.state(entry.id, entry.folder), Running)):
            await self._boot(engine, entry, machine)
        entry.machine = machine
        await self.save(entry, record.model_copy(update={"complete": True, "disk": disk}))

    async def boot(self, entry: Entry) -> None:
        """Starts a VM that exists, with the disk it has. A running one is left alone."""
        record = _recorded(entry)
        engine = self.engine(entry)
        await self._gates.network.wait()
        await self._gates.engines[engine.kind].wait()
        if isinstance(await engine.state(entry.id, entry.folder), Running):
            return
        if record.disk is not None and not record.disk.path.exists():
            await self._storage.restore_disk(entry.id, entry.folder)
        if record.disk is not None and not record.disk.path.exists():
            # A fresh clone here would pass for the old disk and hide that its contents are lost.
            raise AgentError(f"the disk {record.disk.path} of VM {entry.id} is gone; delete the VM and create it again")
        machine = await self._plug_in(entry, record, record.disk)
        await self._boot(engine, entry, machine)
        entry.machine = machine

    async def halt(self, entry: Entry, grace: timedelta) -> None:
        """Powers the VM down. One that does not run is left alone."""
        record = _recorded(entry)
        engine = self.engine(entry)
        if not isinstance(await engine.state(entry.id, entry.folder), Running):
            return
        self._on_step(entry, "stopping")
        machine = entry.machine
        if machine is None:
            nic = await self._network.ensure(entry.id, record.lease, entry.engine)
            machine = entry.machine = self._machine(entry, nic, record.disk)
        await engine.stop(machine, grace)

    async def export_disk(self, entry: Entry, target: Path) -> StreamFormat:
        """Writes a stopped VM's disk to a new file. Raises Conflict while it runs, Unsupported if it has no disk."""
        return await self._storage.export_disk(entry.id, entry.folder, await self._idle_disk(entry), target)

    async def import_disk(self, entry: Entry, source: Path, format_: StreamFormat) -> None:
        """Replaces a stopped VM's disk by what such a file holds. Raises as `export_disk`, ImageRefused, DoesNotFit."""
        disk = await self._idle_disk(entry)
        await self._storage.import_disk(entry.id, entry.folder, disk, _recorded(entry).request.disk, source, format_)

    async def _idle_disk(self, entry: Entry) -> Disk:
        """The disk, once it is certain that nothing runs on it: two writers would destroy it."""
        record = _recorded(entry)
        if record.disk is None:
            raise Unsupported(f"VM {entry.id} has no disk of its own: engine {entry.engine} keeps its files")
        if record.power != "stopped" or isinstance(await self.engine(entry).state(entry.id, entry.folder), Running):
            raise Conflict(f"VM {entry.id} runs; stop it first")
        return record.disk

    async def dismantle(self, entry: Entry) -> None:
        """Removes whatever any step may have made, in reverse. Addresses and ports may be given away afterwards."""
        for engine in self._engines_of(entry):
            await engine.destroy(entry.id, entry.folder)
        await self._network.remove(entry.id)
        entry.machine, entry.ruled = None, False
        await self._retract_rules(entry)
        await self._storage.remove_disk(entry.id, entry.folder)
        await self._store.remove(entry.id)

    async def _retract_rules(self, entry: Entry) -> None:
        if entry.id not in self._rules.suspected:
            return
        await self._gates.network.wait()
        try:
            await self._rules.apply()
        except AgentError as error:
            if entry.id in self._rules.applied:
                raise
            # Most likely never in force. Nobody can inherit them: the next VM waits for a round that replaces everything.
            log.warning("rules_not_retracted", vm_id=entry.id, why=error.message)

    async def look(self, entry: Entry) -> None:
        """Asks the engine how the VM really is. Not being told leaves the last knowledge and notes the doubt."""
        try:
            entry.seen = await self.engine(entry).state(entry.id, entry.folder)
        except AgentError as error:
            entry.unknown = error.message
            return
        except Exception as error:
            log.exception("engine_state_failed", vm_id=entry.id, engine=entry.engine)
            entry.unknown = str(as_agent_error(error, "looking at the VM"))
            return
        entry.looked, entry.unknown = True, ""
        if isinstance(entry.seen, Running):
            entry.start_error = ""

    async def reconnect(self, entry: Entry) -> None:
        """Puts the link of a running VM back where it belongs, should somebody have removed the bridge."""
        record = entry.record
        if record is not None and isinstance(entry.seen, Running):
            await self._network.ensure(entry.id, record.lease, entry.engine)

    def _engines_of(self, entry: Entry) -> tuple[Engine, ...]:
        if entry.broken is not None:
            return tuple(self._engines.values())  # which one made it is not known
        return (self.engine(entry),)

    async def _make_disk(self, entry: Entry, record: VmRecord, kind: DiskKind) -> Disk:
        self._on_step(entry, "disk")
        request = record.request
        return await self._storage.ensure_disk(
            entry.id, entry.folder, request.image, request.disk, kind, cluster=entry.cluster_id
        )

    async def _plug_in(self, entry: Entry, record: VmRecord, disk: Disk | None) -> Machine:
        self._on_step(entry, "network")
        nic = await self._network.ensure(entry.id, record.lease, entry.engine)
        entry.ruled = True
        # Also for a VM whose rules were in force: whoever flushed them since must not have it boot without.
        await self._rules.apply()
        return self._machine(entry, nic, disk)

    async def _boot(self, engine: Engine, entry: Entry, machine: Machine) -> None:
        async with self._boots[engine.kind]:
            self._on_step(entry, "prepare")
            await engine.prepare(machine)
            self._on_step(entry, "booting")
            await engine.start(machine)
        if machine.nic.kind == "bridge":
            # Only now is there the link that the engine made for itself, to be given what the network wants of it.
            await self._network.ensure(machine.id, machine.nic.lease, engine.kind)

    @staticmethod
    def _machine(entry: Entry, nic: Nic, disk: Disk | None) -> Machine:
        return Machine(id=entry.id, folder=entry.folder, request=_recorded(entry).request, nic=nic, disk=disk)


def as_agent_error(error: Exception, tried: str) -> AgentError:
    """A typed error for any exception: a full disk stays recognisable, a defect keeps its type's name."""
    if isinstance(error, AgentError):
        return error
    if isinstance(error, OSError):
        return io_error(tried, error)
    return AgentError(f"{tried} failed unexpectedly ({type(error).__name__}: {error}); the agent's log has the details")


def _recorded(entry: Entry) -> VmRecord:
    if entry.record is None:
        raise AgentError(f"VM {entry.id} has no record on this host")
    return entry.record
