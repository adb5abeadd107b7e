"""The controller's store full, damaged, and replaced by an older copy, while real containers run on the hosts."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.rig import until
from tests.e2e.site import Site, box, filled

pytestmark = [pytest.mark.real, pytest.mark.e2e]


def refused(fleet: Site, *call: Any) -> None:
    """The call is answered 503, and nothing of it is kept."""
    status, body = fleet.call(*call)
    assert (status, body["ok"], body["code"]) == (503, False, "store_unavailable"), body
    assert "the change was not recorded" in body["error"]


def calls(fleet: Site) -> int:
    """Mutating calls so far."""
    return fleet.controller.words_logged("call made", "call failed")


def test_a_full_store_refuses_changes_goes_on_answering_and_recovers_by_itself(fleet: Site) -> None:
    fleet.controller.end()  # leaves no log behind in which a small change could still find room
    fleet.start()
    fleet.put("kept", box(count=2, spread="hosts"))
    kept = fleet.await_phase("kept")
    pids = fleet.pids()
    new = {"id": "new", "vms": [box(ports=list(range(1000, 3000)))]}
    with filled(fleet.database.parent):
        refused(fleet, "PUT", "/api/envs/new", new)
        assert fleet.call("GET", "/api/envs/new")[0] == 404
        assert [vm["id"] for vm in fleet.env("kept")["vms"]] == [vm["id"] for vm in kept["vms"]]
    assert fleet.pids() == pids
    fleet.put("new", box())
    fleet.await_phase("new")
    assert fleet.env("kept")["env"]["phase"] == "ready"


def test_a_damaged_store_is_refused_untouched_and_the_fleet_runs_on_without_a_call_once_it_is_mended(fleet: Site) -> None:
    fleet.put("kept", box(count=4, spread="hosts"))
    fleet.await_phase("kept")
    pids = fleet.pids()
    for part in (fleet.controller, fleet.hosts[0].agent):
        part.kill()
    backup = fleet.folder / "backup"
    shutil.copytree(fleet.database.parent, backup, ignore=shutil.ignore_patterns("*.lock"))
    garbage = bytes(range(256)) * 64
    fleet.database.write_bytes(garbage)
    said = fleet.controller.log.stat().st_size
    fleet.controller.start()
    process = fleet.controller.process
    assert process is not None and process.wait(60) not in (None, 0)
    fleet.controller.process = None
    assert str(fleet.database) in fleet.controller.log.read_text()[said:]
    assert fleet.database.read_bytes() == garbage
    assert fleet.pids() == pids

    put_back(fleet, backup)
    made = calls(fleet)
    fleet.start()
    fleet.await_phase("kept")
    assert (fleet.pids(), calls(fleet)) == (pids, made), "both were restarted together, and nothing had to be done"


def test_a_store_replaced_by_an_older_copy_destroys_nothing_shows_the_strangers_and_works_on(fleet: Site) -> None:
    fleet.put("older", box(count=2, spread="hosts"))
    fleet.await_phase("older")
    fleet.controller.end()
    backup = fleet.folder / "backup"
    shutil.copytree(fleet.database.parent, backup, ignore=shutil.ignore_patterns("*.lock"))
    fleet.start()
    fleet.controller.kill()
    fleet.start()
    fleet.put("newer", box(count=4, spread="hosts"))  # agents hear a term that the copy, started once, would not reach
    fleet.await_phase("newer")
    strangers = {vm["id"]: vm["host_id"] for vm in fleet.env("newer")["vms"]}
    pids = fleet.pids()
    fleet.controller.kill()
    put_back(fleet, backup)
    fleet.start()
    fleet.await_phase("older")
    assert fleet.call("GET", "/api/envs/newer")[0] == 404
    assert {vm["id"]: host.name for host in fleet.hosts for vm in fleet.data(f"/api/hosts/{host.name}/unknown")} == strangers
    assert fleet.pids() == pids
    fleet.put("after", box())
    fleet.await_phase("after")
    assert {vm_id: pid for vm_id, pid in fleet.pids().items() if vm_id in pids} == pids

    (adopted, its_host), *others = sorted(strangers.items())
    status, body = fleet.call("POST", f"/api/hosts/{its_host}/unknown/{adopted}/adopt", {"env": "newer"})
    assert status in (200, 201), body
    for vm_id, host_id in others:
        assert fleet.call("DELETE", f"/api/hosts/{host_id}/unknown/{vm_id}")[0] == 200
    until(lambda: not {vm_id for vm_id, _ in others} & fleet.pids().keys(), "what was not adopted is gone")
    assert [vm["id"] for vm in fleet.await_phase("newer")["vms"]] == [adopted]
    assert fleet.pids()[adopted] == pids[adopted]


def put_back(fleet: Site, backup: Path) -> None:
    """Replaces the store's files by those of a copy."""
    for old in fleet.database.parent.glob("muster.db*"):
        old.unlink()
    for file in backup.glob("muster.db*"):
        shutil.copy(file, fleet.database.parent)
    shutil.rmtree(backup)
