"""Takes VM ids from the queue, asks the core for the next step, and carries it out. The queue owns every retry."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace

import structlog

from reconciler.agents import AgentClient, AgentFailure, Refused, Reply
from reconciler.core.expand import expand
from reconciler.core.model import (
    Call,
    Change,
    Create,
    Destroy,
    Done,
    Forget,
    Observation,
    Place,
    Present,
    Retry,
    Start,
    Step,
    Stop,
    VmIntent,
    Wait,
)
from reconciler.core.move import REFUSAL_KEPT, is_refused, means_elsewhere
from reconciler.core.place import Unplaceable
from reconciler.core.plan import plan_vm
from reconciler.fleet import NEW, Fleet, HostState
from reconciler.loop.backoff import backoff
from reconciler.loop.clock import Clock
from reconciler.loop.moves import Moves
from reconciler.loop.notes import note_replaced
from reconciler.loop.workqueue import WorkQueue
from reconciler.store.database import Database, StoreUnavailable
from specs.names import EnvId, HostId, VmId
from specs.wire import CreateVmReq

log = structlog.get_logger()

CALLS_PER_HOST = 16  # in flight, at most
QUICK_CALLS_PER_HOST = 4  # of those, calls that are answered once recorded: each in flight is one more connection to open
STABLE_AFTER = 30.0  # seconds a VM must run before an earlier failure no longer delays its next restart


class Reconciler:
    """Works on VM ids, many at once, each by one task at a time."""

    def __init__(
        self,
        fleet: Fleet,
        store: Database,
        client: Callable[[str], AgentClient | None],
        new_vm_id: Callable[[], VmId],
        clock: Clock,
    ) -> None:
        self.fleet = fleet
        self.store = store
        self.queue: WorkQueue[VmId] = WorkQueue()
        self.calls = 0  # mutating calls made
        self._client = client
        self._new_vm_id = new_vm_id
        self._clock = clock
        self._quick_slots: defaultdict[str, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(QUICK_CALLS_PER_HOST))
        self._slots: defaultdict[str, asyncio.Semaphore] = defaultdict(
            lambda: asyncio.Semaphore(CALLS_PER_HOST - QUICK_CALLS_PER_HOST)
        )
        self.env_locks: defaultdict[EnvId, asyncio.Lock] = defaultdict(asyncio.Lock)
        self.moves = Moves(fleet, store, self.env_locks, new_vm_id, clock)
        self._burials: dict[VmId, Retry] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Works until cancelled."""
        try:
            while True:
                vm_id = await self.queue.get()
                task = asyncio.create_task(self._work(vm_id))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
        finally:
            self.queue.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _work(self, vm_id: VmId) -> None:
        try:
            await self._reconcile(vm_id)
        except StoreUnavailable as error:
            self._fail(vm_id, str(error))
        except Exception:
            log.exception("reconcile failed", vm=vm_id)
            self._fail(vm_id, "internal error, see the controller's log")
        finally:
            self.queue.done(vm_id)

    async def _reconcile(self, vm_id: VmId) -> None:
        intent = self.fleet.vms.get(vm_id)
        if intent is None:
            return
        if intent.gone_at:
            await self._bury_again(intent)
            await self._go_on(intent.env_id)
            return
        self.queue.forget_timer(vm_id)
        there = self.fleet.holder(vm_id) if intent.host_id is None else None
        if there is not None:
            await self._bind(intent, there)
            return
        seen = self.fleet.seen(intent)
        if isinstance(seen, Present) and seen.state == "failed" and seen.message and intent.desired != "absent":
            self.fleet.note("Failed", f"on host {intent.host_id}: {seen.message}", vm=intent, news=True)
        stranded = None
        if is_refused(intent, seen, self.fleet.status.get(vm_id, NEW).retry):
            stranded = await self.moves.relocate(intent)
            if self.fleet.vms.get(vm_id) != intent:
                return  # it has been moved, and the change has woken it
            seen = self.fleet.seen(intent)
        step = self._plan(intent, seen)
        if stranded is not None and isinstance(step, Wait):
            step = replace(step, why=f"{step.why}; no other host can take it: {stranded.sentence()}")
        match step:
            case Place():
                await self._place(intent)
            case Create() | Start() | Stop() | Destroy():
                await self._call_host(intent)
            case Wait():
                self._note_wait(intent, step)
            case Done():
                await self._settle(intent, step)
            case Forget():
                await self._forget(intent)

    def _plan(self, intent: VmIntent, seen: Observation) -> Step:
        retry = self.fleet.status.get(intent.id, NEW).retry
        return plan_vm(intent, seen, retry, self.fleet.cluster, self._clock.monotonic())

    # ---- the steps

    async def _place(self, intent: VmIntent) -> None:
        decision = self.fleet.place(intent.env_id, intent.spec)
        if isinstance(decision, Unplaceable):
            message = f"waiting for a host: {decision.sentence()}"
            if self.fleet.status[intent.id].message != message:
                self.fleet.note("Unplaceable", message, vm=intent)
            self._set(intent.id, phase="pending", message=message, next_at=None)
            return
        await self._bind(intent, decision.host_id)

    async def _bind(self, intent: VmIntent, host_id: HostId) -> None:
        self.fleet.reserve(intent, host_id)
        try:
            change = Change(placed=((intent.id, host_id),))
            await self.store.commit(change)
        except BaseException:
            self.fleet.release(intent.id)
            raise
        self.fleet.apply(change)  # wakes the VM for its create
        self.fleet.note("Placed", f"placed on host {host_id}", vm=intent, host=host_id)
        self._set(intent.id, phase="progressing", message=f"placed on host {host_id}", next_at=None)

    async def _call_host(self, intent: VmIntent) -> None:
        host = self.fleet.host(intent.host_id or "")
        client = self._client(host.intent.addr) if host else None
        if host is None or client is None:
            return
        # A removal is answered only when nothing is left, and a plain agent answers every call like that.
        is_quick = bool(host.info and host.info.boot_id) and intent.desired != "absent"
        async with (self._quick_slots if is_quick else self._slots)[host.intent.addr]:
            fresh = self.fleet.vms.get(intent.id)
            step = self._plan(fresh, self.fleet.seen(fresh)) if fresh and not fresh.gone_at else None
            if fresh is None or not isinstance(step, Call):
                self.queue.add(intent.id)  # things changed while it waited for a free slot
                return
            await self._call(client, host, fresh, step)

    async def _call(self, client: AgentClient, host: HostState, intent: VmIntent, step: Call) -> None:
        verb = type(step).__name__.lower()
        status = self.fleet.status.get(intent.id, NEW)
        attempts = status.retry.attempts + 1
        phase = "terminating" if isinstance(step, Destroy) else "progressing"
        self._set(intent.id, phase=phase, message=f"asking host {host.shown_id} to {verb} it", settled=False, tried=verb)
        self.calls += 1
        try:
            reply = await self._send(client, host, intent, step)
        except AgentFailure as error:
            answered = isinstance(error, Refused)
            log.warning("call failed", call=verb, vm=intent.id, host=host.shown_id, attempts=attempts, error=str(error))
            if not answered:
                # It may have taken effect: only a later report can say.
                self.fleet.observe_reply(host.intent.addr, intent.id, host.vms.get(intent.id), "", 0)
            prefix = f"{verb} on host {host.shown_id} failed"
            refused = isinstance(step, Create) and isinstance(error, Refused) and means_elsewhere(error.status, error.code)
            self._fail(intent.id, f"{prefix}: {error}" if answered else f"{prefix}, no answer: {error}", refused=refused)
            return
        log.info("call made", call=verb, vm=intent.id, host=host.shown_id, env=intent.env_id)
        self._note_call(intent, step)
        self.fleet.observe_reply(host.intent.addr, intent.id, reply.vm, reply.boot_id, reply.seq)
        not_before = self._clock.monotonic() + backoff(attempts)
        self._set(intent.id, retry=Retry(attempts, not_before, refused_by=status.retry.refused_by), next_at=None)
        self.queue.add(intent.id)

    def _note_call(self, intent: VmIntent, step: Call) -> None:
        seen = self.fleet.seen(intent)
        if isinstance(step, Create):
            self.fleet.note("Creating", f"host {intent.host_id} creates it", vm=intent)
        elif isinstance(step, Start) and isinstance(seen, Present) and seen.reason:
            why = f"{seen.reason}: {seen.message}" if seen.message else seen.reason
            self.fleet.note("Restarted", f"started again on host {intent.host_id} ({why})", vm=intent)

    async def _send(self, client: AgentClient, host: HostState, intent: VmIntent, step: Call) -> Reply:
        match step:
            case Create():
                return await client.create(_create_request(intent, ours=bool(host.info and host.info.boot_id)))
            case Start():
                return await client.start(intent.id)
            case Stop():
                return await client.stop(intent.id)
            case Destroy():
                return await client.destroy(intent.id)

    def _note_wait(self, intent: VmIntent, step: Wait) -> None:
        self._set(intent.id, phase=step.phase, message=step.why, next_at=step.until, settled=False)
        if step.until is not None:
            self.queue.add_at(intent.id, step.until)

    async def _settle(self, intent: VmIntent, step: Done) -> None:
        status = self.fleet.status.get(intent.id, NEW)
        now = self._clock.monotonic()
        since = status.settled_at if status.settled and status.phase == step.phase else now
        retry = status.retry
        if retry.attempts and now >= since + STABLE_AFTER:  # the very sum the timer gets: a rounded difference would spin
            retry = Retry()
        elif retry.attempts:
            self.queue.add_at(intent.id, since + STABLE_AFTER)
        self._set(intent.id, phase=step.phase, message=step.message, next_at=None, settled=True, settled_at=since, retry=retry)
        if not status.settled or status.phase != step.phase:
            self._note_settled(intent, step)
        if not status.settled:
            await self.roll(intent.env_id)

    def _note_settled(self, intent: VmIntent, step: Done) -> None:
        match step.phase:
            case "ready":
                self.fleet.note("Running", f"runs on host {intent.host_id}", vm=intent, news=True)
            case "stopped":
                self.fleet.note("Stopped", step.message or f"stopped on host {intent.host_id}", vm=intent, news=True)
            case _:
                self.fleet.note("Failed", step.message, vm=intent, news=True)

    async def _forget(self, intent: VmIntent) -> None:
        change = Change(gone=((intent.id, int(self._clock.wall())),))
        await self.store.commit(change)
        self.fleet.apply(change)
        where = f"host {intent.host_id} confirms that nothing of it is left" if intent.host_id else "it had no host"
        self.fleet.note("Deleted", where, vm=intent)
        log.info("vm gone", vm=intent.id, host=intent.host_id, env=intent.env_id)
        await self._go_on(intent.env_id)

    async def _go_on(self, env_id: EnvId) -> None:
        """What the end of a VM lets its environment do next."""
        await self._drop_if_empty(env_id)
        await self.roll(env_id)

    async def _bury_again(self, intent: VmIntent) -> None:
        """A VM whose tombstone has ended is back, by a create that was long under way: it is destroyed once more."""
        host = self.fleet.host(intent.host_id or "")
        client = self._client(host.intent.addr) if host else None
        if host is None or client is None or not isinstance(self.fleet.seen(intent), Present):
            self._burials.pop(intent.id, None)
            return
        retry = self._burials.get(intent.id, Retry())
        if self._clock.monotonic() < retry.not_before:
            self.queue.add_at(intent.id, retry.not_before)
            return
        self.calls += 1
        try:
            reply = await client.destroy(intent.id)
        except AgentFailure as error:
            log.warning("call failed", call="destroy", vm=intent.id, host=host.shown_id, error=str(error))
            attempts = retry.attempts + 1
            self._burials[intent.id] = Retry(attempts, self._clock.monotonic() + backoff(attempts + 2))
            self.queue.add_at(intent.id, self._burials[intent.id].not_before)
            return
        self.fleet.observe_reply(host.intent.addr, intent.id, reply.vm, reply.boot_id, reply.seq)

    # ---- environments

    async def roll(self, env_id: EnvId) -> None:
        """Goes on with a roll-out: replaces the next outdated VM once the last replaced one is settled."""
        env = self.fleet.envs.get(env_id)
        if env is None or env.deleting or env.rolled == env.generation:
            return
        async with self.env_locks[env_id]:
            env = self.fleet.envs.get(env_id)
            if env is None or env.deleting or env.rolled == env.generation:
                return
            live = [vm for vm in self.fleet.env_vms(env_id) if vm.desired != "absent"]
            settled = {vm.id for vm in live if self.fleet.status[vm.id].settled}
            plan = expand(env, live, self._new_vm_id, int(self._clock.wall()), settled=settled)
            if not plan.put and plan.pending:
                return
            rolled = env if plan.pending else replace(env, rolled=env.generation)
            change = Change(envs=(rolled,) if rolled != env else (), vms=plan.put)
            await self.store.commit(change)
            self.fleet.apply(change)
            note_replaced(self.fleet, plan.put, f"generation {env.generation} asks for another machine")

    async def resume(self, env_id: EnvId) -> None:
        """Finishes what an earlier process had begun with an environment; called once at the start."""
        try:
            await self._go_on(env_id)
        except StoreUnavailable as error:
            log.warning("resume waits for the store", env=env_id, error=str(error))

    async def _drop_if_empty(self, env_id: EnvId) -> None:
        env = self.fleet.envs.get(env_id)
        if env is None or not env.deleting:
            return
        async with self.env_locks[env_id]:
            env = self.fleet.envs.get(env_id)
            if env is None or not env.deleting or self.fleet.env_vms(env_id):
                return
            change = Change(drop_envs=(env_id,))
            await self.store.commit(change)
            self.fleet.apply(change)
            self.fleet.note("Deleted", f"nothing of environment {env_id} is left", env=env_id)
            log.info("environment gone", env=env_id)

    # ---- status

    def _fail(self, vm_id: VmId, error: str, *, refused: bool = False) -> None:
        status = self.fleet.status.get(vm_id)
        intent = self.fleet.vms.get(vm_id)
        if intent is None:
            return
        if status is None:  # it is gone, and what its environment does next could not be recorded
            self.queue.add_at(vm_id, self._clock.monotonic() + backoff(1))
            return
        attempts = status.retry.attempts + 1
        now = self._clock.monotonic()
        until = now + backoff(attempts)
        phase = "terminating" if intent.desired == "absent" else "degraded"
        refused_by = tuple((host, kept) for host, kept in status.retry.refused_by if kept > now and host != intent.host_id)
        if refused and intent.host_id:
            refused_by += ((intent.host_id, now + REFUSAL_KEPT),)
        retry = Retry(attempts, until, error, refused, refused_by)
        self.fleet.note("Refused" if refused else "Failed", error, vm=intent)
        self._set(vm_id, phase=phase, message=error, retry=retry, next_at=until, settled=False)
        self.queue.add_at(vm_id, until)
        if refused:
            self.queue.add(vm_id)  # another host may take it at once

    def _set(self, vm_id: VmId, **fields: object) -> None:
        status = self.fleet.status.get(vm_id)
        if status is None:
            return
        if fields.get("settled", status.settled):
            fields |= {"since": None, "tried": ""}
        elif status.since is None:
            fields["since"] = self._clock.monotonic()
        self.fleet.set_status(vm_id, replace(status, **fields))  # type: ignore[arg-type]  # names are checked by the tests


def _create_request(intent: VmIntent, *, ours: bool) -> CreateVmReq:
    """What the agent is asked for. A plain agent gets the reference's fields alone."""
    spec = intent.spec
    return CreateVmReq(
        vm_id=intent.id,
        env_id=intent.env_id,
        image=spec.image,
        engine=spec.engine,
        cpu=spec.cpu,
        mem=spec.mem,
        disk=spec.disk,
        ports=spec.all_ports,
        deny_outgoing=spec.deny_outgoing,
        ssh_keys=spec.ssh_keys,
        name=intent.name if ours else None,
        user_data=spec.user_data,
        spec_hash=intent.spec_hash if ours else "",
        ready=spec.ready if ours else None,
    )
