"""Tells watchers what changed: one serialisation a change, kept in a bounded ring so that a watcher can resume.

Called by the fleet through `changed`; the stream handler and waiting requests read it. Revisions grow by one a change and
begin with the controller's term, so that a revision of an earlier process is never mistaken for one of this.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import orjson

from api.bodies import Bodies
from api.views import Views
from reconciler.events import REVISION_BITS
from reconciler.fleet import Fleet, Kind
from specs.names import EnvId, VmId
from specs.wire import History, Message, Sample

RING = 8192  # changes kept
KEEP_ALIVE = 10.0  # seconds
PART = 200  # VMs
LINGER = 60.0  # seconds changes are still kept once nobody watches any more, for a watcher that comes back
_TOLD = 0  # the mark of what a snapshot told


class TooOld(Exception):
    """The revision is no longer, or never was, in the ring: the watcher must begin with a snapshot."""


class Hub:
    """All watchers of one controller."""

    def __init__(self, fleet: Fleet, views: Views, term: int) -> None:
        self.bodies = Bodies(views)
        self.process = secrets.token_hex(6)
        """Differs with every start: a store restored from a backup gives terms away a second time."""
        self.version = 0
        """Grows with everything that may be visible, watchers being told of it or not."""
        self._fleet = fleet
        self._views = views
        self._first = self.revision = term << REVISION_BITS
        self._ring: deque[tuple[int, bytes]] = deque(maxlen=RING)
        self._pending: dict[tuple[Kind, str], None] = {}
        self._last: dict[tuple[Kind, str], int] = {}
        self._flush_due = False
        self._flushed = asyncio.Event()
        self._watchers = 0
        self._left_at = -LINGER
        self._missed = False
        self.closed = False
        self.pulses = 0
        """Grows with every pulse."""
        self.pulse = b""
        """The last frame of counts, told to those who ask for pulses."""

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Counts a watcher in: without one nothing is serialised, and a revision of before is too old afterwards."""
        self.flush()
        if self._missed:
            self._missed = False
            self.revision += 1
            self._ring.clear()
            self._last.clear()
        self._watchers += 1
        try:
            yield
        finally:
            self._watchers -= 1
            self._left_at = time.monotonic()

    def close(self) -> None:
        """Lets every watcher's stream end: the controller stops."""
        self.closed = True
        self._wake()

    def beat(self, sample: Sample) -> None:
        """Tells the counts, and how long ago each host was heard."""
        self.pulses += 1
        if self._watchers:
            ages = {host.id: host.heartbeat_age for host in map(self._views.host, self._fleet.hosts.values())}
            data = {"sample": sample.model_dump(), "heartbeats": ages}
            self.pulse = b"event: pulse\ndata: %s\n\n" % orjson.dumps(data)
            self._wake()

    def history(self, history: History) -> bytes:
        """The frame of everything counted so far."""
        return b"event: history\ndata: %s\n\n" % history.model_dump_json().encode()

    def changed(self, kind: Kind, key: str) -> None:
        """Something visible of the object may differ; said to watchers with the next turn of the event loop."""
        self.version += 1
        self.bodies.forget(kind, key)
        self._pending[kind, key] = None
        if not self._flush_due:
            self._flush_due = True
            asyncio.get_running_loop().call_soon(self.flush)

    def flush(self) -> None:
        """Serialises what is pending and wakes everybody who waits."""
        self._flush_due = False
        pending, self._pending = self._pending, {}
        if self._watchers or time.monotonic() - self._left_at < LINGER:
            for kind, key in pending:
                self._tell(kind, key)
        elif pending:
            self._missed = True
        self._wake()

    def _wake(self) -> None:
        self._flushed.set()
        self._flushed = asyncio.Event()

    def _tell(self, kind: Kind, key: str) -> None:
        body = self._shown(kind, key)
        mark = hash(body)
        if body is None:
            if self._last.pop((kind, key), None) is None:
                return
        elif self._last.get((kind, key)) == mark:
            return
        elif kind != "event":  # an event tells something new whenever it is told, and is never gone
            self._last[kind, key] = mark
        self.revision += 1
        data = b'{"revision":%d,"kind":"%s","id":%s,"object":%s}' % (
            self.revision,
            kind.encode(),
            orjson.dumps(key),
            body or b"null",
        )
        self._ring.append((self.revision, _frame("change", self.revision, data)))

    def _shown(self, kind: Kind, key: str) -> bytes | None:
        if kind == "vm":
            vm = self._fleet.vms.get(VmId(key))
            return self.bodies.vm(vm).json if vm and not vm.gone_at else None
        if kind == "env":
            env = self._fleet.envs.get(EnvId(key))
            return self.bodies.env(env).json if env else None
        if kind == "event":
            event = self._views.find_event(key)
            return None if event is None else _json(event)
        host = self._views.find_host(key)
        return _json(host) if host is not None and host.id == key else None

    def snapshot(self, *, in_parts: bool = False) -> bytes:
        """The frame a watcher begins with: the whole fleet at this revision.

        In parts: VMs come before it in `part` frames of PART each, so that a page that reads one after the other stays quick
        to the touch.
        """
        self.flush()
        hosts = {host.shown_id: _json(self._views.host(host)) for host in self._fleet.hosts.values()}
        envs = {env.id: self.bodies.env(env).json for env in self._fleet.envs.values()}
        vms = {vm.id: self.bodies.vm(vm).json for vm in self._fleet.vms.values() if not vm.gone_at}
        tables: tuple[tuple[Kind, dict[Any, bytes]], ...] = (("host", hosts), ("env", envs), ("vm", vms))
        for kind, told in tables:
            for key in told:  # its end must be told even if nothing was ever said of it but this
                self._last.setdefault((kind, key), _TOLD)
        parts = b""
        if in_parts:
            told_vms = list(vms.values())
            vms.clear()
            for at in range(0, len(told_vms), PART):
                parts += b'event: part\ndata: {"vms":[%s]}\n\n' % b",".join(told_vms[at : at + PART])
        lists = (b'"%ss":[%s]' % (kind.encode(), b",".join(told.values())) for kind, told in tables)
        return parts + _frame("snapshot", self.revision, b'{"revision":%d,%s}' % (self.revision, b",".join(lists)))

    def since(self, revision: int) -> list[tuple[int, bytes]]:
        """The frames after a revision, oldest first. Raises TooOld."""
        oldest = self._ring[0][0] - 1 if self._ring else self.revision
        if not oldest <= revision <= self.revision:
            raise TooOld(f"revision {revision} is not kept any more; watch again without since")
        missing = self.revision - revision
        ring = self._ring
        return [ring[index] for index in range(len(ring) - missing, len(ring))]

    async def wait(self, seconds: float) -> bool:
        """Waits for the next change; False when the time is up first."""
        try:
            async with asyncio.timeout(seconds):
                await self._flushed.wait()
        except TimeoutError:
            return False
        return True

    async def until(self, reached: Callable[[], bool], seconds: float) -> bool:
        """Waits until `reached()` is true, looking after every change; False when the time is up first."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        while not reached():
            if not await self.wait(max(deadline - loop.time(), 0)) and not reached():
                return False
        return True


def _json(message: Message) -> bytes:
    # An age grows without anything having changed; watchers count it themselves.
    return message.model_dump_json(exclude={"heartbeat_age"}, exclude_none=True).encode()


def _frame(event: str, revision: int, data: bytes) -> bytes:
    return b"id: %d\nevent: %s\ndata: %s\n\n" % (revision, event.encode(), data)
