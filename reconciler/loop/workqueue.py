"""Orders keys for workers; knows nothing of VMs. The contract is client-go's: no key is ever worked on twice at once."""

from __future__ import annotations

import asyncio
import heapq
from collections import deque
from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class WorkQueue(Generic[K]):
    """Keys added while queued are merged; keys added while in work run once more afterwards."""

    def __init__(self) -> None:
        self._ready: deque[K] = deque()
        self._dirty: set[K] = set()
        self._processing: set[K] = set()
        self._later: list[tuple[float, int, K]] = []
        self._due: dict[K, float] = {}
        self._order = 0
        self._timer: asyncio.TimerHandle | None = None
        self._arrived = asyncio.Event()

    def __len__(self) -> int:
        return len(self._dirty | self._processing)

    def add(self, key: K) -> None:
        """Asks for the key to be worked on as soon as possible."""
        if key in self._dirty:
            return
        self._dirty.add(key)
        if key not in self._processing:
            self._ready.append(key)
            self._arrived.set()

    def add_at(self, key: K, when: float) -> None:
        """Asks for the key to be worked on at `when` (the running loop's clock); the earliest wish counts."""
        if key in self._due and self._due[key] <= when:
            return
        self._due[key] = when
        self._order += 1
        heapq.heappush(self._later, (when, self._order, key))
        self._set_timer()

    def forget_timer(self, key: K) -> None:
        """Takes back `add_at`: the key has been looked at and wants another time or none."""
        self._due.pop(key, None)

    async def get(self) -> K:
        """The next key. The caller must call `done` with it."""
        while not self._ready:
            self._arrived.clear()
            await self._arrived.wait()
        key = self._ready.popleft()
        self._dirty.discard(key)
        self._processing.add(key)
        return key

    def done(self, key: K) -> None:
        """The key is no longer in work; it is queued again if it was added meanwhile."""
        self._processing.discard(key)
        if key in self._dirty:
            self._ready.append(key)
            self._arrived.set()

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        if self._later:
            self._timer = asyncio.get_running_loop().call_at(self._later[0][0], self._fire)

    def _fire(self) -> None:
        now = asyncio.get_running_loop().time()
        while self._later and self._later[0][0] <= now:
            when, _, key = heapq.heappop(self._later)
            if self._due.get(key) == when:
                del self._due[key]
                self.add(key)
        self._set_timer()

    def close(self) -> None:
        """Drops the timer; nothing more becomes ready by itself."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
