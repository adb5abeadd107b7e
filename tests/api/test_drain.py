"""A host is emptied: VM by VM, told as it goes, held up by name, taken back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from agent.errors import DoesNotFit
from agent.inventory import Capacity
from tests.fleet_rig import FleetRig, env, vm


async def drained(rig: FleetRig, host: str) -> dict[str, Any]:
    """The drain as the API shows it."""
    shown: dict[str, Any] = (await rig.data(f"/api/hosts/{host}"))["drain"]
    return shown


async def test_a_drained_host_ends_empty_and_can_be_removed(tmp_path: Path) -> None:
    async with FleetRig(tmp_path, hosts=2) as rig:
        first, second = rig.hosts
        await rig.call("POST", "/api/hosts/host-1/cordon")
        await rig.call("POST", "/api/envs?wait=30", env("web", vm(count=3)))
        await rig.call("POST", "/api/envs?wait=30", env("idle", vm()))
        await rig.call("POST", "/api/envs/idle/stop?wait=30")
        before = set(first.there())
        assert len(before) == 4 and second.there() == set()
        assert (await rig.call("DELETE", "/api/hosts/host-0")).json()["code"] == "host_in_use"
        await rig.call("POST", "/api/hosts/host-1/uncordon")
        fleet = rig.app.controller.fleet
        out_of_service: list[int] = []
        changed = fleet.changed

        def count_out_of_service(kind: Any, key: str) -> None:
            changed(kind, key)
            wanted = [item for item in fleet.env_vms("web") if item.desired == "running"]  # type: ignore[arg-type]
            out_of_service.append(sum(not fleet.status[item.id].settled for item in wanted if item.id in fleet.status))

        fleet.changed = count_out_of_service
        answer = await rig.call("POST", "/api/hosts/host-0/drain")
        assert answer.status_code == 200
        told = answer.json()["data"]
        assert told["cordoned"] and told["drain"] == {"state": "draining", "total": 4, "left": 4, "moving": 0, "blocked": []}
        assert (await rig.call("POST", "/api/hosts/host-0/drain")).json()["data"]["drain"]["total"] == 4
        await rig.until(lambda: (drain := fleet.hosts[first.addr].drain) is not None and drain.left == 0)
        assert await drained(rig, "host-0") == {"state": "drained", "total": 4, "left": 0, "moving": 0, "blocked": []}
        await rig.until(lambda: len(second.running()) == 3)
        assert first.there() == set() and not before & set(second.there())
        assert max(out_of_service) == 1, "the roll-out rule: one VM of an environment at a time"
        reasons = [event["reason"] for event in await rig.data("/api/events?host=host-0")]
        assert reasons.count("Replaced") == 4 and reasons[-1] == "Drained" and "Draining" in reasons
        replaced = next(event for event in await rig.data("/api/events") if event["reason"] == "Replaced")
        assert "its disk" in replaced["message"] and "host-0 is being drained" in replaced["message"]
        assert (await rig.call("DELETE", "/api/hosts/host-0")).status_code == 200
        await rig.call("POST", "/api/envs/idle/start?wait=30")
        assert len(second.running()) == 4
        rig.hosts.remove(first)
        await first.halt()


async def test_a_blocked_drain_names_the_vm_and_every_hosts_reason_and_can_be_taken_back(tmp_path: Path) -> None:
    async with FleetRig(tmp_path, hosts=2, cpu=4) as rig:
        await rig.call("POST", "/api/hosts/host-1/cordon")
        await rig.call("POST", "/api/envs?wait=30", env("web", vm(name="a", cpu=3)))
        running = rig.hosts[0].running()
        fleet = rig.app.controller.fleet
        host = fleet.hosts[rig.hosts[0].addr]
        await rig.call("POST", "/api/hosts/host-0/drain")
        await rig.until(lambda: host.drain is not None and bool(host.drain.blocked))
        (blocked,) = (await drained(rig, "host-0"))["blocked"]
        assert (blocked["name"], blocked["env"]) == ("a", "web") and set(running) == {blocked["vm"]}
        assert blocked["why"] == "no other host can take it: host-1: cordoned"
        warned = next(event for event in await rig.data("/api/events?vm=a") if event["reason"] == "DrainBlocked")
        assert warned["type"] == "Warning" and "host-1: cordoned" in warned["message"]

        await rig.stop_controller()
        await rig.start_controller()
        fleet = rig.app.controller.fleet
        await rig.until(lambda: bool((drain := fleet.hosts[rig.hosts[0].addr].drain) and drain.blocked))
        assert (await drained(rig, "host-0"))["total"] == 1, "a drain outlives the controller"
        assert (await rig.call("POST", "/api/hosts/host-0/uncordon")).json() == {"ok": True}
        shown = await rig.data("/api/hosts/host-0")
        assert "drain" not in shown and not shown["cordoned"]
        assert rig.hosts[0].running() == running
        assert (await rig.call("POST", "/api/hosts/none/drain")).status_code == 404


async def test_nothing_moves_from_a_drained_host_that_is_silent(tmp_path: Path) -> None:
    async with FleetRig(tmp_path, hosts=2) as rig:
        await rig.call("POST", "/api/hosts/host-1/cordon")
        await rig.call("POST", "/api/envs?wait=30", env("web"))
        await rig.call("POST", "/api/hosts/host-1/uncordon")
        silent, other = rig.hosts
        await silent.halt()
        fleet = rig.app.controller.fleet
        host = fleet.hosts[silent.addr]
        await rig.until(lambda: not host.online)
        await rig.call("POST", "/api/hosts/host-0/drain")
        await rig.until(lambda: host.drain is not None and bool(host.drain.blocked))
        assert "host-0 is offline" in (await drained(rig, "host-0"))["blocked"][0]["why"]
        assert len(silent.running()) == 1 and other.there() == set()
        await silent.boot()
        await rig.until(lambda: len(other.running()) == 1 and silent.there() == set())


async def test_a_vm_its_host_has_no_room_for_is_made_elsewhere(tmp_path: Path) -> None:
    async with FleetRig(tmp_path, hosts=2, cpu=4) as rig:
        full, free = rig.hosts
        fleet = rig.app.controller.fleet
        await rig.until(lambda: all(host.report is not None for host in fleet.hosts.values()))
        assert full.agent is not None
        full.disks.faults.fail_always("ensure_disk", DoesNotFit("the filesystem is full"))
        await rig.call("POST", "/api/hosts/host-1/cordon")
        await rig.call("POST", "/api/envs", env("web", vm(name="a")))
        await rig.until(lambda: any("no other host can take it: host-1: cordoned" in s.message for s in fleet.status.values()))
        await rig.call("POST", "/api/hosts/host-1/uncordon")
        (old,) = fleet.env_vms("web")  # type: ignore[arg-type]
        await rig.until(lambda: len(free.running()) == 1 and len(fleet.env_vms("web")) == 1)  # type: ignore[arg-type]
        assert old.id not in free.running() and full.there() == set()
        replaced = next(event for event in await rig.data("/api/events?vm=a") if event["reason"] == "Replaced")
        assert replaced["vm"] == old.id and "host host-0 refuses it" in replaced["message"]


async def test_a_host_that_answers_507_is_left_at_once(tmp_path: Path) -> None:
    async with FleetRig(tmp_path, hosts=2, cpu=4) as rig:
        fleet = rig.app.controller.fleet
        await rig.until(lambda: all(host.report is not None for host in fleet.hosts.values()))
        small = rig.hosts[0]
        assert small.agent is not None
        # The machine has become smaller than its agent told the controller.
        inventory = small.agent._runtime._inventory  # type: ignore[attr-defined]
        inventory._capacity = Capacity(cpu=1, mem=1, disk=1)
        await rig.call("POST", "/api/envs?wait=30", env("web", vm(name="a")))
        assert len(rig.hosts[1].running()) == 1 and small.there() == set()
        reasons = [event["reason"] for event in await rig.data("/api/events?vm=a")]
        assert reasons.count("Refused") == 1 and reasons.count("Replaced") == 1 and reasons.count("Running") == 1
