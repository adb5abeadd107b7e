"""The command line against a whole fleet: production controller and agents, with drivers that live in memory."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tests.api.cli_rig import Told, muster, write
from tests.fleet_rig import KEY, FleetRig

FRONT = "- {name: front, image: tiny, cpu: 1, mem: 128, disk: 256, ports: [80]}"
WEB = f"id: web\nowner: alice\nssh_keys: ['{KEY}']\nvms:\n{FRONT}\n"


def lines(text: str) -> list[list[str]]:
    """The words of each line."""
    return [line.split() for line in text.splitlines()]


async def test_an_applied_file_becomes_running_machines_and_describe_tells_how_to_enter_them(tmp_path: Path) -> None:
    async with FleetRig(tmp_path) as rig:
        path = write(tmp_path, "web.yaml", WEB)
        applied = await muster(rig, "apply", "-f", path, "--wait")
        assert (applied.status, applied.err) == (0, "")
        assert applied.out.splitlines()[0].startswith("env/web recorded, 1 VM, ")
        assert applied.out.splitlines()[-1] == "web ready (1 of 1 as desired)"
        (vm,) = await rig.data("/api/vms")
        described = await muster(rig, "describe", "env", "web")
        assert described.status == 0
        assert described.out.splitlines()[-1].split() == ["front", "ssh", "-p", str(vm["port_map"]["22"]), "root@127.0.0.1"]
        assert "Owner:       alice" in described.out
        for name in ("web/front", "front", vm["id"]):
            assert f"  ssh -p {vm['port_map']['22']} root@127.0.0.1" in (await muster(rig, "describe", "vm", name)).out
        told = (await muster(rig, "describe", "env/web", "-o", "json")).json
        assert told == {
            **(await rig.data("/api/envs/web")),
            "warnings": [],
            "ssh": {"front": f"ssh -p {vm['port_map']['22']} root@127.0.0.1"},
        }


async def test_applying_again_changes_nothing_and_a_dry_run_tells_what_would_change(tmp_path: Path) -> None:
    async with FleetRig(tmp_path) as rig:
        write(tmp_path, "web.yaml", WEB)
        assert (await muster(rig, "apply", str(tmp_path / "web.yaml"), "--wait")).status == 0
        before = await rig.data("/api/envs/web")
        assert (await muster(rig, "apply", "-f", "-", "--wait=30", stdin=WEB)).status == 0
        same = await muster(rig, "apply", "-f", "-", "--dry-run", stdin=WEB)
        assert lines(same.out) == [["env/web", "is", "as", "described", "already"], ["keep", "web/front"]]
        bigger = await muster(rig, "apply", "-f", "-", "--dry-run", stdin=WEB.replace("cpu: 1", "cpu: 2") + "- {image: tiny}\n")
        assert bigger.out.splitlines()[0] == "env/web would change as follows:"
        assert sorted(line.strip() for line in bigger.out.splitlines()[1:]) == [
            "create   web/vm-1 on host-0",
            "replace  web/front on host-0 (cpu differs; its disk is lost)",
        ]
        plan = (await muster(rig, "apply", "-f", "-", "--dry-run", "-o", "json", stdin=WEB)).json
        assert [(p["env"], [line["action"] for line in p["plan"]]) for p in plan] == [("web", ["keep"])]
        assert await rig.data("/api/envs/web") == before


async def test_a_folder_with_hosts_and_environments_is_applied_in_the_order_of_its_files(tmp_path: Path) -> None:
    async with FleetRig(tmp_path) as rig:
        folder = tmp_path / "fleet"
        folder.mkdir()
        write(folder, "1-hosts.yml", f"kind: Host\naddr: {rig.hosts[0].addr}\n---\nkind: Host\naddr: 127.0.0.1:1\n")
        write(folder, "2-envs.yaml", WEB + "---\n" + WEB.replace("id: web", "id: second"))
        write(folder, "notes.txt", "not: ours")
        told = await muster(rig, "apply", "-f", str(folder))
        assert told.status == 0
        assert [re.sub(r", .*", "", line) for line in told.out.splitlines()] == [
            "host/host-0 registered",
            "host/127.0.0.1:1 registered",
            "env/web recorded",
            "env/second recorded",
        ]
        assert sorted(env["id"] for env in await rig.data("/api/envs")) == ["second", "web"]


async def test_mistakes_of_all_files_are_told_at_once_and_nothing_is_sent(tmp_path: Path) -> None:
    async with FleetRig(tmp_path) as rig:
        good, bad = write(tmp_path, "a.yaml", WEB), write(tmp_path, "b.yaml", WEB.replace("cpu: 1", "cpu: 0"))
        told = await muster(rig, "apply", "-f", good, "-f", bad, str(tmp_path / "missing.yaml"))
        assert told == Told(
            1,
            "",
            f"{tmp_path}/missing.yaml:1:1: cannot be read: No such file or directory\n"
            f"{bad}:5:30: vms.0.cpu: must be greater than 0, not '0'\n"
            "muster: 2 mistakes; nothing was sent\n",
        )
        assert await rig.data("/api/envs") == []


async def test_what_the_controller_refuses_is_named_and_the_rest_is_still_applied(tmp_path: Path) -> None:
    async with FleetRig(tmp_path) as rig:
        assert (await muster(rig, "apply", "-f", "-", stdin=WEB)).status == 0
        await rig.hosts[0].halt()
        assert (await muster(rig, "delete", "env", "web")).status == 0
        text = WEB + "---\n" + WEB.replace("id: web", "id: other")
        told = await muster(rig, "apply", "-f", "-", stdin=text)
        assert (told.status, told.out.split(",")[0]) == (1, "env/other recorded")
        assert told.err.splitlines()[0].startswith("<stdin>:1: env/web: ")
        assert told.err.splitlines()[1] == "muster: 1 of 2 documents refused"
        await rig.hosts[0].boot()


async def test_waiting_in_vain_fails_with_what_each_machine_says(tmp_path: Path) -> None:
    async with FleetRig(tmp_path) as rig:
        told = await muster(rig, "apply", "-f", "-", "--wait=0.5", stdin=WEB.replace("image: tiny", "image: other"))
        assert told.status == 1
        assert told.err.startswith("muster: web not converged after 0.5 s (web/front is pending: ")
        assert "host-0" in told.err


async def test_environments_are_stopped_started_and_deleted_with_a_wait_for_each(tmp_path: Path) -> None:
    async with FleetRig(tmp_path) as rig:
        host = rig.hosts[0]
        assert (await muster(rig, "apply", "-f", "-", "--wait", stdin=WEB)).status == 0
        stopped = await muster(rig, "stop", "web", "--wait")
        assert (stopped.status, host.running(), len(host.there())) == (0, {}, 1)
        assert stopped.out.splitlines()[0] == "env/web is to stop" and stopped.out.splitlines()[-1] == "env/web is stopped"
        assert (await muster(rig, "wait", "env", "web", "--for", "stopped")).status == 0
        assert (await muster(rig, "start", "env/web", "--wait=30")).status == 0
        assert len(host.running()) == 1
        assert (await muster(rig, "wait", "env/web", "--for", "ready", "--timeout", "5")).out.splitlines()[
            -1
        ] == "env/web is ready"
        deleted = await muster(rig, "delete", "env", "web", "--wait")
        assert (deleted.status, deleted.out.splitlines()[-1], host.there()) == (0, "env/web is gone", set())
        assert (await muster(rig, "wait", "env", "web", "--for", "gone")).status == 0


async def test_a_wait_for_an_environment_that_does_not_exist_fails_at_once(tmp_path: Path) -> None:
    async with FleetRig(tmp_path) as rig:
        assert await muster(rig, "wait", "env", "nobody") == Told(1, "", "muster: environment nobody does not exist\n")


async def test_a_missing_environment_is_named_and_the_others_are_still_deleted(tmp_path: Path) -> None:
    async with FleetRig(tmp_path) as rig:
        assert (await muster(rig, "apply", "-f", "-", "--wait", stdin=WEB)).status == 0
        told = await muster(rig, "delete", "env", "nobody", "web")
        assert (told.status, told.out) == (1, "env/web is being destroyed\n")
        assert re.fullmatch(r"muster: nobody: .*nobody.*\n", told.err)
        assert (await muster(rig, "wait", "env/web", "--for", "gone")).status == 0


async def test_a_wait_goes_on_while_the_controller_restarts(tmp_path: Path) -> None:
    async with FleetRig(tmp_path) as rig:
        await rig.hosts[0].halt()
        assert (await muster(rig, "apply", "-f", "-", stdin=WEB)).status == 0
        waiting = asyncio.create_task(muster(rig, "wait", "env", "web", "--timeout", "60"))
        await asyncio.sleep(0.5)  # most likely watching by now; the outcome is the same if not
        await rig.stop_controller()
        await rig.start_controller()
        await rig.hosts[0].boot()
        told = await waiting
        assert (told.status, told.out.splitlines()[-1]) == (0, "env/web is converged")


async def test_tables_list_what_there_is(tmp_path: Path) -> None:
    async with FleetRig(tmp_path) as rig:
        assert await muster(rig, "get", "envs") == Told(0, "", "there are no envs\n")
        assert (await muster(rig, "apply", "-f", "-", "--wait", stdin=WEB)).status == 0
        (vm,) = await rig.data("/api/vms")
        envs, vms, hosts, images = [lines((await muster(rig, "get", kind)).out) for kind in ("envs", "vms", "host", "images")]
        assert envs[0] == ["NAME", "OWNER", "STATE", "PHASE", "VMS", "EXPIRES", "AGE"]
        assert envs[1][:5] == ["web", "alice", "active", "ready", "1"]
        forwards = ",".join(f"{guest}→{host}" for guest, host in sorted(vm["port_map"].items()))
        assert vms[1][:8] == ["web", "front", "running", "ready", "qemu", "host-0", vm["ip"], forwards]
        assert hosts[1][:6] == ["host-0", rig.hosts[0].addr, "online", "qemu,docker", "file", "1"]
        assert ["tiny", "1", "host-0"] in images
        wide = lines((await muster(rig, "get", "vms", "-o", "wide")).out)
        assert wide[0][-8:] == ["ID", "DESIRED", "IMAGE", "CPU", "MEM", "DISK", "TRIES", "MESSAGE"]
        assert wide[1][9:15] == [vm["id"], "running", "tiny", "1", "128M", "256M"]


async def test_json_and_yaml_are_the_objects_alone(tmp_path: Path) -> None:
    async with FleetRig(tmp_path) as rig:
        assert await muster(rig, "get", "vms", "-o", "json") == Told(0, "[]\n", "")
        assert (await muster(rig, "apply", "-f", "-", "--wait", stdin=WEB)).status == 0
        (vm,) = await rig.data("/api/vms")
        env = (await rig.data("/api/envs/web"))["env"]
        assert (await muster(rig, "get", "vms", "-o", "json")).json == [vm]
        assert (await muster(rig, "get", "vm/web/front", "-o", "json")).json == vm
        assert (await muster(rig, "get", "env", "web", "-o", "json")).json == env
        assert YAML(typ="safe").load((await muster(rig, "get", "env", "web", "-o", "yaml")).out) == env
        assert (await muster(rig, "host", "list", "-o", "json")).json[0]["id"] == "host-0"
        assert (await muster(rig, "get", "images", "tiny", "-o", "json")).json == [{"name": "tiny", "host_id": "host-0"}]


async def test_filters_choose_by_environment_host_and_owner(tmp_path: Path) -> None:
    async with FleetRig(tmp_path) as rig:
        text = WEB + "---\n" + WEB.replace("id: web", "id: other").replace("alice", "bob")
        assert (await muster(rig, "apply", "-f", "-", "--wait", stdin=text)).status == 0
        chosen = {
            words: [row[0] for row in lines((await muster(rig, "get", *words)).out)[1:]]
            for words in [
                ("envs", "--owner", "bob"),
                ("vms", "--owner", "alice"),
                ("vms", "--env", "other"),
                ("vms", "--host", "host-9"),
                ("vms", "web/front", "other/front"),
            ]
        }
        assert list(chosen.values()) == [["other"], ["web"], ["other"], [], ["other", "web"]]
        assert await muster(rig, "get", "env", "web2", "-o", "json") == Told(1, "", "muster: there is no env web2\n")


async def test_hosts_are_added_listed_and_removed(tmp_path: Path) -> None:
    async with FleetRig(tmp_path) as rig:
        assert (await muster(rig, "host", "add", "127.0.0.1:1")).out == "host/127.0.0.1:1 registered, offline\n"
        assert len(lines((await muster(rig, "host", "list")).out)) == 3
        assert "State:" in (await muster(rig, "describe", "host", "127.0.0.1:1")).out
        assert (await muster(rig, "host", "remove", "127.0.0.1:1")).out == "127.0.0.1:1 removed\n"
        assert (await muster(rig, "apply", "-f", "-", "--wait", stdin=WEB)).status == 0
        refused = await muster(rig, "host", "remove", "host-0")
        assert refused.status == 1 and refused.err.startswith("muster: host-0: ")
        assert (await muster(rig, "host", "add", "http://x")).status == 2


async def test_a_key_is_taken_from_a_file_or_the_environment(tmp_path: Path) -> None:
    async with FleetRig(tmp_path, key="correct-horse") as rig:
        url = str(rig.http.base_url)
        none, wrong = await muster(rig, "get", "envs"), await muster(rig, "get", "envs", MUSTER_API_KEY="wrong-key-here")
        hint = "give it with --api-key-file or MUSTER_API_KEY"
        assert none == Told(1, "", f"muster: the controller at {url} asks for an API key; {hint}\n")
        assert wrong == Told(1, "", f"muster: the controller at {url} refused the API key; {hint}\n")
        path = write(tmp_path, "key", "correct-horse\n")
        assert (await muster(rig, "get", "envs", "--api-key-file", path)).status == 0
        assert (await muster(rig, "get", "envs", MUSTER_API_KEY="correct-horse")).status == 0
        assert (await muster(rig, "get", "envs", MUSTER_API_KEY_FILE=str(tmp_path))).err == (
            f"muster: the API key file {tmp_path} cannot be read: Is a directory\n"
        )


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["apply"], "name at least one file: -f FILE, or -f - for standard input (see `muster apply --help`)"),
        (["get", "things"], "'things' is none of env, vm, host, image (see `muster get --help`)"),
        (["get", "images", "-w"], "images cannot be watched (see `muster get --help`)"),
        (["describe", "env"], "name one object: env NAME, vm NAME or host NAME (see `muster describe --help`)"),
        (["stop", "host/x"], "this works on environments; host x is none (see `muster stop --help`)"),
        (["delete", "env/a", "vm/b"], "name objects of one kind at a time (see `muster delete --help`)"),
        (["delete", "vm", "b"], "name what to delete: env NAME... (or host NAME...) (see `muster delete --help`)"),
        (["get", "envs", "--url", "ftp://x"], "'ftp://x' is not a URL such as http://127.0.0.1:9200 (see `muster get --help`)"),
        (
            ["get", "envs", "--api-key", "a\nb"],
            "the API key must be one line of printable ASCII without blanks (see `muster get --help`)",
        ),
        (
            ["delete", "env", "x", "--wait=soon"],
            "Invalid value for '--wait': 'soon' is not a valid float range. (see `muster delete --help`)",
        ),
        (["frobnicate"], "No such command 'frobnicate'. (see `muster --help`)"),
        (
            ["agent", "--cpu-total", "-1"],
            "Invalid value for '--cpu-total': -1 is not in the range x>=0. (see `muster agent --help`)",
        ),
        (["up", "--listen", "9200"], "'9200' is not HOST:PORT, such as 127.0.0.1:9200 (see `muster up --help`)"),
        (
            ["image", "build", "huge"],
            "there is no recipe huge; there are tiny, busybox, fc-tiny, debian (see `muster image build --help`)",
        ),
    ],
)
async def test_a_misused_command_says_so_in_one_line_and_ends_with_2(words: list[str], sentence: str, tmp_path: Path) -> None:
    async with FleetRig(tmp_path, hosts=0) as rig:
        assert await muster(rig, *words) == Told(2, "", f"muster: {sentence}\n")


async def test_a_bare_wait_never_takes_the_word_after_it(tmp_path: Path) -> None:
    async with FleetRig(tmp_path) as rig:
        path = write(tmp_path, "web.yaml", WEB)
        assert (await muster(rig, "apply", "--wait", path)).status == 0
        assert (await muster(rig, "delete", "--wait", "env", "web")).out.splitlines()[-1] == "env/web is gone"
