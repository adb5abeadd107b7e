"""The commands of people who run a fleet: events, drains, VMs nobody recorded."""

from __future__ import annotations

from pathlib import Path

from tests.api.cli_rig import muster
from tests.api.test_unknown import made_by_hand
from tests.fleet_rig import FleetRig, env, vm


async def test_a_drain_is_asked_for_waited_for_and_told(tmp_path: Path) -> None:
    async with FleetRig(tmp_path, hosts=2) as rig:
        assert (await muster(rig, "host", "cordon", "host-1")).status == 0
        await rig.call("POST", "/api/envs?wait=30", env("web", vm(name="a")))
        blocked = await muster(rig, "host", "drain", "host-0", "--wait=2")
        assert blocked.status == 1 and "web/a is blocked: no other host can take it: host-1: cordoned" in blocked.err
        shown = (await muster(rig, "describe", "host", "host-0")).out
        assert "draining: 1 of 1 VMs are left" in shown and "DrainBlocked" in shown
        assert "which is being drained: no other host can take it" in (await muster(rig, "describe", "vm", "web/a")).out
        assert (await muster(rig, "host", "uncordon", "host-1")).status == 0
        told = await muster(rig, "host", "drain", "host-0", "--wait=60")
        assert told.status == 0 and told.out.endswith("host/host-0 is drained\n"), told.err
        lines = (await muster(rig, "events", "--env", "web")).out.splitlines()
        assert lines[0].split() == ["AGE", "TYPE", "REASON", "OBJECT", "MESSAGE"]
        assert any("Replaced" in line and "web/a" in line for line in lines)
        events = (await muster(rig, "events", "--host", "host-0", "--limit", "1", "-o", "json")).json
        assert [event["reason"] for event in events] == ["Drained"]


async def test_unknown_vms_are_listed_adopted_and_destroyed(tmp_path: Path) -> None:
    async with FleetRig(tmp_path) as rig:
        assert "every VM of this host is recorded" in (await muster(rig, "host", "unknown", "host-0")).err
        await made_by_hand(rig, "one")
        await made_by_hand(rig, "two")
        listed = await muster(rig, "host", "unknown", "host-0")
        assert [line.split()[0] for line in listed.out.splitlines()] == ["ID", "one", "two"]
        assert (await muster(rig, "adopt", "host-0", "one", "--name", "kept")).out == "vm/one is part of env/e\n"
        assert "no VM" in (await muster(rig, "adopt", "host-0", "none", "--env", "e")).err
        assert (await muster(rig, "adopt", "host-0", "none")).status == 2
        assert (await muster(rig, "host", "destroy-unknown", "host-0", "two")).out == "vm/two is being destroyed\n"
        await rig.until(lambda: set(rig.hosts[0].there()) == {"one"})
        assert "Adopted" in (await muster(rig, "describe", "vm", "e/kept")).out
