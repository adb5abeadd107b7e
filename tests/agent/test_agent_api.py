"""The agent's endpoints over real HTTP, as clients that know only the wire contract see them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from agent.errors import AgentError
from agent.main import Agent
from agent.settings import AgentSettings
from specs.names import VmId
from specs.wire import AgentInfo, AgentVm
from tests.agent.runtime_rig import Rig, reached, request, until

BODY = request().wire()
CLUSTER = {"X-Muster-Cluster": "prod", "X-Muster-Term": "3"}
ASYNC = {"Prefer": "respond-async"}


@dataclass
class Served:
    """A running agent, its host, and a client."""

    rig: Rig
    agent: Agent
    http: httpx.AsyncClient

    async def call(self, method: str, path: str, **more: Any) -> tuple[int, Any]:
        """(status, parsed body)."""
        answer = await self.http.request(method, path, **more)
        assert answer.headers["Content-Type"] == "application/json"
        return answer.status_code, answer.json()


def settings(folder: Path, **more: Any) -> AgentSettings:
    """An agent that listens on a free port."""
    fields = {"listen": "127.0.0.1:0", "data_dir": folder, "cpu_total": 128, "mem_total": 65536, "disk_total": 500_000}
    return AgentSettings.model_validate({**fields, **more})


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    rig = Rig(tmp_path / "vms")
    agent = Agent(settings(tmp_path, host_id="host-1", labels={"rack": "a"}), drivers=rig.drivers())
    await agent.start()
    async with httpx.AsyncClient(base_url=agent.url, trust_env=False, timeout=20) as client:
        await until(lambda: agent.runtime.complete)
        yield Served(rig, agent, client)
        for fault in rig.faults:
            fault.heal()
        await agent.stop()


async def test_info_tells_host_resources_engines_storage_and_images(served: Served) -> None:
    await served.call("POST", "/api/vms", json=BODY)
    status, body = await served.call("GET", "/api/info")
    assert (status, body["ok"]) == (200, True)
    AgentInfo.model_validate(body["data"])
    assert body["data"] == {
        "host_id": "host-1",
        "resource": {
            "cpu_total": 128,
            "cpu_used": 1,
            "mem_total": 65536,
            "mem_used": 128,
            "disk_total": 500_000,
            "disk_used": 256,
            "vm_count": 1,
        },
        "engines": ["qemu", "docker"],
        "storage": "file",
        "images": ["muster/busybox", "tiny"],
        "images_by_engine": {"qemu": ["tiny"], "docker": ["muster/busybox"]},
        "version": body["data"]["version"],
        "boot_id": served.agent.runtime.watch.boot_id,
        "network": "fake",
        "labels": {"rack": "a"},
    }
    assert await served.call("GET", "/api/images") == (200, {"ok": True, "data": ["muster/busybox", "tiny"]})


async def test_create_answers_201_with_the_running_vm_and_200_the_second_time(served: Served) -> None:
    status, body = await served.call("POST", "/api/vms", json=BODY)
    assert (status, body["ok"], set(body)) == (201, True, {"ok", "data", "boot_id", "seq"})
    vm = body["data"]["vm"]
    reference = {
        "id": "vm-a",
        "env_id": "env",
        "host_id": "host-1",
        "image": "tiny",
        "engine": "qemu",
        "cpu": 1,
        "mem": 128,
        "disk": 256,
        "ip": "10.77.0.2",
        "port_map": {"22": 20000, "80": 20001},
        "state": "running",
        "created_at": vm["created_at"],
    }
    assert vm.items() >= reference.items()
    assert isinstance(vm["created_at"], int)
    assert (await served.call("POST", "/api/vms", json=BODY))[0] == 200
    assert await served.call("GET", "/api/vms/vm-a") == (200, {"ok": True, "data": vm})
    status, listed = await served.call("GET", "/api/vms")
    assert (status, listed["data"], listed["complete"]) == (200, [vm], True)


async def test_delete_stop_and_start_answer_exactly_ok(served: Served) -> None:
    await served.call("POST", "/api/vms", json=BODY)
    for _ in range(2):
        assert await served.call("POST", "/api/vms/vm-a/stop") == (200, {"ok": True})
    assert (await served.call("GET", "/api/vms/vm-a"))[1]["data"]["state"] == "stopped"
    for _ in range(2):
        assert await served.call("POST", "/api/vms/vm-a/start") == (200, {"ok": True})
    assert (await served.call("GET", "/api/vms/vm-a"))[1]["data"]["state"] == "running"
    for _ in range(2):
        assert await served.call("DELETE", "/api/vms/vm-a") == (200, {"ok": True})
    assert (await served.call("GET", "/api/vms"))[1]["data"] == []
    assert served.rig.traces()["machines"] == []


async def test_a_controllers_calls_tell_the_position_that_includes_their_change(served: Served) -> None:
    _, created = await served.call("POST", "/api/vms", json=BODY, headers={**CLUSTER, **ASYNC})
    await until(lambda: served.agent.runtime.get("vm-a").state == "running")
    _, stopped = await served.call("POST", "/api/vms/vm-a/stop", headers=CLUSTER)
    _, deleted = await served.call("DELETE", "/api/vms/vm-a", headers=CLUSTER)
    boot = served.agent.runtime.watch.boot_id
    assert stopped == {"ok": True, "boot_id": boot, "seq": stopped["seq"]}
    assert deleted == {"ok": True, "boot_id": boot, "seq": deleted["seq"]}
    assert 0 < created["seq"] < stopped["seq"] < deleted["seq"] == served.agent.runtime.watch.seq


async def test_respond_async_answers_202_with_the_transient_state(served: Served) -> None:
    served.rig.machines.faults.hold["start"] = asyncio.Event()
    answer = await served.http.post("/api/vms", json=BODY, headers={"Prefer": "wait=5, respond-async"})
    assert (answer.status_code, answer.headers["Preference-Applied"]) == (202, "respond-async")
    assert answer.json()["data"]["vm"]["state"] == "creating"
    await reached(served.rig.machines.faults, "start")
    status, body = await served.call("GET", "/api/vms/vm-a")
    assert (status, body["data"]["state"], body["data"]["step"]) == (200, "creating", "booting")
    status, body = await served.call("POST", "/api/vms", json=BODY, headers=ASYNC)
    assert (status, body["data"]["vm"]["state"]) == (202, "creating")
    assert (await served.call("POST", "/api/vms/vm-a/start"))[0] == 409
    served.rig.machines.faults.heal()
    await until(lambda: served.agent.runtime.get("vm-a").state == "running")
    served.rig.machines.faults.hold["stop"] = asyncio.Event()
    status, body = await served.call("POST", "/api/vms/vm-a/stop", headers=ASYNC)
    assert (status, body["data"]["vm"]["state"], body["data"]["vm"]["step"]) == (202, "creating", "stopping")
    served.rig.machines.faults.heal()
    await until(lambda: served.agent.runtime.get("vm-a").state == "stopped")


async def test_an_asynchronous_creation_that_fails_stays_visible_until_deleted(served: Served) -> None:
    served.rig.machines.faults.fail_next("start", AgentError("it did not boot"))
    await served.call("POST", "/api/vms", json=BODY, headers={**CLUSTER, **ASYNC})
    await until(lambda: served.agent.runtime.get("vm-a").state == "failed")
    _, body = await served.call("GET", "/api/vms/vm-a")
    vm = body["data"]
    assert (vm["reason"], vm["message"], vm["ip"], vm["port_map"]) == ("create_failed", "it did not boot", "", {})
    assert served.rig.traces()["disks"] == []
    assert (await served.call("DELETE", "/api/vms/vm-a", headers=CLUSTER))[0] == 200
    assert (await served.call("GET", "/api/vms/vm-a"))[0] == 404


@pytest.mark.parametrize(
    ("changes", "status", "code", "sentence"),
    [
        ({"engine": "firecracker"}, 422, "unsupported", "this host has no engine firecracker (it has: qemu, docker)"),
        ({"image": "none"}, 422, "image_missing", "image none is not on this host (there: tiny)"),
        ({"disk": 1}, 422, "image_refused", "image tiny is 64 MiB large and does not fit a disk of 1 MiB"),
        ({"cpu": 129}, 507, "does_not_fit", "VM vm-a does not fit on host host-1: 129 vCPU asked for, 128 of 128 free"),
    ],
)
async def test_what_this_host_cannot_do_is_refused_with_its_own_status(
    served: Served, changes: dict[str, Any], status: int, code: str, sentence: str
) -> None:
    answer = await served.call("POST", "/api/vms", json={**BODY, **changes})
    assert answer == (status, {"ok": False, "error": sentence, "code": code})
    assert (await served.call("GET", "/api/vms"))[1]["data"] == []


async def test_a_failing_engine_is_a_500_and_a_conflict_a_409_and_nothing_a_404(served: Served) -> None:
    served.rig.machines.faults.fail_next("start", AgentError("it did not boot"))
    failed = await served.call("POST", "/api/vms", json=BODY)
    assert failed == (500, {"ok": False, "error": "it did not boot", "code": "engine_failed"})
    assert (await served.call("GET", "/api/vms"))[1]["data"] == []
    await served.call("POST", "/api/vms", json=BODY)
    status, body = await served.call("POST", "/api/vms", json={**BODY, "mem": 64})
    assert (status, body["code"]) == (409, "conflict")
    for method, path in (("GET", ""), ("POST", "/stop"), ("POST", "/start")):
        missing = await served.call(method, f"/api/vms/none{path}")
        assert missing == (404, {"ok": False, "error": "no VM none on host host-1", "code": "not_found"})


async def test_a_defect_is_a_500_that_tells_nothing_of_the_inside(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: str) -> AgentVm:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(served.agent.runtime, "get", broken)
    status, body = await served.call("GET", "/api/vms/vm-a")
    assert (status, body["ok"], body["code"]) == (500, False, "internal")
    assert "secret" not in body["error"]


async def test_clusters_and_terms_are_fenced(served: Served) -> None:
    await served.call("POST", "/api/vms", json=BODY, headers=CLUSTER)
    for method, path in (("DELETE", ""), ("POST", "/stop"), ("POST", "/start")):
        status, body = await served.call(method, f"/api/vms/vm-a{path}")
        assert (status, body["code"]) == (409, "foreign_vm")
        older = {**CLUSTER, "X-Muster-Term": "2"}
        status, body = await served.call(method, f"/api/vms/vm-a{path}", headers=older)
        assert (status, body["code"]) == (409, "stale_term")
    _, body = await served.call("GET", "/api/vms/vm-a")
    assert (body["data"]["cluster_id"], body["data"]["state"]) == ("prod", "running")


@pytest.mark.parametrize(
    "headers",
    [
        {"X-Muster-Cluster": "prod"},
        {"X-Muster-Term": "3"},
        {"X-Muster-Cluster": "../x", "X-Muster-Term": "3"},
        {"X-Muster-Cluster": "prod", "X-Muster-Term": "-1"},
        {"X-Muster-Cluster": "prod", "X-Muster-Term": "three"},
        {"X-Muster-Cluster": "prod", "X-Muster-Term": "9" * 19},
        {"X-Muster-Cluster": "prod", "X-Muster-Term": "9" * 400},
    ],
)
async def test_cluster_headers_that_make_no_sense_are_a_400(served: Served, headers: dict[str, str]) -> None:
    status, body = await served.call("POST", "/api/vms", json=BODY, headers=headers)
    assert (status, body["code"]) == (400, "bad_header")


async def test_a_long_poll_answers_when_something_changes_and_a_burst_is_one_reply(served: Served) -> None:
    _, first = await served.call("GET", "/api/vms")
    after = f"{first['boot_id']}:{first['seq']}"
    poll = asyncio.create_task(served.call("GET", f"/api/vms?watch=30&after={after}"))
    await asyncio.sleep(0.05)
    assert not poll.done()
    await served.call("POST", "/api/vms", json=BODY)
    seq, polls, states = first["seq"], 0, []
    _, body = await poll
    while True:
        polls += 1
        assert body["boot_id"] == first["boot_id"]
        assert body["seq"] > seq
        seq = body["seq"]
        states = [vm["state"] for vm in body["data"]]
        if states == ["running"]:
            break
        _, body = await served.call("GET", f"/api/vms?watch=30&after={body['boot_id']}:{seq}")
    assert polls < body["seq"] - first["seq"]
    served.rig.machines.crash(VmId("vm-a"))
    _, body = await served.call("GET", f"/api/vms?watch=30&after={body['boot_id']}:{seq}")
    assert [(vm["state"], vm["reason"]) for vm in body["data"]] == [("stopped", "crashed")]


async def test_a_long_poll_from_before_a_restart_or_without_a_position_answers_at_once(served: Served) -> None:
    for query in ("watch=60", "watch=60&after=other:999", "watch=0.5&after=x:0", "watch=600"):
        status, body = await served.call("GET", f"/api/vms?{query}")
        assert (status, body["ok"], body["complete"]) == (200, True, True)


async def test_a_long_poll_without_a_change_answers_the_same_list_after_its_time(served: Served) -> None:
    _, first = await served.call("GET", "/api/vms")
    _, body = await served.call("GET", f"/api/vms?watch=0.05&after={first['boot_id']}:{first['seq']}")
    assert body == first


@pytest.mark.parametrize(
    "query", ["watch=x", "watch=-1", "watch=1e9", "watch=1&after=x", "watch=1&after=a:b", "after=:1", "watch="]
)
async def test_a_watch_that_makes_no_sense_is_a_400(served: Served, query: str) -> None:
    status, body = await served.call("GET", f"/api/vms?{query}")
    assert (status, body["code"]) == (400, "bad_query")


async def test_a_hanging_image_list_delays_info_no_longer_than_its_patience(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.host._FRESH", 0.0)
    monkeypatch.setattr("agent.host._PATIENCE", 0.02)
    await served.call("GET", "/api/info")
    served.rig.containers.faults.hold["images"] = asyncio.Event()
    served.rig.containers.images = ("muster/other",)
    _, body = await served.call("GET", "/api/info")
    assert body["data"]["images"] == ["muster/busybox", "tiny"]
    served.rig.containers.faults.heal()
    await until(lambda: True)
    monkeypatch.setattr("agent.host._PATIENCE", 5)
    await served.call("GET", "/api/info")
    _, body = await served.call("GET", "/api/info")
    assert body["data"]["images"] == ["muster/other", "tiny"]


async def test_a_hundred_creates_over_http_get_ports_of_their_own(served: Served) -> None:
    bodies = [{**BODY, "vm_id": f"vm-{n}", "mem": 64, "disk": 64} for n in range(100)]
    answers = await asyncio.gather(*(served.call("POST", "/api/vms", json=body) for body in bodies))
    assert {status for status, _ in answers} == {201}
    ports = [port for _, body in answers for port in body["data"]["vm"]["port_map"].values()]
    assert len(set(ports)) == len(ports) == 200
    assert len({body["data"]["vm"]["ip"] for _, body in answers}) == 100


async def test_health_and_readiness_need_no_key_and_tell_nothing_of_the_fleet(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "vms")
    rig.machines.faults.hold["leftovers"] = asyncio.Event()
    agent = Agent(settings(tmp_path, api_key="correct horse"), drivers=rig.drivers())
    await agent.start()
    async with httpx.AsyncClient(base_url=agent.url, trust_env=False) as client:
        assert (await client.get("/healthz")).json() == {"ok": True}
        waiting = await client.get("/readyz")
        assert (waiting.status_code, waiting.json()["code"]) == (503, "not_ready")
        rig.machines.faults.heal()
        await until(lambda: agent.runtime.complete)
        assert (await client.get("/readyz")).json() == {"ok": True}
        assert (await client.get("/api/vms")).status_code == 401
    await agent.stop()


async def test_ending_the_agent_answers_long_polls_and_leaves_vms_running(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "vms")
    agent = Agent(settings(tmp_path), drivers=rig.drivers())
    await agent.start()
    async with httpx.AsyncClient(base_url=agent.url, trust_env=False, timeout=20) as client:
        await client.post("/api/vms", json=BODY)
        first = (await client.get("/api/vms")).json()
        poll = asyncio.create_task(client.get(f"/api/vms?watch=60&after={first['boot_id']}:{first['seq']}"))
        rig.machines.faults.hold["start"] = asyncio.Event()
        creating = asyncio.create_task(client.post("/api/vms", json={**BODY, "vm_id": "vm-b"}))
        await reached(rig.machines.faults, "start", "vm-b")
        await agent.stop()
        assert (await poll).status_code == 200
        stopped = await creating
        assert (stopped.status_code, stopped.json()["code"]) == (503, "stopping")
    assert (list(rig.machines.running()), rig.host.bridge) == (["vm-a"], True)


async def test_an_agent_without_vms_leaves_nothing_on_the_network(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "vms")
    agent = Agent(settings(tmp_path), drivers=rig.drivers())
    await agent.start()
    await until(lambda: agent.runtime.complete)
    assert rig.host.bridge
    await agent.stop()
    assert not rig.host.bridge


async def test_a_second_agent_on_the_same_folder_does_not_start(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "vms")
    agent = Agent(settings(tmp_path), drivers=rig.drivers())
    await agent.start()
    with pytest.raises(AgentError, match=r"another agent \(pid \d+\) runs on"):
        await Agent(settings(tmp_path), drivers=rig.drivers()).start()
    await agent.stop()
    third = Agent(settings(tmp_path), drivers=rig.drivers())
    await third.start()
    await third.stop()


async def test_an_agent_open_to_the_network_without_a_key_does_not_start(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "vms")
    for listen in ("0.0.0.0:0", ":0", "[::]:0", "192.0.2.7:9100", "some.host:9100"):
        with pytest.raises(AgentError, match="--insecure-no-auth"):
            await Agent(settings(tmp_path, listen=listen), drivers=rig.drivers()).start()


async def test_a_taken_port_is_told_as_such(served: Served, tmp_path: Path) -> None:
    rig = Rig(tmp_path / "other")
    address = served.agent.url.removeprefix("http://")
    with pytest.raises(AgentError, match=f"cannot listen on {address}"):
        await Agent(settings(tmp_path / "b", listen=address), drivers=rig.drivers()).start()
