"""The fleet as it changes, for commands that wait or follow. Survives a controller that restarts meanwhile."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from api.client import ApiError, Change, Client, Snapshot
from specs.wire import Env, Event, Host, Vm

TICK = 0.5  # seconds; how often a waiting command looks at the clock
_PAUSE_MIN, _PAUSE_MAX = 0.2, 3.0  # seconds between attempts to resume
_FINAL = (400, 401, 403, 404, 405)  # statuses that another attempt will not change


@dataclass(slots=True)
class Fleet:
    """Everything the controller told so far."""

    hosts: dict[str, Host] = field(default_factory=dict)
    envs: dict[str, Env] = field(default_factory=dict)
    vms: dict[str, Vm] = field(default_factory=dict)

    def take(self, event: Snapshot | Change) -> None:
        """Applies one event of a watch."""
        if isinstance(event, Snapshot):
            self.hosts = {host.id: host for host in event.hosts}
            self.envs = {env.id: env for env in event.envs}
            self.vms = {vm.id: vm for vm in event.vms}
            return
        if event.kind == "event":
            return  # tells what happened, not how anything is
        thing = event.parsed()
        if thing is None:
            tables: dict[str, dict[str, Any]] = {"host": self.hosts, "env": self.envs, "vm": self.vms}
            tables[event.kind].pop(event.id, None)
        elif isinstance(thing, Host):
            self.hosts[event.id] = thing
        elif isinstance(thing, Env):
            self.envs[event.id] = thing
        elif not isinstance(thing, Event):
            self.vms[event.id] = thing

    def vms_of(self, env_id: str) -> list[Vm]:
        """An environment's VMs by name."""
        return sorted((vm for vm in self.vms.values() if vm.env_id == env_id), key=lambda vm: (vm.name, vm.id))


class Lost:
    """The connection broke; the feed is trying to resume."""

    def __init__(self, why: str) -> None:
        self.why = why


class Feed:
    """Watches in a thread of its own, so that the reader can also look at the clock. Use as a context manager."""

    def __init__(self, connect: Callable[[], Client]) -> None:
        self.fleet = Fleet()
        self._connect = connect
        self._events: queue.Queue[Snapshot | Change | Lost | ApiError] = queue.Queue()
        self._ended = threading.Event()
        self._client: Client | None = None
        self._thread = threading.Thread(target=self._run, name="muster-watch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        if self._client is not None:
            self._client.close()
        self._thread.join(timeout=5)

    def events(self, tick: float = TICK) -> Iterator[Snapshot | Change | Lost | None]:
        """Every event once `fleet` reflects it, and None after each `tick` seconds without one.

        Raises ApiError when the first connection fails, and when the controller says no for good.
        """
        while True:
            try:
                event = self._events.get(timeout=tick)
            except queue.Empty:
                yield None
                continue
            if isinstance(event, ApiError):
                raise event
            if isinstance(event, Snapshot | Change):
                self.fleet.take(event)
            yield event

    def _run(self) -> None:
        since: int | None = None
        seen, pause = False, _PAUSE_MIN
        while not self._ended.is_set():
            why = "the controller ended the watch"
            try:
                with self._connect() as self._client:
                    for event in self._client.watch(since):
                        self._events.put(event)
                        since, seen, pause = event.revision, True, _PAUSE_MIN
            except ApiError as error:
                if not seen or error.status in _FINAL:
                    self._events.put(error)
                    return
                if error.status == 410:
                    since = None
                    continue
                why = str(error)
            except Exception as error:  # the thread must never end without a word
                self._events.put(ApiError(f"the watch failed: {error!r}"))
                return
            if not self._ended.is_set():
                self._events.put(Lost(why))
            self._ended.wait(pause)
            pause = min(pause * 2, _PAUSE_MAX)
