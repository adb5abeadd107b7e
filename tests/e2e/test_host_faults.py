"""What goes wrong on a host: its disk full, a VM killed, the machine rebooted, a reply that is lost."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest

from tests.e2e.rig import until
from tests.e2e.site import Host, Site, box, filled

pytestmark = [pytest.mark.real, pytest.mark.e2e]


def on(host: Host, name: str = "box", **fields: object) -> dict[str, object]:
    """A container that belongs on one host."""
    return box(name, host_labels={"host": host.name}, **fields)


def says(fleet: Site, env: str, *words: str) -> Callable[[], bool]:
    """Whether the message of an environment's only VM, or of what replaced it, holds some words."""
    return lambda: any(all(word in vm["message"] for word in words) for vm in fleet.env(env)["vms"])


def test_a_create_on_a_full_disk_says_so_leaves_nothing_and_is_made_once_there_is_room(fleet: Site) -> None:
    full, fine = fleet.hosts[:2]
    fleet.put("before", on(full))
    fleet.await_phase("before")
    with filled(full.vms):
        fleet.put("there", on(full))
        fleet.put("elsewhere", on(fine))
        fleet.await_phase("elsewhere")
        until(says(fleet, "there", "No space left on device"), "the VM says what keeps it")
        before = fleet.env("before")["vms"][0]["id"]
        assert [each.id for each in full.found().boxes if each.env == "before"] == [before]
        assert set(full.pids()) == {before}
        until(lambda: full.found().stray == (), "nothing of the failed creation is left")
        assert [each.env for each in full.found().boxes] == ["before"]
    fleet.await_phase("there")
    assert sorted(each.env for each in full.found().boxes if each.pid) == ["before", "there"]


def test_a_killed_vm_is_started_again_as_its_restart_says(fleet: Site) -> None:
    policies = ("always", "on-failure", "never")
    fleet.put("mortal", *(on(fleet.hosts[0], policy, restart=policy) for policy in policies))
    ids = {vm["name"]: vm["id"] for vm in fleet.await_phase("mortal")["vms"]}
    before = fleet.pids()
    for name in policies:
        os.kill(before[ids[name]], signal.SIGKILL)

    def started_again() -> set[str]:
        now = fleet.pids()
        return {name for name, vm_id in ids.items() if now.get(vm_id, before[vm_id]) != before[vm_id]}

    until(lambda: started_again() == {"always", "on-failure"}, "two of them run again")
    until(lambda: fleet.env("mortal")["env"]["phase"] == "degraded", "the third is told")
    dead = next(vm for vm in fleet.env("mortal")["vms"] if vm["name"] == "never")
    assert "signal 9" in dead["message"] and "restart is never" in dead["message"]
    assert ids["never"] not in fleet.pids()
    assert {vm["name"]: vm["id"] for vm in fleet.env("mortal")["vms"]} == ids


def test_after_a_reboot_of_its_host_every_vm_runs_again_once(fleet: Site) -> None:
    host = fleet.hosts[1]
    fleet.put("rebooted", on(host, count=3))
    fleet.await_phase("rebooted")
    before, elsewhere = host.pids(), fleet.hosts[0].pids()
    host.agent.kill()
    host.docker.stop()
    host.docker.host("nft", "flush", "ruleset")
    host.docker.host("ip", "link", "delete", "muster0")
    host.docker.start()
    fleet.start()
    until(lambda: host.pids().keys() == before.keys(), "they run again")
    fleet.await_phase("rebooted")
    assert not set(host.pids().values()) & set(before.values())
    assert fleet.settled()[host.name].stray == ()
    assert fleet.hosts[0].pids() == elsewhere


def test_a_vm_whose_creation_was_never_answered_is_the_same_vm_afterwards(fleet: Site) -> None:
    host = fleet.hosts[3]
    fleet.cut(host, "its data")
    fleet.put("unanswered", on(host))
    until(host.pids, "the call has arrived and the VM runs")
    made = host.pids()
    fleet.controller.kill()
    fleet.mend()
    fleet.start()
    assert [vm["id"] for vm in fleet.await_phase("unanswered")["vms"]] == list(made)
    assert host.pids() == made
    assert {name: len(found.boxes) for name, found in fleet.settled().items()} == {
        each.name: int(each is host) for each in fleet.hosts
    }
