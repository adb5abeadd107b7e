"""What is on this host and what is still free: the VMs in memory, their view for clients, room, addresses and ports.

Called by the runtime and its operations. Everything is synchronous on purpose: between checking for room and reserving it
nothing else can run, so two creates are never given the same address, port or memory.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from agent.entry import Caller, Entry, shown_vm
from agent.errors import DoesNotFit, NotFound
from agent.machine import Lease, hostname_of
from agent.network.base import Network
from agent.network.pool import Taken, allocate
from agent.records import Records, VmRecord
from agent.watch import Watch
from specs.names import VmId
from specs.wire import AgentVm, CreateVmReq, Resource

_RESTING_PORTS = 2048  # host ports released last, given out again only when nothing else is free
_REMEMBERED_FAILURES = 1000


@dataclass(frozen=True, slots=True)
class Capacity:
    """What VMs may reserve in sum: vCPUs, MiB of memory, MiB of disk. Nothing is promised twice."""

    cpu: int
    mem: int
    disk: int


class Inventory:
    """The VMs of one host by id, oldest first, those whose creation failed included."""

    def __init__(
        self,
        *,
        host_id: str,
        capacity: Capacity,
        store: Records,
        network: Network,
        port_range: range,
        watch: Watch,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.host_id = host_id
        self.entries: dict[VmId, Entry] = {}
        self._capacity = capacity
        self._store = store
        self._network = network
        self._port_range = port_range
        self._watch = watch
        self._now = now
        self._resting: OrderedDict[int, None] = OrderedDict()
        self._taken = Taken()
        self._held = Capacity(0, 0, 0)
        self._count = 0  # VMs of which something may be on the host

    def find(self, vm_id: str) -> Entry:
        """The entry of a VM. Raises NotFound."""
        try:
            return self.entries[VmId(vm_id)]
        except KeyError:
            raise NotFound(f"no VM {vm_id[:128]} on host {self.host_id}") from None

    def take_over(self, record: VmRecord) -> Entry:
        """Adds a VM found on disk at agent start."""
        entry = Entry(record.id, self._store.folder(record.id), record.request, record.cluster_id, record.created_at, record)
        entry.ruled = not record.deleting
        entry.step = "deleting" if record.deleting else "" if record.complete else "accepted"
        entry.recorded.set()
        self._hold(record, 1)
        return self._add(entry)

    def take_over_unreadable(self, vm_id: VmId, why: str) -> Entry:
        """Adds a VM whose record cannot be read: shown, and left alone until somebody deletes it."""
        self._count += 1
        return self._add(Entry(vm_id, self._store.root / vm_id, None, broken=why))

    def reserve(self, request: CreateVmReq, caller: Caller, warnings: tuple[str, ...]) -> Entry:
        """Adds a VM to be created, with room, address and ports reserved. Raises DoesNotFit."""
        self._check_room(request)
        vm_id = VmId(request.vm_id)
        lease = allocate(
            self._taken,
            vm_id,
            {22, *request.ports},
            request.deny_outgoing,
            request.env_id,
            subnet=self._network.subnet,
            gateway=self._network.gateway,
            is_free=self._network.port_is_free,
            port_range=self._port_range,
            avoid_ports=self._resting,
            name=hostname_of(request),
        )
        record = VmRecord(request=request, cluster_id=caller.cluster, created_at=int(self._now()), lease=lease)
        entry = Entry(vm_id, self._store.folder(vm_id), request, caller.cluster, record.created_at, record)
        entry.warnings, entry.step = warnings, "accepted"
        self.entries.pop(vm_id, None)
        self._hold(record, 1)
        return self._add(entry)

    def publish(self, entry: Entry) -> None:
        """Shows clients the entry as it is now, if that differs from what they were shown."""
        vm = shown_vm(entry, self.host_id)
        if vm == entry.shown:
            return
        entry.shown, entry.shown_json = vm, vm.model_dump_json(exclude_none=True).encode()
        self._watch.changed()

    def note_step(self, entry: Entry, step: str) -> None:
        """The VM is at this step of what is under way; "" when nothing is."""
        entry.step = step
        self.publish(entry)

    def drop(self, entry: Entry, *, remember: bool) -> None:
        """Frees what the VM held. With `remember` it stays to be seen as failed, with the reason."""
        if entry.record is not None:
            self._hold(entry.record, -1)
            self._rest(entry.record.lease)
        elif entry.broken is not None:
            self._count -= 1
        entry.record, entry.broken, entry.removal_error, entry.step = None, None, "", ""
        if remember:
            self.publish(entry)
            failures = [other.id for other in self.entries.values() if other.is_memory]
            for vm_id in failures[: max(0, len(failures) - _REMEMBERED_FAILURES)]:
                del self.entries[vm_id]
        else:
            del self.entries[entry.id]
            self._watch.changed()

    def shown(self, entry: Entry) -> AgentVm:
        """The VM as clients were last shown it."""
        return entry.shown or shown_vm(entry, self.host_id)

    def list_json(self) -> bytes:
        """All VMs as one JSON array; each is encoded once per change, so a list of 600 costs little more than one of 10."""
        return b"[" + b",".join(entry.shown_json for entry in self.entries.values()) + b"]"

    def present_ids(self) -> frozenset[VmId]:
        """Ids of which something may be on the host: whatever else a driver finds there is left over."""
        return frozenset(vm_id for vm_id, entry in self.entries.items() if not entry.is_memory)

    def ruled_leases(self) -> dict[VmId, Lease]:
        """The leases that the network rules must contain now."""
        return {vm_id: entry.record.lease for vm_id, entry in self.entries.items() if entry.record is not None and entry.ruled}

    def resource(self) -> Resource:
        """Capacity and what the records have reserved of it."""
        total, held = self._capacity, self._held
        return Resource(
            cpu_total=total.cpu,
            cpu_used=held.cpu,
            mem_total=total.mem,
            mem_used=held.mem,
            disk_total=total.disk,
            disk_used=held.disk,
            vm_count=self._count,
        )

    def _hold(self, record: VmRecord, sign: int) -> None:
        """Counts what a record reserves in (`sign` 1) or out (-1)."""
        request, held = record.request, self._held
        self._held = Capacity(held.cpu + sign * request.cpu, held.mem + sign * request.mem, held.disk + sign * request.disk)
        self._count += sign
        if sign > 0:
            self._taken.add(record.lease)
        else:
            self._taken.remove(record.lease)

    def _add(self, entry: Entry) -> Entry:
        self.entries[entry.id] = entry
        self.publish(entry)
        return entry

    def _rest(self, lease: Lease) -> None:
        for port in lease.ports.values():
            self._resting[port] = None
            self._resting.move_to_end(port)
        while len(self._resting) > _RESTING_PORTS:
            self._resting.popitem(last=False)

    def _check_room(self, request: CreateVmReq) -> None:
        now = self.resource()
        short = [
            f"{wanted} {unit} asked for, {max(0, total - used)} of {total} free"
            for unit, wanted, used, total in (
                ("vCPU", request.cpu, now.cpu_used, now.cpu_total),
                ("MiB of memory", request.mem, now.mem_used, now.mem_total),
                ("MiB of disk", request.disk, now.disk_used, now.disk_total),
            )
            if used + wanted > total
        ]
        if short:
            raise DoesNotFit(f"VM {request.vm_id} does not fit on host {self.host_id}: {'; '.join(short)}")
