"""How many VMs were wanted, running and not as desired over the last hour, and how each VM came to where it is.

Told of changes by the hub's caller; read by the handlers and the dashboard. Bounded, and gone with the process.
"""

from __future__ import annotations

import asyncio
from collections import deque

from api.views import Views
from reconciler.fleet import Fleet, Kind
from reconciler.loop.clock import Clock
from specs.names import VmId
from specs.wire import History as HistoryInfo
from specs.wire import Sample, Step

STEP = 5  # seconds between two samples
KEPT = 3600 // STEP
STEPS_KEPT = 16  # of a VM


class History:
    """Samples the fleet's counts, and notes when VMs reach each step of their making."""

    def __init__(self, fleet: Fleet, views: Views, clock: Clock) -> None:
        self._fleet = fleet
        self._views = views
        self._clock = clock
        self._samples: deque[Sample] = deque(maxlen=KEPT)
        self._steps: dict[str, deque[Step]] = {}

    def sample(self) -> Sample:
        """Takes and keeps the present counts."""
        found = self._views.counts(int(self._clock.wall()))
        self._samples.append(found)
        return found

    def shown(self) -> HistoryInfo:
        """Everything kept, oldest first."""
        return HistoryInfo(step=STEP, samples=tuple(self._samples))

    def changed(self, kind: Kind, key: str) -> None:
        """Something visible of the object may differ; a VM may have reached its next step."""
        if kind != "vm":
            return
        vm = self._fleet.vms.get(VmId(key))
        if vm is None or vm.gone_at:
            self._steps.pop(key, None)
            return
        name = self._views.step(vm)
        steps = self._steps.get(key)
        if steps is None:
            # A VM that is there already when this process begins was made at times nobody here has seen.
            steps = self._steps[key] = deque(maxlen=STEPS_KEPT)
        if not steps or steps[-1].name != name:
            steps.append(Step(name=name, at_ms=int(self._clock.wall() * 1000)))

    def steps(self, vm_id: str) -> tuple[Step, ...]:
        """The steps of a VM since this process began, oldest first."""
        return tuple(self._steps.get(vm_id, ()))

    async def pause(self) -> None:
        """Until the next sample is due."""
        await asyncio.sleep(STEP)
