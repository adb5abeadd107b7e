"""Containers on a bridge that is ours: a real daemon, a real bridge, in a network namespace."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest

from agent.engines.docker import DockerEngine
from agent.errors import AgentError, DoesNotFit
from agent.machine import Machine, Stopped, mac_of
from specs.names import VmId
from tests.docker_fixture import GATEWAY, SUBNET, DockerDaemon, docker_daemon, make_machine  # noqa: F401

pytestmark = pytest.mark.real

BRIDGE = "mbr0"
ADDRESS = f"inet {GATEWAY}/{SUBNET.prefixlen}"


@pytest.fixture
async def engine(docker: DockerDaemon, tmp_path: Path) -> AsyncIterator[DockerEngine]:
    docker.make_bridge(BRIDGE)
    made = DockerEngine(tmp_path, docker.argv)
    yield made
    await made.leftovers(frozenset())
    await made.close()
    docker.host("ip", "link", "delete", BRIDGE)
    assert docker.containers() == []
    assert networks(docker) == ["bridge", "host", "none"]


def networks(docker: DockerDaemon) -> list[str]:
    return sorted(docker("network", "ls", "--format", "{{.Name}}").split())


def on_bridge(folder: Path, vm_id: str, ip: str = "10.66.0.5", *, bridge: str = BRIDGE, deny_outgoing: bool = False) -> Machine:
    return make_machine(folder, vm_id, kind="bridge", bridge=bridge, ip=ip, deny_outgoing=deny_outgoing)


async def run_machine(engine: DockerEngine, machine: Machine) -> None:
    await engine.prepare(machine)
    await engine.start(machine)


async def test_a_container_sits_on_our_bridge_with_its_leased_addresses(
    docker: DockerDaemon, engine: DockerEngine, tmp_path: Path
) -> None:
    before = docker.host("iptables-save", "-t", "nat")
    await run_machine(engine, on_bridge(tmp_path, "vm-1"))
    assert docker.get("http://10.66.0.5/") == "vm-1"
    links = docker("exec", "muster-vm-1", "ip", "address", "show", "dev", "eth0")
    assert f"ether {mac_of(VmId('vm-1'))} " in links
    assert "inet 10.66.0.5/16 " in links
    assert docker("exec", "muster-vm-1", "ip", "route").splitlines()[0] == f"default via {GATEWAY} dev eth0 "
    assert docker("port", "muster-vm-1") == ""
    assert _rules(docker.host("iptables-save", "-t", "nat")) == _rules(before)


async def test_the_docker_network_goes_with_the_last_container_and_the_bridge_stays(
    docker: DockerDaemon, engine: DockerEngine, tmp_path: Path
) -> None:
    first, second = on_bridge(tmp_path, "vm-1"), on_bridge(tmp_path, "vm-2", "10.66.0.6")
    await run_machine(engine, first)
    await run_machine(engine, second)
    await engine.stop(second, timedelta(seconds=5))
    await engine.destroy(first.id, first.folder)
    assert "muster-mbr0" in networks(docker)
    await engine.destroy(second.id, second.folder)
    assert "muster-mbr0" not in networks(docker)
    assert ADDRESS in docker.host("ip", "address", "show", "dev", BRIDGE)


async def test_a_stopped_container_starts_on_a_network_that_was_made_anew(
    docker: DockerDaemon, engine: DockerEngine, tmp_path: Path
) -> None:
    machine = on_bridge(tmp_path, "vm-1")
    await run_machine(engine, machine)
    docker("exec", "muster-vm-1", "sh", "-c", "echo kept > /note")
    await engine.stop(machine, timedelta(seconds=5))
    docker("network", "rm", "muster-mbr0")  # as `docker network prune` does
    await engine.start(machine)
    assert docker.get("http://10.66.0.5/") == "vm-1"
    assert docker("exec", "muster-vm-1", "cat", "/note") == "kept"
    assert f"ether {mac_of(VmId('vm-1'))} " in docker("exec", "muster-vm-1", "ip", "address")


async def test_a_bridge_made_anew_while_a_container_was_stopped_is_joined_again(
    docker: DockerDaemon, engine: DockerEngine, tmp_path: Path
) -> None:
    machine = on_bridge(tmp_path, "vm-1")
    await run_machine(engine, machine)
    await engine.stop(machine, timedelta(seconds=5))
    docker.host("ip", "link", "delete", BRIDGE)
    docker.make_bridge(BRIDGE)
    await engine.start(machine)
    assert docker.get("http://10.66.0.5/") == "vm-1"


async def test_a_missing_bridge_fails_the_start_and_nothing_else(
    docker: DockerDaemon, engine: DockerEngine, tmp_path: Path
) -> None:
    machine = on_bridge(tmp_path, "vm-1")
    await engine.prepare(machine)
    docker.host("ip", "link", "delete", BRIDGE)
    with pytest.raises(AgentError, match=BRIDGE):
        await engine.start(machine)
    state = await engine.state(machine.id, machine.folder)
    assert isinstance(state, Stopped)
    assert state.reason == "crashed"
    docker.make_bridge(BRIDGE)
    await engine.start(machine)
    assert docker.get("http://10.66.0.5/") == "vm-1"


async def test_containers_and_bridge_survive_a_daemon_restart(
    docker: DockerDaemon, engine: DockerEngine, tmp_path: Path
) -> None:
    await run_machine(engine, on_bridge(tmp_path, "vm-1"))
    docker.stop(keep=True)
    assert docker.get("http://10.66.0.5/") == "vm-1"
    docker.start()
    assert docker.get("http://10.66.0.5/") == "vm-1"
    assert ADDRESS in docker.host("ip", "address", "show", "dev", BRIDGE)


async def test_a_reused_address_says_who_has_it(docker: DockerDaemon, engine: DockerEngine, tmp_path: Path) -> None:
    await run_machine(engine, on_bridge(tmp_path, "vm-1"))
    second = on_bridge(tmp_path, "vm-2")
    await engine.prepare(second)
    with pytest.raises(DoesNotFit, match="held by another container"):
        await engine.start(second)
    assert docker.get("http://10.66.0.5/") == "vm-1"


async def test_a_subnet_of_another_docker_network_is_refused_with_what_to_do(
    docker: DockerDaemon, engine: DockerEngine, tmp_path: Path
) -> None:
    await run_machine(engine, on_bridge(tmp_path, "vm-1"))
    with pytest.raises(AgentError, match=r"already has this subnet.*--subnet"):
        await engine.prepare(on_bridge(tmp_path, "vm-2", "10.66.0.6", bridge="mbr1"))


async def test_a_denied_container_has_no_resolver_outside_itself(
    docker: DockerDaemon, engine: DockerEngine, tmp_path: Path
) -> None:
    await run_machine(engine, on_bridge(tmp_path, "vm-1", deny_outgoing=True))
    assert docker("inspect", "-f", "{{.HostConfig.Dns}}", "muster-vm-1") == "[127.0.0.1]"


def _rules(saved: str) -> list[str]:
    """Rules of iptables-save that mention an address, without counters and comments."""
    return [
        line for line in saved.splitlines() if line.startswith("-A") and any(char.isdigit() for char in line.split("-j")[0])
    ]
