"""Trouble on demand for the fake drivers. Used by tests of whoever calls drivers."""

from __future__ import annotations

import asyncio
from collections import defaultdict


class Faults:
    """What happens at each step of a fake driver, by the step's name.

    Every operation `op` passes two steps: `op` before it changes anything and `op.done` after it has. A failure at `op.done`
    is a call whose effect stands though it never reported success.
    """

    def __init__(self) -> None:
        self.latency: dict[str, float] = {}
        """Seconds a step takes."""
        self.hold: dict[str, asyncio.Event] = {}
        """A step waits until its event is set."""
        self.steps: list[tuple[str, str]] = []
        """Every step reached, with the VM id ("" where there is none)."""
        self._failures: defaultdict[str, list[BaseException]] = defaultdict(list)

    def fail_next(self, step: str, error: BaseException, times: int = 1) -> None:
        """Raises `error` the next `times` that `step` is reached."""
        self._failures[step] += [error] * times

    def fail_always(self, step: str, error: BaseException) -> None:
        """Raises `error` whenever `step` is reached, until `heal`."""
        self.fail_next(step, error, times=1_000_000)

    def heal(self) -> None:
        """Ends all trouble: nothing fails, waits or is held any more."""
        self._failures.clear()
        self.latency.clear()
        for event in self.hold.values():
            event.set()
        self.hold.clear()

    async def reach(self, step: str, vm_id: str = "") -> None:
        """Called by the fakes at each step."""
        self.steps.append((step, vm_id))
        if delay := self.latency.get(step):
            await asyncio.sleep(delay)
        if event := self.hold.get(step):
            await event.wait()
        if waiting := self._failures.get(step):
            raise waiting.pop(0)
