"""A disk with the controller's database on it, and the production Database working on that disk in virtual time.

Real SQLite, real transactions and the production writer loop; only its thread is gone: the loop below runs it when something
waits to be written. A mirror in plain Python follows every commit, so that a reload can be compared with what was committed.
"""

from __future__ import annotations

import queue
import sqlite3
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import sqlalchemy as sa
from sqlalchemy.pool import StaticPool

from reconciler.core.model import Change, EnvIntent, HostIntent, VmIntent
from reconciler.store.database import Database, _migrate, begin_sqlite
from reconciler.store.schema import meta
from specs.names import EnvId, VmId
from tests.sim.loop import Process, SimLoop

CLUSTER = "cluster"
_IDLE_DISKS: list[Disk] = []
_EMPTY: list[bytes] = []


class _NothingToWrite(Exception):
    """Ends one run of the production writer loop."""


class StoreTime:
    """Stands in for `time` in tenacity while the store retries: sleeping moves this clock and no other."""

    def __init__(self) -> None:
        self.slept = 0.0
        self.now: Callable[[], float] = lambda: 0.0

    def sleep(self, seconds: float) -> None:
        """Blocks the writer."""
        self.slept += seconds

    def monotonic(self) -> float:
        """The writer's time."""
        return self.now() + self.slept


STORE_TIME = StoreTime()


@dataclass
class Mirror:
    """What has been committed to one disk. `wished` are all wishes ever committed for a VM, `hosted` all its hosts."""

    envs: dict[EnvId, EnvIntent] = field(default_factory=dict)
    vms: dict[VmId, VmIntent] = field(default_factory=dict)
    hosts: dict[str, HostIntent] = field(default_factory=dict)
    wished: dict[VmId, set[str]] = field(default_factory=dict)
    hosted: dict[VmId, set[str]] = field(default_factory=dict)
    term: int = 0

    def apply(self, change: Change) -> None:
        """Follows the meaning of Change as its docstring tells it."""
        for env in change.envs:
            self.envs[env.id] = env
        for vm in change.vms:
            old = self.vms.get(vm.id)
            self.vms[vm.id] = replace(vm, host_id=old.host_id, gone_at=old.gone_at) if old else vm
            self.wished.setdefault(vm.id, set()).add(vm.desired)
        for vm_id, host_id in change.placed:
            self.vms[vm_id] = replace(self.vms[vm_id], host_id=host_id)
            self.hosted.setdefault(vm_id, set()).add(host_id)
        for vm_id, when in change.gone:
            self.vms[vm_id] = replace(self.vms[vm_id], gone_at=when)
        for vm_id in change.drop_vms:
            self.vms.pop(vm_id, None)
        for env_id in change.drop_envs:
            self.envs.pop(env_id, None)
        for host in change.hosts:
            self.hosts[host.addr] = host
        for addr in change.drop_hosts:
            self.hosts.pop(addr, None)

    def differs_from(self, loaded: Change) -> str:
        """What of the committed state a fresh load lacks or has too much, "" if they are equal."""
        for mine, theirs in (
            (self.envs, {env.id: env for env in loaded.envs}),
            (self.vms, {vm.id: vm for vm in loaded.vms}),
            (self.hosts, {host.addr: host for host in loaded.hosts}),
        ):
            for key in sorted({*mine, *theirs}):
                if mine.get(key) != theirs.get(key):  # type: ignore[call-overload]
                    return f"{key}: committed {mine.get(key)}, loaded {theirs.get(key)}"  # type: ignore[call-overload]
        return ""


@dataclass(frozen=True)
class Backup:
    """The database file at one moment, and what had been committed to it."""

    data: bytes
    mirror: Mirror


