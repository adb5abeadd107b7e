"""VMs nobody recorded: shown, left alone, adopted as they run, destroyed by hand."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import httpx

from tests.fleet_rig import KEY, FleetRig, env, vm


async def made_by_hand(rig: FleetRig, vm_id: str, headers: dict[str, str] | None = None) -> None:
    """Creates a VM on the first host behind the controller's back."""
    body = {
        "vm_id": vm_id,
        "env_id": "e",
        "image": "tiny",
        "engine": "qemu",
        "cpu": 1,
        "mem": 64,
        "disk": 64,
        "ssh_keys": [KEY],
    }
    async with httpx.AsyncClient(base_url=f"http://{rig.hosts[0].addr}", trust_env=False) as agent:
        assert (await agent.post("/api/vms", json=body, headers=headers)).status_code == 201
    fleet = rig.app.controller.fleet
    await rig.until(lambda: vm_id in fleet.hosts[rig.hosts[0].addr].vms)


async def unknown(rig: FleetRig) -> dict[str, dict[str, Any]]:
    return {item["id"]: item for item in await rig.data("/api/hosts/host-0/unknown")}


async def test_a_fleet_whose_store_was_replaced_by_an_older_copy_is_healed_by_hand(tmp_path: Path) -> None:
    async with FleetRig(tmp_path) as rig:
        await rig.call("POST", "/api/envs?wait=30", env("old"))
        await rig.stop_controller()
        data = tmp_path / "controller"
        shutil.copytree(data, tmp_path / "copy")
        await rig.start_controller()
        young = env("new", vm(name="a", ports=[80]), vm(name="b"))
        made = (await rig.call("POST", "/api/envs?wait=30", young)).json()["data"]["vms"]
        ids = {item["name"]: item["id"] for item in made}
        running = rig.hosts[0].running()
        await rig.stop_controller()
        shutil.rmtree(data)
        shutil.copytree(tmp_path / "copy", data)
        await rig.start_controller()
        fleet = rig.app.controller.fleet
        host = fleet.hosts[rig.hosts[0].addr]
        await rig.until(lambda: host.report is not None and all(status.settled for status in fleet.status.values()))
        assert rig.hosts[0].running() == running and set(await unknown(rig)) == set(ids.values())
        warned = {event["vm"] for event in await rig.data("/api/events") if event["reason"] == "UnknownVmFound"}
        assert warned == set(ids.values())

        answer = await rig.call("POST", f"/api/hosts/host-0/unknown/{ids['a']}/adopt", {"env": "new"})
        assert answer.status_code == 200, answer.text
        assert [item["name"] for item in answer.json()["data"]["vms"]] == ["a"]
        again = (await rig.call("PUT", "/api/envs/new?wait=30", env("new", vm(name="a", ports=[80])))).json()["data"]
        assert [(item["id"], item["state"]) for item in again["vms"]] == [(ids["a"], "running")]
        assert (await rig.call("DELETE", f"/api/hosts/host-0/unknown/{ids['b']}")).json() == {"ok": True}
        await rig.until(lambda: ids["b"] not in rig.hosts[0].there())
        assert (await rig.call("DELETE", f"/api/hosts/host-0/unknown/{ids['b']}")).status_code == 200, "asked again"
        await rig.until(lambda: bool(fleet.vms[ids["b"]].gone_at))
        assert await unknown(rig) == {}
        assert rig.hosts[0].running() == {key: pid for key, pid in running.items() if key != ids["b"]}
        calls = rig.app.controller.reconciler.calls
        assert calls == 1, "one destroy, and not one call for the adopted VM"


async def test_what_is_not_unknown_or_not_ours_is_refused_with_the_reason(tmp_path: Path) -> None:
    async with FleetRig(tmp_path) as rig:
        await made_by_hand(rig, "theirs", {"X-Muster-Cluster": "other", "X-Muster-Term": "1"})
        await made_by_hand(rig, "mine")
        listed = await unknown(rig)
        assert "belongs to cluster other" in listed["theirs"]["obstacle"] and listed["mine"]["obstacle"] == ""
        path = "/api/hosts/host-0/unknown"
        for method, tail in (("POST", "theirs/adopt"), ("DELETE", "theirs")):
            answer = await rig.call(method, f"{path}/{tail}", {"env": "web"} if method == "POST" else None)
            assert (answer.status_code, answer.json()["code"]) == (409, "foreign_vm")
        assert (await rig.call("POST", f"{path}/mine/adopt", {"env": "web", "name": "kept"})).status_code == 200
        for method, tail in (("POST", "mine/adopt"), ("DELETE", "mine")):
            answer = await rig.call(method, f"{path}/{tail}", {"env": "web"} if method == "POST" else None)
            assert (answer.status_code, answer.json()["code"]) == (409, "known_vm")
            assert "environment web" in answer.json()["error"]
        assert (await rig.call("DELETE", f"{path}/nobody")).status_code == 404
        assert (await rig.call("GET", "/api/hosts/nowhere/unknown")).status_code == 404
        answer = await rig.call("POST", f"{path}/mine/adopt", {"env": "web", "nam": "x"})
        assert answer.status_code == 422 and "nam" in answer.json()["error"]
        assert (await rig.call("DELETE", "/api/envs/web?wait=30")).status_code == 200
        assert set(rig.hosts[0].there()) == {"theirs"}


async def test_an_agent_tells_what_it_was_asked_for_and_a_silent_one_adopts_nothing(tmp_path: Path) -> None:
    async with FleetRig(tmp_path) as rig:
        await made_by_hand(rig, "mine")
        client = rig.app.controller.watchers.client(rig.hosts[0].addr)
        assert client is not None and await client.spec("none") is None  # type: ignore[arg-type]
        made = await client.spec("mine")  # type: ignore[arg-type]
        assert made is not None and made.ssh_keys == (KEY,)
        await rig.hosts[0].halt()
        await rig.until(lambda: not rig.app.controller.fleet.hosts[rig.hosts[0].addr].online)
        answer = await rig.call("POST", "/api/hosts/host-0/unknown/mine/adopt", {"env": "web"})
        assert (answer.status_code, answer.json()["code"]) == (409, "offline")
