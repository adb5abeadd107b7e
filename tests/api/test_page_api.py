"""What the dashboard asks for beside everybody's endpoints: counts of the last hour, checks of YAML, specs beside what is."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from pathlib import Path
from typing import Any

import httpx

from api import hub
from tests.api.test_watch import events
from tests.fleet_rig import KEY, FleetRig, env, vm

GOOD = f"""\
id: web
ssh_keys: ["{KEY}"]
vms:
  - name: a
    image: tiny
    cpu: 1
    mem: 128
    disk: 256
"""


async def check(rig: FleetRig, text: str, kind: str = "application/yaml") -> httpx.Response:
    return await rig.http.post("/api/validate", content=text.encode(), headers={"Content-Type": kind})


async def checked(rig: FleetRig, text: str) -> dict[str, Any]:
    answer = await check(rig, text)
    assert answer.status_code == 200, answer.text
    return dict(answer.json()["data"])


async def test_yaml_is_told_its_mistakes_by_line_and_its_plan_when_it_has_none(tmp_path: Path) -> None:
    async with FleetRig(tmp_path) as rig:
        found = await checked(rig, GOOD.replace("cpu: 1", "cpus: 1").replace("mem: 128", "mem: -1"))
        assert [(one["line"], one["field"]) for one in found["errors"]] == [(6, "vms.0.cpus"), (7, "vms.0.mem")]
        assert "spec" not in found or found["spec"] is None
        found = await checked(rig, GOOD)
        assert found["errors"] == [] and found["exists"] is False
        assert [(line["action"], line["name"], line["host"]) for line in found["plan"]] == [("create", "a", "host-0")]
        assert await rig.data("/api/envs") == []
        applied = await rig.call("PUT", "/api/envs/web?wait=30", found["spec"])
        assert applied.status_code == 201, applied.text
        found = await checked(rig, GOOD.replace("mem: 128", "mem: 256"))
        assert (found["exists"], found["generation"]) == (True, 1)
        assert [(line["action"], line["fields"]) for line in found["plan"]] == [("replace", ["mem"])]


async def test_yaml_that_reads_files_or_holds_several_or_is_none_is_refused(tmp_path: Path) -> None:
    async with FleetRig(tmp_path) as rig:
        secret = tmp_path / "key.pub"
        secret.write_text(KEY)
        found = await checked(rig, GOOD.replace(KEY, f"@{secret}"))
        assert found["errors"] != [] and KEY not in str(found)
        several = await checked(rig, GOOD + "---\n" + GOOD.replace("id: web", "id: db"))
        assert "one environment at a time" in several["errors"][0]["message"]
        assert (await checked(rig, ""))["errors"] != []
        assert (await check(rig, GOOD, "text/plain")).status_code == 415
        answer = await rig.http.post("/api/validate", content=b"\xff\xfe", headers={"Content-Type": "application/yaml"})
        assert answer.status_code == 400


async def test_a_spec_is_read_as_yaml_beside_what_is_there(tmp_path: Path) -> None:
    async with FleetRig(tmp_path) as rig:
        await rig.call("POST", "/api/envs?wait=30", env("web", vm(name="a", ports=[80])))
        found = await rig.data("/api/envs/web/spec")
        (seen,) = found["vms"]
        assert (
            seen["desired"]
            == seen["observed"]
            == {
                "state": "running",
                "engine": "qemu",
                "image": "tiny",
                "cpu": 1,
                "mem": 128,
                "disk": 256,
                "ports": [22, 80],
            }
        )
        again = await checked(rig, found["yaml"])
        assert (again["errors"], [line["action"] for line in again["plan"]]) == ([], ["keep"])
        assert (await rig.call("GET", "/api/envs/none/spec")).status_code == 404


async def test_a_vm_tells_its_steps_and_the_fleet_its_counts(tmp_path: Path) -> None:
    async with FleetRig(tmp_path) as rig:
        await rig.call("POST", "/api/envs?wait=30", env("web", vm(name="a")))
        steps = (await rig.data("/api/envs/web"))["vms"][0]["steps"]
        assert (steps[0]["name"], steps[-1]["name"]) == ("accepted", "ready")
        assert [step["name"] for step in steps].count("placed") == 1  # never back to a step it has left
        assert [step["at_ms"] for step in steps] == sorted(step["at_ms"] for step in steps)
        rig.app.history.sample()
        told = await rig.data("/api/history")
        assert {key: told["samples"][-1][key] for key in ("desired", "actual", "unconverged")} == {
            "desired": 1,
            "actual": 1,
            "unconverged": 0,
        }


async def test_a_watcher_that_asks_for_it_is_told_counts_and_heartbeats(tmp_path: Path) -> None:
    async with FleetRig(tmp_path) as rig, asyncio.timeout(60), aclosing(events(rig, "?pulse=true")) as told:
        seen: dict[str, dict[str, Any]] = {}
        async for name, data in told:
            seen[name] = data
            if name == "snapshot":
                rig.app.hub.beat(rig.app.history.sample())
            if {"history", "snapshot", "pulse"} <= seen.keys():
                break
        assert seen["history"]["step"] == 5
        assert seen["pulse"]["sample"]["desired"] == 0 and "host-0" in seen["pulse"]["heartbeats"]


async def test_a_watcher_that_asks_for_it_is_told_the_vms_in_parts_before_the_snapshot(
    tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(hub, "PART", 2)
    async with FleetRig(tmp_path) as rig, asyncio.timeout(60):
        await rig.call("POST", "/api/envs?wait=30", env("web", vm(name="a", count=5)))
        told: list[tuple[str, int]] = []
        async with aclosing(events(rig, "?parts=true")) as watched:
            async for name, data in watched:
                told.append((name, len(data["vms"])))
                if name == "snapshot":
                    break
        assert told == [("part", 2), ("part", 2), ("part", 1), ("snapshot", 0)]


async def test_nothing_is_serialised_long_after_the_last_watcher_left_and_a_return_begins_anew(
    tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(hub, "LINGER", 0.0)
    async with FleetRig(tmp_path) as rig:
        before = rig.app.hub.revision
        await rig.call("POST", "/api/envs?wait=30", env("web"))
        assert rig.app.hub.revision == before
        async with asyncio.timeout(60), aclosing(events(rig)) as told:
            async for name, data in told:
                assert (name, [one["id"] for one in data["envs"]]) == ("snapshot", ["web"])
                break
        answer = await rig.call("GET", f"/api/watch?since={before}")
        assert answer.status_code == 410


async def test_streams_end_cleanly_when_the_controller_stops(tmp_path: Path) -> None:
    async with FleetRig(tmp_path) as rig:
        begun = asyncio.Event()

        async def watch() -> str:
            async for _ in events(rig):
                begun.set()
            return "ended"

        watching = asyncio.create_task(watch())
        async with asyncio.timeout(60):
            await begun.wait()
            await rig.app.stop()
            assert await watching == "ended"
            await rig.http.aclose()
            await rig.start_controller()
