"""The command line as processes: what it loads, how it ends, and `muster up` with both parts running."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

from api.cli.feed import Fleet
from api.cli.progress import _Live
from api.client import Change, Snapshot
from tests.fleet_rig import FleetRig, env

MUSTER = (sys.executable, "-P", "-m", "api.cli.main")


def muster(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command line to its end."""
    return subprocess.run(
        [*MUSTER, *words], capture_output=True, text=True, env={**os.environ, **environment}, timeout=60, check=False
    )


def test_help_loads_nothing_heavy() -> None:
    script = (
        "import sys\nfrom api.cli.main import run_command\n"
        "run_command(['--help'])\nrun_command(['up', '--help'])\nprint(sorted(sys.modules))"
    )
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    heavy = {"tornado", "rich", "sqlalchemy", "httpx", "pydantic", "ruamel", "agent", "reconciler", "psutil", "sh"}
    loaded = {name.strip("'").split(".")[0] for name in told.stdout.splitlines()[-1].strip("[]").split(", ")}
    assert loaded & heavy == set()


def test_every_command_has_help_and_a_bare_muster_shows_it() -> None:
    bare = muster()
    assert (bare.returncode, bare.stdout) == (2, "")
    assert "Ask for machines" in bare.stderr
    for words in (["apply"], ["get"], ["describe"], ["host", "add"], ["image", "build"], ["agent"], ["up"], ["controller"]):
        told = muster(*words, "--help")
        assert (told.returncode, told.stderr) == (0, "")
        assert "Usage: muster" in told.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_a_script_of_that_shell(shell: str) -> None:
    told = muster("completion", shell)
    assert (told.returncode, told.stderr) == (0, "")
    assert "_MUSTER_COMPLETE" in told.stdout


def test_a_controller_and_an_agent_say_in_one_line_why_they_cannot_start(tmp_path: Path) -> None:
    for part in ("controller", "agent"):
        told = muster(part, "--listen", "0.0.0.0:0", "--data-dir", str(tmp_path))
        assert (told.returncode, told.stdout) == (1, "")
        assert told.stderr.count("\n") == 1 and told.stderr.startswith("muster: ")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        told = muster("controller", "--listen", f"127.0.0.1:{taken.getsockname()[1]}", "--data-dir", str(tmp_path / "c"))
    assert told.returncode == 1
    assert told.stderr.splitlines()[-1].startswith("muster: cannot listen on 127.0.0.1:")


def test_a_live_table_shows_hostile_text_as_text() -> None:
    hostile = "\x1b[31m[bold]no\n[/bold]"
    fleet = Fleet()
    fleet.take(Snapshot.model_validate({"revision": 1, "vms": [vm_object("front", "degraded", message=hostile)]}))
    out = StringIO()
    Console(file=out, force_terminal=True, width=120, color_system=None).print(_Live(fleet, ["web"])._table())
    shown = out.getvalue()
    assert "\\x1b[31m[bold]no\\n[/bold]" in shown and "\x1b[31m" not in shown
    assert "0 of 1 as desired" in shown and "web/front" in shown


def vm_object(name: str, phase: str, **changes: Any) -> dict[str, Any]:
    """A VM as the controller answers it."""
    wanted = {
        "id": f"id-{name}",
        "env_id": "web",
        "host_id": "h",
        "image": "t",
        "engine": "qemu",
        "cpu": 1,
        "mem": 1,
        "disk": 1,
    }
    seen = {"ip": "", "port_map": {}, "state": "running", "created_at": 1, "name": name, "desired": "running", "phase": phase}
    return wanted | seen | changes


def test_the_fleet_follows_changes_and_forgets_what_is_gone() -> None:
    fleet = Fleet()
    fleet.take(Snapshot.model_validate({"revision": 1, "vms": [vm_object("b", "ready"), vm_object("a", "pending")]}))
    fleet.take(Change(revision=2, kind="vm", id="id-a", object=vm_object("a", "ready")))
    fleet.take(Change(revision=3, kind="vm", id="id-b", object=None))
    fleet.take(Change(revision=4, kind="vm", id="never-seen", object=None))
    assert [(vm.name, vm.phase) for vm in fleet.vms_of("web")] == [("a", "ready")]


