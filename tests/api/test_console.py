"""What guests say on their consoles, through the controller and the agents over real HTTP."""

from __future__ import annotations

from pathlib import Path

from tests.api.cli_rig import muster
from tests.fleet_rig import FleetRig, env, vm


async def test_a_console_is_told_through_the_controller_and_else_why_not(tmp_path: Path) -> None:
    async with FleetRig(tmp_path) as rig:
        made = (await rig.call("POST", "/api/envs?wait=30", env("web", vm(name="a")))).json()["data"]["vms"][0]
        path = f"/api/vms/{made['id']}/console"
        (machine,) = rig.hosts[0].machines.machines.values()
        machine.console = b"".join(b"line %d\r\n" % n for n in range(300)) + b"\x1b[31m\xff<script>"
        said = (await rig.data(f"{path}?tail=2"))["text"]
        assert said == "line 299\n\x1b[31m\ufffd<script>"
        assert len((await rig.data(path))["text"].splitlines()) == 100
        machine.console = b"x" * 1_000_000
        assert len((await rig.data(path))["text"]) == 64 * 1024

        assert (await rig.call("GET", f"{path}?tail=0")).status_code == 400
        assert (await rig.call("GET", "/api/vms/none/console")).status_code == 404
        big = (await rig.call("POST", "/api/envs", env("big", vm(name="huge", cpu=4096)))).json()["data"]["vms"][0]
        refused = await rig.call("GET", f"/api/vms/{big['id']}/console")
        assert (refused.status_code, refused.json()["code"]) == (409, "not_placed")
        await rig.hosts[0].halt()
        away = await rig.call("GET", path)
        assert (away.status_code, away.json()["code"]) == (503, "offline")


async def test_the_command_line_prints_a_console_and_obeys_nothing_in_it(tmp_path: Path) -> None:
    async with FleetRig(tmp_path) as rig:
        await rig.call("POST", "/api/envs?wait=30", env("web", vm(name="a")))
        (machine,) = rig.hosts[0].machines.machines.values()
        machine.console = "one\r\ntwo \x1b[2J\u202e\n".encode()
        told = await muster(rig, "console", "web/a", "--tail", "1")
        assert (told.status, told.out) == (0, "two \\x1b[2J\\u202e\n")
        assert (await muster(rig, "console", "web/none")).status == 1
