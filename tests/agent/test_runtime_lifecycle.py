"""Creating, stopping, starting and deleting on a host in memory: what clients see and what is on the host afterwards."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path
from typing import Any

import pytest

from agent.errors import AgentError, Conflict, DoesNotFit, ImageMissing, NotFound, Unsupported
from agent.inventory import Capacity
from agent.records import RECORD
from agent.runtime import Runtime
from specs.names import VmId
from tests.agent.runtime_rig import NOBODY, Rig, controller, outline, reached, request, until

A = VmId("vm-a")


def whole(rig: Rig) -> dict[str, object]:
    """What one QEMU VM has on the host."""
    return {**Rig.NOTHING, "machines": [A], "disks": [A], "links": sorted(rig.host.links), "rules": [A], "folders": [A]}


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


@pytest.fixture
async def runtime(rig: Rig):  # type: ignore[no-untyped-def]
    started = await rig.boot()
    yield started
    for fault in rig.faults:
        fault.heal()
    for agent in tuple(rig.agents):
        await rig.kill(agent)
    assert rig.machines.most_alive <= 1
    assert rig.containers.most_alive <= 1


async def test_a_created_vm_runs_with_its_own_disk_link_address_and_ports(rig: Rig, runtime: Runtime) -> None:
    vm, outcome = await runtime.create(request(), NOBODY, wait=True)
    assert outcome == "created"
    assert outline(vm) == ("running", "", "")
    assert (vm.ip, vm.port_map, vm.pid) == ("10.77.0.2", {"22": 20000, "80": 20001}, rig.machines.running()[A])
    assert rig.traces() == whole(rig)
    assert len(rig.host.links) == 1
    assert runtime.list() == [vm]


async def test_a_container_gets_no_disk_and_no_tap(rig: Rig, runtime: Runtime) -> None:
    vm, _ = await runtime.create(request(engine="docker", image="muster/busybox"), NOBODY, wait=True)
    assert outline(vm) == ("running", "", "")
    assert rig.traces() == {**Rig.NOTHING, "containers": [A], "rules": [A], "folders": [A]}


async def test_the_same_create_again_returns_the_vm_that_is_there(rig: Rig, runtime: Runtime) -> None:
    first, _ = await runtime.create(request(ports=(80, 443)), NOBODY, wait=True)
    again, outcome = await runtime.create(request(ports=(443, 80, 22)), NOBODY, wait=True)
    assert (again, outcome) == (first, "existing")
    assert rig.machines.machines[A].boots == 1


async def test_another_spec_under_the_same_id_is_a_conflict_and_changes_nothing(rig: Rig, runtime: Runtime) -> None:
    first, _ = await runtime.create(request(), NOBODY, wait=True)
    with pytest.raises(Conflict, match="another spec"):
        await runtime.create(request(mem=256), NOBODY, wait=True)
    assert runtime.list() == [first]


async def test_equal_creates_at_the_same_time_make_one_vm(rig: Rig, runtime: Runtime) -> None:
    results = await asyncio.gather(*(runtime.create(request(), NOBODY, wait=True) for _ in range(10)))
    assert {vm.state for vm, _ in results} == {"running"}
    assert sorted(outcome for _, outcome in results) == ["created"] + ["existing"] * 9
    assert rig.machines.machines[A].boots == 1


async def test_a_hundred_creates_at_once_get_addresses_and_ports_of_their_own(rig: Rig, runtime: Runtime) -> None:
    results = await asyncio.gather(*(runtime.create(request(f"vm-{n}"), NOBODY, wait=True) for n in range(100)))
    vms = [vm for vm, _ in results]
    ports = [port for vm in vms for port in vm.port_map.values()]
    assert len({vm.ip for vm in vms}) == 100
    assert len(set(ports)) == len(ports) == 200
    assert len(rig.machines.running()) == 100
    assert set(rig.host.rules) == {vm.id for vm in vms}
    assert rig.host.applied < 100


async def test_many_creates_waiting_for_rules_share_one_apply(rig: Rig, runtime: Runtime) -> None:
    rig.host.faults.hold["apply"] = gate = asyncio.Event()
    creates = [asyncio.create_task(runtime.create(request(f"vm-{n}"), NOBODY, wait=True)) for n in range(20)]
    await until(lambda: sum(step == "ensure.done" for step, _ in rig.host.faults.steps) == 20)
    before = rig.host.applied
    gate.set()
    await asyncio.gather(*creates)
    assert rig.host.applied - before == 2  # the round of the first one, and one for all who came during it


@pytest.mark.parametrize(
    ("where", "step"),
    [
        ("disks", "ensure_disk"),
        ("disks", "ensure_disk.half"),
        ("disks", "ensure_disk.done"),
        ("host", "ensure"),
        ("host", "ensure.done"),
        ("host", "apply"),
        ("host", "apply.done"),
        ("machines", "prepare"),
        ("machines", "prepare.half"),
        ("machines", "prepare.done"),
        ("machines", "start"),
        ("machines", "start.done"),
    ],
)
@pytest.mark.parametrize("wait", [True, False], ids=["waiting", "respond-async"])
async def test_a_failed_creation_leaves_nothing_and_a_new_try_works(
    rig: Rig, runtime: Runtime, where: str, step: str, wait: bool
) -> None:
    getattr(rig, where).faults.fail_next(step, AgentError("the disk broke"))
    if wait:
        with pytest.raises(AgentError, match="the disk broke"):
            await runtime.create(request(), controller(), wait=True)
        assert runtime.list() == []
    else:
        vm, outcome = await runtime.create(request(), controller(), wait=False)
        assert (outline(vm)[0], outcome) == ("creating", "accepted")
        await until(lambda: runtime.get(A).state == "failed")
        failed = runtime.get(A)
        assert outline(failed) == ("failed", "create_failed", "")
        assert (failed.message, failed.ip, failed.port_map) == ("the disk broke", "", {})
        assert failed.cluster_id == "prod"
    assert rig.traces() == Rig.NOTHING
    assert runtime.is_empty
    assert runtime.resource().vm_count == runtime.resource().mem_used == 0
    vm, outcome = await runtime.create(request(), controller(), wait=True)
    assert (outline(vm), outcome) == (("running", "", ""), "created")
    assert len(runtime.list()) == 1


async def test_a_driver_that_breaks_unexpectedly_fails_one_creation_cleanly(rig: Rig, runtime: Runtime) -> None:
    rig.machines.faults.fail_next("prepare", ZeroDivisionError("oops"))
    with pytest.raises(AgentError, match="ZeroDivisionError: oops"):
        await runtime.create(request(), NOBODY, wait=True)
    rig.disks.faults.fail_next("ensure_disk", OSError(28, "No space left on device"))
    with pytest.raises(DoesNotFit, match="No space left"):
        await runtime.create(request(), NOBODY, wait=True)
    assert rig.traces() == Rig.NOTHING


async def test_what_cannot_be_undone_stays_reserved_and_is_removed_later(rig: Rig, runtime: Runtime) -> None:
    rig.machines.faults.fail_next("start.done", AgentError("it did not boot"))
    rig.machines.faults.fail_next("destroy", AgentError("the daemon is down"))
    await runtime.create(request(), controller(), wait=False)
    await until(lambda: runtime.get(A).reason == "remove_failed")
    stuck = runtime.get(A)
    assert stuck.state == "failed"
    assert "it did not boot" in stuck.message
    assert "the daemon is down" in stuck.message
    assert stuck.port_map
    assert runtime.resource().mem_used == 128
    await runtime.resync()
    await until(lambda: runtime.get(A).reason == "create_failed")
    assert rig.traces() == Rig.NOTHING


async def test_a_failed_delete_says_why_and_the_next_one_finishes_it(rig: Rig, runtime: Runtime) -> None:
    await runtime.create(request(), NOBODY, wait=True)
    rig.disks.faults.fail_next("remove_disk", AgentError("the pool is suspended"))
    with pytest.raises(AgentError, match="the pool is suspended"):
        await runtime.delete(A, NOBODY)
    assert runtime.get(A).reason == "remove_failed"
    await runtime.delete(A, NOBODY)
    assert rig.traces() == Rig.NOTHING
    assert runtime.list() == []


async def test_delete_removes_everything_and_can_be_repeated(rig: Rig, runtime: Runtime) -> None:
    await runtime.create(request(), NOBODY, wait=True)
    await asyncio.gather(*(runtime.delete(A, NOBODY) for _ in range(3)))
    await runtime.delete(A, NOBODY)
    await runtime.delete("never-there", NOBODY)
    assert rig.traces() == Rig.NOTHING
    with pytest.raises(NotFound):
        runtime.get(A)


STEPS = [
    ("disks", "ensure_disk.half"),
    ("host", "ensure"),
    ("host", "apply"),
    ("machines", "prepare.half"),
    ("machines", "start"),
    ("machines", "start.done"),
]


@pytest.mark.parametrize(("where", "step"), STEPS)
async def test_deleting_while_creating_breaks_the_creation_off(rig: Rig, runtime: Runtime, where: str, step: str) -> None:
    faults = getattr(rig, where).faults
    faults.steps.clear()
    faults.hold[step] = asyncio.Event()
    creating = asyncio.create_task(runtime.create(request(), NOBODY, wait=True))
    await reached(faults, step)
    if step == "apply":
        faults.hold[step].set()
    await runtime.delete(A, NOBODY)
    with pytest.raises(Conflict, match="deleted while it was being created"):
        await creating
    assert rig.traces() == Rig.NOTHING
    assert runtime.list() == []


async def test_a_create_during_a_delete_waits_for_it(rig: Rig, runtime: Runtime) -> None:
    await runtime.create(request(), NOBODY, wait=True)
    rig.machines.faults.hold["destroy"] = gate = asyncio.Event()
    deleting = asyncio.create_task(runtime.delete(A, NOBODY))
    await reached(rig.machines.faults, "destroy", A)
    assert runtime.get(A).step == "deleting"
    with pytest.raises(Conflict, match="being deleted"):
        await runtime.set_power(A, "running", NOBODY, wait=True)
    creating = asyncio.create_task(runtime.create(request(mem=256), NOBODY, wait=True))
    gate.set()
    await deleting
    vm, outcome = await creating
    assert (vm.mem, vm.state, outcome) == (256, "running", "created")


async def test_steps_are_told_while_creating_and_power_calls_are_refused(rig: Rig, runtime: Runtime) -> None:
    seen = []
    for faults, step in ((rig.disks.faults, "ensure_disk"), (rig.host.faults, "ensure"), (rig.machines.faults, "prepare")):
        faults.hold[step] = asyncio.Event()
    rig.machines.faults.hold["start"] = asyncio.Event()
    await runtime.create(request(), NOBODY, wait=False)
    for faults, step in (
        (rig.disks.faults, "ensure_disk"),
        (rig.host.faults, "ensure"),
        (rig.machines.faults, "prepare"),
        (rig.machines.faults, "start"),
    ):
        await reached(faults, step)
        seen.append(outline(runtime.get(A)))
        with pytest.raises(Conflict, match="still being created"):
            await runtime.set_power(A, "stopped", NOBODY, wait=True)
        faults.hold[step].set()
    await until(lambda: runtime.get(A).state == "running")
    assert seen == [("creating", "", step) for step in ("disk", "network", "prepare", "booting")]


async def test_stop_and_start_keep_the_disk_and_can_be_repeated(rig: Rig, runtime: Runtime) -> None:
    first, _ = await runtime.create(request(), NOBODY, wait=True)
    for _ in range(2):
        stopped, _ = await runtime.set_power(A, "stopped", NOBODY, wait=True)
        assert (outline(stopped), stopped.pid) == (("stopped", "", ""), None)
    assert rig.machines.running() == {}
    for _ in range(2):
        started, _ = await runtime.set_power(A, "running", NOBODY, wait=True)
        assert outline(started) == ("running", "", "")
    assert started.port_map == first.port_map
    assert rig.machines.machines[A].boots == 2
    assert sum(step == "ensure_disk" for step, _ in rig.disks.faults.steps) == 1


async def test_a_start_without_need_is_not_even_visible(rig: Rig, runtime: Runtime) -> None:
    await runtime.create(request(), NOBODY, wait=True)
    before = runtime.watch.seq
    await runtime.set_power(A, "running", NOBODY, wait=True)
    assert runtime.watch.seq == before


async def test_an_asynchronous_stop_is_answered_in_its_transient_state_and_joined_by_equal_ones(
    rig: Rig, runtime: Runtime
) -> None:
    await runtime.create(request(), NOBODY, wait=True)
    rig.machines.faults.hold["stop"] = asyncio.Event()
    for _ in range(3):
        vm, outcome = await runtime.set_power(A, "stopped", NOBODY, wait=False)
        assert (outline(vm), outcome) == (("creating", "", "stopping"), "accepted")
    await reached(rig.machines.faults, "stop")
    rig.machines.faults.heal()
    await until(lambda: runtime.get(A).state == "stopped")
    assert sum(step == "stop" for step, _ in rig.machines.faults.steps) == 1


async def test_a_start_asked_during_a_stop_happens_after_it(rig: Rig, runtime: Runtime) -> None:
    await runtime.create(request(), NOBODY, wait=True)
    rig.machines.faults.hold["stop"] = asyncio.Event()
    stopping = asyncio.create_task(runtime.set_power(A, "stopped", NOBODY, wait=True))
    await reached(rig.machines.faults, "stop")
    starting = asyncio.create_task(runtime.set_power(A, "running", NOBODY, wait=True))
    await asyncio.sleep(0)
    rig.machines.faults.heal()
    await asyncio.gather(stopping, starting)
    assert outline(runtime.get(A)) == ("running", "", "")
    assert rig.machines.machines[A].boots == 2


async def test_deleting_while_stopping_does_not_wait_for_the_grace_time(rig: Rig, runtime: Runtime) -> None:
    await runtime.create(request(), NOBODY, wait=True)
    rig.machines.faults.hold["stop"] = asyncio.Event()
    await runtime.set_power(A, "stopped", NOBODY, wait=False)
    await reached(rig.machines.faults, "stop")
    await runtime.delete(A, NOBODY)
    assert rig.traces() == Rig.NOTHING


async def test_a_start_that_fails_leaves_the_vm_and_says_why(rig: Rig, runtime: Runtime) -> None:
    await runtime.create(request(), NOBODY, wait=True)
    await runtime.set_power(A, "stopped", NOBODY, wait=True)
    rig.machines.faults.fail_next("start", AgentError("no memory"))
    with pytest.raises(AgentError, match="no memory"):
        await runtime.set_power(A, "running", NOBODY, wait=True)
    failed = runtime.get(A)
    assert (outline(failed), failed.message) == (("failed", "start_failed", ""), "no memory")
    assert rig.traces()["disks"] == [A]
    stopped, _ = await runtime.set_power(A, "stopped", NOBODY, wait=True)
    assert outline(stopped) == ("stopped", "", "")
    started, _ = await runtime.set_power(A, "running", NOBODY, wait=True)
    assert outline(started) == ("running", "", "")


async def test_a_vm_whose_disk_is_gone_is_never_given_a_fresh_one(rig: Rig, runtime: Runtime) -> None:
    await runtime.create(request(), NOBODY, wait=True)
    await runtime.set_power(A, "stopped", NOBODY, wait=True)
    (rig.folder / A / "disk.qcow2").unlink()
    with pytest.raises(AgentError, match="is gone"):
        await runtime.set_power(A, "running", NOBODY, wait=True)
    assert runtime.get(A).reason == "start_failed"


async def test_an_exit_is_seen_at_once_and_told_as_what_it_was(rig: Rig, runtime: Runtime) -> None:
    await runtime.create(request(), NOBODY, wait=True)
    rig.machines.crash(A)
    await until(lambda: runtime.get(A).state == "stopped")
    assert runtime.get(A).reason == "crashed"
    assert runtime.get(A).message == "the process was killed by SIGKILL"
    await runtime.set_power(A, "running", NOBODY, wait=True)
    rig.machines.power_off(A)
    await until(lambda: runtime.get(A).state == "stopped")
    assert runtime.get(A).reason == "exited"
    stopped, _ = await runtime.set_power(A, "stopped", NOBODY, wait=True)
    assert outline(stopped) == ("stopped", "", "")
    await runtime.resync()
    assert rig.machines.running() == {}  # nothing is started unasked


async def test_a_vm_that_dies_while_it_boots_is_reported_crashed(rig: Rig, runtime: Runtime) -> None:
    rig.machines.faults.hold["start.done"] = asyncio.Event()
    creating = asyncio.create_task(runtime.create(request(), NOBODY, wait=True))
    await reached(rig.machines.faults, "start.done")
    rig.machines.crash(A)
    rig.machines.faults.heal()
    vm, _ = await creating
    assert outline(vm) == ("stopped", "crashed", "")


async def test_an_engine_that_cannot_tell_leaves_doubt_about_its_own_vm_alone(rig: Rig, runtime: Runtime) -> None:
    await runtime.create(request(), NOBODY, wait=True)
    rig.machines.faults.fail_next("state", AgentError("the daemon does not answer"))
    await runtime.resync()
    assert outline(runtime.get(A)) == ("running", "state_unknown", "")
    assert "the daemon does not answer" in runtime.get(A).message
    assert runtime.complete, "what the list lacks is still not here"
    await runtime.resync()
    assert outline(runtime.get(A)) == ("running", "", "") and runtime.get(A).message == ""


async def test_nothing_is_promised_twice(tmp_path: Path) -> None:
    rig = Rig(tmp_path, capacity=Capacity(cpu=2, mem=1000, disk=600))
    runtime = await rig.boot()
    tries = [runtime.create(request(f"vm-{n}"), NOBODY, wait=True) for n in range(5)]
    results = await asyncio.gather(*tries, return_exceptions=True)
    refused = [str(result) for result in results if isinstance(result, DoesNotFit)]
    assert len(refused) == 3
    assert "1 vCPU asked for, 0 of 2 free; 256 MiB of disk asked for, 88 of 600 free" in refused[0]
    used = runtime.resource()
    assert (used.cpu_used, used.mem_used, used.disk_used, used.vm_count) == (2, 256, 512, 2)
    await runtime.set_power("vm-0", "stopped", NOBODY, wait=True)
    with pytest.raises(DoesNotFit):
        await runtime.create(request("vm-9"), NOBODY, wait=True)
    await runtime.delete("vm-0", NOBODY)
    assert (await runtime.create(request("vm-9"), NOBODY, wait=True))[1] == "created"
    await rig.kill(runtime)


async def test_released_ports_are_not_given_away_again_at_once(rig: Rig, runtime: Runtime) -> None:
    first, _ = await runtime.create(request(), NOBODY, wait=True)
    await runtime.delete(A, NOBODY)
    second, _ = await runtime.create(request("vm-b"), NOBODY, wait=True)
    assert not set(first.port_map.values()) & set(second.port_map.values())


async def test_an_engine_this_host_lacks_is_refused_with_those_it_has(rig: Rig, runtime: Runtime) -> None:
    with pytest.raises(Unsupported, match=r"no engine firecracker \(it has: qemu, docker\)"):
        await runtime.create(request(engine="firecracker"), NOBODY, wait=True)
    with pytest.raises(ImageMissing):
        await runtime.create(request(image="nope"), NOBODY, wait=True)
    assert rig.traces() == Rig.NOTHING


async def test_what_an_engine_warns_of_stays_with_the_vm(rig: Rig, runtime: Runtime) -> None:
    rig.engines[1].warnings = ("disk: 256 MiB is not enforced",)
    await runtime.create(request(engine="docker", image="muster/busybox"), NOBODY, wait=True)
    assert runtime.get(A).warnings == ("disk: 256 MiB is not enforced",)


async def test_a_slow_vm_holds_nobody_else_up(rig: Rig, runtime: Runtime) -> None:
    rig.disks.faults.hold["ensure_disk"] = asyncio.Event()
    slow = asyncio.create_task(runtime.create(request("slow"), NOBODY, wait=True))
    await reached(rig.disks.faults, "ensure_disk", "slow")
    quick, _ = await runtime.create(request("quick", engine="docker", image="muster/busybox"), NOBODY, wait=True)
    assert quick.state == "running"
    assert runtime.get("slow").state == "creating"
    rig.disks.faults.heal()
    assert (await slow)[0].state == "running"


async def test_a_full_disk_at_the_very_first_write_reserves_nothing(
    rig: Rig, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    really_open = os.open

    def full(path: str, flags: int, *args: Any, **more: Any) -> int:
        if flags & os.O_CREAT:
            raise OSError(errno.ENOSPC, "No space left on device")
        return really_open(path, flags, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr("os.open", full)
        with pytest.raises(DoesNotFit, match=rf"{RECORD} failed: No space left"):
            await runtime.create(request(), NOBODY, wait=True)
    assert rig.traces() == Rig.NOTHING
    assert runtime.resource().vm_count == 0


async def test_a_network_that_comes_back_is_mended_with_links_and_rules(rig: Rig, runtime: Runtime) -> None:
    await runtime.create(request(), NOBODY, wait=True)
    links = set(rig.host.links)
    rig.host.bridge = False
    rig.host.links.clear()
    rig.host.rules.clear()
    runtime._upkeep._mend_at = 0
    await runtime.resync()
    assert (rig.host.bridge, rig.host.links, set(rig.host.rules)) == (True, links, {A})
