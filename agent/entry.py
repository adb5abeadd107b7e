"""One VM as the runtime holds it in memory, and how that reads to clients. No I/O."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent.errors import AgentError
from agent.machine import EngineState, Machine, Running
from agent.records import Power, VmRecord
from specs.names import ClusterId, Engine, VmId
from specs.wire import AgentVm, CreateVmReq, Readiness

NO_CLUSTER = ClusterId("")


@dataclass(frozen=True, slots=True)
class Caller:
    """Who makes a mutating call: a controller of `cluster` in its `term`, or somebody without a cluster ("" and 0)."""

    cluster: ClusterId = NO_CLUSTER
    term: int = 0


@dataclass(eq=False, slots=True)
class Entry:
    """A VM on this host, or the memory of one whose creation failed (`record` and `broken` are then both None).

    `lock` is held around every driver call for the VM. `tasks` are the operations under way, which a delete cancels.
    """

    id: VmId
    folder: Path
    request: CreateVmReq | None
    cluster_id: str = ""
    created_at: int = 0
    record: VmRecord | None = None
    broken: str | None = None
    """Why vm.json cannot be read; nothing but a delete touches such a VM."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    creation: asyncio.Task[None] | None = None
    recorded: asyncio.Event = field(default_factory=asyncio.Event)
    power: tuple[Power, asyncio.Task[None]] | None = None
    """The stop or start asked for last, while it is under way."""
    removal: asyncio.Task[None] | None = None

    step: str = ""
    ruled: bool = False
    """Whether the network rules must contain the lease."""
    machine: Machine | None = None
    looked: bool = False
    seen: EngineState | None = None
    unknown: str = ""
    """Why the engine could not tell the state when last asked."""
    look_wanted: bool = False
    verdict: AgentError | None = None
    """Why the creation failed."""
    start_error: str = ""
    removal_error: str = ""
    warnings: tuple[str, ...] = ()
    readiness: Readiness | None = None
    probed_pid: int | None = None
    """The process `readiness` is about."""
    probing: asyncio.Task[None] | None = None

    shown: AgentVm | None = None
    shown_json: bytes = b""

    @property
    def engine(self) -> Engine:
        """The engine asked for; an unreadable record says nothing, so the default stands in."""
        return self.request.engine if self.request else Engine.QEMU

    @property
    def is_memory(self) -> bool:
        """Whether nothing of the VM is on the host: its creation failed and was undone."""
        return self.record is None and self.broken is None

    @property
    def is_creating(self) -> bool:
        """Whether the creation has not been through all its steps yet."""
        return self.record is not None and not self.record.complete

    @property
    def is_going(self) -> bool:
        """Whether its removal has begun, or must be taken up again."""
        return self.removal is not None or bool(self.removal_error) or (self.record is not None and self.record.deleting)


def same_spec(one: CreateVmReq, other: CreateVmReq) -> bool:
    """Whether two requests ask for the same machine; the order of ports and keys and the name do not matter."""
    return _normal(one) == _normal(other)


def _normal(request: CreateVmReq) -> dict[str, Any]:
    parts = request.model_dump(exclude={"name", "spec_hash"})
    parts["ports"] = {22, *request.ports}
    parts["ssh_keys"] = set(request.ssh_keys)
    return parts


def shown_vm(entry: Entry, host_id: str) -> AgentVm:
    """The VM as clients see it."""
    request, record = entry.request, entry.record
    lease = record.lease if record else None
    condition = _condition(entry)
    return AgentVm(
        id=entry.id,
        env_id=request.env_id if request else "",
        host_id=host_id,
        image=request.image if request else "",
        engine=entry.engine,
        cpu=request.cpu if request else 0,
        mem=request.mem if request else 0,
        disk=request.disk if request else 0,
        ip=str(lease.ip) if lease else "",
        port_map={str(guest): host for guest, host in sorted(lease.ports.items())} if lease else {},
        created_at=entry.created_at,
        cluster_id=entry.cluster_id,
        spec_hash=request.spec_hash if request else "",
        step=entry.step,
        warnings=entry.warnings,
        ready=_readiness(entry) if condition["state"] == "running" else None,
        **condition,
    )


def _readiness(entry: Entry) -> Readiness | None:
    if entry.request is None or entry.request.ready is None or entry.readiness is not None:
        return entry.readiness
    # Nobody has looked since the agent began: nothing said here would read as a VM that need not answer.
    mark = entry.record.ready if entry.record else None
    if mark is not None:
        return Readiness(status=True, reason="Answered", since=mark.since)
    return Readiness(status=False, reason="Probing", message="the guest has not been probed yet", since=entry.created_at)


def _condition(entry: Entry) -> dict[str, Any]:
    """state, reason, message and pid."""
    record = entry.record
    if entry.removal_error:
        why = f"{entry.verdict.message}; " if entry.verdict else ""
        return _told("failed", "remove_failed", f"{why}removing it failed and is tried again: {entry.removal_error}")
    if entry.broken is not None:
        return _told("failed", "state_unknown", f"its record cannot be read, so it is left alone: {entry.broken}")
    if record is None:
        if entry.verdict is None:
            return _told("failed", "create_failed", "its creation failed")
        return _told("failed", "create_failed", entry.verdict.message) | {"cause": entry.verdict.code}
    if not record.complete:
        return _told("creating")
    if entry.step and entry.step != "deleting":
        # A controller waits for what is `creating`; shown as running or stopped it would be told to change again at once.
        return _told("creating")
    if entry.start_error:
        return _told("failed", "start_failed", entry.start_error)
    return _observed(entry, record)


def _observed(entry: Entry, record: VmRecord) -> dict[str, Any]:
    if entry.unknown:
        # Shown as asked, since `stopped` would make a controller start what may well be running.
        return _told(record.power, "state_unknown", f"its engine cannot tell how it is: {entry.unknown}")
    if not entry.looked:
        return _told(record.power)
    if isinstance(entry.seen, Running):
        return _told("running") | {"pid": entry.seen.pid}
    if record.power == "stopped":
        return _told("stopped")
    if entry.seen is None:
        return _told("stopped", "crashed", f"{entry.engine} has nothing of it any more; start makes it again")
    return _told("stopped", entry.seen.reason, entry.seen.message)


def _told(state: str, reason: str = "", message: str = "") -> dict[str, Any]:
    return {"state": state, "reason": reason, "message": message}
