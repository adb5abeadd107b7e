"""An agent killed at any moment and started again on the same folder: nothing leaks, nothing is lost or started twice."""

from __future__ import annotations

import asyncio
import contextlib
import json
from pathlib import Path

import pytest

from agent.errors import AgentError, Conflict
from agent.records import RECORD, TERMS
from specs.names import VmId
from tests.agent.runtime_rig import NOBODY, Rig, controller, outline, reached, request, until

A = VmId("vm-a")

CREATE_STEPS = [
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
    ("machines", "state"),
]
DELETE_STEPS = [
    ("machines", "destroy"),
    ("machines", "destroy.done"),
    ("host", "remove"),
    ("host", "remove.done"),
    ("host", "apply"),
    ("host", "apply.done"),
    ("disks", "remove_disk"),
    ("disks", "remove_disk.done"),
]


@pytest.fixture
async def rig(tmp_path: Path):  # type: ignore[no-untyped-def]
    made = Rig(tmp_path)
    yield made
    for fault in made.faults:
        fault.heal()
    for agent in tuple(made.agents):
        await made.kill(agent)
    assert made.machines.most_alive <= 1


async def killed_at(rig: Rig, where: str, step: str, doing: str) -> None:
    """Starts an agent, lets it create or delete VM A, and kills it when it reaches a step."""
    runtime = await rig.boot()
    if doing == "delete":
        await runtime.create(request(), controller(), wait=True)
    faults = getattr(rig, where).faults
    faults.steps.clear()
    faults.hold[step] = asyncio.Event()
    work = runtime.create(request(), controller(), wait=True) if doing == "create" else runtime.delete(A, controller())
    task = asyncio.create_task(work)
    await reached(faults, step)
    await rig.kill(runtime)
    with contextlib.suppress(AgentError):
        await task
    faults.heal()


@pytest.mark.parametrize(("where", "step"), CREATE_STEPS)
async def test_a_creation_cut_off_at_any_step_is_continued(rig: Rig, where: str, step: str) -> None:
    await killed_at(rig, where, step, "create")
    runtime = await rig.boot()
    await until(lambda: runtime.get(A).state == "running")
    vm = runtime.get(A)
    assert outline(vm) == ("running", "", "")
    assert (vm.cluster_id, vm.port_map) == ("prod", {"22": 20000, "80": 20001})
    assert rig.machines.running() == {A: vm.pid}
    assert (sorted(rig.disks.disks), sorted(rig.host.rules), len(rig.host.links)) == ([A], [A], 1)
    assert (await runtime.create(request(), controller(), wait=True))[1] == "existing"
    await runtime.delete(A, controller())
    assert rig.traces() == Rig.NOTHING


@pytest.mark.parametrize(("where", "step"), CREATE_STEPS[:-2])
async def test_a_continued_creation_that_fails_is_undone_and_says_why(rig: Rig, where: str, step: str) -> None:
    await killed_at(rig, where, step, "create")
    rig.machines.faults.fail_next("prepare", AgentError("no luck"))
    runtime = await rig.boot()
    await until(lambda: runtime.get(A).state == "failed")
    assert (outline(runtime.get(A)), runtime.get(A).message) == (("failed", "create_failed", ""), "no luck")
    assert rig.traces() == Rig.NOTHING


@pytest.mark.parametrize(("where", "step"), CREATE_STEPS)
async def test_a_creation_cut_off_can_be_deleted_after_the_restart(rig: Rig, where: str, step: str) -> None:
    await killed_at(rig, where, step, "create")
    runtime = await rig.boot(settle=False)
    await runtime.delete(A, controller())
    assert runtime.list() == []
    await until(lambda: runtime.complete)
    assert rig.traces() == Rig.NOTHING


@pytest.mark.parametrize(("where", "step"), DELETE_STEPS)
async def test_a_removal_cut_off_at_any_step_is_finished(rig: Rig, where: str, step: str) -> None:
    await killed_at(rig, where, step, "delete")
    runtime = await rig.boot()
    await until(lambda: runtime.list() == [])
    assert rig.traces() == Rig.NOTHING


@pytest.mark.parametrize("step", ["setup", "setup.done"])
async def test_a_vm_whose_removal_was_cut_off_goes_with_its_rules_though_the_network_cannot_be_mended(
    rig: Rig, step: str
) -> None:
    await killed_at(rig, "machines", "destroy", "delete")
    assert sorted(rig.host.rules) == [A]
    rig.host.faults.fail_always(step, AgentError("no bridge today"))
    runtime = await rig.boot()
    assert "no bridge today" in runtime.trouble
    await until(lambda: runtime.list() == [])
    assert rig.traces() == Rig.NOTHING


