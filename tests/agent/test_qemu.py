"""What the qemu driver does beyond the contract: hostile circumstances of real QEMU processes."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import psutil
import pytest

from agent import process
from agent.engines import processes, qemu, qemu_folder, qemu_qmp
from agent.engines.qemu import QemuEngine
from agent.errors import AgentError, Unsupported
from agent.machine import Machine, Running, Stopped, Unusable
from specs.names import VmId
from tests.contract.engine_contract import GRACE, until
from tests.contract.engine_qemu_rig import QemuRig

pytestmark = pytest.mark.real


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[QemuRig]:
    rig = QemuRig(tmp_path / "runtime")
    yield rig
    await rig.close()
    assert not [found for found in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(found.info["cmdline"] or [])]


async def _started(rig: QemuRig, image: str) -> tuple[Machine, int]:
    machine = await rig.make_machine("vm-a", image)
    await rig.engine.prepare(machine)
    await rig.engine.start(machine)
    return machine, await rig.pid(machine)


async def test_a_guest_deaf_to_the_power_button_is_made_to_quit_after_the_grace(rig: QemuRig) -> None:
    machine, pid = await _started(rig, "deaf")
    await rig.boots(machine)
    await rig.engine.stop(machine, timedelta(seconds=0.5))
    assert not rig.is_alive(pid)
    assert await rig.state(machine) == Stopped()
    assert (machine.folder / "exit.json").read_text() == '{"status": 0}'


async def test_a_guest_that_was_still_booting_gets_the_power_button_again(
    rig: QemuRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qemu, "POWER_BUTTON_EVERY", 0.2)
    machine, _ = await _started(rig, "guest")
    await rig.engine.stop(machine, GRACE)
    assert "reason=6" in (machine.folder / "ending.log").read_text(), "the guest itself ended it"
    assert await rig.state(machine) == Stopped()


async def test_a_qemu_that_hangs_is_killed(rig: QemuRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qemu_qmp, "LIMIT", 0.3)
    monkeypatch.setattr(qemu, "QUIT_LIMIT", 0.3)
    machine, pid = await _started(rig, "guest")
    os.kill(pid, signal.SIGSTOP)
    await rig.engine.stop(machine, GRACE)
    assert not rig.is_alive(pid)
    assert await rig.state(machine) == Stopped()
    assert (machine.folder / "exit.json").read_text() == '{"status": -9}'


async def test_a_qemu_that_never_answers_is_not_left_running(rig: QemuRig, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = await rig.make_machine("vm-a")
    await rig.engine.prepare(machine)
    monkeypatch.setattr(qemu, "START_LIMIT", 0.3)
    monkeypatch.setattr(qemu_qmp, "QMP", "another.sock")
    with pytest.raises(AgentError, match=r"VM vm-a was started but did not answer within 0.3 s: .*query-status"):
        await rig.engine.start(machine)
    assert qemu_folder.find_processes(rig.runtime_dir, "qemu-system-x86_64") == {}
    assert await rig.next_exit() == machine.id
    assert await rig.state(machine) == Stopped("crashed", "QEMU was killed by SIGKILL")


async def test_a_guest_that_ends_as_soon_as_it_is_up_has_started_and_exited(rig: QemuRig) -> None:
    machine = await rig.make_machine("vm-a", "brief")
    await rig.engine.prepare(machine)
    await rig.engine.start(machine)
    assert await rig.next_exit() == machine.id
    assert await rig.state(machine) == Stopped("exited", "the guest powered itself off")


async def test_a_runtime_folder_too_deep_for_a_socket_address_works(tmp_path: Path) -> None:
    deep = tmp_path.joinpath(*["a-folder-name-of-thirty-letters"] * 5) / "runtime"
    assert len(str(deep)) > 150
    rig = QemuRig(deep)
    machine, pid = await rig.started("vm-a")
    await rig.boots(machine)
    await rig.engine.stop(machine, GRACE)
    assert "reason=6" in (machine.folder / "ending.log").read_text()
    assert not rig.is_alive(pid)
    await rig.close()


async def test_a_vm_whose_record_was_never_written_is_found_and_not_started_twice(rig: QemuRig) -> None:
    machine, pid = await rig.started("vm-a")
    (machine.folder / "process.json").unlink()
    await rig.restart_agent()
    await rig.engine.start(machine)
    assert await rig.pid(machine) == pid
    assert len(qemu_folder.find_processes(rig.runtime_dir, "qemu-system-x86_64")) == 1
    await rig.restart_agent()
    assert await rig.pid(machine) == pid


async def test_a_vm_whose_folder_is_gone_is_a_leftover(rig: QemuRig) -> None:
    machine, pid = await rig.started("vm-a")
    shutil.rmtree(machine.folder)
    await rig.restart_agent()
    assert await rig.engine.leftovers(frozenset()) == (f"QEMU process {pid} of unknown VM vm-a",)
    assert not rig.is_alive(pid)
    machine.folder.mkdir()


async def test_a_folder_moved_out_of_the_way_is_destroyed_all_the_same(rig: QemuRig) -> None:
    machine, pid = await rig.started("vm-a")
    trash = machine.folder.rename(rig.runtime_dir / ".trash-vm-a")
    await rig.engine.destroy(machine.id, trash)
    assert not rig.is_alive(pid)
    assert sorted(path.name for path in trash.iterdir()) == ["base.raw", "disk.qcow2"], "disks are for the storage driver"
    machine.folder.mkdir()


async def test_an_unprepared_destroy_ends_a_vm_that_nothing_in_its_folder_names(rig: QemuRig) -> None:
    machine, pid = await rig.started("vm-a")
    await rig.restart_agent()
    for path in machine.folder.iterdir():
        path.unlink()
    await rig.engine.destroy(machine.id, machine.folder)
    assert not rig.is_alive(pid)
    assert rig.remains(machine) == []


async def test_a_process_that_got_the_pid_of_a_dead_vm_is_left_alone(rig: QemuRig, tmp_path: Path) -> None:
    machine, pid = await rig.started("vm-a")
    await rig.crash(machine, pid)
    await rig.next_exit()
    innocent = process.spawn(("sleep", "600"), cwd=tmp_path, log=tmp_path / "log")
    process.write_record(machine.folder / "process.json", replace(innocent, start="1"))
    await rig.restart_agent()
    state = await rig.state(machine)
    assert isinstance(state, Stopped)
    assert state.reason == "crashed"
    await rig.engine.stop(machine, timedelta(0))
    await rig.engine.destroy(machine.id, machine.folder)
    assert process.alive(innocent)
    await process.kill(innocent)


async def test_a_vm_that_a_signal_ended_politely_has_crashed_and_says_by_what(rig: QemuRig) -> None:
    machine, pid = await rig.started("vm-a")
    os.kill(pid, signal.SIGTERM)
    assert await rig.next_exit() == machine.id
    state = await rig.state(machine)
    assert isinstance(state, Stopped)
    assert state.reason == "crashed"
    assert "terminating on signal 15" in state.message


async def test_a_killed_vm_names_the_signal_also_to_the_next_agent(rig: QemuRig) -> None:
    machine, pid = await rig.started("vm-a")
    await rig.crash(machine, pid)
    await rig.next_exit()
    await rig.restart_agent()
    assert await rig.state(machine) == Stopped("crashed", "QEMU was killed by SIGKILL")


async def test_a_vm_that_ran_when_the_host_was_restarted_has_crashed(rig: QemuRig) -> None:
    machine, pid = await rig.started("vm-a")
    await rig.crash(machine, pid)
    process.write_record(machine.folder / "process.json", process.ProcessRecord(1, "1", "another boot"))
    await rig.restart_agent()
    assert await rig.state(machine) == Stopped("crashed", "the host was restarted while the VM ran")


async def test_a_process_whose_record_cannot_be_read_is_found_by_its_arguments(rig: QemuRig) -> None:
    machine, pid = await rig.started("vm-a")
    (machine.folder / "process.json").write_text("{")
    await rig.restart_agent()
    assert await rig.state(machine) == Running(pid)
    (machine.folder / "process.json").write_text("{")
    await rig.restart_agent()
    await rig.engine.destroy(machine.id, machine.folder)
    assert not rig.is_alive(pid) and rig.remains(machine) == []


async def test_a_start_that_fails_says_what_qemu_said_and_leaves_no_process(rig: QemuRig) -> None:
    machine = await rig.make_machine("vm-a")
    await rig.engine.prepare(machine)
    assert machine.disk is not None
    hidden = machine.disk.path.rename(rig.runtime_dir / "hidden")
    with pytest.raises(AgentError, match=r"QEMU did not start VM vm-a: .*disk.qcow2.*No such file"):
        await rig.engine.start(machine)
    hidden.rename(machine.disk.path)
    state = await rig.state(machine)
    assert isinstance(state, Stopped)
    assert state.reason == "crashed"
    await rig.engine.start(machine)
    assert isinstance(await rig.state(machine), Running)


async def test_a_tap_that_is_gone_is_an_error_and_not_made_anew_beside_the_bridge(rig: QemuRig) -> None:
    machine = await rig.make_machine("vm-a")
    await rig.engine.prepare(machine)
    with pytest.raises(AgentError, match="no network device mt-absent"):
        await rig.engine.start(replace(machine, nic=replace(machine.nic, kind="tap", link="mt-absent")))
    assert await rig.state(machine) == Stopped()
    assert "mt-absent" not in {name for _, name in socket.if_nameindex()}


async def test_a_forward_listens_where_it_was_asked_to_and_a_taken_port_fails_the_start(rig: QemuRig) -> None:
    machine = await rig.make_machine("vm-a")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        nic = replace(machine.nic, lease=replace(machine.nic.lease, ports={22: port}))
        machine = replace(machine, nic=nic)
        await rig.engine.prepare(machine)
        with pytest.raises(AgentError, match=rf"forwarding rule.*{port}"):
            await rig.engine.start(machine)
    await rig.engine.start(machine)
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.close()
    await writer.wait_closed()
    await rig.engine.destroy(machine.id, machine.folder)
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", port)


async def test_a_chattering_guest_cannot_fill_the_hosts_disk(rig: QemuRig, monkeypatch: pytest.MonkeyPatch) -> None:
    machine, _ = await rig.started("vm-a")
    await rig.spoken(machine, "guest: boot 1")
    said = rig.console(machine)
    monkeypatch.setattr(processes, "CONSOLE_MAX", 4)
    await rig.state(machine)
    assert rig.console(machine) == ""
    assert (machine.folder / "console.log.1").read_text() == said
    monkeypatch.setattr(processes, "CONSOLE_MAX", 1000)
    await qemu_qmp.execute(machine.folder, "system_reset")
    await rig.spoken(machine, "guest: boot 2")
    assert "\0" not in rig.console(machine)


_AGENT = """
import asyncio, pickle, sys
from pathlib import Path
from agent.engines.qemu import QemuEngine

