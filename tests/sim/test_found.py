"""What the simulation has found in the production code, each as its smallest case."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import pytest

from reconciler.agents import AgentClient, Refused
from reconciler.core.model import Change, Done, EnvIntent, HostIntent, Retry, VmIntent
from reconciler.events import EventLog
from reconciler.fleet import Fleet, Report
from reconciler.loop.clock import Clock
from reconciler.loop.intents import Clash, Intents
from reconciler.loop.quarantine import Quarantine
from reconciler.loop.reconciler import STABLE_AFTER, Reconciler
from reconciler.loop.watchers import Watchers
from reconciler.store.database import Database, StoreUnavailable
from specs.desired import EnvSpec, VmSpec
from specs.names import ClusterId, EnvId, HostId, VmId
from specs.wire import AgentInfo, AgentVm, Resource
from tests.core.worlds import env_intent, vm_intent
from tests.sim.world import run

ADDR = "10.0.0.1:9100"
HOST = HostId("h1")
VM = VmId("vm-1")
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIBJbDrk6WHYGFqkzL1M2t3gYKEcvXYo6ZS1lnzFDpq8J me@here"


class StoppedClock(Clock):
    """Shows what it is set to."""

    def __init__(self) -> None:
        self.now = 0.0

    def wall(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now


class Store:
    """Commits when it is let."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.refuses: Callable[[Change], bool] = lambda _: False

    async def commit(self, change: Change) -> None:
        await self.gate.wait()
        if self.refuses(change):
            raise StoreUnavailable("locked")


def _vm(state: str, reason: str = "") -> AgentVm:
    return AgentVm.model_validate(
        {
            "id": VM,
            "env_id": "web",
            "image": "tiny",
            "engine": "qemu",
            "cpu": 1,
            "mem": 1,
            "disk": 1,
            "state": state,
            "reason": reason,
        }
    )


def _fleet(*vms: VmIntent, env: EnvIntent | None = None) -> Fleet:
    fleet = Fleet(ClusterId("here"))
    spec = EnvSpec(id="web", ssh_keys=(KEY,), vms=(VmSpec(image="tiny"),))
    fleet.apply(Change(envs=(env or env_intent(spec),), vms=vms, hosts=(HostIntent(ADDR, HOST, 1),)))
    resource = Resource(cpu_total=8, mem_total=9000, disk_total=90_000)
    info = AgentInfo.model_validate({"host_id": HOST, "resource": resource, "engines": ("qemu",), "storage": "file"})
    fleet.observe_info(ADDR, info, 0.0)
    return fleet


def _report(fleet: Fleet, vm: AgentVm | None, boot_id: str, seq: int) -> None:
    fleet.observe(ADDR, Report({VM: vm} if vm else {}, fleet.tick(), boot_id, seq), 0.0)


def _loop(fleet: Fleet, store: Store, clock: Clock) -> tuple[Reconciler, Intents]:
    new_id: Callable[[], VmId] = lambda: VmId("vm-new")  # noqa: E731
    database = cast(Database, store)
    reconciler = Reconciler(fleet, database, lambda _: None, new_id, clock)
    return reconciler, Intents(fleet, database, reconciler, new_id, clock)


def test_a_reply_overtaken_by_a_newer_report_changes_nothing() -> None:
    fleet = _fleet(vm_intent(desired="stopped"))
    _report(fleet, _vm("stopped"), "b1", 7)
    fleet.observe_reply(ADDR, VM, _vm("running"), "b1", 6)
    assert fleet.hosts[ADDR].vms == {VM: _vm("stopped")}
    assert fleet.hosts[ADDR].touched == {}


def test_a_reply_of_an_agent_process_that_has_ended_changes_nothing() -> None:
    fleet = _fleet(vm_intent())
    _report(fleet, _vm("running"), "b1", 7)
    fleet.lost(ADDR, "agent restarts", 0.0)
    fleet.observe_info(ADDR, cast(AgentInfo, fleet.hosts[ADDR].info), 0.0)
    _report(fleet, _vm("stopped", "crashed"), "b2", 2)
    fleet.observe_reply(ADDR, VM, _vm("running"), "b1", 9)
    assert fleet.hosts[ADDR].vms == {VM: _vm("stopped", "crashed")}
    assert fleet.hosts[ADDR].touched == {}


def test_a_reply_is_taken_over_while_the_report_is_older_than_an_earlier_call() -> None:
    fleet = _fleet(vm_intent())
    _report(fleet, _vm("stopped"), "b1", 7)
    fleet.observe_reply(ADDR, VM, _vm("stopped"), "", 0)  # a call without an answer: what is known is in doubt
    fleet.observe_reply(ADDR, VM, _vm("running"), "b1", 7)
    assert fleet.hosts[ADDR].vms == {VM: _vm("running")}