async def test_running_vms_keep_running_under_a_new_agent_and_their_exits_are_seen(rig: Rig) -> None:
    runtime = await rig.boot()
    before = {}
    for n in range(5):
        vm, _ = await runtime.create(request(f"vm-{n}"), controller(), wait=True)
        before[vm.id] = vm
    await rig.kill(runtime)
    runtime = await rig.boot()
    assert {vm.id: vm for vm in runtime.list()} == before
    assert rig.machines.machines[VmId("vm-0")].boots == 1
    rig.machines.crash(VmId("vm-3"))
    await until(lambda: runtime.get("vm-3").reason == "crashed")


async def test_a_vm_that_ran_already_when_its_creation_was_cut_off_keeps_its_process(rig: Rig) -> None:
    await killed_at(rig, "machines", "start.done", "create")
    running = rig.machines.running()
    rig.machines.faults.fail_always("prepare", AgentError("never called"))
    runtime = await rig.boot()
    await until(lambda: runtime.get(A).state == "running")
    assert rig.machines.running() == running == {A: runtime.get(A).pid}


async def test_after_a_host_reboot_nothing_is_started_until_somebody_asks(rig: Rig) -> None:
    runtime = await rig.boot()
    await runtime.create(request(), NOBODY, wait=True)
    await runtime.create(request("vm-b"), NOBODY, wait=True)
    await runtime.set_power("vm-b", "stopped", NOBODY, wait=True)
    await rig.kill(runtime)
    rig.machines.crash(A, "the host was restarted")
    rig.host.bridge = False
    rig.host.links.clear()
    rig.host.rules.clear()
    runtime = await rig.boot()
    assert outline(runtime.get(A)) == ("stopped", "crashed", "")
    assert outline(runtime.get("vm-b")) == ("stopped", "", "")
    assert (rig.machines.running(), rig.host.bridge, sorted(rig.host.rules)) == ({}, True, [A, "vm-b"])
    vm, _ = await runtime.set_power(A, "running", NOBODY, wait=True)
    assert (vm.state, len(rig.host.links)) == ("running", 1)


async def test_what_no_record_knows_is_removed_from_the_host(rig: Rig) -> None:
    runtime = await rig.boot()
    await runtime.create(request(), NOBODY, wait=True)
    await rig.kill(runtime)
    (rig.folder / A / RECORD).unlink()
    (rig.folder / A / "disk.qcow2").unlink()
    runtime = await rig.boot()
    assert runtime.list() == []
    assert (rig.machines.running(), rig.host.links, rig.host.rules) == ({}, set(), {})
    assert not (rig.folder / A).exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"version": 2}', b"\xff\xfe", b'{"request": {}}', None])
async def test_an_unreadable_record_is_shown_and_left_alone_until_deleted(rig: Rig, content: bytes | None) -> None:
    runtime = await rig.boot()
    await runtime.create(request(), controller(), wait=True)
    await runtime.create(request("vm-b"), controller(), wait=True)
    await rig.kill(runtime)
    record = rig.folder / A / RECORD
    if content is None:
        record.unlink()
    else:
        record.write_bytes(content)
    runtime = await rig.boot()
    broken = runtime.get(A)
    assert outline(broken) == ("failed", "state_unknown", "")
    assert str(record) in broken.message
    assert outline(runtime.get("vm-b")) == ("running", "", "")
    assert sorted(rig.machines.running()) == [A, "vm-b"]
    for call in (runtime.create(request(), controller(), wait=True), runtime.set_power(A, "stopped", controller(), wait=True)):
        with pytest.raises(Conflict, match="cannot be read"):
            await call
    assert (rig.folder / A / "disk.qcow2").exists()
    await runtime.delete(A, controller())
    assert sorted(rig.machines.running()) == ["vm-b"]
    assert not (rig.folder / A).exists()


async def test_a_record_under_another_vms_name_or_behind_a_link_is_refused(
    rig: Rig, tmp_path_factory: pytest.TempPathFactory
) -> None:
    runtime = await rig.boot()
    await runtime.create(request(), NOBODY, wait=True)
    await rig.kill(runtime)
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / RECORD).write_bytes((rig.folder / A / RECORD).read_bytes())
    (rig.folder / "vm-copy").mkdir()
    (rig.folder / "vm-copy" / RECORD).write_bytes((rig.folder / A / RECORD).read_bytes())
    (rig.folder / "vm-link").symlink_to(elsewhere)
    (rig.folder / "vm-filelink").mkdir()
    (rig.folder / "vm-filelink" / RECORD).symlink_to(elsewhere / RECORD)
    runtime = await rig.boot()
    assert {vm.id: vm.state for vm in runtime.list()} == {
        A: "running",
        "vm-copy": "failed",
        "vm-link": "failed",
        "vm-filelink": "failed",
    }


