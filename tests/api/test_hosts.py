"""Hosts that are lost, return, and are taken out of placement."""

from __future__ import annotations

from pathlib import Path

from tests.fleet_rig import FleetRig, env, vm


async def test_a_lost_hosts_vms_wait_for_it_and_keep_running(tmp_path: Path) -> None:
    rig = FleetRig(tmp_path, hosts=2)
    rig.host_loss_grace = 0.0
    async with rig:
        await rig.call("POST", "/api/envs?wait=30", env("web", vm(count=2, spread="hosts")))
        lost = rig.hosts[1]
        before = lost.running()
        await lost.halt()
        fleet = rig.app.controller.fleet
        await rig.until(lambda: not fleet.hosts[lost.addr].online)
        await rig.until(lambda: any("offline" in status.message for status in fleet.status.values()))
        assert len(fleet.vms) == 2 and lost.running() == before
        detail = await rig.data("/api/envs/web")
        assert detail["env"]["phase"] == "degraded" and "host-1 is offline" in detail["warnings"][0]
        await lost.boot()
        await rig.until(lambda: all(status.settled for status in fleet.status.values()))
        assert lost.running() == before and len(rig.hosts[0].running()) == 1


async def test_recreate_gives_a_lost_vm_one_successor_and_the_host_loses_its_copy_when_it_returns(tmp_path: Path) -> None:
    rig = FleetRig(tmp_path, hosts=2)
    rig.host_loss_grace = 0.5
    async with rig:
        body = env("web", vm(count=2, spread="hosts"), on_host_loss="recreate")
        await rig.call("POST", "/api/envs?wait=30", body)
        kept, lost = rig.hosts
        (old,) = lost.running()
        await lost.halt()
        await rig.until(lambda: len(kept.running()) == 2)
        assert set(lost.running()) == {old}, "what runs on a host nobody reaches cannot be stopped"
        await lost.boot()
        fleet = rig.app.controller.fleet
        await rig.until(lambda: len(fleet.env_vms("web")) == 2)  # type: ignore[arg-type]
        assert lost.there() == set()
        names = [item["name"] for item in (await rig.data("/api/envs/web"))["vms"]]
        assert sorted(names) == ["vm-0-0", "vm-0-1"] and old not in kept.running()


async def test_a_cordoned_host_keeps_its_vms_and_gets_no_new_ones(tmp_path: Path) -> None:
    async with FleetRig(tmp_path) as rig:
        await rig.call("POST", "/api/envs?wait=30", env("old"))
        for _ in range(2):
            answer = await rig.call("POST", "/api/hosts/host-0/cordon")
            assert (answer.status_code, answer.json()) == (200, {"ok": True})
        assert (await rig.data("/api/hosts/host-0"))["cordoned"] is True
        await rig.call("POST", "/api/envs", env("new"))
        fleet = rig.app.controller.fleet
        await rig.until(lambda: any("host-0: cordoned" in status.message for status in fleet.status.values()))
        assert len(rig.hosts[0].running()) == 1
        await rig.call("POST", "/api/hosts/host-0/uncordon")
        await rig.until(lambda: len(rig.hosts[0].running()) == 2)
        assert (await rig.call("POST", "/api/hosts/none/cordon")).status_code == 404


async def test_a_vm_for_which_no_port_is_left_says_so_and_gets_one_once_it_is_given_back(tmp_path: Path) -> None:
    rig = FleetRig(tmp_path)
    rig.hosts[0].port_range = (20000, 20001)
    async with rig:
        for name in ("first", "second"):
            await rig.call("PUT", f"/api/envs/{name}?wait=30", env(name))
        await rig.call("PUT", "/api/envs/third", env("third"))
        fleet = rig.app.controller.fleet
        await rig.until(lambda: any("it needs 1 host ports and only 0" in status.message for status in fleet.status.values()))
        (vm_shown,) = (await rig.data("/api/envs/third"))["vms"]
        assert vm_shown["port_map"] == {} and len(rig.hosts[0].running()) == 2
        held = (await rig.data("/api/envs/first"))["vms"][0]["port_map"]["22"]
        await rig.call("DELETE", "/api/envs/first")
        await rig.until(lambda: len(rig.hosts[0].running()) == 2 and all(s.settled for s in fleet.status.values()))
        (vm_shown,) = (await rig.data("/api/envs/third"))["vms"]
        assert (vm_shown["state"], vm_shown["port_map"]) == ("running", {"22": held})
