"""Simulated hosts are production agents: real requests, room and long polls over machines in memory."""

from __future__ import annotations

import asyncio
import json
import random
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner
from pydantic import ValidationError

from agent.errors import AgentError
from agent.settings import AgentSettings
from agent.simulate import SimulatedHosts, Simulation
from api.cli.serve import agent
from tests.agent.runtime_rig import request


def free_ports(count: int) -> int:
    """The first of `count` consecutive ports that nobody listens on."""
    while True:
        first = random.randrange(10000, 19000)
        taken = []
        try:
            for port in range(first, first + count):
                taken.append(socket.create_server(("127.0.0.1", port)))
        except OSError:
            continue
        finally:
            for one in taken:
                one.close()
        return first


@asynccontextmanager
async def simulated(hosts: int = 1, folder: Path | None = None, port: int = 0, **options: Any) -> AsyncIterator[SimulatedHosts]:
    """Running hosts; `cpu_total` and `labels` are the agent's, other options the simulation's."""
    own = {name: options.pop(name) for name in ("cpu_total", "labels") if name in options}
    settings = AgentSettings(listen=f"127.0.0.1:{port or free_ports(hosts)}", **own)
    fleet = SimulatedHosts(settings, Simulation(simulate=hosts, **options), folder)
    await fleet.start()
    try:
        yield fleet
    finally:
        await fleet.stop()


def body(vm_id: str, **changes: Any) -> dict[str, Any]:
    return request(vm_id, **changes).wire()


async def test_each_host_has_its_own_port_id_and_zone_and_all_share_labels() -> None:
    async with simulated(3, zones=2, labels={"disk": "ssd"}) as fleet, httpx.AsyncClient(trust_env=False) as http:
        told = [(await http.get(f"{host.agent.url}/api/info")).json()["data"] for host in fleet.hosts]
        ports = [int(host.agent.url.rpartition(":")[2]) for host in fleet.hosts]
    assert ports == [ports[0], ports[0] + 1, ports[0] + 2]
    assert [info["host_id"] for info in told] == [f"sim-{port}" for port in ports]
    assert [info["labels"] for info in told] == [
        {"disk": "ssd", "zone": "zone-1"},
        {"disk": "ssd", "zone": "zone-2"},
        {"disk": "ssd", "zone": "zone-1"},
    ]
    assert told[0]["images_by_engine"]["docker"] == ["alpine-cloud", "debian", "muster/busybox", "tiny"]


async def test_a_vm_lives_its_whole_life_and_a_long_poll_tells_it() -> None:
    async with simulated() as fleet, httpx.AsyncClient(trust_env=False, base_url=fleet.hosts[0].agent.url) as http:
        assert (await http.post("/api/vms", json=body("a"))).status_code == 201
        listing = (await http.get("/api/vms")).json()
        poll = asyncio.create_task(http.get(f"/api/vms?watch=30&after={listing['boot_id']}:{listing['seq']}"))
        await http.post("/api/vms/a/stop")
        assert (await poll).json()["seq"] > listing["seq"]
        assert (await http.get("/api/vms/a")).json()["data"]["state"] == "stopped"
        await http.post("/api/vms/a/start")
        assert (await http.get("/api/vms/a")).json()["data"]["state"] == "running"
        await http.delete("/api/vms/a")
        assert (await http.get("/api/vms")).json()["data"] == []


async def test_a_full_host_answers_507_and_other_hosts_have_room() -> None:
    async with simulated(2, cpu_total=2) as fleet, httpx.AsyncClient(trust_env=False) as http:
        urls = [f"{host.agent.url}/api/vms" for host in fleet.hosts]
        statuses = [(await http.post(urls[0], json=body(name))).status_code for name in ("a", "b", "c")]
        assert statuses == [201, 201, 507]
        assert (await http.post(urls[1], json=body("c"))).status_code == 201


async def outcomes(seed: int) -> list[int]:
    async with simulated(fail_rate=0.5, seed=seed) as fleet, httpx.AsyncClient(trust_env=False) as http:
        url = f"{fleet.hosts[0].agent.url}/api/vms"
        return [(await http.post(url, json=body(f"vm-{n}"))).status_code for n in range(24)]


