"""The production controller as a process of the simulation: started, killed, started again on the same disk."""

from __future__ import annotations

import asyncio
import contextlib
import random
import sys
import traceback
from collections.abc import Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest import mock

import sqlalchemy as sa

from reconciler.loop import controller as controller_module
from reconciler.loop import intents, moves, quarantine, reconciler, timers, watchers
from reconciler.loop.clock import Clock
from reconciler.loop.controller import Controller
from reconciler.loop.watchers import WatchSettings
from reconciler.store import database
from reconciler.store.database import StoreUnavailable
from tests.sim.loop import Process
from tests.sim.network import SimClient
from tests.sim.store import STORE_TIME, Disk, SimDatabase

if TYPE_CHECKING:
    from tests.sim.world import World

EPOCH = 1_800_000_000.0  # Unix seconds at virtual time 0
HEARTBEAT = 10.0
HOST_LOSS_GRACE = 12.0


class SimClock(Clock):
    """The controller machine's clocks."""

    def __init__(self, world: World, process: Process) -> None:
        self._world = world
        self._process = process

    def wall(self) -> float:
        """Unix seconds, jumps included."""
        self._process.point("clock wall")
        return self._world.wall()

    def monotonic(self) -> float:
        """Virtual seconds."""
        self._process.point("clock monotonic")
        return self._world.loop.now


class SimController:
    """One run of the controller on a disk."""

    def __init__(self, world: World, disk: Disk, name: str) -> None:
        self.world = world
        self.disk = disk
        self.is_ready = False
        self.is_retired = False
        self.is_last = False
        """Whether nobody starts it again once it has died."""
        self.controller: Controller | None = None
        self.process = Process(world.loop, name, self._died)
        self.process.spawn(self._main())

    async def _main(self) -> None:
        world, process = self.world, self.process
        try:
            store = SimDatabase(self.disk, process, world.store_latency, world.checks)
            settings = WatchSettings(heartbeat=HEARTBEAT)
            clock = SimClock(world, process)
            controller = Controller(store, watch=settings, host_loss_grace=HOST_LOSS_GRACE, clock=clock)
            world.checks.begin(process, controller.fleet, self.disk.mirror)
            await controller.start()
        except (StoreUnavailable, sa.exc.OperationalError) as error:
            world.note("controller cannot start", error)
            process.kill("start refused")
            return
        except Exception as error:
            world.checks.violated("X", f"the controller does not start: {error!r}")
            raise
        self.controller = controller
        self.is_ready = True
        await asyncio.Event().wait()

    def _died(self, label: str) -> None:
        self.is_ready = False
        self.world.note("controller dies", self.process.name, label)
        if not self.is_retired and not self.is_last:
            self.world.restart_controller_later(self)

    def retire(self) -> None:
        """Killed, and nobody starts it again."""
        self.is_retired = True
        self.process.kill("retired")


class _Log:
    """Stands in for the production loggers: lines of the timeline; an exception in the log is a violation."""

    def __init__(self) -> None:
        self.world: World | None = None

    def info(self, event: str, **facts: Any) -> None:
        if self.world is not None and self.world.timeline is not None:
            self.world.note("log", event, *(f"{key}={value}" for key, value in facts.items()))

    warning = error = info

    def exception(self, event: str, **facts: Any) -> None:
        error = sys.exc_info()[1]
        if self.world is not None:
            where = "".join(traceback.format_exception(error)[-3:]) if error else ""
            self.world.checks.violated("X", f"{event} {facts}: {error!r}\n{where}")


_LOG = _Log()


@contextlib.contextmanager
def production_in(world: World) -> Iterator[None]:
    """Production code run inside takes its clients, ids, jitter, sleep and logs from this world."""
    before = random.getstate()
    random.seed(world.seed)
    _LOG.world = world
    STORE_TIME.now = world.loop.time
    ids = random.Random(f"{world.seed} ids")

    def client(addr: str, cluster: Any, term: int, _key: str | None) -> SimClient:
        return SimClient(world, addr, cluster, term)

    with contextlib.ExitStack() as stack:
        for module in (controller_module, intents, moves, quarantine, reconciler, timers, watchers, database):
            stack.enter_context(mock.patch.object(module, "log", _LOG))
        stack.enter_context(mock.patch.object(controller_module, "AgentClient", client))
        secrets = SimpleNamespace(token_hex=lambda size: f"{ids.getrandbits(8 * size):0{2 * size}x}")
        stack.enter_context(mock.patch.object(controller_module, "secrets", secrets))
        stack.enter_context(mock.patch("tenacity.time", STORE_TIME))
        stack.enter_context(mock.patch("tenacity.nap.time", STORE_TIME))
        asyncio._set_running_loop(world.loop)
        try:
            yield
        finally:
            asyncio._set_running_loop(None)
            _LOG.world = None
            random.setstate(before)
