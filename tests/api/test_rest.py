"""The controller's contract over real HTTP, with production agents whose drivers live in memory."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import httpx

from tests.fleet_rig import KEY, FleetRig, env, vm

RUNNING_FIELDS = {"id", "env_id", "host_id", "image", "engine", "cpu", "mem", "disk", "ip", "port_map", "state", "created_at"}


async def test_an_environment_is_recorded_at_once_and_runs_soon_after(tmp_path: Path) -> None:
    async with FleetRig(tmp_path) as rig:
        answer = await rig.call("POST", "/api/envs", env("web", vm(ports=[80]), vm(engine="KVM"), owner="alice"))
        assert answer.status_code == 201
        body = answer.json()
        assert body["ok"] is True
        assert {machine["state"] for machine in body["data"]["vms"]} == {"creating"}
        assert all(machine["ip"] == "" and machine["port_map"] == {} for machine in body["data"]["vms"])

        waited = await rig.call("POST", "/api/envs?wait=30", env("web", vm(ports=[80]), vm(engine="qemu"), owner="alice"))
        assert waited.status_code == 200, "an identical spec is not an error"
        detail = waited.json()["data"]
        assert detail["env"]["phase"] == "ready"
        assert "warnings" not in detail
        first = detail["vms"][0]
        assert set(first) >= RUNNING_FIELDS
        assert first["state"] == "running" and first["host_id"] == "host-0" and first["ip"]
        assert set(first["port_map"]) == {"22", "80"}
        assert {machine["id"] for machine in detail["vms"]} == set(rig.hosts[0].running())


async def test_stop_start_and_delete_answer_ok_alone_and_take_effect(tmp_path: Path) -> None:
    async with FleetRig(tmp_path) as rig:
        host = rig.hosts[0]
        await rig.call("POST", "/api/envs?wait=30", env())
        stopped = await rig.call("POST", "/api/envs/web/stop?wait=30")
        assert (stopped.status_code, stopped.json()) == (200, {"ok": True})
        assert host.running() == {} and len(host.there()) == 1
        assert (await rig.data("/api/envs/web"))["env"]["state"] == "stopped"
        started = await rig.call("POST", "/api/envs/web/start?wait=30")
        assert (started.status_code, started.json()) == (200, {"ok": True})
        assert len(host.running()) == 1
        deleted = await rig.call("DELETE", "/api/envs/web?wait=30")
        assert (deleted.status_code, deleted.json()) == (200, {"ok": True})
        assert host.there() == set()
        assert await rig.data("/api/envs") == []
        assert (await rig.call("GET", "/api/envs/web")).status_code == 404


async def test_a_vm_that_dies_is_started_again_and_one_that_vanishes_is_made_again(tmp_path: Path) -> None:
    async with FleetRig(tmp_path) as rig:
        host = rig.hosts[0]
        await rig.call("POST", "/api/envs?wait=30", env())
        (vm_id, pid), *_ = host.running().items()
        host.machines.crash(vm_id)  # type: ignore[arg-type]
        await rig.until(lambda: host.running().get(vm_id, pid) != pid)
        await rig.until(lambda: rig.app.controller.fleet.status[vm_id].settled)  # type: ignore[index]
        await host.halt()
        host.machines.machines.clear()
        shutil.rmtree(host.folder / "vms")
        await host.boot()
        await rig.until(lambda: vm_id in host.running())


async def test_what_cannot_be_placed_waits_with_every_hosts_reason_and_goes_on_by_itself(tmp_path: Path) -> None:
    async with FleetRig(tmp_path, hosts=2, cpu=4) as rig:
        body = env("big", vm(cpu=8), vm(image="other"), vm(engine="firecracker"))
        assert (await rig.call("POST", "/api/envs", body)).status_code == 201
        fleet = rig.app.controller.fleet
        await rig.until(lambda: all(s.message.startswith("waiting for a host") for s in fleet.status.values()))
        detail = await rig.data("/api/envs/big")
        assert {machine["state"] for machine in detail["vms"]} == {"creating"}
        assert detail["env"]["phase"] == "pending"
        text = "\n".join(detail["warnings"])
        assert "host-0: no room: cpu (8 wanted, 4 of 4 free)" in text and "host-1: no room" in text
        assert "has no qemu image other" in text
        assert "has no engine firecracker (it has docker, qemu)" in text
        rig.hosts[0].disks.images["other"] = 64
        rig.hosts[0].machines.images = ("tiny", "other")
        await rig.until(lambda: len(rig.hosts[0].running()) == 1)


async def test_a_host_that_does_not_answer_is_recorded_and_joins_by_itself(tmp_path: Path) -> None:
    async with FleetRig(tmp_path) as rig:
        host = rig.hosts[0]
        await host.halt()
        await rig.call("DELETE", f"/api/hosts/{host.name}")
        answer = await rig.call("POST", "/api/hosts", {"addr": host.addr})
        assert answer.status_code == 201
        assert answer.json()["data"] | {"state": "offline", "id": host.addr} == answer.json()["data"]
        await host.boot()
        fleet = rig.app.controller.fleet
        await rig.until(lambda: fleet.hosts[host.addr].online)
        assert (await rig.data("/api/hosts"))[0]["id"] == host.name
        again = await rig.call("POST", "/api/hosts", {"addr": host.addr})
        assert again.status_code == 200
        alias = host.addr.replace("127.0.0.1", "localhost")
        taken = await rig.call("POST", "/api/hosts", {"addr": alias})
        assert taken.status_code == 409 and taken.json()["code"] == "host_id_taken"


async def test_a_host_with_vms_cannot_be_removed(tmp_path: Path) -> None:
    async with FleetRig(tmp_path) as rig:
        await rig.call("POST", "/api/envs?wait=30", env())
        refused = await rig.call("DELETE", "/api/hosts/host-0")
        assert refused.status_code == 409 and "web" in refused.json()["error"]
        await rig.call("DELETE", "/api/envs/web?wait=30")
        gone = await rig.call("DELETE", f"/api/hosts/{rig.hosts[0].addr}")
        assert (gone.status_code, gone.json()) == (200, {"ok": True})


async def test_a_changed_spec_replaces_one_vm_after_the_other(tmp_path: Path) -> None:
    async with FleetRig(tmp_path) as rig:
        body = env("web", vm(name="a", count=3))
        await rig.call("PUT", "/api/envs/web?wait=30", body)
        before = set(rig.hosts[0].running())
        changed = env("web", vm(name="a", count=3, mem=256))
        plan = (await rig.call("PUT", "/api/envs/web?dry_run=true", changed)).json()["data"]["plan"]
        assert [(line["action"], line["name"], line["fields"]) for line in plan] == [
            ("replace", f"a-{number}", ["mem"]) for number in range(3)
        ]
        assert {line["host"] for line in plan} == {"host-0"}
        assert set(rig.hosts[0].running()) == before, "a dry run changes nothing"
        stale = await rig.call("PUT", "/api/envs/web", changed, headers={"If-Match": '"7"'})
        assert stale.status_code == 412
        fewest = 3
        task = asyncio.create_task(rig.call("PUT", "/api/envs/web?wait=60", changed, headers={"If-Match": '"1"'}))
        while not task.done():
            fewest = min(fewest, len(rig.hosts[0].running()))
            await asyncio.sleep(0)
        detail = (await task).json()["data"]
        assert detail["env"]["phase"] == "ready" and detail["env"]["generation"] == 2
        assert {machine["mem"] for machine in detail["vms"]} == {256}
        assert before.isdisjoint(rig.hosts[0].running()) and len(rig.hosts[0].running()) == 3
        assert fewest >= 2, "never more than one is out of service"


async def test_deleting_while_its_host_is_away_waits_and_ends_by_itself(tmp_path: Path) -> None:
    async with FleetRig(tmp_path) as rig:
        host = rig.hosts[0]
        await rig.call("POST", "/api/envs?wait=30", env())
        await host.halt()
        assert (await rig.call("DELETE", "/api/envs/web")).json() == {"ok": True}
        assert (await rig.call("DELETE", "/api/envs/web")).json() == {"ok": True}
        detail = await rig.data("/api/envs/web")
        assert detail["env"]["phase"] == "terminating" and detail["vms"][0]["desired"] == "absent"
        again = await rig.call("POST", "/api/envs", env())
        assert again.status_code == 409 and again.json()["code"] == "terminating"
        assert (await rig.call("POST", "/api/envs/web/start")).status_code == 409
        await host.boot()
        await rig.until(lambda: not rig.app.controller.fleet.envs)
        assert host.there() == set()


async def test_a_restarted_controller_goes_on_and_makes_no_needless_call(tmp_path: Path) -> None:
    async with FleetRig(tmp_path, hosts=2) as rig:
        await rig.call("POST", "/api/envs?wait=30", env("web", vm(count=4, spread="hosts")))
        before = [host.running() for host in rig.hosts]
        assert [len(pids) for pids in before] == [2, 2]
        await rig.stop_controller()
        await rig.start_controller()
        fleet = rig.app.controller.fleet
        await rig.until(lambda: bool(fleet.status) and all(status.settled for status in fleet.status.values()))
        assert [host.running() for host in rig.hosts] == before
        assert rig.app.controller.reconciler.calls == 0
        assert (await rig.data("/api/status"))["total_vms"] == 4


async def test_a_stranger_on_a_host_is_counted_and_left_alone(tmp_path: Path) -> None:
    async with FleetRig(tmp_path, cpu=4) as rig:
        stranger = {"vm_id": "mine", "env_id": "e", "image": "tiny", "engine": "qemu", "cpu": 3, "mem": 64, "disk": 64}
        async with httpx.AsyncClient(base_url=f"http://{rig.hosts[0].addr}", trust_env=False) as agent:
            made = await agent.post("/api/vms", json=stranger | {"ssh_keys": [KEY]})
            assert made.status_code == 201
        fleet = rig.app.controller.fleet
        await rig.until(lambda: bool(fleet.hosts[rig.hosts[0].addr].vms))
        await rig.call("POST", "/api/envs", env("web", vm(cpu=2)))
        await rig.until(lambda: any("1 of 4 free" in status.message for status in fleet.status.values()))
        assert (await rig.data("/api/hosts"))[0]["resource"]["cpu_used"] == 3
        await rig.call("DELETE", "/api/envs/web?wait=30")
        assert set(rig.hosts[0].running()) == {"mine"}
