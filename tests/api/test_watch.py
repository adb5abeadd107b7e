"""The watch stream: a snapshot, every change in order, resume, and 410 where resuming is impossible."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import httpx

from api import hub
from tests.fleet_rig import FleetRig, env, vm


async def events(rig: FleetRig, query: str = "") -> AsyncGenerator[tuple[str, dict[str, Any]], None]:
    """(event, data) as they come."""
    async with rig.http.stream("GET", f"/api/watch{query}") as answer:
        assert answer.status_code == 200 and answer.headers["Content-Type"] == "text/event-stream"
        name = ""
        async for line in answer.aiter_lines():
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
            elif line.startswith("data: "):
                yield name, json.loads(line.removeprefix("data: "))


class Mirror:
    """What a watcher believes; fails if a revision is missing or repeated."""

    def __init__(self) -> None:
        self.revision = 0
        self.objects: dict[tuple[str, str], dict[str, Any]] = {}

    def take(self, name: str, data: dict[str, Any]) -> None:
        if name == "snapshot":
            self.revision = data["revision"]
            self.objects = {(kind[:-1], item["id"]): item for kind in ("hosts", "envs", "vms") for item in data[kind]}
            return
        assert data["revision"] == self.revision + 1
        self.revision = data["revision"]
        if data["object"] is None:
            del self.objects[data["kind"], data["id"]]
        else:
            self.objects[data["kind"], data["id"]] = data["object"]


async def follow(rig: FleetRig, mirror: Mirror, query: str = "") -> None:
    with contextlib.suppress(httpx.ReadError):
        async for name, data in events(rig, query):
            mirror.take(name, data)


async def caught_up(rig: FleetRig, mirror: Mirror) -> None:
    await rig.until(lambda: mirror.revision == rig.app.hub.revision)
    for kind, path in (("env", "/api/envs"), ("vm", "/api/vms"), ("host", "/api/hosts")):
        shown = {item["id"]: item for item in await rig.data(path)}
        for item in shown.values():
            item.pop("heartbeat_age", None)
        assert {key: item for (of, key), item in mirror.objects.items() if of == kind} == shown


async def test_a_watcher_sees_what_a_reader_sees_through_a_whole_life(tmp_path: Path) -> None:
    async with FleetRig(tmp_path, hosts=2) as rig:
        await rig.call("POST", "/api/envs?wait=30", env("early"))
        mirror = Mirror()
        watcher = asyncio.create_task(follow(rig, mirror))
        await caught_up(rig, mirror)
        assert ("env", "early") in mirror.objects
        await rig.call("POST", "/api/envs?wait=30", env("web", vm(count=5)))
        await caught_up(rig, mirror)
        assert mirror.objects["env", "web"]["phase"] == "ready"
        await rig.call("POST", "/api/envs/web/stop?wait=30")
        await caught_up(rig, mirror)
        assert mirror.objects["env", "web"]["state"] == "stopped"
        await rig.call("DELETE", "/api/envs/web?wait=30")
        await caught_up(rig, mirror)
        assert ("env", "web") not in mirror.objects
        watcher.cancel()
        await asyncio.gather(watcher, return_exceptions=True)


async def test_a_watcher_resumes_without_missing_anything(tmp_path: Path) -> None:
    async with FleetRig(tmp_path) as rig:
        mirror = Mirror()
        watcher = asyncio.create_task(follow(rig, mirror))
        await caught_up(rig, mirror)
        watcher.cancel()
        await asyncio.gather(watcher, return_exceptions=True)
        await rig.call("POST", "/api/envs?wait=30", env("web"))
        watcher = asyncio.create_task(follow(rig, mirror, f"?since={mirror.revision}"))
        await caught_up(rig, mirror)
        assert mirror.objects["env", "web"]["phase"] == "ready"
        watcher.cancel()
        await asyncio.gather(watcher, return_exceptions=True)


async def test_a_revision_that_is_gone_or_of_another_process_is_410(tmp_path: Path) -> None:
    async with FleetRig(tmp_path) as rig:
        before = rig.app.hub.revision
        for since in ("0", str(before + 1000), "99999999999999999"):
            answer = await rig.call("GET", f"/api/watch?since={since}")
            assert (answer.status_code, answer.json()["code"]) == (410, "revision_gone")
        assert (await rig.call("GET", "/api/watch?since=soon")).status_code == 400
        await rig.stop_controller()
        await rig.start_controller()
        assert (await rig.call("GET", f"/api/watch?since={before}")).status_code == 410
        for number in range(3):
            await rig.call("POST", "/api/envs?wait=30", env(f"e{number}"))
        old = rig.app.hub.revision
        rig.app.hub._ring.clear()
        assert (await rig.call("GET", f"/api/watch?since={old - 1}")).status_code == 410


async def test_an_idle_fleet_is_quiet_and_the_stream_is_kept_alive(tmp_path: Path) -> None:
    async with FleetRig(tmp_path) as rig:
        await rig.call("POST", "/api/envs?wait=30", env("web"))
        fleet, calls = rig.app.controller.fleet, rig.app.controller.reconciler.calls
        await rig.until(lambda: fleet.hosts[rig.hosts[0].addr].report is not None)
        revision = rig.app.hub.revision
        await asyncio.sleep(2)  # four heartbeats
        assert rig.app.hub.revision == revision and rig.app.controller.reconciler.calls == calls
        assert hub.KEEP_ALIVE <= 10
