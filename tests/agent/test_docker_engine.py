"""The docker engine against a real daemon."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import psutil
import pytest

from agent.engines.docker import DockerEngine
from agent.errors import AgentError, Conflict, DoesNotFit, ImageMissing, Unsupported
from agent.machine import Machine, Running, Stopped, Unusable, Usable
from specs.names import VmId
from tests.docker_fixture import IMAGE, DockerDaemon, box_image, docker_daemon, make_machine  # noqa: F401

pytestmark = pytest.mark.real

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGJveA alice@laptop"
NOW = timedelta()


@pytest.fixture
async def engine(docker: DockerDaemon, tmp_path: Path) -> AsyncIterator[DockerEngine]:
    made = DockerEngine(tmp_path, docker.argv)
    yield made
    docker.start()
    await made.leftovers(frozenset())
    await made.close()
    assert docker.containers() == []


async def run_machine(engine: DockerEngine, machine: Machine) -> int:
    await engine.prepare(machine)
    await engine.start(machine)
    state = await engine.state(machine.id, machine.folder)
    assert isinstance(state, Running)
    return state.pid


class Exits:
    """Collects on_exit calls; `of` waits for one."""

    def __init__(self, engine: DockerEngine) -> None:
        self._seen: asyncio.Queue[VmId] = asyncio.Queue()
        engine.on_exit = self._seen.put_nowait

    async def of(self, vm_id: VmId) -> None:
        async with asyncio.timeout(20):
            while await self._seen.get() != vm_id:
                pass

    def forget(self) -> None:
        while not self._seen.empty():
            self._seen.get_nowait()


async def test_probe_runs_a_container_and_leaves_nothing(docker: DockerDaemon, engine: DockerEngine) -> None:
    images = docker("image", "ls", "-q")
    probe = await engine.probe()
    assert isinstance(probe, Usable)
    assert probe.detail.startswith("docker 20.") or probe.detail.startswith("docker 2")
    assert probe.warnings == ()
    assert (docker.containers(), docker("image", "ls", "-q")) == ([], images)


async def test_probe_of_a_silent_daemon_says_what_to_do(tmp_path: Path) -> None:
    engine = DockerEngine(tmp_path, ("docker", "-H", f"unix://{tmp_path}/none.sock"))
    probe = await engine.probe()
    assert isinstance(probe, Unusable)
    assert "start it (ops/dockerd" in probe.why


async def test_state_of_a_silent_daemon_is_unknown_not_absent(tmp_path: Path) -> None:
    engine = DockerEngine(tmp_path, ("docker", "-H", f"unix://{tmp_path}/none.sock"))
    with pytest.raises(AgentError, match="does not answer"):
        await engine.state(VmId("a"), tmp_path)
    await engine.close()


async def test_images_are_listed_by_every_name_they_can_be_started_with(docker: DockerDaemon, engine: DockerEngine) -> None:
    docker("tag", IMAGE, "registry.example:5000/team/app:1.2")
    try:
        assert await engine.images() == (IMAGE, f"{IMAGE}:latest", "registry.example:5000/team/app:1.2")
    finally:
        docker("rmi", "registry.example:5000/team/app:1.2")


async def test_a_disk_without_quota_and_user_data_are_told_before_anything_is_made(
    engine: DockerEngine, tmp_path: Path
) -> None:
    await engine.probe()
    request = make_machine(tmp_path, "vm-1").request
    assert engine.check(request) == (
        "disk: 512 MiB is not enforced for this container, because overlay2 on extfs has no quotas",
    )
    with pytest.raises(Unsupported, match="user_data"):
        engine.check(request.model_copy(update={"user_data": "#!/bin/sh"}))
    with pytest.raises(Unsupported, match="at least 6 MiB"):
        engine.check(request.model_copy(update={"mem": 5}))


async def test_a_life_from_prepare_to_destroy(docker: DockerDaemon, engine: DockerEngine, tmp_path: Path) -> None:
    machine = make_machine(tmp_path, "vm-1", name="Web_One")
    assert await engine.state(machine.id, machine.folder) is None
    await engine.prepare(machine)
    assert await engine.state(machine.id, machine.folder) == Stopped()
    await engine.start(machine)
    first = await engine.state(machine.id, machine.folder)
    assert isinstance(first, Running)
    assert psutil.pid_exists(first.pid)
    await engine.start(machine)
    assert await engine.state(machine.id, machine.folder) == first
    docker("exec", "muster-vm-1", "sh", "-c", "echo kept > /root/note")
    await engine.stop(machine, timedelta(seconds=5))
    assert await engine.state(machine.id, machine.folder) == Stopped()
    assert not psutil.pid_exists(first.pid)
    await engine.prepare(machine)
    await engine.start(machine)
    assert docker("exec", "muster-vm-1", "cat", "/root/note") == "kept"
    assert docker("exec", "muster-vm-1", "hostname") == "web-one"
    await engine.destroy(machine.id, machine.folder)
    assert await engine.state(machine.id, machine.folder) is None
    assert (docker.containers(), list(machine.folder.iterdir())) == ([], [])
    await engine.destroy(machine.id, machine.folder)


async def test_keys_are_roots_alone(docker: DockerDaemon, engine: DockerEngine, tmp_path: Path) -> None:
    machine = make_machine(tmp_path, "vm-1", ssh_keys=[KEY, KEY + "2"])
    await run_machine(engine, machine)
    assert docker("exec", "muster-vm-1", "cat", "/root/.ssh/authorized_keys") == f"{KEY}\n{KEY}2"
    shown = docker("exec", "muster-vm-1", "stat", "-c", "%n %u:%g %a", "/root", "/root/.ssh", "/root/.ssh/authorized_keys")
    assert shown.splitlines() == ["/root 0:0 700", "/root/.ssh 0:0 700", "/root/.ssh/authorized_keys 0:0 600"]


async def test_a_container_gets_its_limits_and_no_more_privileges_than_servers_need(
    docker: DockerDaemon, engine: DockerEngine, tmp_path: Path
) -> None:
    await run_machine(engine, make_machine(tmp_path, "vm-1", cpu=7, mem=96))
    fields = "{{.HostConfig.Memory}} {{.HostConfig.MemorySwap}} {{.HostConfig.CpuQuota}} {{.HostConfig.PidsLimit}}"
    assert docker("inspect", "-f", fields, "muster-vm-1") == f"{96 << 20} {96 << 20} 700000 4096"
    status = dict(
        line.split(":", 1) for line in docker("exec", "muster-vm-1", "cat", "/proc/1/status").splitlines() if ":" in line
    )
    assert status["NoNewPrivs"].strip() == "1"
    # chown dac_override fowner fsetid kill setgid setuid net_bind_service sys_chroot audit_write (capability.h)
    wanted = sum(1 << bit for bit in (0, 1, 3, 4, 5, 6, 7, 10, 18, 29))
    assert int(status["CapBnd"], 16) == int(status["CapEff"], 16) == wanted


async def test_user_network_publishes_every_leased_port(docker: DockerDaemon, engine: DockerEngine, tmp_path: Path) -> None:
    machine = make_machine(tmp_path, "vm-1", ports={80: 20080, 22: 20022})
    await run_machine(engine, machine)
    assert sorted(docker("port", "muster-vm-1").splitlines()) == ["22/tcp -> 127.0.0.1:20022", "80/tcp -> 127.0.0.1:20080"]
    assert docker.get("http://127.0.0.1:20080/") == "vm-1"


async def test_deny_outgoing_is_refused_where_nothing_would_enforce_it(
    docker: DockerDaemon, engine: DockerEngine, tmp_path: Path
) -> None:
    with pytest.raises(Unsupported, match="--network bridge"):
        await engine.prepare(make_machine(tmp_path, "vm-1", deny_outgoing=True))
    assert docker.containers() == []


async def test_a_taken_host_port_is_told_as_such(engine: DockerEngine, tmp_path: Path) -> None:
    await run_machine(engine, make_machine(tmp_path, "vm-1", ports={80: 20081}))
    second = make_machine(tmp_path, "vm-2", ports={80: 20081})
    await engine.prepare(second)
    with pytest.raises(DoesNotFit, match="host port"):
        await engine.start(second)
    state = await engine.state(second.id, second.folder)
    assert isinstance(state, Stopped)


async def test_a_missing_image_is_not_pulled(docker: DockerDaemon, engine: DockerEngine, tmp_path: Path) -> None:
    with pytest.raises(ImageMissing, match="never pulled"):
        await engine.prepare(make_machine(tmp_path, "vm-1", image="nowhere/nothing:1"))
    assert docker.containers() == []


async def test_a_name_that_looks_like_an_option_is_only_a_missing_image(engine: DockerEngine, tmp_path: Path) -> None:
    with pytest.raises(AgentError):
        await engine.prepare(make_machine(tmp_path, "vm-1", image="--privileged"))


async def test_a_killed_container_is_seen_at_once_and_told_from_a_stop(engine: DockerEngine, tmp_path: Path) -> None:
    exits = Exits(engine)
    machine = make_machine(tmp_path, "vm-1")
    pid = await run_machine(engine, machine)
    os.kill(pid, signal.SIGKILL)
    await exits.of(machine.id)
    state = await engine.state(machine.id, machine.folder)
    assert state == Stopped("crashed", "its main program ended with status 137 (signal 9)")
    await engine.start(machine)
    assert isinstance(await engine.state(machine.id, machine.folder), Running)


async def test_a_guest_that_ends_by_itself_has_exited(engine: DockerEngine, tmp_path: Path) -> None:
    exits = Exits(engine)
    machine = make_machine(tmp_path, "vm-1")
    os.kill(await run_machine(engine, machine), signal.SIGTERM)
    await exits.of(machine.id)
    assert await engine.state(machine.id, machine.folder) == Stopped("exited", "its main program ended with status 0")


async def test_a_guest_that_used_up_its_memory_says_so(docker: DockerDaemon, engine: DockerEngine, tmp_path: Path) -> None:
    exits = Exits(engine)
    docker("import", "-c", 'CMD ["/bin/tail", "/dev/zero"]', "-", "greedy:1", stdin=box_image())
    machine = make_machine(tmp_path, "vm-1", image="greedy:1", mem=16)
    try:
        await engine.prepare(machine)
        await engine.start(machine)
        await exits.of(machine.id)
        state = await engine.state(machine.id, machine.folder)
        assert state == Stopped("crashed", "killed by the kernel: it used up its 16 MiB of memory")
    finally:
        await engine.destroy(machine.id, machine.folder)
        docker("rmi", "greedy:1")


async def test_a_guest_deaf_to_sigterm_is_killed_after_the_grace_and_counts_as_stopped(
    docker: DockerDaemon, engine: DockerEngine, tmp_path: Path
) -> None:
    docker("import", "-c", 'CMD ["/bin/sleep", "1000"]', "-", "stubborn:1", stdin=box_image())
    machine = make_machine(tmp_path, "vm-1", image="stubborn:1")
    try:
        pid = await run_machine(engine, machine)
        await engine.stop(machine, timedelta(seconds=1))
        assert await engine.state(machine.id, machine.folder) == Stopped()
        assert not psutil.pid_exists(pid)
    finally:
        await engine.destroy(machine.id, machine.folder)
        docker("rmi", "stubborn:1")


async def test_an_image_whose_program_is_missing_fails_with_its_reason(
    docker: DockerDaemon, engine: DockerEngine, tmp_path: Path
) -> None:
    docker("import", "-c", 'CMD ["/nope"]', "-", "broken:1", stdin=box_image())
    machine = make_machine(tmp_path, "vm-1", image="broken:1")
    try:
        await engine.prepare(machine)
        with pytest.raises(AgentError, match="/nope"):
            await engine.start(machine)
        state = await engine.state(machine.id, machine.folder)
        assert isinstance(state, Stopped)
        assert (state.reason, "/nope" in state.message) == ("crashed", True)
    finally:
        await engine.destroy(machine.id, machine.folder)
        docker("rmi", "broken:1")


async def test_a_container_without_its_keys_is_made_again(docker: DockerDaemon, engine: DockerEngine, tmp_path: Path) -> None:
    machine = make_machine(tmp_path, "vm-1", ssh_keys=[KEY])
    await engine.prepare(machine)
    (machine.folder / "docker.id").unlink()  # as after a death between `create` and `cp`
    before = docker("inspect", "-f", "{{.Id}}", "muster-vm-1")
    again = DockerEngine(tmp_path, docker.argv)
    await again.prepare(machine)
    await again.start(machine)
    await again.close()
    assert docker("inspect", "-f", "{{.Id}}", "muster-vm-1") != before
    assert docker("exec", "muster-vm-1", "cat", "/root/.ssh/authorized_keys") == KEY


async def test_a_container_that_ran_is_never_made_again(docker: DockerDaemon, engine: DockerEngine, tmp_path: Path) -> None:
    machine = make_machine(tmp_path, "vm-1")
    await run_machine(engine, machine)
    await engine.stop(machine, NOW)
    (machine.folder / "docker.id").unlink()
    before = docker("inspect", "-f", "{{.Id}}", "muster-vm-1")
    await engine.prepare(machine)
    assert docker("inspect", "-f", "{{.Id}}", "muster-vm-1") == before


@pytest.mark.parametrize("turns", [1, 50, 400])
async def test_a_prepare_cut_off_at_any_instant_leaves_nothing_after_destroy(
    docker: DockerDaemon, engine: DockerEngine, tmp_path: Path, turns: int
) -> None:
    machine = make_machine(tmp_path, "vm-1", ssh_keys=[KEY])
    task = asyncio.create_task(engine.prepare(machine))
    for _ in range(turns):
        await asyncio.sleep(0.0002)
    task.cancel()
    await asyncio.wait({task})
    await engine.destroy(machine.id, machine.folder)
    assert docker.containers() == []


async def test_a_new_agent_process_adopts_what_runs_and_hears_of_its_end(
    docker: DockerDaemon, engine: DockerEngine, tmp_path: Path
) -> None:
    machine = make_machine(tmp_path, "vm-1")
    pid = await run_machine(engine, machine)
    await engine.close()
    again = DockerEngine(tmp_path, docker.argv)
    exits = Exits(again)
    assert await again.state(machine.id, machine.folder) == Running(pid)
    os.kill(pid, signal.SIGKILL)
    await exits.of(machine.id)
    state = await again.state(machine.id, machine.folder)
    assert isinstance(state, Stopped)
    await again.close()


async def test_containers_outlive_a_daemon_restart_and_are_watched_again(
    docker: DockerDaemon, engine: DockerEngine, tmp_path: Path
) -> None:
    exits = Exits(engine)
    kept, killed = make_machine(tmp_path, "vm-1"), make_machine(tmp_path, "vm-2")
    pid = await run_machine(engine, kept)
    victim = await run_machine(engine, killed)
    exits.forget()
    await asyncio.to_thread(docker.stop, keep=True)
    with pytest.raises(AgentError, match="does not answer"):
        await engine.state(kept.id, kept.folder)
    os.kill(victim, signal.SIGKILL)
    await asyncio.to_thread(docker.start)
    await exits.of(killed.id)
    assert await engine.state(kept.id, kept.folder) == Running(pid)
    assert isinstance(await engine.state(killed.id, killed.folder), Stopped)
    exits.forget()
    os.kill(pid, signal.SIGKILL)
    await exits.of(kept.id)
    assert isinstance(await engine.state(kept.id, kept.folder), Stopped)


async def test_leftovers_are_removed_for_this_agent_only(docker: DockerDaemon, engine: DockerEngine, tmp_path: Path) -> None:
    neighbour_dir = tmp_path / "neighbour"
    neighbour = DockerEngine(neighbour_dir, docker.argv)
    mine, lost, theirs = (
        make_machine(tmp_path, "mine"),
        make_machine(tmp_path, "lost"),
        make_machine(neighbour_dir, "theirs"),
    )
    await run_machine(engine, mine)
    await run_machine(engine, lost)
    await run_machine(neighbour, theirs)
    assert await engine.leftovers(frozenset({mine.id})) == ("container muster-lost",)
    assert docker.containers() == ["muster-mine", "muster-theirs"]
    assert await engine.leftovers(frozenset({mine.id})) == ()
    with pytest.raises(Conflict, match="another agent"):
        await engine.prepare(make_machine(tmp_path, "theirs"))
    await engine.destroy(theirs.id, theirs.folder)
    assert await engine.state(theirs.id, theirs.folder) is None
    assert isinstance(await neighbour.state(theirs.id, theirs.folder), Running)
    await neighbour.destroy(theirs.id, theirs.folder)
    await neighbour.close()


async def test_a_hundred_questions_at_once_are_answered_together(
    docker: DockerDaemon, engine: DockerEngine, tmp_path: Path
) -> None:
    machine = make_machine(tmp_path, "vm-7")
    pid = await run_machine(engine, machine)
    states = await asyncio.gather(*(engine.state(VmId(f"vm-{number}"), tmp_path / f"vm-{number}") for number in range(100)))
    assert [state for state in states if state is not None] == [Running(pid)]
    assert states[7] == Running(pid)


async def test_the_watcher_of_a_killed_agent_does_not_stay(docker: DockerDaemon, engine: DockerEngine, tmp_path: Path) -> None:
    script = (
        "import asyncio, sys; from pathlib import Path; from agent.engines.docker import DockerEngine\n"
        "async def main():\n"
        "    engine = DockerEngine(Path(sys.argv[1]), tuple(sys.argv[2:]))\n"
        "    ready = asyncio.Event(); engine.on_exit = lambda _: ready.set(); engine._known.add('x')\n"
        "    await engine.state('x', Path(sys.argv[1])); await ready.wait()\n"
        "    print('watching', flush=True); await asyncio.sleep(100)\n"
        "asyncio.run(main())\n"
    )
    agent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, str(tmp_path), *docker.argv, stdout=asyncio.subprocess.PIPE
    )
    assert agent.stdout is not None
    assert await agent.stdout.readline() == b"watching\n"
    watchers = _watchers(engine.owner)
    assert len(watchers) == 1
    agent.kill()
    await agent.wait()
    _, alive = await asyncio.to_thread(psutil.wait_procs, watchers, 20)
    assert alive == []


def _watchers(owner: str) -> list[psutil.Process]:
    """Processes that are `docker events` for this owner."""
    own = f"--filter=label=muster.agent={owner}"
    return [process for process in psutil.process_iter(["cmdline"]) if {"events", own} <= set(process.info["cmdline"] or ())]
