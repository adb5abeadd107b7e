"""Moves VMs to other hosts: away from one that refuses them, and from one that is being drained.

Called by the reconciler for a refused VM and by a timer for drains. What moves is decided by core.move.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable

import structlog

from reconciler.core.expand import recreate
from reconciler.core.explain import ACCEPTED
from reconciler.core.model import Change, EnvIntent, Retry, VmIntent
from reconciler.core.move import REFUSAL_KEPT, DrainStep, drain_step, elsewhere, is_refused
from reconciler.core.place import Placement, Unplaceable
from reconciler.fleet import DrainProgress, Fleet, HostState, VmStatus
from reconciler.loop.backoff import backoff
from reconciler.loop.clock import Clock
from reconciler.loop.notes import note_replaced
from reconciler.store.database import Database, StoreUnavailable
from specs.names import EnvId, HostId, VmId

log = structlog.get_logger()

DRAIN_EVERY = 1.0  # seconds


class Moves:
    """Retires VMs and places their successors in one commit each."""

    def __init__(
        self,
        fleet: Fleet,
        store: Database,
        env_locks: defaultdict[EnvId, asyncio.Lock],
        new_vm_id: Callable[[], VmId],
        clock: Clock,
    ) -> None:
        self._fleet = fleet
        self._store = store
        self._env_locks = env_locks
        self._new_vm_id = new_vm_id
        self._clock = clock

    async def relocate(self, intent: VmIntent) -> Unplaceable | None:
        """Makes a VM that its host refuses anew on another one; returns why no other can take it.

        None if it has been moved, or there is no reason to any more.
        """
        fleet = self._fleet
        async with self._env_locks[intent.env_id]:
            vm, env = fleet.vms.get(intent.id), fleet.envs.get(intent.env_id)
            status = fleet.status.get(intent.id)
            if vm is None or env is None or env.deleting or status is None:
                return None
            if not is_refused(vm, fleet.seen(vm), status.retry):
                return None
            now = self._clock.monotonic()
            refused_by = {host: until for host, until in status.retry.refused_by if until > now}
            decision = elsewhere(vm, fleet.rooms(), refused_by)
            if isinstance(decision, Unplaceable):
                return decision
            attempts = max(status.retry.attempts, 1)
            # The successor takes over the patience: a VM that many hosts refuse must not wander ever faster.
            refused_by[HostId(vm.host_id or "")] = now + REFUSAL_KEPT
            retry = Retry(attempts, now + backoff(attempts), refused_by=tuple(refused_by.items()))
            await self._move(env, vm, decision, f"host {vm.host_id} refuses it", retry)
            return None

    async def drain(self, host: HostState) -> None:
        """Moves what can move now from a host that is being drained, and records how far it is. Raises StoreUnavailable."""
        host_id = host.intent.id
        steps: list[DrainStep] = []
        for env_id in sorted({vm.env_id for vm in self._on(host_id) if vm.desired != "absent"}):
            async with self._env_locks[env_id]:
                env = self._fleet.envs.get(env_id)
                if host_id is None or host.intent.drain_total is None or env is None or env.deleting:
                    continue
                step = self._step(env, host, host_id)
                for vm, target in step.moves:
                    await self._move(env, vm, Placement(target), f"host {host_id} is being drained")
                steps.append(step)
        self._note_progress(host, steps)

    def _on(self, host_id: HostId | None) -> list[VmIntent]:
        return self._fleet.host_vms(host_id) if host_id else []

    def _step(self, env: EnvIntent, host: HostState, host_id: HostId) -> DrainStep:
        fleet = self._fleet
        live = [vm for vm in fleet.env_vms(env.id) if vm.desired != "absent"]
        settled = {vm.id for vm in live if fleet.status[vm.id].settled}
        stuck = {vm.id for vm in live if _needs_help(fleet.status[vm.id])} - settled
        silent = "" if host.online and host.report else f"host {host_id} is offline, and what runs there cannot be stopped"
        return drain_step(live, host_id, fleet.rooms(), settled=settled, stuck=stuck, silent=silent)

    async def _move(self, env: EnvIntent, vm: VmIntent, to: Placement, why: str, retry: Retry | None = None) -> None:
        """Commits the retirement and the placed successor together. The caller holds the environment's lock."""
        rows = recreate(env, [vm], self._new_vm_id, int(self._clock.wall()))
        new = rows[-1]
        placed = ((new.id, to.host_id),) if new.desired == "running" else ()
        if placed:
            self._fleet.reserve(new, to.host_id)
        try:
            change = Change(vms=rows, placed=placed)
            await self._store.commit(change)
        except BaseException:
            self._fleet.release(new.id)
            raise
        self._fleet.apply(change)
        if retry is not None:
            self._fleet.set_status(new.id, VmStatus(retry=retry))
        note_replaced(self._fleet, rows, why)
        if placed:
            self._fleet.note("Placed", f"placed on host {to.host_id}", vm=new, host=to.host_id)
        log.info("vm moves", vm=vm.id, successor=new.id, env=env.id, host=vm.host_id, to=to.host_id, why=why)

    def _note_progress(self, host: HostState, steps: list[DrainStep]) -> None:
        if host.intent.drain_total is None:
            return
        bound = self._on(host.intent.id)
        blocked = tuple((vm.id, why) for step in steps for vm, why in step.blocked)
        progress = DrainProgress(len(bound), sum(vm.desired == "absent" for vm in bound), blocked)
        before = dict(host.drain.blocked) if host.drain else {}
        for vm_id, why in blocked:
            if before.get(vm_id) != why:
                self._fleet.note("DrainBlocked", why, vm=self._fleet.vms[vm_id], news=True)
        if progress.left == 0 and self._is_news(host):
            self._fleet.note("Drained", f"nothing of ours is left on host {host.shown_id}", host=host.shown_id)
        self._fleet.set_drain(host.intent.addr, progress)

    def _is_news(self, host: HostState) -> bool:
        if host.drain is not None:
            return host.drain.left > 0
        # A controller that has just started finds the host drained by the one before it.
        told = [event.reason for event in self._fleet.events if event.host == host.shown_id]
        return [reason for reason in told if reason in ("Draining", "Drained")][-1:] != ["Drained"]


def _needs_help(status: VmStatus) -> bool:
    return status.phase in ("pending", "degraded") and status.message != ACCEPTED


async def drain_forever(fleet: Fleet, moves: Moves) -> None:
    """Goes on with every drain, until it is taken back or the host is removed."""
    while True:
        await asyncio.sleep(DRAIN_EVERY)
        for host in list(fleet.hosts.values()):
            if host.intent.drain_total is None:
                continue
            try:
                await moves.drain(host)
            except StoreUnavailable as error:
                log.warning("drain waits for the store", host=host.shown_id, error=str(error))
