"""The VMs of this host, as the handlers see them: list, create, stop, start, delete, watch.

One lock a VM and no lock over all, so a slow clone or a hung daemon holds nobody else up. Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Literal

import structlog

from agent.engines.base import Engine
from agent.entry import Caller, Entry, same_spec
from agent.errors import Conflict, NoConsole, Unsupported
from agent.inventory import Capacity, Inventory
from agent.lifecycle import Gates, Lifecycle
from agent.machine import StreamFormat
from agent.network.base import Network
from agent.network.pool import DEFAULT_PORT_RANGE
from agent.operations import Operations
from agent.readiness import GuestProbe, Watcher, check_ready, probe_guest
from agent.records import Power, Records, Terms
from agent.rules import Rules
from agent.storage.base import Storage
from agent.upkeep import Upkeep
from agent.watch import Watch
from specs.names import Engine as EngineKind
from specs.names import VmId
from specs.wire import AgentVm, CreateVmReq, Resource

log = structlog.get_logger(__name__)

Outcome = Literal["created", "existing", "accepted"]

CONSOLE_BYTES = 64 * 1024
_GONE = "VM {} was deleted while it was being created"


@dataclass(frozen=True, slots=True)
class Drivers:
    """The drivers of this host. `refused` says why an engine among `engines` does not work here at agent start."""

    engines: Mapping[EngineKind, Engine]
    storage: Storage
    network: Network
    refused: Mapping[EngineKind, str] = field(default_factory=dict)
    probe: GuestProbe = probe_guest


class Runtime:
    """The VMs of one runtime folder. `start` comes first, `close` last."""

    def __init__(
        self,
        *,
        host_id: str,
        store: Records,
        drivers: Drivers,
        capacity: Capacity,
        port_range: range = DEFAULT_PORT_RANGE,
        stop_grace: timedelta = timedelta(seconds=30),
        resync: timedelta = timedelta(seconds=30),
        now: Callable[[], float] = time.time,
    ) -> None:
        self.host_id = host_id
        self.watch = Watch()
        self._store = store
        self._engines = dict(drivers.engines)
        self._refused = dict(drivers.refused)
        self._terms: Terms | None = None
        self._term_lock = asyncio.Lock()
        self._inventory = Inventory(
            host_id=host_id,
            capacity=capacity,
            store=store,
            network=drivers.network,
            port_range=port_range,
            watch=self.watch,
            now=now,
        )
        self._rules = Rules(drivers.network, self._inventory.ruled_leases)
        gates = Gates(self._engines)
        life = self._life = Lifecycle(
            store=store,
            engines=self._engines,
            storage=drivers.storage,
            network=drivers.network,
            rules=self._rules,
            gates=gates,
            on_step=self._inventory.note_step,
        )
        self._network = drivers.network
        watcher = Watcher(self._inventory, life, drivers.network, drivers.probe, now)
        self._operations = Operations(self._inventory, life, stop_grace, watcher)
        self._upkeep = Upkeep(
            engines=self._engines,
            refused=self._refused,
            network=drivers.network,
            inventory=self._inventory,
            operations=self._operations,
            life=life,
            rules=self._rules,
            gates=gates,
            watch=self.watch,
            resync=resync,
        )

    async def start(self) -> None:
        """Reads the records and begins re-adopting; `complete` says when that is done. Raises AgentError."""
        self._terms, loaded = await self._store.open()
        for vm_id, why in loaded.unreadable.items():
            log.error("record_unreadable", vm_id=vm_id, why=why)
            self._inventory.take_over_unreadable(vm_id, why)
        for name in loaded.strangers:
            log.warning("no_vm_passed_over", path=str(self._store.root / name))
        for record in loaded.records.values():
            self._inventory.take_over(record)
        self._rules.suspected |= loaded.records.keys() | loaded.unreadable.keys()
        for engine in self._engines.values():
            engine.on_exit = self._exited
        self._operations.spawn(self._clear_trash(), "trash")
        self._operations.spawn(self._upkeep.run(), "upkeep")

    async def close(self) -> None:
        """Lets go of everything in memory. VMs keep running; a creation under way is continued at the next start."""
        self.watch.close()
        await self._operations.close()
        await self._rules.close()

    @property
    def complete(self) -> bool:
        """Whether what the list lacks is not here: all is re-adopted. How a listed VM is may still be unknown."""
        return self._upkeep.adopted

    @property
    def trouble(self) -> str:
        """Why new VMs cannot be connected now, "" if they can."""
        return self._upkeep.trouble

    @property
    def usable(self) -> tuple[EngineKind, ...]:
        """The engines that work here now, in their canonical order."""
        return tuple(kind for kind in EngineKind if kind in self._engines and kind not in self._refused)

    @property
    def is_empty(self) -> bool:
        """Whether nothing of any VM is on the host."""
        return not self._inventory.present_ids()

    def get(self, vm_id: str) -> AgentVm:
        """One VM. Raises NotFound."""
        return self._inventory.shown(self._inventory.find(vm_id))

    def spec(self, vm_id: str) -> CreateVmReq:
        """What was asked for when the VM was made. Raises NotFound, Conflict where its record cannot be read."""
        entry = self._inventory.find(vm_id)
        if entry.request is None:
            raise Conflict(f"the record of VM {entry.id} cannot be read ({entry.broken})")
        return entry.request

    async def console(self, vm_id: str, lines: int) -> str:
        """The last lines of the VM's console, at most CONSOLE_BYTES. Raises NotFound, Conflict, NoConsole, a driver's error."""
        request = self.spec(vm_id)
        entry = self._inventory.find(vm_id)
        if entry.is_memory:
            self._check_settled(entry)
        engine = self._engines.get(request.engine)
        if engine is None:
            raise NoConsole(f"this agent has no engine {request.engine}, which would know the console of VM {entry.id}")
        said = await engine.console(entry.id, entry.folder, CONSOLE_BYTES)
        kept = said.decode(errors="replace").replace("\r\n", "\n").split("\n")
        return "\n".join(kept[-lines - 1 :] if not kept[-1] else kept[-lines:])

    def list(self) -> list[AgentVm]:
        """Every VM, oldest first, those whose creation failed included."""
        return [self._inventory.shown(entry) for entry in self._inventory.entries.values()]

    def list_json(self) -> bytes:
        """The same as a JSON array, from ready-made parts."""
        return self._inventory.list_json()

    def resource(self) -> Resource:
        """Capacity and what is reserved of it."""
        return self._inventory.resource()

    async def create(self, request: CreateVmReq, caller: Caller, *, wait: bool) -> tuple[AgentVm, Outcome]:
        """Creates and boots a VM; with `wait` returns once it runs, else once it is durably accepted.

        The same request again returns the VM that is there. Raises Conflict (another spec, another cluster, a stale term),
        Unsupported, DoesNotFit, and with `wait` what a driver raised; nothing is left behind then.
        """
        await self._fence(caller)
        while (entry := self._inventory.entries.get(VmId(request.vm_id))) is not None and not entry.is_memory:
            self._check_owner(entry, caller)
            if not entry.is_going:
                return await self._existing(entry, request, wait=wait)
            await self._operations.remove(entry)
            self._check_term(caller)  # a newer controller may have called while this waited
        warnings = self._engine_for(request).check(request)
        check_ready(request, self._network)
        entry = self._inventory.reserve(request, caller, warnings)
        creation = self._operations.create(entry, forget=wait)
        if wait:
            await self._operations.join(creation, _GONE.format(entry.id))
            return self._inventory.shown(entry), "created"
        await self._operations.until_recorded(entry, creation)
        return self._inventory.shown(entry), "accepted"

    async def delete(self, vm_id: str, caller: Caller) -> None:
        """Removes a VM with all it had, breaking off its creation; returns when nothing is left. An unknown id is fine."""
        await self._fence(caller)
        entry = self._inventory.entries.get(VmId(vm_id))
        if entry is None:
            return
        self._check_owner(entry, caller)
        if not entry.is_memory:
            entry.verdict = None  # somebody wants it gone: why its creation failed need not be remembered
        await self._operations.remove(entry)

    async def set_power(self, vm_id: str, power: Power, caller: Caller, *, wait: bool) -> tuple[AgentVm, Outcome]:
        """Stops or starts a VM; one that is so already is left alone. Raises NotFound, Conflict, what a driver raised."""
        await self._fence(caller)
        entry = self._inventory.find(vm_id)
        self._check_owner(entry, caller)
        self._check_settled(entry)
        task = self._operations.set_power(entry, power)
        if not wait:
            return self._inventory.shown(entry), "accepted"
        await self._operations.join(task, f"VM {entry.id} was deleted meanwhile")
        return self._inventory.shown(entry), "existing"

    def check_disk_can_change(self, vm_id: str) -> None:
        """Raises NotFound, or Conflict if the VM is not to be stopped: what is known without asking its engine."""
        entry = self._inventory.find(vm_id)
        self._check_settled(entry)
        if entry.record is not None and entry.record.power != "stopped":
            raise Conflict(f"VM {entry.id} runs; stop it first")

    async def export_disk(self, vm_id: str, target: Path) -> StreamFormat:
        """Writes a stopped VM's disk to a new file. Raises NotFound, Conflict, Unsupported, what the storage raises."""
        entry = self._inventory.find(vm_id)
        async with entry.lock:
            self.check_disk_can_change(vm_id)
            return await self._life.export_disk(entry, target)

    async def import_disk(self, vm_id: str, source: Path, format_: StreamFormat) -> None:
        """Replaces a stopped VM's disk by what such a file holds, whole or not at all. Raises as `export_disk`."""
        entry = self._inventory.find(vm_id)
        async with entry.lock:
            self.check_disk_can_change(vm_id)
            await self._life.import_disk(entry, source, format_)

    async def resync(self) -> None:
        """Looks at everything now instead of at the next round."""
        await self._upkeep.round()

    async def _fence(self, caller: Caller) -> None:
        if not caller.cluster:
            return
        self._check_term(caller)
        terms = self._known_terms()
        if caller.term != terms.highest(caller.cluster):
            async with self._term_lock:
                await asyncio.to_thread(terms.admit, caller.cluster, caller.term)

    def _check_term(self, caller: Caller) -> None:
        if caller.cluster:
            self._known_terms().check(caller.cluster, caller.term)

    def _known_terms(self) -> Terms:
        if self._terms is None:
            raise RuntimeError("Runtime.start has not been called")
        return self._terms

    async def _existing(self, entry: Entry, request: CreateVmReq, *, wait: bool) -> tuple[AgentVm, Outcome]:
        if entry.request is None:
            raise Conflict(f"the record of VM {entry.id} cannot be read ({entry.broken}); delete it first")
        if not same_spec(entry.request, request):
            raise Conflict(f"VM {entry.id} exists with another spec; use another id or delete it first")
        if entry.creation is None or entry.creation.done():
            return self._inventory.shown(entry), "existing"
        if not wait:
            await self._operations.until_recorded(entry, entry.creation)
            return self._inventory.shown(entry), "accepted"
        await self._operations.join(entry.creation, _GONE.format(entry.id))
        return self._inventory.shown(entry), "existing"

    @staticmethod
    def _check_owner(entry: Entry, caller: Caller) -> None:
        if entry.cluster_id and entry.cluster_id != caller.cluster:
            raise Conflict(
                f"VM {entry.id} belongs to cluster {entry.cluster_id}; only its controller may change it", "foreign_vm"
            )

    @staticmethod
    def _check_settled(entry: Entry) -> None:
        if entry.broken is not None:
            raise Conflict(f"the record of VM {entry.id} cannot be read ({entry.broken}); it can only be deleted")
        if entry.is_memory:
            raise Conflict(f"the creation of VM {entry.id} failed and nothing of it is here; create it again")
        if entry.is_going:
            raise Conflict(f"VM {entry.id} is being deleted")
        if entry.is_creating:
            raise Conflict(f"VM {entry.id} is still being created (step: {entry.step}); try again once it runs")

    def _engine_for(self, request: CreateVmReq) -> Engine:
        if request.engine in self.usable:
            return self._engines[request.engine]
        why = self._refused.get(request.engine)
        has = ", ".join(self.usable) or "none"
        raise Unsupported(f"this host has no engine {request.engine} (it has: {has})" + (f"; {why}" if why else ""))

    def _exited(self, vm_id: VmId) -> None:
        entry = self._inventory.entries.get(vm_id)
        if entry is not None:
            self._operations.exited(entry)

    async def _clear_trash(self) -> None:
        for folder in await self._store.clear_trash():
            log.warning("trash_stays", folder=folder)