async def test_the_same_seed_makes_the_same_trouble() -> None:
    first, again, other = await outcomes(7), await outcomes(7), await outcomes(8)
    assert first == again != other
    assert set(first) == {201, 500}


async def test_a_crashed_machine_is_reported_with_the_reason() -> None:
    async with simulated(crash_rate="3600/h") as fleet, httpx.AsyncClient(trust_env=False, timeout=30) as http:
        url = f"{fleet.hosts[0].agent.url}/api/vms"
        for name in "abcdefgh":
            await http.post(url, json=body(name))
        while True:
            found = [vm for vm in (await http.get(url)).json()["data"] if vm["state"] == "stopped"]
            if found:
                break
            await asyncio.sleep(0.02)
        assert (found[0]["reason"], found[0]["message"]) == ("crashed", "simulated crash")
        assert (await http.post(f"{url}/{found[0]['id']}/start")).status_code == 200


async def test_with_a_folder_vms_come_back_as_after_a_reboot(tmp_path: Path) -> None:
    port = free_ports(1)
    async with simulated(folder=tmp_path, port=port) as fleet, httpx.AsyncClient(trust_env=False) as http:
        await http.post(f"{fleet.hosts[0].agent.url}/api/vms", json=body("a"))
    async with simulated(folder=tmp_path, port=port) as fleet, httpx.AsyncClient(trust_env=False) as http:
        url = f"{fleet.hosts[0].agent.url}/api/vms"
        while not (listing := (await http.get(url)).json())["complete"]:  # noqa: ASYNC110 asked over the wire
            await asyncio.sleep(0.005)
        assert [(vm["state"], vm["reason"]) for vm in listing["data"]] == [("stopped", "crashed")]
        assert (await http.post(f"{url}/a/start")).status_code == 200
        assert (await http.get(f"{url}/a")).json()["data"]["state"] == "running"


async def test_if_one_port_is_taken_no_host_answers() -> None:
    first = free_ports(3)
    with socket.create_server(("127.0.0.1", first + 2)):
        with pytest.raises(AgentError, match=rf"cannot listen on 127.0.0.1:{first + 2}"):
            async with simulated(3, port=first):
                pass
        async with httpx.AsyncClient(trust_env=False) as http:
            with pytest.raises(httpx.ConnectError):
                await http.get(f"http://127.0.0.1:{first}/api/info")


def test_more_hosts_than_ports_are_refused() -> None:
    for listen in ("127.0.0.1:0", "127.0.0.1:65500"):
        with pytest.raises(AgentError, match="no room for 50 hosts"):
            SimulatedHosts(AgentSettings(listen=listen), Simulation(simulate=50))


@pytest.mark.parametrize(
    ("text", "span"),
    [("50ms", (0.05, 0.05)), ("10ms-2s", (0.01, 2.0)), ("1.5", (1.5, 1.5)), ("200us", (0.0002, 0.0002))],
)
def test_a_latency_is_a_time_or_a_range(text: str, span: tuple[float, float]) -> None:
    assert Simulation.model_validate({"simulate": 1, "latency": text}).latency == pytest.approx(span)


@pytest.mark.parametrize(
    "bad",
    [
        {"latency": "fast"},
        {"latency": "2s-1s"},
        {"latency": "1s-2s-3s"},
        {"fail_rate": 1.5},
        {"crash_rate": "x/h"},
        {"images": ""},
    ],
    ids=json.dumps,
)
def test_nonsense_is_refused_by_its_field(bad: dict[str, object]) -> None:
    with pytest.raises(ValidationError) as caught:
        Simulation.model_validate({"simulate": 1, **bad})
    assert [error["loc"][0] for error in caught.value.errors()] == list(bad)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--latency", "50ms"], "--latency needs --simulate N"),
        (["--simulate", "3", "--accel", "kvm"], "--accel means nothing to simulated hosts"),
        (["--simulate", "3", "--latency", "soon"], "--latency: must be a time such as 50ms"),
    ],
)
def test_options_of_one_kind_of_host_are_refused_for_the_other(words: list[str], told: str) -> None:
    result = CliRunner().invoke(agent, words)
    assert (result.exit_code, told in result.output) == (2, True), result.output
