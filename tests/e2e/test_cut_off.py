"""Hosts that are cut off from the controller, both ways and one way, for less and for more than the grace time."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.e2e.rig import until
from tests.e2e.site import Direction, Host, Site, box

pytestmark = [pytest.mark.real, pytest.mark.e2e]

CUTS: tuple[Direction, ...] = ("both ways", "to the host", "from the host")


def cut_all_but_the_first(fleet: Site) -> list[Host]:
    """Cuts three of the four hosts off, each in another direction, and waits until they count as offline."""
    away = fleet.hosts[1:]
    for host, direction in zip(away, CUTS, strict=True):
        fleet.cut(host, direction)
    for host in away:
        until(lambda host=host: fleet.state(host) == "offline", f"{host.name} is offline")  # type: ignore[misc]
    return away


def return_all(fleet: Site) -> None:
    """Mends the network and waits until every host is back."""
    fleet.mend()
    for host in fleet.hosts:
        until(lambda host=host: fleet.state(host) == "online", f"{host.name} is back")  # type: ignore[misc]


def live(fleet: Site, env: str) -> dict[str, tuple[str, str, int]]:
    """Name → (host, VM id, process) of an environment's VMs as found on the hosts; a name found twice fails."""
    found = [(host, each) for host, there in fleet.settled().items() for each in there.boxes if each.env == env]
    assert not [name for name, times in Counter(each.name for _, each in found).items() if times > 1], found
    return {each.name: (host, each.id, each.pid) for host, each in found}


def test_a_host_cut_off_for_less_than_the_grace_time_loses_nothing_and_gets_nothing_new(fleet: Site) -> None:
    fleet.put("waits", box(count=4, spread="hosts"))
    fleet.put("moves", box(count=4, spread="hosts"), on_host_loss="recreate")
    before = {name: (fleet.await_phase(name), live(fleet, name))[1] for name in ("waits", "moves")}
    assert [len({host for host, _, _ in vms.values()}) for vms in before.values()] == [4, 4]
    cut_all_but_the_first(fleet)
    assert fleet.env("waits")["env"]["phase"] == "degraded"
    return_all(fleet)
    for name, vms in before.items():
        fleet.await_phase(name)
        assert live(fleet, name) == vms


def test_a_host_cut_off_for_longer_keeps_what_waits_and_loses_only_the_copies_that_were_made_anew(fleet: Site) -> None:
    fleet.put("waits", box(count=4, spread="hosts"))
    fleet.put("moves", box(count=4, spread="hosts"), on_host_loss="recreate")
    fleet.put("doomed", *(box(f"on-{host.name}", host_labels={"host": host.name}) for host in fleet.hosts))
    before = {name: (fleet.await_phase(name), live(fleet, name))[1] for name in ("waits", "moves", "doomed")}
    pids = fleet.pids()
    away = cut_all_but_the_first(fleet)
    stayed = fleet.hosts[0]

    assert fleet.call("DELETE", "/api/envs/doomed") == (200, {"ok": True})
    until(lambda: len(fleet.env("doomed")["vms"]) == len(away), "the VM on the host that is there is gone")
    doomed = fleet.env("doomed")
    assert doomed["env"]["phase"] == "terminating"
    for vm in doomed["vms"]:
        assert f"host {vm['host_id']} is offline" in vm["message"]
    again = {"id": "doomed", "vms": [box("again")]}
    assert fleet.call("PUT", "/api/envs/doomed", again)[0] == 409
    assert fleet.call("POST", "/api/envs", again)[0] == 409

    def anew() -> set[str]:
        return {vm_id for vm_id in stayed.pids() if vm_id not in pids}

    until(lambda: len(anew()) == len(away), "what ran on the lost hosts is made anew on the one that is left")
    made = anew()
    assert {vm_id: pid for vm_id, pid in fleet.pids().items() if vm_id not in made} == {
        vm_id: pid for vm_id, pid in pids.items() if vm_id != before["doomed"][f"on-{stayed.name}"][1]
    }, "on a host that nobody reaches everything goes on"
    assert {vm["host_id"] for vm in fleet.env("waits")["vms"]} == {host.name for host in fleet.hosts}

    return_all(fleet)
    until(lambda: fleet.call("GET", "/api/envs/doomed")[0] == 404, "the deletion ends by itself")
    for name in ("waits", "moves"):
        fleet.await_phase(name)
    assert live(fleet, "waits") == before["waits"]
    assert live(fleet, "doomed") == {}
    moved = live(fleet, "moves")
    assert sorted(moved) == sorted(before["moves"])
    assert {vm_id for _, vm_id, _ in moved.values()} == made | {
        vm_id for host, vm_id, _ in before["moves"].values() if host == stayed.name
    }
    assert {host for host, _, _ in moved.values()} == {stayed.name}
    fleet.put("doomed", box("again"))
    fleet.await_phase("doomed")
