"""An agent that speaks the reference alone: no long poll, no async create, none of our fields."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from tornado.httpserver import HTTPServer
from tornado.testing import bind_unused_port
from tornado.web import Application, RequestHandler

from tests.fleet_rig import FleetRig, env, vm

KNOWN = {"vm_id", "env_id", "image", "engine", "cpu", "mem", "disk", "ports", "deny_outgoing", "ssh_keys"}


class PlainAgent:
    """VMs in a dictionary; a stopped one is reported as paused, as such agents do."""

    def __init__(self) -> None:
        self.vms: dict[str, dict[str, Any]] = {}
        self.calls: list[str] = []
        self.strange: list[str] = []
        self.broken: bytes | None = None

    def answer(self, handler: RequestHandler) -> tuple[int, Any]:
        """Status and data of one request."""
        path, method = handler.request.path, handler.request.method
        if path == "/api/info":
            room = {"cpu_total": 8, "mem_total": 8192, "disk_total": 90_000}
            room |= {"cpu_used": 0, "mem_used": 0, "disk_used": 0, "vm_count": 0}
            return 200, {"host_id": "plain", "resource": room, "engines": ["qemu"], "storage": "raw", "images": ["tiny"]}
        if method == "GET":
            return 200, list(self.vms.values())
        self.calls.append(f"{method} {path}")
        if path == "/api/vms":
            body = orjson.loads(handler.request.body)
            self.strange += sorted(body.keys() - KNOWN)
            shown = {key: body[key] for key in ("env_id", "image", "engine", "cpu", "mem", "disk")}
            made = {"id": body["vm_id"], "host_id": "plain", "ip": "10.0.0.9", "port_map": {"22": 20100}, "created_at": 5}
            self.vms[body["vm_id"]] = shown | made | {"state": "running"}
            return 201, {"vm": self.vms[body["vm_id"]]}
        vm_id = path.split("/")[3]
        if method == "DELETE":
            self.vms.pop(vm_id, None)
        else:
            self.vms[vm_id]["state"] = "paused" if path.endswith("stop") else "running"
        return 200, None


@pytest.fixture
async def plain() -> AsyncIterator[tuple[PlainAgent, str]]:
    agent = PlainAgent()

    class Every(RequestHandler):
        def prepare(self) -> None:
            if agent.broken is not None:
                self.finish(agent.broken)
                return
            status, data = agent.answer(self)
            self.set_status(status)
            self.set_header("Content-Type", "application/json")
            self.finish(orjson.dumps({"ok": True} if data is None else {"ok": True, "data": data}))

    server = HTTPServer(Application([(r".*", Every)]))
    socket, port = bind_unused_port()
    server.add_socket(socket)
    yield agent, f"127.0.0.1:{port}"
    server.stop()
    await server.close_all_connections()


async def test_a_plain_agent_is_polled_and_served_as_well(tmp_path: Path, plain: tuple[PlainAgent, str]) -> None:
    agent, addr = plain
    async with FleetRig(tmp_path, hosts=0) as rig:
        host = (await rig.call("POST", "/api/hosts", {"addr": addr})).json()["data"]
        assert (host["id"], host["state"], host["storage"]) == ("plain", "online", "file")
        detail = (await rig.call("POST", "/api/envs?wait=30", env("web", vm(ports=[80])))).json()["data"]
        (machine,) = detail["vms"]
        assert (machine["state"], machine["ip"], machine["port_map"]) == ("running", "10.0.0.9", {"22": 20100})
        await rig.call("POST", "/api/envs/web/stop?wait=30")
        assert (await rig.data("/api/envs/web"))["vms"][0]["state"] == "stopped"
        await rig.call("POST", "/api/envs/web/start?wait=30")
        del agent.vms[machine["id"]]
        await rig.until(lambda: machine["id"] in agent.vms)
        await rig.call("DELETE", "/api/envs/web?wait=30")
        path = f"/api/vms/{machine['id']}"
        create = "POST /api/vms"
        assert agent.calls == [create, f"POST {path}/stop", f"POST {path}/start", create, f"DELETE {path}"]
        assert agent.strange == [], "a plain agent is sent the reference's fields alone"
        assert agent.vms == {}


@pytest.mark.parametrize(
    "garbage", [b"", b"<html>", b"[]", b"null", b'{"ok": true}', b'{"ok": true, "data": [{"id": 7}]}', b'{"ok": "yes"}']
)
async def test_garbage_from_a_host_is_never_taken_for_an_empty_host(
    tmp_path: Path, plain: tuple[PlainAgent, str], garbage: bytes
) -> None:
    agent, addr = plain
    async with FleetRig(tmp_path, hosts=0) as rig:
        await rig.call("POST", "/api/hosts", {"addr": addr})
        await rig.call("POST", "/api/envs?wait=30", env("web"))
        before = list(agent.calls)
        agent.broken = garbage
        fleet = rig.app.controller.fleet
        (vm_id,) = fleet.vms
        await rig.until(lambda: not fleet.hosts[addr].online and "offline" in fleet.status[vm_id].message)
        assert not fleet.status[vm_id].settled
        agent.broken = None
        await rig.until(lambda: fleet.hosts[addr].online and fleet.status[vm_id].settled)
        assert agent.calls == before
