"""Keeps the host's network rules equal to the leases. Called by the lifecycle; many changes at once lead to one `apply`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from agent.machine import Lease
from agent.network.base import Network
from specs.names import VmId


class Rules:
    """Coalesces `Network.apply`. `leases` is asked at the moment a round begins."""

    def __init__(self, network: Network, leases: Callable[[], Mapping[VmId, Lease]]) -> None:
        self._network = network
        self._leases = leases
        self._next: asyncio.Future[None] | None = None
        self._runner: asyncio.Task[None] | None = None
        self.applied: frozenset[VmId] = frozenset()
        """Whose leases the last successful round contained."""
        self.suspected: set[VmId] = set()
        """Whose leases the host may hold: those, what failed rounds since may have brought in all the same, and before the
        first successful round what an earlier agent may have left in force."""

    async def apply(self) -> None:
        """Returns once a round that began after this call has succeeded; raises what `Network.apply` raised in it."""
        if self._next is None:
            self._next = asyncio.get_running_loop().create_future()
        if self._runner is None:
            self._runner = asyncio.create_task(self._run(), name="rules")
        await asyncio.shield(self._next)

    async def _run(self) -> None:
        try:
            while self._next is not None:
                # A caller from here on belongs to the following round: this one's leases are read now.
                waiting, self._next = self._next, None
                try:
                    leases = dict(self._leases())
                    self.suspected |= leases.keys()
                    await self._network.apply(leases)
                except asyncio.CancelledError:
                    waiting.cancel()
                    raise
                except Exception as error:
                    waiting.set_exception(error)
                    waiting.exception()  # every waiter may have been cancelled; that is no unhandled error
                else:
                    self.applied = frozenset(leases)
                    self.suspected = set(leases)
                    waiting.set_result(None)
        finally:
            self._runner = None

    async def close(self) -> None:
        """Ends the round under way; its waiters are cancelled."""
        runner, waiting = self._runner, self._next
        self._next = None
        if waiting is not None:
            waiting.cancel()
        if runner is not None:
            runner.cancel()
            await asyncio.wait([runner])
