"""Numbers the visible changes of this host and lets long polls wait for them. Knows nothing of VMs or HTTP."""

from __future__ import annotations

import asyncio
import secrets

MAX_WAIT = 60.0  # seconds a long poll is held at most
SETTLE = 0.003  # seconds after a change of a burst before waiters go, so that many changes are one reply
_QUIET = 10  # settling times without a waiter gone, after which the next change is no burst


class Watch:
    """(boot_id, seq): `boot_id` is new in every agent process, `seq` grows by one with every visible change."""

    def __init__(self, *, settle: float = SETTLE) -> None:
        self.boot_id = secrets.token_hex(8)
        self.seq = 1
        self._settle = settle
        self._released = float("-inf")  # when waiters last went, in the running loop's seconds
        self._moved = asyncio.Event()
        self._closed = False

    def changed(self) -> None:
        """Something a client can see is different now."""
        self.seq += 1
        self._moved.set()
        self._moved = asyncio.Event()

    def is_newer_than(self, boot_id: str, seq: int) -> bool:
        """Whether a client that has seen this much has missed something; true for a position of another process."""
        return boot_id != self.boot_id or seq != self.seq

    async def wait(self, boot_id: str, seq: int, limit: float) -> None:
        """Returns at once if there is something newer than (boot_id, seq), else at the next change or after `limit` seconds."""
        if self._closed or self.is_newer_than(boot_id, seq):
            return
        # No await lies between the comparison and taking the event, so a change in between cannot be missed.
        moved = self._moved
        try:
            async with asyncio.timeout(min(limit, MAX_WAIT)):
                await moved.wait()
        except TimeoutError:
            return
        if self._closed:
            return
        # A change after a quiet while is told at once: only the next ones can be a burst.
        loop = asyncio.get_running_loop()
        if loop.time() - self._released < self._settle * _QUIET:
            await asyncio.sleep(self._settle)
        self._released = loop.time()

    def close(self) -> None:
        """Lets every waiter go, now and later: the process is ending."""
        self._closed = True
        self._moved.set()
