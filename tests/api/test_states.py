"""People, operators and faults in any order over the REST API: it never answers otherwise than it should, and all converges."""

from __future__ import annotations

import asyncio
import itertools
import json
import shutil
import tempfile
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from specs.names import VmId
from tests.fleet_rig import KEY, FleetRig, env, vm

T = TypeVar("T")

HOSTS = 3
ENVS = ("e0", "e1", "e2")
SETTLED = 60.0  # seconds

names = st.sampled_from(ENVS)
hosts = st.integers(0, HOSTS - 1)
machines = st.lists(
    st.builds(vm, name=st.sampled_from(["a", "b"]), cpu=st.integers(1, 2), ports=st.sampled_from([[], [80]])),
    min_size=1,
    max_size=2,
    unique_by=lambda item: item["name"],
) | st.builds(lambda count: [vm(count=count)], st.integers(1, 3))
bodies = st.builds(lambda vms, lifetime: {"vms": vms, "lifetime": lifetime}, machines, st.sampled_from(["1h", "never"]))


@dataclass
class Wanted:
    """What an environment should be."""

    body: dict[str, Any]
    generation: int = 1
    power: str = "running"
    ending: bool = False
    is_extended: bool = False

    def names(self) -> list[str]:
        """The names its VMs have."""
        given = self.body["vms"]
        if "name" in given[0]:
            return sorted(item["name"] for item in given)
        return [f"vm-0-{number}" for number in range(given[0]["count"])] if given[0]["count"] > 1 else ["vm-0"]