@pytest.mark.e2e
async def test_watching_prints_each_change_until_interrupted(tmp_path: Path) -> None:
    async with FleetRig(tmp_path) as rig:
        process = await asyncio.create_subprocess_exec(
            *MUSTER, "get", "envs", "-w", "-o", "json", "--url", str(rig.http.base_url),
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert process.stdout is not None
        await rig.call("POST", "/api/envs", env("web"))
        async with asyncio.timeout(30):
            told: list[Any] = []
            while not told or (told[-1]["object"] or {}).get("phase") != "ready":
                told.append(json.loads(await process.stdout.readline()))
            await rig.call("DELETE", "/api/envs/web")
            while told[-1]["object"] is not None:
                told.append(json.loads(await process.stdout.readline()))
        process.send_signal(signal.SIGINT)
        _, err = await process.communicate()
        assert (process.returncode, err.strip()) == (130, b"")
        assert {line["id"] for line in told} == {"web"}


@pytest.mark.e2e
async def test_following_events_tells_each_once_and_goes_on_after_the_controller_restarts(tmp_path: Path) -> None:
    async with FleetRig(tmp_path) as rig:
        await rig.call("POST", "/api/envs?wait=30", env("old"))
        process = await asyncio.create_subprocess_exec(
            *MUSTER, "events", "--follow", "-o", "json", "--url", str(rig.http.base_url),
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert process.stdout is not None
        told: list[Any] = []

        async def until_told(reason: str, name: str) -> None:
            async with asyncio.timeout(60):
                while not told or (told[-1]["reason"], told[-1]["env"]) != (reason, name):
                    told.append(json.loads(await process.stdout.readline()))  # type: ignore[union-attr]

        await until_told("Running", "old")
        await rig.call("POST", "/api/envs?wait=30", env("web"))
        await until_told("Running", "web")
        await rig.stop_controller()
        await rig.start_controller()
        await rig.call("POST", "/api/envs?wait=30", env("late"))
        await until_told("Running", "late")
        process.send_signal(signal.SIGINT)
        await process.communicate()
        assert process.returncode == 130
        revisions = [event["revision"] for event in told]
        assert revisions == sorted(set(revisions)), "in order, and none twice"
        assert {"old", "web", "late"} <= {event["env"] for event in told}


async def test_a_reader_that_leaves_ends_the_command_without_a_complaint(tmp_path: Path) -> None:
    async with FleetRig(tmp_path) as rig:
        await rig.call("POST", "/api/envs?wait=30", env("web"))
        reader, writer = os.pipe()
        os.close(reader)
        process = await asyncio.create_subprocess_exec(
            *MUSTER, "get", "envs", "--url", str(rig.http.base_url), stdout=writer, stderr=asyncio.subprocess.PIPE
        )
        os.close(writer)
        _, err = await process.communicate()
        assert (process.returncode, err) == (1, b"")


def free_address() -> str:
    """An address nobody listens on right now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{found.getsockname()[1]}"


class Up:
    """A running `muster up`."""

    def __init__(self, folder: Path, *words: str, agent: str | None = None) -> None:
        self.url, self.agent = f"http://{free_address()}", agent or free_address()
        self.log = folder / "up.log"
        listen = (
            "--listen",
            self.url.removeprefix("http://"),
            "--agent-listen",
            self.agent,
            "--data-dir",
            str(folder / "data"),
        )
        machine = ("--network", "user", "--engines", "qemu", "--accel", "tcg", *words)
        with self.log.open("wb") as log:
            self.process = subprocess.Popen([*MUSTER, "up", *listen, *machine], stdout=log, stderr=subprocess.STDOUT)

    def part(self, name: str) -> psutil.Process:
        """The running controller or agent."""
        return next(child for child in psutil.Process(self.process.pid).children() if name in child.cmdline())

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """A command against this controller."""
        return muster(*words, MUSTER_URL=self.url)

    def end(self, number: signal.Signals = signal.SIGINT) -> int:
        """Signals it and waits."""
        self.process.send_signal(number)
        return self.process.wait(timeout=60)


@contextlib.contextmanager
def running(folder: Path, *words: str, agent: str | None = None) -> Iterator[Up]:
    """`muster up`, ready; gone afterwards whatever happens."""
    up = Up(folder, *words, agent=agent)
    try:
        until(lambda: "\nnext " in up.log.read_text() or up.process.poll() is not None)
        assert up.process.poll() is None, up.log.read_text()
        yield up
    finally:
        if up.process.poll() is None:
            up.end()


def until(reached: Callable[[], bool]) -> None:
    """Waits for something to become true; the test's own time limit ends a vain wait."""
    while not reached():
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(["sleep", "0.05"], check=True, timeout=5)


@pytest.mark.e2e
def test_up_registers_its_agent_and_ends_both_at_ctrl_c(tmp_path: Path) -> None:
    with running(tmp_path) as up:
        (host,) = json.loads(up.run("get", "hosts", "-o", "json").stdout)
        assert (host["addr"], host["state"], host["engines"]) == (up.agent, "online", ["qemu"])
        second = muster("up", "--listen", up.url.removeprefix("http://"))
        assert second.returncode == 1
        assert second.stderr.startswith(f"muster: something listens on {up.url.removeprefix('http://')} already; ")
        parts = [up.part("controller"), up.part("agent")]
        assert up.end() == 0
        assert not any(part.is_running() for part in parts)
    assert up.log.read_text().endswith("stopped; VMs keep running\n")


@pytest.mark.e2e
def test_up_starts_again_what_was_killed_and_the_other_part_goes_on(tmp_path: Path) -> None:
    with running(tmp_path) as up:
        controller, agent = up.part("controller"), up.part("agent")
        agent.kill()
        until(lambda: "\nthe agent was killed by signal 9; starting it again in 1 s\n" in up.log.read_text())
        assert controller.is_running()
        until(lambda: [host["state"] for host in hosts(up)] == ["online"] and up_has(up, "agent"))
        new_agent = up.part("agent")
        controller.kill()
        until(lambda: "\nthe controller was killed by signal 9; starting it again in 1 s\n" in up.log.read_text())
        assert new_agent.is_running()
        until(lambda: up_has(up, "controller") and [host["state"] for host in hosts(up)] == ["online"])
        assert up.part("agent") == new_agent


def hosts(up: Up) -> list[dict[str, Any]]:
    """The hosts, none while the controller does not answer."""
    told = up.run("get", "hosts", "-o", "json")
    return list(json.loads(told.stdout)) if told.returncode == 0 else []


def up_has(up: Up, name: str) -> bool:
    """Whether a part runs right now."""
    return any(name in child.cmdline() for child in psutil.Process(up.process.pid).children())


@pytest.mark.e2e
def test_up_killed_outright_takes_its_parts_with_it(tmp_path: Path) -> None:
    with running(tmp_path) as up:
        parts = [up.part("controller"), up.part("agent")]
        assert up.end(signal.SIGKILL) == -9
        _, alive = psutil.wait_procs(parts, timeout=30)
        assert alive == []


@pytest.mark.e2e
def test_up_with_destroy_on_exit_leaves_no_environment_and_makes_the_key_it_is_told_to_use(tmp_path: Path) -> None:
    key = tmp_path / "key"
    spec = tmp_path / "env.yaml"
    spec.write_text("id: web\nssh_keys: []\nvms: [{image: missing, cpu: 1, mem: 64, disk: 64}]\n")
    words = ("--api-key-file", str(key))
    with running(tmp_path, *words, "--destroy-on-exit") as up:
        assert key.stat().st_mode & 0o777 == 0o600
        assert up.run("get", "envs").returncode == 1
        assert up.run("apply", "-f", str(spec), *words).returncode == 0
        assert up.end() == 0
        assert up.log.read_text().endswith("stopped\n")
    with running(tmp_path, *words, agent=up.agent) as up:
        assert json.loads(up.run("get", "envs", "-o", "json", *words).stdout) == []


@pytest.mark.e2e
def test_up_on_another_agent_address_says_where_this_host_is_registered(tmp_path: Path) -> None:
    with running(tmp_path) as up:
        first = up.agent
    moved = Up(tmp_path)
    assert moved.process.wait(timeout=60) == 1
    told = moved.log.read_text().splitlines()[-1]
    assert (
        told.startswith("muster: ") and first in told and told.endswith(f"; start it there again with --agent-listen {first}")
    )
