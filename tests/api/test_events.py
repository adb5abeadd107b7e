"""Events over the API: told in order, kept over a restart, streamed to watchers."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

from agent.errors import CommandFailed
from reconciler.events import REVISION_BITS
from tests.api.test_watch import Mirror, follow
from tests.fleet_rig import FleetRig, env, vm


async def told(rig: FleetRig, query: str = "") -> list[tuple[str, str]]:
    """(reason, VM's name, else environment, else host) of every event."""
    events = await rig.data(f"/api/events{query}")
    return [(event["reason"], event["vm_name"] or event["env"] or event["host"]) for event in events]


async def test_a_vms_life_is_told_in_order_and_outlives_the_controller(tmp_path: Path) -> None:
    async with FleetRig(tmp_path) as rig:
        await rig.call("POST", "/api/envs?wait=30", env("web", vm(name="a")))
        (running,) = rig.hosts[0].running()
        rig.hosts[0].machines.crash(running)  # type: ignore[arg-type]
        await rig.until(lambda: any(event.reason == "Restarted" for event in rig.app.controller.fleet.events))
        await rig.until(lambda: all(status.settled for status in rig.app.controller.fleet.status.values()))
        await rig.call("DELETE", "/api/envs/web?wait=30")
        lived = [reason for reason, _ in await told(rig, "?vm=a")]
        assert lived == ["Placed", "Creating", "Restarted", "Running", "Deleted"], "a repeat moves to the end"
        events: list[dict[str, Any]] = await rig.data("/api/events?vm=a")
        again = next(event for event in events if event["reason"] == "Running")
        assert again["count"] == 2 and time.time() - 100 < again["first_seen"] <= again["last_seen"] <= time.time()
        assert [event["revision"] >> REVISION_BITS for event in events] == [rig.app.controller.term] * 5
        assert again["host"] == "host-0" and again["env"] == "web" and again["vm"] == running
        assert "SIGKILL" in next(event["message"] for event in events if event["reason"] == "Restarted")
        assert (await told(rig, "?env=web&limit=2")) == [("Recorded", "web"), ("Deleted", "a"), ("Deleted", "web")][1:]
        before = await rig.data("/api/events?env=web")
        await rig.stop_controller()
        await rig.start_controller()
        assert await rig.data("/api/events?env=web") == before
        later = await rig.data(f"/api/events?since={before[-1]['revision']}")
        assert [event["reason"] for event in later] in ([], ["HostOnline"])


async def test_what_goes_wrong_is_a_warning_that_names_the_error(tmp_path: Path) -> None:
    async with FleetRig(tmp_path, cpu=2) as rig:
        rig.hosts[0].machines.faults.fail_next("start", CommandFailed(("qemu",), status=1, stderr="no such device"))
        await rig.call("POST", "/api/envs", env("big", vm(name="b", cpu=9)))
        await rig.call("POST", "/api/envs?wait=30", env("web", vm(name="a")))
        await rig.hosts[0].halt()
        await rig.until(lambda: not rig.app.controller.fleet.hosts[rig.hosts[0].addr].online)
        every = await rig.data("/api/events")
        assert {event["type"] for event in every if event["reason"] == "Unplaceable"} == {"Warning"}
        assert any("no room: cpu (9 wanted" in event["message"] for event in every if event["vm_name"] == "b")
        events = {(event["reason"], event["vm_name"]): event for event in every}
        assert events["Failed", "a"]["type"] == "Warning" and "no such device" in events["Failed", "a"]["message"]
        assert events["Running", "a"]["type"] == "Normal"
        assert events["HostOffline", ""]["host"] == "host-0" and events["HostOnline", ""]["type"] == "Normal"


async def test_watchers_get_every_event_the_log_has(tmp_path: Path) -> None:
    async with FleetRig(tmp_path) as rig:
        await rig.until(lambda: rig.app.controller.fleet.hosts[rig.hosts[0].addr].online)
        mirror = Mirror()
        watcher = asyncio.create_task(follow(rig, mirror))
        await rig.until(lambda: mirror.revision > 0)
        (start,) = (await rig.data("/api/events"))[-1:]
        await rig.call("POST", "/api/envs?wait=30", env("web", vm(count=3)))
        await rig.call("DELETE", "/api/envs/web?wait=30")
        await rig.until(lambda: mirror.revision == rig.app.hub.revision)
        streamed = {key: item for (kind, key), item in mirror.objects.items() if kind == "event"}
        listed = {event["id"]: event for event in await rig.data(f"/api/events?since={start['revision']}")}
        assert streamed == listed and len(listed) >= 3 * 4
        watcher.cancel()
        await asyncio.gather(watcher, return_exceptions=True)


async def test_a_bad_number_is_refused_by_name(tmp_path: Path) -> None:
    async with FleetRig(tmp_path) as rig:
        for query in ("since=soon", "limit=-1", "limit=all", "hots=a"):
            answer = await rig.call("GET", f"/api/events?{query}")
            assert answer.status_code == 400 and answer.json()["error"].startswith(query.partition("=")[0])
