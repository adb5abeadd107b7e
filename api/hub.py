"""Tells watchers what changed: one serialisation a change, kept in a bounded ring so that a watcher can resume.

Called by the fleet through `changed`; the stream handler and waiting requests read it. Revisions grow by one a change and
begin with the controller's term, so that a revision of an earlier process is never mistaken for one of this.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from collections.abc import Callable

import orjson

from api.bodies import Bodies
from api.views import Views
from reconciler.events import REVISION_BITS
from reconciler.fleet import Fleet, Kind
from specs.wire import Message

RING = 8192  # changes kept
KEEP_ALIVE = 10.0  # seconds


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
        for kind, key in pending:
            shown = self._shown(kind, key)
            body = None if shown is None else orjson.dumps(_dump(shown))
            mark = hash(body)
            if body is None:
                if self._last.pop((kind, key), None) is None:
                    continue
            elif self._last.get((kind, key)) == mark:
                continue
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
        self._flushed.set()
        self._flushed = asyncio.Event()

    def _shown(self, kind: Kind, key: str) -> Message | None:
        if kind == "vm":
            return self._views.find_vm(key)
        if kind == "env":
            return self._views.find_env(key)
        if kind == "event":
            return self._views.find_event(key)
        host = self._views.find_host(key)
        return host if host is not None and host.id == key else None

    def snapshot(self) -> bytes:
        """The frame a watcher begins with: the whole fleet at this revision."""
        self.flush()
        data = orjson.dumps(
            {
                "revision": self.revision,
                "hosts": [_dump(self._views.host(host)) for host in self._fleet.hosts.values()],
                "envs": [_dump(self._views.env(env)) for env in self._fleet.envs.values()],
                "vms": [_dump(self._views.vm(vm)) for vm in self._fleet.vms.values() if not vm.gone_at],
            }
        )
        return _frame("snapshot", self.revision, data)

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


def _dump(message: Message) -> object:
    # An age grows without anything having changed; watchers count it themselves.
    return message.model_dump(mode="json", exclude={"heartbeat_age"}, exclude_none=True)


def _frame(event: str, revision: int, data: bytes) -> bytes:
    return b"id: %d\nevent: %s\ndata: %s\n\n" % (revision, event.encode(), data)
