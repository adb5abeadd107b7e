"""An event loop whose clock jumps to the next timer, and programs on it that can be killed. Knows nothing of VMs.

Everything runs in one thread and in one order: the same callbacks with the same times give the same run, always.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import Context, ContextVar, copy_context
from typing import Any

LIVELOCK = 2000  # rounds without time passing

_PROCESS: ContextVar[Process | None] = ContextVar("process", default=None)


def current_process() -> Process:
    """The program whose code is running. Raises LookupError outside of one."""
    process = _PROCESS.get()
    if process is None:
        raise LookupError("no simulated process is running")
    return process


class Handle:
    """A callback to come. asyncio's own does more than a loop in one thread needs, and schedules make them by the million."""

    __slots__ = ("args", "callback", "cancelled_", "context", "when_")

    def __init__(self, callback: Callable[..., object], args: tuple[Any, ...], context: Context | None, when: float) -> None:
        self.callback = callback
        self.args = args
        self.context = context if context is not None else copy_context()
        self.cancelled_ = False
        self.when_ = when

    def cancel(self) -> None:
        """It will not be called."""
        self.cancelled_ = True

    def cancelled(self) -> bool:
        """Whether it has been cancelled."""
        return self.cancelled_

    def when(self) -> float:
        """Virtual seconds."""
        return self.when_


class SimLoop(asyncio.AbstractEventLoop):
    """Just enough of an event loop for tasks, futures, timers and asyncio's locks. Times in seconds from 0."""

    def __init__(self, on_error: Callable[[str, BaseException | None], None]) -> None:
        self.now = 0.0
        self.blocked = 0.0
        """How long a blocking port (the store's thread) held up what it hands over to the loop next."""
        self.on_birth: Callable[[Process], None] | None = None
        """Told of every program as it begins."""
        self._on_error = on_error
        self._ready: deque[Handle] = deque()
        self._timers: list[tuple[float, int, Handle]] = []
        self._order = 0
        self._last = -1.0
        self._timers_at_once = 0

    def step(self, until: float) -> bool:
        """Runs the next instant at which something happens; False if nothing does before `until`, where the clock then is."""
        timers, ready = self._timers, self._ready
        if not ready:
            while timers and timers[0][2].cancelled_:
                heapq.heappop(timers)
            if not timers or timers[0][0] > until:
                self.now = max(self.now, until)
                return False
            self.now = max(self.now, timers[0][0])
            while timers and timers[0][0] <= self.now:
                ready.append(heapq.heappop(timers)[2])
        before = self._order
        try:
            while ready:
                handle = ready.popleft()
                if not handle.cancelled_:
                    handle.context.run(handle.callback, *handle.args)
        except Exception as error:
            self._on_error("a callback failed", error)
            return False
        if self._order == before:
            return True
        self._timers_at_once = self._timers_at_once + 1 if self.now == self._last else 0
        self._last = self.now
        if self._timers_at_once > LIVELOCK:
            self._on_error(f"nothing but timers of this very instant for {LIVELOCK} rounds", None)
            return False
        return True

    def time(self) -> float:
        """Virtual monotonic seconds."""
        return self.now

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> Handle:
        """In this instant, after everything already due in it."""
        handle = Handle(callback, args, context, self.now)
        self._ready.append(handle)
        return handle

    def call_soon_threadsafe(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> Handle:
        """What another thread hands over: after the time that thread was held up."""
        return self.call_at(self.now + self.blocked, callback, *args, context=context)

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> Handle:
        """At `when`; equal times in the order of the calls."""
        handle = Handle(callback, args, context, when)
        self._order += 1
        heapq.heappush(self._timers, (when, self._order, handle))
        return handle

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> Handle:
        """`delay` seconds from now."""
        when = self.now + delay
        handle = Handle(callback, args, context, when)
        self._order += 1
        heapq.heappush(self._timers, (when, self._order, handle))
        return handle

    def create_future(self) -> asyncio.Future[Any]:
        """A future of this loop."""
        return asyncio.Future(loop=self)

    def create_task(  # type: ignore[override]
        self, coro: Coroutine[Any, Any, Any], *, name: str | None = None, context: Context | None = None
    ) -> asyncio.Task[Any]:
        """A task that belongs to the process whose code asked for it."""
        task = asyncio.Task(coro, loop=self, name=name, context=context)
        process = (context or {}).get(_PROCESS) if context is not None else _PROCESS.get()
        if process is not None:
            process.adopt(task)
        return task

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Nothing may fail unnoticed."""
        self._on_error(str(context.get("message")), context.get("exception"))

    def get_debug(self) -> bool:
        """False."""
        return False

    def is_running(self) -> bool:
        """True: nobody else runs it."""
        return True

    def is_closed(self) -> bool:
        """False."""
        return False


class Process:
    """A program: its tasks, and the number of calls it has made through its ports. `die_at` kills it at that call.

    Killing is final and leaves no room for manners: what its code does while its tasks unwind can reach nothing, because
    every port asks `point` first.
    """

    def __init__(self, loop: SimLoop, name: str, on_death: Callable[[str], None] = lambda _: None) -> None:
        self.loop = loop
        self.name = name
        self.alive = True
        self.tasks: dict[asyncio.Task[Any], None] = {}  # in the order of their beginning: a set's order is not the same twice
        self.points = 0
        self.die_at: int | None = None
        self.died_at_label = ""
        self.on_point: Callable[[str], object] | None = None
        self._on_death = on_death
        if loop.on_birth is not None:
            loop.on_birth(self)

    def spawn(self, work: Coroutine[Any, Any, Any], name: str = "") -> asyncio.Task[Any]:
        """Runs work as part of this program."""
        context = copy_context()
        context.run(_PROCESS.set, self)
        return self.loop.create_task(work, name=name or self.name, context=context)

    def adopt(self, task: asyncio.Task[Any]) -> None:
        """The task dies with this program."""
        self.tasks[task] = None
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        del self.tasks[task]
        error = None if task.cancelled() else task.exception()
        if error is not None and self.alive:
            self.loop.call_exception_handler({"message": f"task {task.get_name()} of {self.name} died", "exception": error})

    def point(self, label: str) -> None:
        """A port is about to be called or has been: the moments at which a crash makes a difference."""
        if not self.alive:
            raise asyncio.CancelledError
        self.points += 1
        if self.on_point is not None:
            self.on_point(label)
        if self.points == self.die_at:
            self.kill(label)
            raise asyncio.CancelledError

    def kill(self, label: str = "") -> None:
        """SIGKILL."""
        if not self.alive:
            return
        self.alive = False
        self.died_at_label = label
        for task in tuple(self.tasks):
            task.cancel()
        self._on_death(label)