@pytest.mark.parametrize("changes", [{"desired": "stopped"}, {"desired": "absent"}])
def test_room_stays_reserved_while_a_placement_is_on_its_way_whatever_people_change(changes: dict[str, Any]) -> None:
    waiting = vm_intent(host=None)
    fleet = _fleet(waiting)
    fleet.reserve(waiting, HOST)
    fleet.apply(Change(vms=(replace(waiting, **changes),)))
    assert fleet.load(HOST).count == 1
    fleet.apply(Change(placed=((VM, HOST),)))
    assert fleet.load(HOST).count == 1
    fleet.apply(Change(gone=((VM, 5),)))
    assert (fleet.load(HOST).count, fleet.load(HOST).cpu) == (0, 0)


async def test_an_environment_extended_while_its_expiry_waits_does_not_expire() -> None:
    spec = EnvSpec(id="web", ssh_keys=(KEY,), vms=(VmSpec(image="tiny"),))
    fleet = _fleet(vm_intent(), env=env_intent(spec, expires_at=10))
    store, clock = Store(), StoppedClock()
    clock.now = 20.0
    _, intents = _loop(fleet, store, clock)
    store.gate.clear()
    extension = asyncio.create_task(intents.extend("web", 3600))
    expiry = asyncio.create_task(intents.expire_env("web"))
    await asyncio.sleep(0)
    store.gate.set()
    await asyncio.gather(extension, expiry)
    assert (fleet.envs[EnvId("web")].deleting, fleet.envs[EnvId("web")].expires_at) == (False, 3620)


async def test_a_vm_stable_for_long_enough_is_forgiven_at_the_very_time_its_timer_was_set_to() -> None:
    fleet = _fleet(vm_intent())
    clock = StoppedClock()
    reconciler, _ = _loop(fleet, Store(), clock)
    since = next(n / 10 for n in range(1, 10_000) if (n / 10 + STABLE_AFTER) - n / 10 < STABLE_AFTER)
    status = replace(fleet.status[VM], phase="ready", settled=True, settled_at=since, retry=Retry(attempts=3))
    fleet.set_status(VM, status)
    clock.now = since + STABLE_AFTER
    await reconciler._settle(fleet.vms[VM], Done("ready"))
    reconciler.queue.close()
    assert fleet.status[VM].retry == Retry()


def test_vms_of_a_host_come_in_the_order_they_were_placed() -> None:
    names = [VmId(f"vm-{number}") for number in range(20)]
    fleet = _fleet(*(vm_intent(id=name, name=name) for name in names))
    assert [vm.id for vm in fleet.host_vms(HOST)] == names


def test_a_fleet_writes_into_the_log_of_events_it_is_given_even_while_that_is_empty() -> None:
    events = EventLog(lambda: 7.0, term=2)
    Fleet(ClusterId("here"), events=events).note("Recorded", "as asked", env="web")
    (event,) = events
    assert (event.env, event.first_seen) == ("web", 7)


@pytest.mark.parametrize("desired", ["running", "stopped", "absent"])
async def test_a_vm_that_a_host_shows_is_bound_to_that_host_where_an_older_store_records_none(desired: Any) -> None:
    fleet = _fleet(vm_intent(host=None, desired=desired))
    _report(fleet, _vm("running"), "b1", 7)
    reconciler, _ = _loop(fleet, Store(), StoppedClock())
    await reconciler._reconcile(VM)
    reconciler.queue.close()
    assert (fleet.vms[VM].host_id, fleet.vms[VM].gone_at, fleet.load(HOST).count) == (HOST, 0, 1)


def test_a_second_copy_of_a_vm_on_a_host_it_is_not_bound_to_is_shown_and_takes_room() -> None:
    fleet = _fleet(vm_intent(host="h2"))
    _report(fleet, _vm("running"), "b1", 7)
    assert [vm.id for vm in fleet.strangers(fleet.hosts[ADDR])] == [VM]
    assert [room.cpu_used for room in fleet.rooms()] == [1]


async def test_a_host_that_refuses_to_bury_a_vm_again_is_not_asked_at_every_report() -> None:
    fleet = _fleet(vm_intent(desired="absent", gone_at=5))
    _report(fleet, _vm("running"), "b1", 7)
    reconciler, _ = _loop(fleet, Store(), StoppedClock())
    reconciler._client = lambda _: cast(AgentClient, Refusing())
    for _ in range(3):
        await reconciler._reconcile(VM)
    reconciler.queue.close()
    assert reconciler.calls == 1


class Refusing:
    """A client whose term is over."""

    async def destroy(self, _vm_id: VmId) -> None:
        raise Refused(409, "stale_term", "a later controller has called")


def _host(fleet: Fleet) -> HostIntent:
    return fleet.hosts[ADDR].intent


