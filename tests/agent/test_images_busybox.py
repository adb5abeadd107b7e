"""The container image, built into a real daemon and run as the docker engine runs it."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest

from agent.engines.docker import DockerEngine
from agent.images import BuiltImage, build
from agent.images.recipe import default_cache
from agent.machine import Machine, Stopped
from tests.docker_fixture import DockerDaemon, docker_daemon, make_machine  # noqa: F401
from tests.images_fixture import SshKey, ssh_key  # noqa: F401

pytestmark = pytest.mark.real


async def build_busybox(folder: Path, docker: DockerDaemon, said: list[str]) -> BuiltImage:
    return await build("busybox", folder, progress=said.append, cache_dir=default_cache(), docker=docker.argv)


@pytest.fixture
async def engine(docker: DockerDaemon, tmp_path: Path) -> AsyncIterator[DockerEngine]:
    made = DockerEngine(tmp_path / "runtime", docker.argv)
    yield made
    await made.leftovers(frozenset())
    await made.close()


async def answer(docker: DockerDaemon, url: str) -> str:
    """The page behind a URL once the server is up."""
    async with asyncio.timeout(30):
        while not (page := await asyncio.to_thread(docker.get, url)):  # noqa: ASYNC110 nothing here could set an event
            await asyncio.sleep(0.1)
    return page


async def test_the_image_is_built_once_and_the_daemon_is_asked_whether_it_is_there(
    docker: DockerDaemon, tmp_path: Path
) -> None:
    said: list[str] = []
    built = await build_busybox(tmp_path, docker, said)
    assert (built.reference, built.format, built.path) == ("muster/busybox", "docker", None)
    assert docker("image", "inspect", "-f", "{{.Id}}", "muster/busybox:latest") == built.digest
    assert 1 << 20 < built.size < 16 << 20
    assert json.loads((tmp_path / "busybox.json").read_text())["digest"] == built.digest
    assert "busybox-static" in built.packages

    said.clear()
    assert await build_busybox(tmp_path, docker, said) == built
    assert said == ["busybox is up to date"]

    docker("image", "rm", "-f", "muster/busybox:latest")
    said.clear()
    await build_busybox(tmp_path, docker, said)
    assert said[-2:-1] == ["importing muster/busybox:latest"]


async def start(docker: DockerDaemon, engine: DockerEngine, folder: Path, key: SshKey) -> Machine:
    await build_busybox(folder, docker, [])
    machine = make_machine(
        folder / "runtime",
        "web",
        image="muster/busybox",
        ports={22: 20422, 80: 20480},
        ssh_keys=[key.public],
        name="web",
    )
    await engine.prepare(machine)
    await engine.start(machine)
    return machine


async def test_it_serves_its_name_and_lets_the_key_in(
    docker: DockerDaemon,
    engine: DockerEngine,
    tmp_path: Path,
    ssh_key: SshKey,  # noqa: F811
) -> None:
    machine = await start(docker, engine, tmp_path, ssh_key)
    assert await answer(docker, "http://127.0.0.1:20480/") == "<!doctype html><title>web</title><h1>web</h1>"
    assert docker.host(*ssh_key.command(20422, "hostname; id -u; awk 'BEGIN {print 6*7}'")) == "web\n0\n42"
    stranger = [word for word in ssh_key.command(20422, "id") if word != str(ssh_key.path)]
    stranger.insert(stranger.index("-i") + 1, "/dev/null")
    with pytest.raises(subprocess.CalledProcessError) as refused:
        docker.host(*stranger)
    assert "Permission denied" in str(refused.value.stderr)
    await engine.destroy(machine.id, machine.folder)


async def test_it_ends_at_once_when_asked_and_keeps_its_files(
    docker: DockerDaemon,
    engine: DockerEngine,
    tmp_path: Path,
    ssh_key: SshKey,  # noqa: F811
) -> None:
    machine = await start(docker, engine, tmp_path, ssh_key)
    await answer(docker, "http://127.0.0.1:20480/")
    docker("exec", f"muster-{machine.id}", "sh", "-c", "echo kept >/persist/note")
    await engine.stop(machine, timedelta(seconds=60))
    assert await engine.state(machine.id, machine.folder) == Stopped("")
    # 0 is its own answer to SIGTERM; 137 would be the SIGKILL after the grace time.
    assert docker("inspect", "-f", "{{.State.ExitCode}}", f"muster-{machine.id}") == "0"

    await engine.start(machine)
    await answer(docker, "http://127.0.0.1:20480/")
    assert docker("exec", f"muster-{machine.id}", "cat", "/persist/note") == "kept"
    await engine.destroy(machine.id, machine.folder)
    assert docker.containers() == []
