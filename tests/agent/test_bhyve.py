"""What the bhyve driver does beyond the contract: reboots, exit statuses, bhyveload, guests that do not listen."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest

from agent.engines.bhyve import BhyveEngine
from agent.engines.keeper import CONSOLE_MAX
from agent.errors import AgentError, Unsupported
from agent.machine import Running, Stopped, Unusable, Usable
from specs.wire import CreateVmReq
from tests.contract.engine_contract import until
from tests.contract.test_engine_bhyve import BhyveRig
from tests.freebsd_fixture import FreeBsd, freebsd  # noqa: F401


@pytest.fixture
async def rig(freebsd: FreeBsd, tmp_path: Path) -> AsyncIterator[BhyveRig]:  # noqa: F811
    rig = BhyveRig(tmp_path / "runtime", freebsd)
    yield rig
    await rig.close()
    assert freebsd.state["vmm"] == {}


async def test_a_guest_that_reboots_runs_again_though_no_agent_is_there_and_nobody_calls_it_ended(rig: BhyveRig) -> None:
    machine, pid = await rig.started("vm-a")
    assert await rig.boots(machine) == 1
    await rig.engine.close()
    os.kill(pid, signal.SIGUSR2)
    await until(lambda: "guest: boot 2" in rig.console(machine))
    await rig.restart_agent()
    state = await rig.state(machine)
    assert isinstance(state, Running)
    assert state.pid != pid
    assert rig.exits.empty()


async def test_a_triple_fault_is_a_crash_that_says_so_with_the_last_words_on_the_console(rig: BhyveRig) -> None:
    machine, pid = await rig.started("vm-a")
    await rig.boots(machine)
    os.kill(pid, signal.SIGALRM)
    assert await rig.next_exit() == machine.id
    assert await rig.state(machine) == Stopped("crashed", "the guest made a triple fault: guest: boot 1")
    assert rig.host.state["vmm"] == {}


async def test_a_guest_deaf_to_its_power_button_is_powered_off_by_force_after_the_grace(rig: BhyveRig) -> None:
    machine = await rig.make_machine("vm-a", b"deaf")
    await rig.running(machine)
    await rig.boots(machine)
    await rig.engine.stop(machine, timedelta(seconds=0.3))
    assert await rig.state(machine) == Stopped()
    assert rig.host.state["vmm"] == {}


async def test_without_firmware_freebsd_guests_are_loaded_anew_at_every_boot(freebsd: FreeBsd, tmp_path: Path) -> None:  # noqa: F811
    rig = BhyveRig(tmp_path / "loaded", freebsd, uefi=False)
    probe = await rig.engine.probe()
    assert isinstance(probe, Usable)
    assert "only FreeBSD guests boot" in probe.warnings[0]
    machine, pid = await rig.started("vm-a")
    assert await rig.boots(machine) == 1
    os.kill(pid, signal.SIGUSR2)
    await until(lambda: "guest: boot 2" in rig.console(machine))
    bad = await rig.make_machine("vm-b", b"no-loader")
    await rig.engine.prepare(bad)
    with pytest.raises(AgentError, match="Could not load loader"):
        await rig.engine.start(bad)
    await rig.close()
    assert freebsd.state["vmm"] == {}


async def test_a_vm_without_its_tap_does_not_start_and_says_what_bhyve_said(rig: BhyveRig) -> None:
    machine = await rig.make_machine("vm-a")
    with rig.host.changing() as host:
        del host["interfaces"][machine.nic.link]
    await rig.engine.prepare(machine)
    with pytest.raises(AgentError, match=f"open of tap device /dev/{machine.nic.link} failed"):
        await rig.engine.start(machine)
    assert rig.host.state["vmm"] == {}


async def test_memory_of_a_vm_whose_keeper_was_killed_too_is_freed_by_the_next_look(rig: BhyveRig) -> None:
    machine = await rig.make_machine("vm-a")
    await rig.half_made()["dead_with_its_keeper"](machine)
    assert len(rig.host.state["vmm"]) == 1
    state = await rig.state(machine)
    assert isinstance(state, Stopped)
    assert state.reason == "crashed"
    assert state.message.startswith("its keeper process was killed")
    assert rig.host.state["vmm"] == {}


async def test_a_talkative_guest_does_not_fill_the_hosts_disk(rig: BhyveRig) -> None:
    machine = await rig.make_machine("vm-a")
    log = machine.folder / "console.log"
    log.write_bytes(b"x" * (CONSOLE_MAX + 1))
    await rig.running(machine)
    await until(lambda: log.exists() and log.stat().st_size < 100)
    assert (machine.folder / "console.log.1").stat().st_size == CONSOLE_MAX + 1


async def test_leftovers_include_what_only_the_kernel_still_knows(rig: BhyveRig) -> None:
    machine = await rig.make_machine("vm-a")
    await rig.half_made()["made_in_the_kernel"](machine)
    (removed,) = await rig.engine.leftovers(frozenset())
    assert rig.name(machine) in removed
    assert rig.host.state["vmm"] == {}


async def test_the_seed_and_the_plan_carry_what_was_asked_for(rig: BhyveRig) -> None:
    machine = await rig.make_machine("vm-a")
    await rig.running(machine)
    words = json.loads((machine.folder / "keeper.json").read_text())["main"]
    assert words[words.index("-c") + 1] == str(machine.request.cpu)
    assert words[words.index("-m") + 1] == f"{machine.request.mem}M"
    assert f"4,virtio-net,{machine.nic.link},mac={machine.nic.lease.mac}" in words
    assert f"3,ahci-cd,{machine.folder}/seed.iso" in words
    assert (machine.folder / "seed.iso").stat().st_mode & 0o077 == 0


async def test_a_host_that_cannot_run_vms_is_unusable_and_too_many_processors_are_refused(rig: BhyveRig) -> None:
    assert isinstance(rig.engine, BhyveEngine)
    assert isinstance(await rig.engine.probe(), Usable)
    request = CreateVmReq(vm_id="vm-a", env_id="env", image="guest", engine="bhyve", cpu=17, mem=64, disk=8)
    with pytest.raises(Unsupported, match="cpu 17 is more than the 16"):
        rig.engine.check(request)
    rig.host.change(missing_modules=["vmm"])
    probe = await rig.engine.probe()
    assert isinstance(probe, Unusable)
    assert "can't load vmm" in probe.why
