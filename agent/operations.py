"""What goes on with one VM at a time: creation, power changes, removal, each in its own task under the VM's lock.

Called by the runtime. Decides what a failure or a crash half way means; how a step is done is the lifecycle's business.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from datetime import timedelta
from typing import Any

import structlog

from agent.entry import Entry
from agent.errors import AgentError, Conflict
from agent.inventory import Inventory
from agent.lifecycle import Lifecycle, as_agent_error
from agent.machine import Running
from agent.readiness import Watcher
from agent.records import Power, VmRecord

log = structlog.get_logger(__name__)


class Stopping(AgentError):
    """The agent is ending; what was begun goes on when it is back."""

    status, code = 503, "stopping"


class Operations:
    """Starts operations and lets several callers wait for the same one. `grace` is how long a guest may take to power down."""

    def __init__(self, inventory: Inventory, life: Lifecycle, grace: timedelta, watcher: Watcher) -> None:
        self._inventory = inventory
        self._life = life
        self._grace = grace
        self._watcher = watcher
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = False

    def create(self, entry: Entry, *, forget: bool) -> asyncio.Task[None]:
        """Begins, or after a restart continues, the creation; `forget` if a failure is told to the caller in person."""
        entry.creation = self._operate(entry, self._create(entry, forget=forget), "create")
        return entry.creation

    def set_power(self, entry: Entry, power: Power) -> asyncio.Task[None]:
        """Begins a stop or start, behind whatever is under way; the same one under way is joined."""
        if entry.power is None or entry.power[0] != power:
            is_running = isinstance(entry.seen, Running)
            if is_running != (power == "running") and not entry.step:
                self._inventory.note_step(entry, "starting" if power == "running" else "stopping")
            entry.power = (power, self._operate(entry, self._set_power(entry, power), power))
        return entry.power[1]

    async def remove(self, entry: Entry) -> None:
        """Removes all of the VM, breaking off what is under way. Raises what hindered it; the upkeep then tries again."""
        await self.join(self.begin_removal(entry), "the agent is ending")

    def begin_removal(self, entry: Entry) -> asyncio.Task[None]:
        """Begins the removal, or returns the one under way."""
        if entry.removal is None:
            entry.removal = self.spawn(self._remove(entry), f"remove {entry.id}")
        return entry.removal

    def resume(self, entry: Entry) -> None:
        """Takes up again what an earlier process or a failure left unfinished."""
        if entry.removal is not None or entry.tasks:
            return
        if entry.is_going:
            self.begin_removal(entry)
        elif entry.is_creating:
            self.create(entry, forget=False)

    def exited(self, entry: Entry) -> None:
        """The VM's process has ended: look how, as soon as nothing else is under way with it."""
        if not entry.look_wanted:
            entry.look_wanted = True
            self.spawn(self._look_again(entry), f"look {entry.id}")

    async def join(self, task: asyncio.Task[None], if_cancelled: str) -> None:
        """Waits for an operation without owning it; its error is raised, its being broken off as Conflict or Stopping."""
        await asyncio.wait([task])
        if task.cancelled() and self._closing:
            raise Stopping("the agent is stopping; ask again when it is back")
        if task.cancelled():
            raise Conflict(if_cancelled)
        error = task.exception()
        if error is not None:
            raise error

    async def until_recorded(self, entry: Entry, creation: asyncio.Task[None]) -> None:
        """Returns once the new VM would survive a crash; raises what the creation raised before that."""
        recorded = asyncio.ensure_future(entry.recorded.wait())
        await asyncio.wait([recorded, creation], return_when=asyncio.FIRST_COMPLETED)
        recorded.cancel()
        if not entry.recorded.is_set():
            await self.join(creation, f"VM {entry.id} was deleted while it was being created")

    async def look(self, entry: Entry) -> None:
        """Asks the engine how the VM is, has its guest probed if it newly runs, and shows that. The caller holds the lock."""
        await self._life.look(entry)
        if (probing := self._watcher.follow(entry)) is not None:
            entry.probing = self.spawn(probing, f"probe {entry.id}")
        self._inventory.publish(entry)

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Runs work of the runtime in the background, until `close` at the latest."""
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    async def close(self) -> None:
        """Breaks off everything under way, undoing nothing: records say where to go on."""
        self._closing = True
        while self._tasks:
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(tuple(self._tasks))

    def _operate(self, entry: Entry, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = self.spawn(work, f"{name} {entry.id}")
        entry.tasks.add(task)
        task.add_done_callback(entry.tasks.discard)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, AgentError):
            log.error("task_failed", task=task.get_name(), exc_info=error)

    async def _create(self, entry: Entry, *, forget: bool) -> None:
        try:
            async with entry.lock:
                await self._life.build(entry)
                entry.step = ""
                await self.look(entry)
        except Exception as error:
            verdict = self._known(error, f"creating VM {entry.id}")
            log.warning("create_failed", vm_id=entry.id, step=entry.step, why=verdict.message)
            await self._undo(entry, verdict, forget=forget)
            raise verdict from error
        log.info("vm_created", vm_id=entry.id, image=entry.request and entry.request.image, engine=entry.engine)

    async def _undo(self, entry: Entry, verdict: AgentError, *, forget: bool) -> None:
        entry.verdict = verdict
        async with entry.lock:
            if await self._dismantle(entry):
                self._inventory.drop(entry, remember=not forget)

    async def _set_power(self, entry: Entry, power: Power) -> None:
        try:
            async with entry.lock:
                await self._change_power(entry, power)
        finally:
            if entry.power is not None and entry.power[1] is asyncio.current_task():
                entry.power = None

    async def _change_power(self, entry: Entry, power: Power) -> None:
        if entry.record is None or entry.is_going:
            raise Conflict(f"VM {entry.id} is being deleted")
        failure: AgentError | None = None
        try:
            if entry.record.power != power:
                await self._record_power(entry, entry.record.model_copy(update={"power": power}))
            if power == "stopped":
                await self._life.halt(entry, self._grace)
            else:
                await self._life.boot(entry)
        except Exception as error:
            failure = self._known(error, f"{'stopping' if power == 'stopped' else 'starting'} VM {entry.id}")
            failure.__cause__ = error if failure is not error else None
        entry.start_error = failure.message if failure and power == "running" else ""
        entry.step = ""
        await self.look(entry)
        if failure:
            log.warning("power_failed", vm_id=entry.id, power=power, why=failure.message)
            raise failure
        log.info("power_set", vm_id=entry.id, power=power)

    async def _record_power(self, entry: Entry, record: VmRecord) -> None:
        try:
            await self._life.save(entry, record)
        except AgentError as error:
            if record.power == "running":
                raise
            # A full disk must not keep a VM running: after a restart it reads as one that ended by itself, and stays off too.
            log.warning("stop_not_recorded", vm_id=entry.id, why=error.message)
            entry.record = record

    async def _remove(self, entry: Entry) -> None:
        try:
            if entry.tasks:
                for task in entry.tasks:
                    task.cancel()
                await asyncio.wait(tuple(entry.tasks))
            async with entry.lock:
                if self._inventory.entries.get(entry.id) is not entry:
                    return  # a failing creation removed it itself while this waited for the lock
                if not entry.is_memory and not await self._dismantle(entry):
                    raise AgentError(f"VM {entry.id} could not be removed: {entry.removal_error}")
                self._inventory.drop(entry, remember=entry.verdict is not None and not entry.is_memory)
                log.info("vm_removed", vm_id=entry.id)
        finally:
            entry.removal = None

    async def _dismantle(self, entry: Entry) -> bool:
        """Whether everything is gone. If not, `removal_error` says why, and address and ports stay reserved."""
        self._inventory.note_step(entry, "deleting")
        self._watcher.forget(entry)
        try:
            if entry.record is not None and not entry.record.deleting and entry.recorded.is_set():
                await self._life.save(entry, entry.record.model_copy(update={"deleting": True}))
        except AgentError as error:
            # On a full disk a removal is what helps; it only would not be taken up by itself after a crash.
            log.warning("removal_not_recorded", vm_id=entry.id, why=error.message)
        try:
            await self._life.dismantle(entry)
        except Exception as error:
            entry.removal_error = self._known(error, f"removing VM {entry.id}").message
            log.error("removal_failed", vm_id=entry.id, why=entry.removal_error)
            self._inventory.note_step(entry, "")
            return False
        return True

    async def _look_again(self, entry: Entry) -> None:
        async with entry.lock:
            entry.look_wanted = False  # an exit from here on asks for another look
            if entry.record is not None and entry.record.complete:
                await self.look(entry)

    @staticmethod
    def _known(error: Exception, tried: str) -> AgentError:
        if not isinstance(error, AgentError | OSError):
            log.error("driver_failed_unexpectedly", tried=tried, exc_info=error)
        return as_agent_error(error, tried)
