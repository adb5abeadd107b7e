"""What scripts rely on: pure JSON on standard output, exit statuses, filters."""

from __future__ import annotations

from pathlib import Path
from subprocess import run

import pytest

from tests.api.cli_rig import muster, muster_here
from tests.fleet_rig import FleetRig, env, vm


async def test_every_change_can_be_told_as_pure_json(tmp_path: Path) -> None:
    async with FleetRig(tmp_path) as rig:
        await rig.call("POST", "/api/envs?wait=30", env())
        stopped = await muster(rig, "stop", "web", "--wait", "-o", "json")
        assert (stopped.status, [one["phase"] for one in stopped.json]) == (0, ["stopped"])
        assert [one["state"] for one in (await muster(rig, "start", "web", "-o", "json")).json] == ["active"]
        ready = await muster(rig, "wait", "env", "web", "--for", "ready", "-o", "json")
        assert [(one["id"], one["phase"]) for one in ready.json] == [("web", "ready")]
        assert [one["cordoned"] for one in (await muster(rig, "host", "cordon", "host-0", "-o", "json")).json] == [True]
        assert (await rig.data("/api/hosts/host-0"))["cordoned"] is True
        assert [one["cordoned"] for one in (await muster(rig, "host", "uncordon", "host-0", "-o", "json")).json] == [False]
        assert (await muster(rig, "delete", "env", "web", "--wait", "-o", "json")).json == [{"id": "web", "phase": "gone"}]
        assert (await muster(rig, "host", "remove", "host-0", "-o", "json")).json == [{"id": "host-0", "state": "removed"}]
        refused = await muster(rig, "host", "cordon", "host-0", "-o", "json")
        assert (refused.status, refused.json) == (1, [])
        assert refused.err == "muster: host-0: there is no host host-0\n"
    assert set(muster_here("version", "-o", "json").json) == {"version"}


async def test_lists_are_filtered_by_owner_phase_and_host(tmp_path: Path) -> None:
    async with FleetRig(tmp_path) as rig:
        await rig.call("POST", "/api/envs?wait=30", env("a", owner="alice"))
        await rig.call("POST", "/api/envs", env("b", vm(image="none"), owner="bob"))
        await rig.until(lambda: any(s.message.startswith("waiting") for s in rig.app.controller.fleet.status.values()))
        for words, chosen in (
            (("envs",), ["a", "b"]),
            (("envs", "--owner", "bob"), ["b"]),
            (("envs", "--phase", "ready"), ["a"]),
            (("envs", "--host", rig.hosts[0].addr), ["a"]),
            (("envs", "--owner", "bob", "--phase", "ready"), []),
        ):
            assert [one["id"] for one in (await muster(rig, "get", *words, "-o", "json")).json] == chosen, words
        for words, chosen in ((("--owner", "bob"), ["b"]), (("--phase", "pending"), ["b"]), (("--host", "host-0"), ["a"])):
            assert [one["env_id"] for one in (await muster(rig, "get", "vms", *words, "-o", "json")).json] == chosen, words
        misused = await muster(rig, "get", "envs", "--phase", "happy")
        assert misused.status == 2 and "happy" in misused.err and misused.out == ""


async def test_a_wait_never_takes_degraded_for_converged(tmp_path: Path) -> None:
    async with FleetRig(tmp_path) as rig:
        await rig.call("POST", "/api/envs?wait=30", env("web", vm(restart="never")))
        (running,) = rig.hosts[0].running()
        rig.hosts[0].machines.crash(running)  # type: ignore[arg-type]
        views, fleet = rig.app.hub.bodies, rig.app.controller.fleet
        await rig.until(lambda: [views.env(one).phase for one in fleet.envs.values()] == ["degraded"])
        told = await muster(rig, "wait", "env", "web", "--timeout", "1")
        assert told.status == 1 and told.err.startswith("muster: web not converged"), told


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_told_for_every_shell(shell: str) -> None:
    told = muster_here("completion", shell)
    assert told.status == 0 and "_MUSTER_COMPLETE" in told.out
    if shell == "bash":
        assert run(["bash", "-n"], input=told.out, text=True, check=False, capture_output=True, timeout=20).returncode == 0


def test_two_keys_are_refused_unless_one_is_typed(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("long enough a key\n")
    bad = str(tmp_path / "no" / "such")
    for command in ("controller", "agent"):
        told = muster_here(command, "--api-key", "another long key", "--api-key-file", str(file))
        assert (told.status, "--api-key and --api-key-file are both given" in told.err) == (2, True), told
        told = muster_here(command, MUSTER_API_KEY="another long key", MUSTER_API_KEY_FILE=str(file))
        assert (told.status, "MUSTER_API_KEY and MUSTER_API_KEY_FILE are both given" in told.err) == (2, True), told
    # What is typed goes before the environment: the short key is found fault with, not the file that is not there.
    told = muster_here("controller", "--api-key", "short", "--data-dir", str(tmp_path), MUSTER_API_KEY_FILE=bad)
    assert told.status == 1 and "shorter than" in told.err