class Disk:
    """One database file. `take` gives an empty one, `give_back` lets the next schedule have it."""

    def __init__(self) -> None:
        self.connection = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
        self.engine = sa.create_engine("sqlite://", creator=lambda: self.connection, poolclass=StaticPool)
        sa.event.listen(self.engine, "begin", begin_sqlite)
        sa.event.listen(self.engine, "commit", self._fail_if_full)
        self.mirror = Mirror()
        self.locked_until = 0.0
        self.full_until = 0.0
        self.slow_until = 0.0

    def _fail_if_full(self, _connection: sa.Connection) -> None:
        if STORE_TIME.monotonic() < self.full_until:
            raise sa.exc.OperationalError("COMMIT", None, sqlite3.OperationalError("database or disk is full"))

    @classmethod
    def take(cls) -> Disk:
        """A disk with a migrated, empty database whose cluster id is CLUSTER."""
        disk = _IDLE_DISKS.pop() if _IDLE_DISKS else cls()
        if not _EMPTY:
            with disk.engine.begin() as connection:
                _migrate(connection)
                connection.execute(sa.insert(meta), [{"key": "cluster", "value": CLUSTER}])
            _EMPTY.append(disk.connection.serialize())
        disk.restore(Backup(_EMPTY[0], Mirror()))
        disk.locked_until = disk.full_until = disk.slow_until = 0.0
        return disk

    def give_back(self) -> None:
        """The schedule has ended."""
        _IDLE_DISKS.append(self)

    def copy(self) -> Backup:
        """A backup."""
        wished = {vm_id: set(wishes) for vm_id, wishes in self.mirror.wished.items()}
        hosted = {vm_id: set(hosts) for vm_id, hosts in self.mirror.hosted.items()}
        mirror = Mirror(
            dict(self.mirror.envs), dict(self.mirror.vms), dict(self.mirror.hosts), wished, hosted, self.mirror.term
        )
        return Backup(self.connection.serialize(), mirror)

    def restore(self, backup: Backup) -> None:
        """Puts a backup in the place of what is there; no process may be using it."""
        self.connection.deserialize(backup.data)
        self.mirror = backup.mirror


class _Pending:
    """Stands in for the writer's queue: putting something in makes the writer run a little later."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self.items: deque[Any] = deque()
        self._wake = wake

    def put(self, item: Any) -> None:
        self.items.append(item)
        self._wake()

    def get(self) -> Any:
        if not self.items:
            raise _NothingToWrite
        return self.items.popleft()

    def get_nowait(self) -> Any:
        if not self.items:
            raise queue.Empty
        return self.items.popleft()


class StoreWatch(Protocol):
    """Who is told what happens at a store."""

    def committing(self, process: Process, change: Change, mirror: Mirror) -> None:
        """A change has been written; the mirror shows what was there before it."""

    def committed(self, change: Change, mirror: Mirror) -> None:
        """The mirror has followed."""

    def loaded(self, difference: str) -> None:
        """A process has loaded everything; `difference` from what was committed, "" if none."""


class SimDatabase(Database):
    """The production Database of one process. `watch` is told of every change and every load, before anybody else."""

    def __init__(self, disk: Disk, process: Process, latency: Callable[[], float], watch: StoreWatch) -> None:
        super().__init__("sqlite://")
        self.disk = disk
        self._process = process
        self._loop: SimLoop = process.loop
        self._latency = latency
        self._watch = watch
        self._pending = _Pending(self._wake)  # type: ignore[assignment]
        self._busy_until = 0.0
        self._is_due = False

    def open(self) -> None:
        """The database has been migrated when the disk was made."""
        self._process.point("store open")
        self._engine = self._open_engine()
        self._writer = object()  # type: ignore[assignment]

    def close(self) -> None:
        """The process ends."""
        self._writer = None
        self._engine = None

    def begin_term(self, now: float = 0.0) -> Any:
        """As in production, between two crash points."""
        self._process.point("store term")
        cluster, term = super().begin_term(now)
        self.disk.mirror.term = term
        self._process.point("store term done")
        return cluster, term

    def load(self) -> Change:
        """As in production, between two crash points."""
        self._process.point("store load")
        change = super().load()
        self._watch.loaded(self.disk.mirror.differs_from(change))
        self._process.point("store loaded")
        return change

    async def commit(self, change: Change) -> None:
        """As in production, between two crash points."""
        self._process.point("store commit")
        await super().commit(change)
        self._process.point("store committed")

    def _open_engine(self) -> sa.Engine:
        if STORE_TIME.monotonic() < self.disk.locked_until:
            raise sa.exc.OperationalError("BEGIN", None, sqlite3.OperationalError("database is locked"))
        return self.disk.engine

    def _wake(self) -> None:
        if not self._is_due:
            self._is_due = True
            self._loop.call_at(max(self._loop.now + self._latency(), self._busy_until), self._run_writer)

    def _run_writer(self) -> None:
        self._is_due = False
        if not self._process.alive or not self._pending.items:  # type: ignore[attr-defined]
            return
        STORE_TIME.slept = 0.0
        try:
            self._write_forever()
        except _NothingToWrite:
            pass
        finally:
            self._busy_until = self._loop.now + STORE_TIME.slept
            STORE_TIME.slept = 0.0

    def _try_write(self, changes: list[Change]) -> Any:
        error = super()._try_write(changes)
        if error is None:
            for change in changes:
                self._watch.committing(self._process, change, self.disk.mirror)
                self.disk.mirror.apply(change)
                self._watch.committed(change, self.disk.mirror)
        return error

    def _finish(self, waiting: Any, error: Any) -> None:  # type: ignore[override]
        self._loop.blocked = STORE_TIME.slept
        super()._finish(waiting, error)
        self._loop.blocked = 0.0
