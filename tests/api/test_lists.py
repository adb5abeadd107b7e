"""Lists over real HTTP: filters, pages that survive changes, tags that change with the fleet and answers of 304."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.fleet_rig import FleetRig, env, vm


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[FleetRig]:
    """Two hosts; alice's VMs run on both, bob's wait for an image."""
    async with FleetRig(tmp_path, hosts=2) as rig:
        for env_id, owner, machine in (
            ("a1", "alice", vm(count=2, spread="hosts")),
            ("a2", "alice", vm()),
            ("b1", "bob", vm(image="none", count=3)),
        ):
            await rig.call("POST", "/api/envs", env(env_id, machine, owner=owner))
        fleet = rig.app.controller.fleet
        await rig.until(lambda: sum(status.settled for status in fleet.status.values()) == 3)
        await rig.until(lambda: sum(s.message.startswith("waiting for a host") for s in fleet.status.values()) == 3)
        yield rig


async def ids(rig: FleetRig, path: str) -> list[str]:
    """The ids a list answers."""
    return [thing["id"] for thing in await rig.data(path)]


async def test_lists_are_filtered_by_owner_phase_host_and_environment(rig: FleetRig) -> None:
    assert await ids(rig, "/api/envs") == ["a1", "a2", "b1"]
    assert await ids(rig, "/api/envs?owner=alice") == ["a1", "a2"]
    assert await ids(rig, "/api/envs?phase=pending") == ["b1"]
    assert await ids(rig, "/api/envs?owner=alice&phase=pending") == []
    assert set(await ids(rig, "/api/envs?host=host-0")) | set(await ids(rig, "/api/envs?host=host-1")) == {"a1", "a2"}
    assert await ids(rig, f"/api/vms?host={rig.hosts[0].addr}") == await ids(rig, "/api/vms?host=host-0")
    everything = await rig.data("/api/vms")
    for query, chosen in (
        ("owner=bob", [one for one in everything if one["env_id"] == "b1"]),
        ("phase=ready", [one for one in everything if one["env_id"] != "b1"]),
        ("host=host-1", [one for one in everything if one["host_id"] == "host-1"]),
        ("host=", [one for one in everything if one["env_id"] == "b1"]),
        ("env=a2", [one for one in everything if one["env_id"] == "a2"]),
        ("owner=nobody", []),
        ("host=nowhere", []),
    ):
        assert await rig.data(f"/api/vms?{query}") == chosen, query
    assert sorted(await ids(rig, "/api/hosts?owner=alice")) == ["host-0", "host-1"]
    assert await ids(rig, "/api/hosts?owner=bob") == []
    assert await ids(rig, "/api/hosts?host=host-1") == ["host-1"]
    assert sorted(await ids(rig, "/api/hosts?phase=ready")) == ["host-0", "host-1"]


async def pages(rig: FleetRig, path: str, limit: int) -> AsyncIterator[list[str]]:
    """The ids of one page after the other."""
    token = ""
    while True:
        answer = (await rig.call("GET", path, params={"limit": limit} | ({"continue": token} if token else {}))).json()
        assert len(answer["data"]) <= limit
        yield [thing["id"] for thing in answer["data"]]
        if "continue" not in answer:
            return
        token = answer["continue"]


async def test_pages_together_are_the_whole_list_in_order(rig: FleetRig) -> None:
    for path, limit in itertools.product(("/api/vms", "/api/envs", "/api/hosts"), (1, 2, 3, 100)):
        assert [one for page in [page async for page in pages(rig, path, limit)] for one in page] == await ids(rig, path)
    assert "continue" not in (await rig.call("GET", "/api/vms")).json()


async def test_what_comes_and_goes_between_pages_neither_repeats_nor_hides_others(rig: FleetRig) -> None:
    before = await ids(rig, "/api/vms")
    seen: list[str] = []
    async for page in pages(rig, "/api/vms", 2):
        if not seen:  # the very VM that the token names goes, and another comes
            env_id = next(one["env_id"] for one in await rig.data("/api/vms") if one["id"] == page[-1])
            await rig.call("DELETE", f"/api/envs/{env_id}?wait=30")
            await rig.call("POST", "/api/envs?wait=30", env("late"))
            gone = {one for one in before if one not in await ids(rig, "/api/vms")}
            assert page[-1] in gone
        seen += page
    after = await ids(rig, "/api/vms")
    assert len(seen) == len(set(seen))
    assert set(seen) >= set(before) - gone, "everything that was there all the time is told"
    assert set(seen) <= set(before) | set(after)


BAD_QUERIES = [
    ("limit=abc", "limit must be a whole number from 1"),
    ("limit=0", "limit must be"),
    ("limit=-1", "limit must be"),
    ("limit=", "limit must be"),
    ("limit=10001", "limit must be"),
    ("limit=1&limit=2", "limit is given more than once"),
    ("limit=%D9%A1", "limit must be"),
    ("phase=happy", "phase must be pending, progressing"),
    ("continue=x", "continue must be"),
    ("continue=%00", "continue must be"),
    ("continue=W10", "continue must be"),
    ("continue=bnVsbA", "continue must be"),
    ("owner=%FF", "owner must be UTF-8"),
    ("color=red", "color is no query parameter of this call; there are owner, phase, host"),
    ("=1", "an empty name is no query parameter"),
]


async def test_a_bad_query_is_400_and_names_the_parameter(rig: FleetRig) -> None:
    for path, (query, says) in itertools.product(("/api/envs", "/api/vms", "/api/hosts"), BAD_QUERIES):
        answer = await rig.call("GET", f"{path}?{query}")
        assert answer.status_code == 400 and answer.json()["code"] == "bad_query", (path, answer.text)
        assert answer.json()["error"].startswith(says), answer.text


async def test_a_token_of_another_list_or_filter_is_refused(rig: FleetRig) -> None:
    token = (await rig.call("GET", "/api/vms?limit=1&owner=alice")).json()["continue"]
    for path in ("/api/envs?owner=alice", "/api/vms?owner=bob", "/api/vms?"):
        answer = await rig.call("GET", f"{path}&continue={token}")
        assert answer.status_code == 400 and "another list or other filters" in answer.json()["error"]
    assert (await rig.call("GET", f"/api/vms?owner=alice&limit=7&continue={token}")).status_code == 200


async def test_no_call_takes_a_parameter_it_does_not_know(rig: FleetRig) -> None:
    calls = [(path, "GET") for path in ("/api/status", "/api/images", "/api/version", "/api/envs/a1", "/api/hosts/host-0")]
    for path, method in (
        *calls,
        ("/healthz", "GET"),
        ("/readyz", "GET"),
        ("/api/envs/a1/stop", "POST"),
        ("/api/hosts", "POST"),
    ):
        answer = await rig.call(method, f"{path}?force=1")
        assert answer.status_code == 400 and answer.json()["error"].startswith("force is no query parameter"), path


TAGGED = (
    "/api/envs",
    "/api/envs?owner=alice",
    "/api/envs/a1",
    "/api/vms",
    "/api/vms?limit=1",
    "/api/hosts",
    "/api/hosts/host-0",
    "/api/images",
    "/api/status",
    "/api/version",
)


async def quiet(rig: FleetRig) -> None:
    """Ends what is tried again and again, and waits until nothing more changes by itself."""
    await rig.call("DELETE", "/api/envs/b1?wait=30")
    version = -1
    while version != rig.app.hub.version:
        version = rig.app.hub.version
        await asyncio.sleep(0.2)


async def test_what_has_not_changed_is_answered_with_304_and_no_body(rig: FleetRig) -> None:
    await quiet(rig)
    tags: dict[str, str] = {}
    for path in TAGGED:
        answer = await rig.call("GET", path)
        tags[path] = answer.headers["ETag"]
        for given in (tags[path], f'"other", {tags[path]}', "*"):
            again = await rig.call("GET", path, headers={"If-None-Match": given})
            assert (again.status_code, again.content) == (304, b""), (path, given)
            assert again.headers["ETag"] == tags[path] and "Content-Type" not in again.headers
        other = await rig.call("GET", path, headers={"If-None-Match": '"other"'})
        assert other.status_code == 200 and other.json() == answer.json()
        head = await rig.call("HEAD", path)
        assert (head.status_code, head.headers["ETag"], head.content) == (200, tags[path], b"")
    assert len(set(tags.values())) == len(TAGGED), "one tag a view"
    missing = await rig.call("GET", "/api/envs/none", headers={"If-None-Match": "*"})
    assert missing.status_code == 404 and "ETag" not in missing.headers


async def test_every_change_makes_another_tag(rig: FleetRig) -> None:
    fleet = rig.app.controller.fleet

    async def changed_by(path: str, *call: Any) -> None:
        await quiet(rig)
        before = await rig.call("GET", path)
        assert (await rig.call(*call)).is_success
        after = await rig.call("GET", path, headers={"If-None-Match": before.headers["ETag"]})
        assert after.status_code == 200 and after.json() != before.json(), path

    await changed_by("/api/hosts/host-0", "POST", "/api/hosts/host-0/cordon")
    await changed_by("/api/envs/a1", "POST", "/api/envs/a1/stop?wait=30")
    await changed_by("/api/envs/a1", "POST", "/api/envs/a1/extend", {"lifetime": "never"})
    await changed_by("/api/status", "DELETE", "/api/envs/a1?wait=30")
    await changed_by("/api/envs", "POST", "/api/envs", env("new"))
    await quiet(rig)
    before = await rig.call("GET", "/api/images")
    rig.hosts[0].machines.images = ("tiny", "fresh")
    rig.hosts[0].disks.images["fresh"] = 64
    await rig.until(lambda: "fresh" in fleet.hosts[rig.hosts[0].addr].info.images)  # type: ignore[union-attr]
    after = await rig.call("GET", "/api/images", headers={"If-None-Match": before.headers["ETag"]})
    assert after.status_code == 200 and {"name": "fresh", "host_id": "host-0"} in after.json()["data"]


async def test_no_tag_outlives_the_process_even_if_the_store_is_put_back(rig: FleetRig) -> None:
    await quiet(rig)
    store = rig.folder / "controller" / "muster.db"
    await rig.stop_controller()
    kept = store.read_bytes()
    await rig.start_controller()
    tags = {path: (await rig.call("GET", path)).headers["ETag"] for path in TAGGED}
    await rig.stop_controller()
    store.write_bytes(kept)
    await rig.start_controller()
    for path, tag in tags.items():
        assert (await rig.call("GET", path, headers={"If-None-Match": tag})).status_code == 200, path


async def test_the_tag_of_an_environment_can_be_sent_back_in_if_match(rig: FleetRig) -> None:
    await quiet(rig)
    tag = (await rig.call("GET", "/api/envs/a2")).headers["ETag"]
    changed = env("a2", vm(mem=256), owner="alice")
    assert (await rig.call("PUT", "/api/envs/a2?wait=30", changed, headers={"If-Match": tag})).status_code == 200
    stale = await rig.call("PUT", "/api/envs/a2", env("a2", vm(mem=512), owner="alice"), headers={"If-Match": tag})
    assert stale.status_code == 412 and stale.json()["code"] == "stale_generation"