class Fleets(RuleBasedStateMachine):
    """One fleet of three hosts, and what should be there."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.folder = Path(tempfile.mkdtemp())
        self.wanted: dict[str, Wanted] = {}
        self.down: set[int] = set()
        self.strangers: dict[str, str] = {}
        self.numbers = itertools.count()
        self.revision = 0

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    def call(self, method: str, path: str, body: object = None, **options: Any) -> tuple[int, Any]:
        answer = self.run(self.rig.call(method, path, body, **options))
        content = answer.json()
        assert content["ok"] is (answer.status_code < 300)
        return answer.status_code, content.get("data", content)

    def data(self, path: str) -> Any:
        status, content = self.call("GET", path)
        assert status == 200
        return content

    @initialize()
    def begin(self) -> None:
        self.rig = self.run(FleetRig(self.folder, hosts=HOSTS).__aenter__())

    # ---- people

    def recorded(self, env_id: str, body: dict[str, Any], status: int) -> None:
        """What a request that was carried out means."""
        known = self.wanted.get(env_id)
        if known is None or known.ending:
            assert status == 201
            self.wanted[env_id] = Wanted(body)
        elif known.body != body:
            assert status == 200
            known.body, known.generation = body, known.generation + 1
        else:
            assert status == 200

    @rule(env_id=names, body=bodies)
    def post(self, env_id: str, body: dict[str, Any]) -> None:
        known = self.wanted.get(env_id)
        status, content = self.call("POST", "/api/envs", env(env_id, *body["vms"], lifetime=body["lifetime"]))
        if status == 409:
            assert known is not None and (known.ending or known.body != body)
            assert content["code"] == ("terminating" if known.ending else "exists")
        else:
            assert known is None or known.ending or known.body == body
            self.recorded(env_id, body, status)

    @rule(env_id=names, body=bodies, behind=st.none() | st.integers(0, 2), dry=st.booleans())
    def put(self, env_id: str, body: dict[str, Any], behind: int | None, dry: bool) -> None:
        known = self.wanted.get(env_id)
        is_there = known is not None and not known.ending
        generation = known.generation if known and is_there else 0
        headers = {} if behind is None else {"If-Match": f'"{generation + behind}"'}
        request = env(env_id, *body["vms"], lifetime=body["lifetime"])
        status, content = self.call("PUT", f"/api/envs/{env_id}?dry_run={str(dry).lower()}", request, headers=headers)
        if known is not None and known.ending and status in (409, 412):
            assert content["code"] in ("terminating", "stale_generation")
        elif dry:
            assert status == 200 and {line["action"] for line in content["plan"]} <= {"keep", "create", "replace", "destroy"}
            if is_there and known is not None and known.body == body:
                assert {line["action"] for line in content["plan"]} == {"keep"}
        elif behind:
            assert (status, content["code"]) == (412, "stale_generation")
        else:
            self.recorded(env_id, body, status)

    @rule(env_id=names)
    def delete(self, env_id: str) -> None:
        status, _ = self.call("DELETE", f"/api/envs/{env_id}")
        known = self.wanted.get(env_id)
        assert status == 200 if known and not known.ending else status in (200, 404) if known else status == 404
        if known is not None:
            known.ending = True
            if status == 404:
                del self.wanted[env_id]

    @rule(env_id=names, verb=st.sampled_from(["stop", "start"]))
    def set_power(self, env_id: str, verb: str) -> None:
        if self.changed(env_id, *self.call("POST", f"/api/envs/{env_id}/{verb}")):
            self.wanted[env_id].power = "stopped" if verb == "stop" else "running"

    @rule(env_id=names, lifetime=st.sampled_from(["2h", "never"]))
    def extend(self, env_id: str, lifetime: str) -> None:
        status, content = self.call("POST", f"/api/envs/{env_id}/extend", {"lifetime": lifetime})
        if self.changed(env_id, status, content):
            assert (content["expires_at"] == 0) is (lifetime == "never")

    def changed(self, env_id: str, status: int, content: Any) -> bool:
        """Whether a request to an environment was carried out, which depends on whether it is there."""
        known = self.wanted.get(env_id)
        if status == 200:
            assert known is not None and not known.ending
        else:
            assert status == 404 if known is None else (known.ending and status in (404, 409))
            assert content["code"] == ("not_found" if status == 404 else "terminating")
        return status == 200

    # ---- operators

    @rule(host=hosts, verb=st.sampled_from(["cordon", "uncordon", "drain"]))
    def mark(self, host: int, verb: str) -> None:
        addr = self.rig.hosts[host].addr  # its name is not known after `forget` until it has answered
        status, _ = self.call("POST", f"/api/hosts/{addr}/{verb}")
        shown = self.data(f"/api/hosts/{addr}")
        assert (status, shown["cordoned"]) == (200, verb != "uncordon")
        if verb != "cordon":  # which changes nothing about a host that is being drained
            assert ("drain" in shown) is (verb == "drain")

    @rule(host=hosts)
    def forget(self, host: int) -> None:
        """A host that VMs are placed on cannot be unregistered; another is registered again at once."""
        status, content = self.call("DELETE", f"/api/hosts/{self.rig.hosts[host].addr}")
        if status == 409:
            assert content["code"] == "host_in_use"
            return
        assert status == 200
        status, _ = self.call("POST", "/api/hosts", {"addr": self.rig.hosts[host].addr})
        assert status == 201

    @rule(host=hosts)
    def make_by_hand(self, host: int) -> None:
        if host in self.down:
            return
        vm_id = f"hand-{next(self.numbers)}"
        body = {"vm_id": vm_id, "env_id": "e", "image": "tiny", "engine": "qemu", "cpu": 1, "mem": 64, "disk": 64}

        async def make() -> int:
            async with httpx.AsyncClient(base_url=f"http://{self.rig.hosts[host].addr}", trust_env=False) as agent:
                return (await agent.post("/api/vms", json={**body, "ssh_keys": [KEY]}, timeout=30)).status_code

        assert self.run(make()) == 201
        self.strangers[vm_id] = f"host-{host}"

    @precondition(lambda self: self.strangers)
    @rule(adopts=st.booleans(), number=st.integers(0, 9))
    def treat(self, adopts: bool, number: int) -> None:
        vm_id, host = sorted(self.strangers.items())[number % len(self.strangers)]
        path = f"/api/hosts/{host}/unknown/{vm_id}"
        if adopts:
            status, content = self.call("POST", f"{path}/adopt", {"env": f"of-{vm_id}"})
        else:
            status, content = self.call("DELETE", path)
        if status != 200:  # its host is off, or has not told of it yet, or what is placed there leaves no room
            assert (status, content["code"]) in {(409, "offline"), (404, "not_found"), (409, "no_room")}
            return
        del self.strangers[vm_id]
        if adopts:
            shown = content["vms"][0]
            assert (content["env"]["id"], shown["id"]) == (f"of-{vm_id}", vm_id)
            body = {"vms": [{"name": shown["name"]}]}
            self.wanted[f"of-{vm_id}"] = Wanted(body, generation=content["env"]["generation"])

    # ---- faults

    @rule(host=hosts)
    def halt(self, host: int) -> None:
        if host not in self.down:
            self.run(self.rig.hosts[host].halt())
            self.down.add(host)

    @rule(host=hosts)
    def wake(self, host: int) -> None:
        if host in self.down:
            self.run(self.rig.hosts[host].boot())
            self.down.remove(host)

    @rule(host=hosts)
    def crash(self, host: int) -> None:
        async def crash() -> None:
            for vm_id in sorted(self.rig.hosts[host].running())[:1]:
                self.rig.hosts[host].machines.crash(VmId(vm_id))

        self.run(crash())

    @rule()
    def restart_controller(self) -> None:
        self.run(self.rig.stop_controller())
        self.run(self.rig.start_controller())
        self.revision = 0

    @rule(seconds=st.sampled_from([0.01, 0.1, 0.6]))
    def pass_time(self, seconds: float) -> None:
        self.run(asyncio.sleep(seconds))

    # ---- what always holds

    @invariant()
    def what_is_recorded_is_what_was_asked(self) -> None:
        if not hasattr(self, "rig"):
            return
        shown = {item["id"]: item for item in self.data("/api/envs")}
        for gone in [name for name, known in self.wanted.items() if known.ending and name not in shown]:
            del self.wanted[gone]
        assert shown.keys() == self.wanted.keys()
        for name, known in self.wanted.items():
            status, detail = self.call("GET", f"/api/envs/{name}")
            if known.ending:
                assert status == 404 or detail["env"]["phase"] == "terminating"
                continue
            told = detail["env"]
            assert (told["generation"], told["state"]) == (known.generation, {"running": "active"}.get(known.power, "stopped"))
            lasting = [item for item in detail["vms"] if item["desired"] != "absent"]
            assert {item["desired"] for item in lasting} <= {known.power}
            if told["observed_generation"] == known.generation:
                assert sorted(item["name"] for item in lasting) == known.names()
            assert all(item["message"] for item in detail["vms"] if item["observed_generation"] < item["generation"])

    @invariant()
    def pages_are_the_whole_list(self) -> None:
        if not hasattr(self, "rig") or any(known.ending for known in self.wanted.values()):
            return
        found: list[str] = []
        more: dict[str, str] = {}
        while True:
            answer = self.run(self.rig.http.get("/api/envs", params={"limit": "1", **more})).json()
            found += [item["id"] for item in answer["data"]]
            if "continue" not in answer:
                break
            more = {"continue": answer["continue"]}
        assert sorted(found) == sorted(self.wanted)

    # ---- and in the end

    def teardown(self) -> None:
        try:
            if hasattr(self, "rig"):
                self.run(self.end())
        finally:
            self.runner.close()
            shutil.rmtree(self.folder)

    async def end(self) -> None:
        try:
            for host in sorted(self.down):
                await self.rig.hosts[host].boot()
            for number in range(HOSTS):
                await self.rig.call("POST", f"/api/hosts/{self.rig.hosts[number].addr}/uncordon")
            async with asyncio.timeout(SETTLED):
                while not await self.is_settled():  # noqa: ASYNC110 what is waited for lies beyond HTTP
                    await asyncio.sleep(0.02)
            await self.compare()
        finally:
            await self.rig.__aexit__(None, None, None)

    async def is_settled(self) -> bool:
        online = [host["state"] == "online" for host in await self.rig.data("/api/hosts")]
        envs = await self.rig.data("/api/envs")
        fleet = self.rig.app.controller.fleet
        return (
            online == [True] * HOSTS
            and all(item["phase"] in ("ready", "stopped") for item in envs)
            and all(item["observed_generation"] == item["generation"] for item in envs)
            and all(fleet.status[item.id].settled for item in fleet.vms.values() if not item.gone_at)
        )

    async def compare(self) -> None:
        """The hosts have what is wanted, the strangers, and nothing else; the watch and the lists tell the same."""
        vms = {item["id"]: item for item in await self.rig.data("/api/vms")}
        lasting = {name: known for name, known in self.wanted.items() if not known.ending}
        assert sorted(item["id"] for item in await self.rig.data("/api/envs")) == sorted(lasting)
        for name, known in lasting.items():
            assert sorted(item["name"] for item in vms.values() if item["env_id"] == name) == known.names()
        there = [vm_id for host in self.rig.hosts for vm_id in host.there()]
        running = [vm_id for host in self.rig.hosts for vm_id in host.running()]
        assert sorted(there) == sorted([*vms, *self.strangers])
        up = [vm_id for vm_id, item in vms.items() if lasting[item["env_id"]].power == "running"]
        assert set(up) <= set(running) <= set(up) | set(self.strangers)
        assert await self.watched("vm") == vms

    async def watched(self, kind: str) -> dict[str, Any]:
        """The objects of a kind as a new watch tells them before its first pause."""
        found: dict[str, Any] = {}
        async with self.rig.http.stream("GET", "/api/watch") as stream:
            event = ""
            async for line in stream.aiter_lines():
                field, _, value = line.partition(": ")
                event = value if field == "event" else event
                if field == "data" and event == "snapshot":
                    content = json.loads(value)
                    return {item["id"]: item for item in content[f"{kind}s"]}
        return found


TestFleets = Fleets.TestCase
TestFleets.settings = settings(
    max_examples=8,
    stateful_step_count=25,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],  # each run takes its own time, so a failure cannot be made smaller by repeating it
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