async def main(machine, state_dir):
    async def images():
        return ()
    engine = QemuEngine(machine.folder.parent, images, "tcg", state_dir)
    await engine.prepare(machine)
    await engine.start(machine)
    print("started", flush=True)
    await asyncio.sleep(600)

with open(sys.argv[1], "rb") as file:
    asyncio.run(main(pickle.load(file), Path(sys.argv[2])))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
async def test_vms_survive_the_death_of_the_agents_process_group(rig: QemuRig, tmp_path: Path, number: signal.Signals) -> None:
    import pickle

    machine = await rig.make_machine("vm-a")
    (tmp_path / "machine").write_bytes(pickle.dumps(machine))
    agent = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", _AGENT, str(tmp_path / "machine"), str(tmp_path / "state")),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert agent.stdout is not None
    assert await agent.stdout.readline() == b"started\n"
    os.killpg(agent.pid, number)
    await agent.wait()
    pid = await rig.pid(machine)
    assert rig.is_alive(pid)
    await rig.boots(machine)
    await rig.power_off(machine)
    assert await rig.next_exit() == machine.id
    assert await rig.state(machine) == Stopped("exited", "the guest powered itself off")


async def test_ten_vms_killed_at_once_are_all_told(rig: QemuRig) -> None:
    machines = [await rig.make_machine(f"vm-{number}") for number in range(10)]
    for machine in machines:
        await rig.engine.prepare(machine)
    await asyncio.gather(*(rig.engine.start(machine) for machine in machines))
    for machine in machines:
        os.kill(await rig.pid(machine), signal.SIGKILL)
    assert {await rig.next_exit() for _ in machines} == {machine.id for machine in machines}
    await until(lambda: qemu_folder.find_processes(rig.runtime_dir, "qemu-system-x86_64") == {})


async def test_more_processors_than_a_machine_has_are_refused_and_user_data_is_checked(rig: QemuRig) -> None:
    machine = await rig.make_machine("vm-a")
    assert rig.engine.check(machine.request.model_copy(update={"cpu": 255})) == ()
    with pytest.raises(Unsupported, match="cpu 256"):
        rig.engine.check(machine.request.model_copy(update={"cpu": 256}))
    with pytest.raises(Unsupported):
        rig.engine.check(machine.request.model_copy(update={"user_data": "neither a script nor a config"}))


async def test_without_qemu_the_engine_says_what_to_install(tmp_path: Path) -> None:
    async def images() -> tuple[str, ...]:
        return ()

    engine = QemuEngine(tmp_path, images, "auto", tmp_path / "state", binary="qemu-system-absent")
    assert await engine.probe() == Unusable("QEMU is not installed; apt-get install qemu-system-x86 qemu-utils")
    assert await engine.state(VmId("vm-a"), tmp_path / "vm-a") is None