async def test_half_written_and_trashed_folders_vanish_at_start(rig: Rig) -> None:
    (rig.folder / "vm-x").mkdir()
    (rig.folder / "vm-y").mkdir()
    (rig.folder / "vm-y" / f".{RECORD}.abcd.tmp").write_text("{")
    (rig.folder / ".trash-0011-vm-z" / "deep").mkdir(parents=True)
    runtime = await rig.boot()
    await until(lambda: rig.traces() == Rig.NOTHING)
    assert runtime.list() == []


async def test_until_it_has_looked_an_agent_calls_its_list_incomplete_and_nothing_stopped(rig: Rig) -> None:
    runtime = await rig.boot()
    await runtime.create(request(), NOBODY, wait=True)
    await rig.kill(runtime)
    rig.machines.faults.hold["state"] = asyncio.Event()
    runtime = await rig.boot(settle=False)
    await reached(rig.machines.faults, "state", A)
    assert (outline(runtime.get(A)), runtime.complete) == (("running", "", ""), False)
    seq = runtime.watch.seq
    rig.machines.faults.heal()
    await until(lambda: runtime.complete)
    assert runtime.watch.seq > seq


async def test_a_vm_being_made_is_never_taken_for_a_leftover(rig: Rig) -> None:
    rig.machines.faults.hold["leftovers"] = asyncio.Event()
    runtime = await rig.boot(settle=False)
    creating = asyncio.create_task(runtime.create(request(), NOBODY, wait=True))
    await until(lambda: any(vm.state == "creating" for vm in runtime.list()))
    assert rig.machines.machines == {}
    rig.machines.faults.heal()
    assert (await creating)[0].state == "running"
    await until(lambda: runtime.complete)
    assert list(rig.machines.running()) == [A]


async def test_a_network_that_fails_at_start_is_told_and_tried_again(rig: Rig) -> None:
    rig.host.faults.fail_next("setup", AgentError("nft is missing"))
    runtime = await rig.boot()
    assert runtime.trouble == "the network fake cannot be set up: nft is missing"
    runtime._upkeep._mend_at = 0
    await runtime.resync()
    assert runtime.trouble == ""


async def test_an_engine_that_becomes_usable_is_offered_without_a_restart(rig: Rig) -> None:
    runtime = await rig.boot()
    runtime._refused[next(iter(runtime._engines))] = "its daemon is down"
    assert runtime.usable == ("docker",)
    await runtime.resync()
    assert runtime.usable == ("qemu", "docker")


async def test_terms_never_go_back_even_over_restarts(rig: Rig) -> None:
    runtime = await rig.boot()
    await runtime.create(request(), controller(term=5), wait=True)
    await rig.kill(runtime)
    runtime = await rig.boot()
    for call in (
        runtime.create(request("vm-b"), controller(term=4), wait=True),
        runtime.delete(A, controller(term=4)),
        runtime.set_power(A, "stopped", controller(term=4), wait=True),
    ):
        with pytest.raises(Conflict) as refused:
            await call
        assert refused.value.code == "stale_term"
    assert [outline(vm) for vm in runtime.list()] == [("running", "", "")]
    await runtime.create(request("vm-c"), controller(term=1, cluster="other"), wait=True)
    await runtime.set_power(A, "stopped", controller(term=6), wait=True)
    assert json.loads((rig.folder / TERMS).read_text()) == {"other": 1, "prod": 6}


async def test_a_vm_of_one_cluster_is_changed_by_nobody_else(rig: Rig) -> None:
    runtime = await rig.boot()
    await runtime.create(request(), controller(), wait=True)
    for caller in (NOBODY, controller(cluster="other", term=99)):
        for call in (
            runtime.create(request(), caller, wait=True),
            runtime.delete(A, caller),
            runtime.set_power(A, "stopped", caller, wait=True),
        ):
            with pytest.raises(Conflict) as refused:
                await call
            assert refused.value.code == "foreign_vm"
    assert outline(runtime.get(A)) == ("running", "", "")
    await runtime.create(request("free"), NOBODY, wait=True)
    await runtime.delete("free", controller())
    assert [vm.id for vm in runtime.list()] == [A]


async def test_a_terms_file_that_makes_no_sense_stops_the_agent_from_starting(rig: Rig) -> None:
    for content in ("{", "[]", '{"prod": "5"}', '{"prod": true}'):
        (rig.folder / TERMS).write_text(content)
        with pytest.raises(AgentError, match="remove it only if"):
            await rig.boot()
