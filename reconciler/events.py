"""The log of events in memory: repeats are counted, and it never grows beyond its bounds. Called by fleet and loop.

Knows nothing of the store: a timer takes what is unsaved and writes it in batches.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator

from reconciler.core.events import Event, Reason

KEPT = 5000  # events in all
KEPT_OF_A_KIND = 8  # different messages of one reason about the same VM, environment or host
# A term is a time in seconds: below 2**23 changes a second a revision of an earlier process is always lower, and with 30 bits
# for the term no revision is beyond what JavaScript counts exactly (2**53).
REVISION_BITS = 23


class EventLog:
    """Events by revision, oldest first. `term` makes revisions of a later controller greater than those of an earlier one."""

    def __init__(self, wall: Callable[[], float] = lambda: 0.0, term: int = 0) -> None:
        self._wall = wall
        self._revision = term << REVISION_BITS
        self._events: OrderedDict[int, Event] = OrderedDict()
        self._ids: dict[tuple[str, ...], int] = {}
        self._kinds: defaultdict[tuple[str, ...], dict[int, None]] = defaultdict(dict)
        self._last: dict[str, int] = {}  # by VM
        self._unsaved: dict[int, None] = {}
        self._dropped: dict[int, None] = {}

    def load(self, events: Iterable[Event]) -> None:
        """Takes over what an earlier process has saved."""
        for event in sorted(events, key=lambda event: event.revision):
            self._keep(event)
        self._unsaved.clear()

    def add(
        self,
        reason: Reason,
        message: str,
        *,
        env: str = "",
        vm: str = "",
        vm_name: str = "",
        host: str = "",
        news: bool = False,
    ) -> Event | None:
        """Notes that something happened. With `news`, None if it is what was noted of this VM last: then nothing has."""
        now = int(self._wall())
        known = self._ids.get((reason, env, vm, host, message))
        if news and known is not None and self._last.get(vm) == known:
            return None
        self._revision += 1
        if known is not None:
            event = self._events.pop(known).again(self._revision, now)
        else:
            event = Event(self._revision, self._revision, reason, message, env, vm, vm_name, host, 1, now, now)
        self._keep(event)
        return event

    def get(self, event_id: int) -> Event | None:
        """An event that is still kept."""
        return self._events.get(event_id)

    def __iter__(self) -> Iterator[Event]:
        """Oldest first."""
        return iter(self._events.values())

    def __len__(self) -> int:
        return len(self._events)

    def take_unsaved(self) -> tuple[tuple[Event, ...], tuple[int, ...]]:
        """What must be written and what deleted so that the store holds this log; both count as saved from now on."""
        events = tuple(self._events[event_id] for event_id in self._unsaved if event_id in self._events)
        dropped = tuple(self._dropped)
        self._unsaved, self._dropped = {}, {}
        return events, dropped

    def put_back(self, events: tuple[Event, ...], dropped: tuple[int, ...]) -> None:
        """The write failed: they are unsaved again."""
        self._unsaved.update((event.id, None) for event in events)
        self._dropped.update((event_id, None) for event_id in dropped)

    def _keep(self, event: Event) -> None:
        self._events[event.id] = event
        self._unsaved[event.id] = None
        self._ids[*event.subject, event.message] = event.id
        if event.vm:
            self._last[event.vm] = event.id
        kind = self._kinds[event.subject]
        kind.pop(event.id, None)
        kind[event.id] = None
        if len(kind) > KEPT_OF_A_KIND:
            self._drop(next(iter(kind)))
        if len(self._events) > KEPT:
            self._drop(next(iter(self._events)))

    def _drop(self, event_id: int) -> None:
        event = self._events.pop(event_id)
        key = (*event.subject, event.message)
        if self._ids.get(key) == event_id:  # two controllers on one store may have noted the same, each on its own
            del self._ids[key]
        del self._kinds[event.subject][event_id]
        if not self._kinds[event.subject]:
            del self._kinds[event.subject]
        if self._last.get(event.vm) == event_id:
            del self._last[event.vm]
        self._unsaved.pop(event_id, None)
        self._dropped[event_id] = None
