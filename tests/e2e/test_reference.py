"""The REST reference's examples, sent with curl as they stand, between network namespaces: 10.0.0.2 is one of their hosts."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.rig import Part, until
from tests.images_fixture import tiny  # noqa: F401
from tests.netns import Lab

pytestmark = [pytest.mark.real, pytest.mark.e2e]

KEY = "a-key-of-this-test"
HOST = '{"addr": "10.0.0.2:9100"}'
ENVIRONMENT = """{
"id": "my-env",
"owner": "alice",
"ssh_keys": ["ssh-ed25519 AAAA... alice@laptop"],
"vms": [
{
"image": "alpine-cloud",
"engine": "qemu",
"cpu": 2,
"mem": 2048,
"disk": 40960,
"ports": [80],
"deny_outgoing": false
}
],
"lifetime": 21600
}"""
RESOURCE = {"cpu_total", "cpu_used", "mem_total", "mem_used", "disk_total", "disk_used", "vm_count"}
VM = {"id", "env_id", "host_id", "image", "engine", "cpu", "mem", "disk", "ip", "port_map", "state", "created_at"}


@dataclass
class Office:
    """curl as a person at the controller uses it."""

    namespace: str

    def curl(self, *words: str, key: str = KEY) -> tuple[int, Any]:
        """(status, body) of `curl WORDS`, where the last word is a path."""
        done = subprocess.run(
            [
                *("nsenter", f"--net=/run/netns/{self.namespace}", "curl", "--silent", "--noproxy", "*", "--max-time", "20"),
                *("--resolve", "controller:9200:10.0.0.1", "--write-out", "\n%{http_code} %{content_type}"),
                *("-H", f"Authorization: Bearer {key}", *words[:-1], f"http://controller:9200{words[-1]}"),
            ],
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
        )
        body, _, last = done.stdout.rpartition("\n")
        status, _, kind = last.partition(" ")
        assert kind.startswith("application/json"), done
        return int(status), json.loads(body)

    def post(self, path: str, body: str) -> tuple[int, Any]:
        """The reference's POST."""
        return self.curl("-X", "POST", "-H", "Content-Type: application/json", "-d", body, path)


@pytest.fixture
def office(tiny: Path) -> Iterator[Office]:  # noqa: F811
    """A controller at 10.0.0.1 and an agent at 10.0.0.2, the image alpine-cloud among its own."""
    lab = Lab()
    folder = Path(tempfile.mkdtemp(prefix="mte"))
    (folder / "images").mkdir()
    shutil.copy(tiny, folder / "images" / "alpine-cloud.qcow2")
    (folder / "key").write_text(KEY)
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder)
        stack.callback(lab.close)
        one, two = lab.namespace("a"), lab.namespace("b")
        lab.cable(one, "10.0.0.1/24", two, "10.0.0.2/24")
        common = ["--api-key-file", str(folder / "key"), "--data-dir"]
        parts = [
            Part(
                [
                    *("agent", "--listen", "10.0.0.2:9100", *common, str(folder / "agent")),
                    *("--runtime-dir", str(folder / "vms"), "--image-dir", str(folder / "images")),
                    *("--engines", "qemu", "--network", "bridge", "--accel", "tcg", "--subnet", "10.77.0.0/24"),
                    *("--cpu-total", "8", "--mem-total", "8192", "--disk-total", "81920"),
                ],
                folder / "agent.log",
                two,
            ),
            Part(["controller", "--listen", "10.0.0.1:9200", *common, str(folder / "data")], folder / "controller.log", one),
        ]
        for part in parts:
            stack.callback(part.end)
            part.start()
        built = Office(one)
        until(lambda: _listens(built, "http://10.0.0.1:9200") and _listens(built, "http://10.0.0.2:9100"), "both answer")
        yield built


def _listens(office: Office, url: str) -> bool:
    words = ["nsenter", f"--net=/run/netns/{office.namespace}", "curl", "-sf", "--noproxy", "*", "-m", "2", f"{url}/readyz"]
    return subprocess.run(words, capture_output=True, check=False).returncode == 0


def test_the_examples_of_the_reference_get_the_documented_answers(office: Office) -> None:
    status, body = office.post("/api/hosts", HOST)
    assert (status, set(body), body["ok"]) == (201, {"ok", "data"}, True)
    host = body["data"]
    assert {"id", "addr", "resource", "state", "engines", "storage", "registered_at"} <= set(host)
    assert (host["addr"], host["state"], host["engines"], host["storage"]) == ("10.0.0.2:9100", "online", ["qemu"], "file")
    assert set(host["resource"]) == RESOURCE
    assert office.post("/api/hosts", HOST)[0] == 200

    status, body = office.post("/api/envs", ENVIRONMENT)
    assert (status, body["ok"]) == (201, True)
    env = body["data"]["env"]
    assert (env["id"], env["owner"], env["state"]) == ("my-env", "alice", "active")
    assert env["expires_at"] == env["created_at"] + 21600
    (vm,) = body["data"]["vms"]
    assert set(vm) >= VM
    assert env["vm_ids"] == [vm["id"]]
    asked = {"image": "alpine-cloud", "engine": "qemu", "cpu": 2, "mem": 2048, "disk": 40960}
    assert {name: vm[name] for name in asked} == asked

    until(lambda: office.curl(f"/api/vms/{vm['id']}")[1]["data"]["state"] == "running", "the VM runs")
    vm = office.curl(f"/api/vms/{vm['id']}")[1]["data"]
    assert (vm["host_id"], sorted(vm["port_map"]), vm["ip"].rpartition(".")[0]) == (host["id"], ["22", "80"], "10.77.0")
    status, body = office.curl("/api/status")
    counted = {
        "hosts": 1,
        "hosts_online": 1,
        "total_vms": 1,
        "total_envs": 1,
        "cpu_used": 2,
        "mem_used": 2048,
        "disk_used": 40960,
    }
    assert (status, {name: body["data"][name] for name in counted}) == (200, counted)
    assert office.curl("/api/images")[1] == {"ok": True, "data": [{"name": "alpine-cloud", "host_id": host["id"]}]}

    done = (200, {"ok": True})
    assert office.curl("-X", "POST", "/api/envs/my-env/stop") == done
    until(lambda: office.curl(f"/api/vms/{vm['id']}")[1]["data"]["state"] == "stopped", "the VM is stopped")
    assert office.curl("/api/envs/my-env")[1]["data"]["env"]["state"] == "stopped"
    assert office.curl("-X", "POST", "/api/envs/my-env/start") == done
    until(lambda: office.curl(f"/api/vms/{vm['id']}")[1]["data"]["state"] == "running", "the VM runs again")
    assert office.curl("-X", "DELETE", "/api/envs/my-env") == done
    until(lambda: office.curl("/api/envs/my-env")[0] == 404, "the environment is gone")
    assert office.curl("-X", "DELETE", f"/api/hosts/{host['id']}") == done
    assert office.curl("/api/hosts") == (200, {"ok": True, "data": []})
    status, body = office.curl("/api/status", key="another")
    assert (status, body["ok"], set(body) >= {"ok", "error", "code"}) == (401, False, True)