async def test_a_cordon_and_the_first_answer_of_a_host_at_the_same_time_do_not_undo_each_other() -> None:
    fleet = Fleet(ClusterId("here"))
    fleet.apply(Change(hosts=(HostIntent(ADDR, None, 1),)))
    store, clock = Store(), StoppedClock()
    _, intents = _loop(fleet, store, clock)
    watchers = Watchers(fleet, cast(Database, store), lambda _: cast(AgentClient, None), clock)
    info = AgentInfo.model_validate({"host_id": HOST, "resource": {}, "engines": ("qemu",), "storage": "file"})
    store.gate.clear()
    answers = asyncio.create_task(watchers._check_identity(ADDR, info))
    cordons = asyncio.create_task(intents.set_cordon(ADDR, True))
    await asyncio.sleep(0)
    store.gate.set()
    await asyncio.gather(answers, cordons)
    assert (_host(fleet).id, _host(fleet).cordoned) == (HOST, True)


async def test_nothing_is_placed_on_a_host_while_its_removal_is_on_its_way_to_the_disk() -> None:
    fleet = _fleet(vm_intent(host=None))
    _report(fleet, None, "b1", 1)
    store = Store()
    _, intents = _loop(fleet, store, StoppedClock())
    assert [room.online for room in fleet.rooms()] == [True]
    store.gate.clear()
    removes = asyncio.create_task(intents.remove_host(HOST))
    await asyncio.sleep(0)
    assert [(room.online, room.why_offline) for room in fleet.rooms()] == [(False, "is being removed")]
    store.gate.set()
    await removes
    assert fleet.hosts == {}


async def test_a_host_is_not_removed_while_a_placement_on_it_is_on_its_way_to_the_disk() -> None:
    waiting = vm_intent(host=None)
    fleet = _fleet(waiting)
    _, intents = _loop(fleet, Store(), StoppedClock())
    fleet.reserve(waiting, HOST)
    with pytest.raises(Clash, match="still has 1 VMs"):
        await intents.remove_host(HOST)


async def test_an_environment_whose_end_the_store_could_not_record_ends_once_it_can() -> None:
    env = env_intent(EnvSpec(id="web", ssh_keys=(KEY,), vms=(VmSpec(image="tiny"),)), deleting=True)
    fleet = _fleet(vm_intent("absent"), env=env)
    _report(fleet, None, "b1", 7)
    store, clock = Store(), StoppedClock()
    clock.now = 5.0
    reconciler, _ = _loop(fleet, store, clock)
    store.refuses = lambda change: bool(change.drop_envs)
    await reconciler._work(VM)
    assert (env.id in fleet.envs, list(reconciler.queue._due)) == (True, [VM])
    store.refuses = lambda _: False
    await reconciler._reconcile(VM)
    reconciler.queue.close()
    assert fleet.envs == {}


async def test_a_host_registered_twice_at_once_keeps_the_identity_it_has_told() -> None:
    fleet = Fleet(ClusterId("here"))
    store = Store()
    _, intents = _loop(fleet, store, StoppedClock())
    store.gate.clear()
    both = [asyncio.create_task(intents.add_host(ADDR, told)) for told in (HOST, None)]
    await asyncio.sleep(0)
    store.gate.set()
    assert await asyncio.gather(*both) == [True, False]
    assert _host(fleet).id == HOST


async def test_a_vm_that_is_destroyed_and_adopted_by_hand_at_once_gets_one_verdict() -> None:
    fleet = _fleet()
    _report(fleet, _vm("running"), "b1", 7)
    store, clock = Store(), StoppedClock()
    reconciler, _ = _loop(fleet, store, clock)
    client = cast(AgentClient, Silent())
    quarantine = Quarantine(fleet, cast(Database, store), reconciler.env_locks, lambda _: client, clock)
    store.gate.clear()
    destroys = asyncio.create_task(quarantine.destroy(HOST, VM))
    adopts = asyncio.create_task(quarantine.adopt(HOST, VM, "web", None))
    for _ in range(5):
        await asyncio.sleep(0)
    store.gate.set()
    outcomes = await asyncio.gather(destroys, adopts, return_exceptions=True)
    reconciler.queue.close()
    assert outcomes[0] is None and isinstance(outcomes[1], Clash) and outcomes[1].code == "known_vm"
    assert fleet.vms[VM].desired == "absent"


class Silent:
    """An agent that does not tell what it was asked for."""

    async def spec(self, _vm_id: VmId) -> None:
        return None


@pytest.mark.parametrize("seed", [892, 1758, 3299, 5024, 5229, 6861, 7530, 8507, 8513])
def test_a_schedule_that_once_violated_a_rule_does_so_no_more(seed: int) -> None:
    assert run(seed).violations == ()
