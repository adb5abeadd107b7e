"""Twelve classic mistakes, planted one at a time: the proof that the checks can fail.

Each is a patch of the production code the simulation runs, or, where the mistake is an agent's, of the agent's rules.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any
from unittest import mock

from agent.records import Terms
from reconciler import fleet as fleet_module
from reconciler.core.model import Change, Forget, Place, Unknown
from reconciler.fleet import Fleet, Report
from reconciler.loop import reconciler as reconciler_module
from reconciler.loop import timers, watchers
from reconciler.loop.intents import Intents
from reconciler.loop.workqueue import WorkQueue
from tests.sim.agent import Agent
from tests.sim.host import Host

Plant = Callable[[], AbstractContextManager[object]]


def _non_idempotent_create() -> AbstractContextManager[object]:
    create = Agent.create

    async def twice(self: Agent, request: Any, cluster: Any, term: int) -> Any:
        entry = self.entries.get(request.vm_id)
        if entry is not None and entry.record is not None and entry.record.complete and not entry.is_going:
            self.host.boot(entry.id)
        return await create(self, request, cluster, term)

    return mock.patch.object(Agent, "create", twice)


def _planning(instead: Callable[..., Any]) -> AbstractContextManager[object]:
    plan = reconciler_module.plan_vm

    def planned(intent: Any, seen: Any, *rest: Any) -> Any:
        return instead(intent, seen) or plan(intent, seen, *rest)

    return mock.patch.object(reconciler_module, "plan_vm", planned)


def _forgets_the_tombstone() -> AbstractContextManager[object]:
    return _planning(lambda intent, _: Forget() if intent.desired == "absent" else None)


def _reschedules_on_unknown() -> AbstractContextManager[object]:
    def elsewhere(intent: Any, seen: Any) -> Any:
        lost = intent.host_id is not None and isinstance(seen, Unknown) and seen.silent
        return Place() if lost and intent.desired == "running" else None

    return _planning(elsewhere)


def _observing(change: Callable[[Fleet, str, Report], Report]) -> AbstractContextManager[object]:
    observe = Fleet.observe

    def observed(self: Fleet, addr: str, report: Report, now: float) -> bool:
        return observe(self, addr, change(self, addr, report), now)

    return mock.patch.object(Fleet, "observe", observed)


def _trusts_an_incomplete_report() -> AbstractContextManager[object]:
    return _observing(lambda _fleet, _addr, report: replace(report, complete=True))


def _acts_on_a_stale_observation() -> AbstractContextManager[object]:
    return mock.patch.object(fleet_module._Touch, "is_covered_by", lambda _self, _report: True)


def _lower_term_accepted() -> AbstractContextManager[object]:
    return mock.patch.object(Terms, "check", lambda _self, _cluster, _term: None)


def _acts_before_commit() -> AbstractContextManager[object]:
    async def commit(self: Intents, change: Change) -> None:
        if change != Change():
            self._fleet.apply(change)
            await self._store.commit(change)

    return mock.patch.object(Intents, "_commit", commit)


@contextlib.contextmanager
def _gc_of_unknown_vms() -> Iterator[None]:
    begin = watchers.Watchers.__init__
    owners: dict[int, watchers.Watchers] = {}

    def remember(self: watchers.Watchers, fleet: Fleet, *rest: Any) -> None:
        owners[id(fleet)] = self
        begin(self, fleet, *rest)

    def collect(fleet: Fleet, addr: str, report: Report) -> Report:
        client = owners[id(fleet)].client(addr)
        for vm_id in report.vms:
            if vm_id not in fleet.vms and client is not None:
                asyncio.get_running_loop().create_task(client.destroy(vm_id))
        return report

    with mock.patch.object(watchers.Watchers, "__init__", remember), _observing(collect):
        yield


@contextlib.contextmanager
def _double_placement() -> Iterator[None]:
    nothing = mock.patch.object(Fleet, "reserve", lambda *_: None)
    with nothing, mock.patch.object(Fleet, "release", lambda *_: None):
        yield


def _lost_wake_up() -> AbstractContextManager[object]:
    def done(self: WorkQueue[Any], key: Any) -> None:
        self._processing.discard(key)
        self._dirty.discard(key)

    return mock.patch.object(WorkQueue, "done", done)


def _port_reused_too_early() -> AbstractContextManager[object]:
    lease = Host.lease

    def early(self: Host, request: Any, taken: Any, resting: Any) -> Any:
        going = [record.lease for record in self.records.values() if record.deleting]
        return lease(self, request, [held for held in taken if held not in going], ())

    return mock.patch.object(Host, "lease", early)


def _expiry_on_a_clock_jump() -> AbstractContextManager[object]:
    return mock.patch.object(timers, "clock_jumped", lambda *_: False)


PLANTED: dict[str, Plant] = {
    "non-idempotent create": _non_idempotent_create,
    "forgets the tombstone": _forgets_the_tombstone,
    "trusts an incomplete report": _trusts_an_incomplete_report,
    "reschedules on Unknown": _reschedules_on_unknown,
    "acts on a stale observation": _acts_on_a_stale_observation,
    "lower term accepted": _lower_term_accepted,
    "acts before commit": _acts_before_commit,
    "GC of unknown VMs": _gc_of_unknown_vms,
    "double placement": _double_placement,
    "lost wake-up": _lost_wake_up,
    "port reused too early": _port_reused_too_early,
    "expiry on a clock jump": _expiry_on_a_clock_jump,
}


def hunt(name: str, first: int, limit: int) -> tuple[int, str] | None:
    """Runs schedules with the mistake planted until one is caught: (how many it took, the violation), or None."""
    from tests.sim.world import run

    with PLANTED[name]():
        for number in range(limit):
            result = run(first + number)
            if result.violations:
                return number + 1, result.violations[0]
    return None
