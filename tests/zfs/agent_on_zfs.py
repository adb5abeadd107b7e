"""`muster agent --storage zvol` with real QEMU on real ZFS, killed at moments that hurt. Run in the guest of ops/lab/zfs."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

URL = "http://127.0.0.1:9177"
MIB = 1024 * 1024


def _zfs(*words: str) -> list[str]:
    return subprocess.run(["zfs", *words], check=True, capture_output=True, text=True).stdout.split()


def _until(true: Callable[[], object], what: str, limit: float = 120.0) -> None:
    deadline = time.monotonic() + limit
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


class AgentProcess:
    """The agent of a host whose image folder and runtime folder are ZFS filesystems."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process: psutil.Popen | None = None
        for name in ("images", "vms"):
            _zfs("create", "-o", f"mountpoint={folder / name}", f"tank/{name}")
        (folder / "images" / "base.raw").write_bytes(b"base".ljust(4 * MIB, b"\0"))

    def start(self) -> None:
        """Starts it and waits until it has adopted what it found."""
        words = ["--data-dir", str(self.folder), "--listen", URL.removeprefix("http://"), "--storage", "zvol"]
        words += ["--engines", "qemu", "--network", "user", "--accel", "tcg", "--forward-addrs", "127.0.0.1"]
        with (self.folder / "log").open("ab") as log:
            self.process = psutil.Popen([sys.executable, "-m", "api.cli.main", "agent", *words], stdout=log, stderr=log)
        _until(lambda: self.call("GET", "/api/info")[0] == 200, "the agent answers")

    def kill(self) -> None:
        """kill -9."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def call(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        """(status, answer); (0, None) where nobody answers."""
        with contextlib.suppress(httpx.TransportError):
            answer = httpx.request(method, URL + path, json=body, timeout=120, trust_env=False)
            return answer.status_code, answer.json()
        return 0, None

    def create(self, vm_id: str) -> tuple[int, Any]:
        """A VM of the image, whose disk holds nothing that boots."""
        fields = {"vm_id": vm_id, "env_id": "env", "image": "base", "engine": "qemu", "cpu": 1, "mem": 64, "disk": 64}
        return self.call("POST", "/api/vms", fields)

    def vms(self) -> dict[str, Any]:
        """All VMs by id."""
        return {vm["id"]: vm for vm in self.call("GET", "/api/vms")[1]["data"]}

    def killed_during(self, call: Callable[[], object], when: Callable[[], object]) -> None:
        """Begins a call and kills the agent as soon as `when` holds."""
        calling = threading.Thread(target=call)
        calling.start()
        _until(when, "the moment to kill the agent")
        self.kill()
        calling.join()


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[AgentProcess]:
    for dataset in _zfs("list", "-H", "-o", "name", "-d", "1", "tank")[1:]:
        _zfs("destroy", "-R", dataset)
    made = AgentProcess(tmp_path)
    yield made
    with contextlib.suppress(psutil.NoSuchProcess):
        made.kill()
    sys.stdout.write((tmp_path / "log").read_text())
    for process in psutil.process_iter(["name"]):
        if process.info["name"].startswith("qemu-system"):
            process.kill()


def test_an_agent_with_volumes_killed_while_it_makes_and_removes_vms_loses_and_leaves_nothing(agent: AgentProcess) -> None:
    agent.start()
    assert agent.call("GET", "/api/info")[1]["data"]["storage"] == "zvol"
    status, answer = agent.create("vm-a")
    assert (status, answer["ok"]) == (201, True), answer
    first = answer["data"]["vm"]
    words = psutil.Process(first["pid"]).cmdline()
    assert any("/dev/zvol/tank/vms/vm-a" in word for word in words), words
    assert _zfs("get", "-H", "-o", "value", "muster:vm,muster:image,origin", "tank/vms/vm-a") == [
        "vm-a", "base", "tank/images/base@base",
    ]  # fmt: skip

    agent.killed_during(lambda: agent.create("vm-b"), lambda: "tank/vms/vm-b" in _zfs("list", "-H", "-o", "name", "-r", "tank"))
    agent.start()
    _until(lambda: {vm["state"] for vm in agent.vms().values()} == {"running"}, "both VMs run")
    both = agent.vms()
    assert sorted(both) == ["vm-a", "vm-b"]
    assert both["vm-a"]["pid"] == first["pid"]

    gone = psutil.Process(both["vm-a"]["pid"])
    agent.killed_during(lambda: agent.call("DELETE", "/api/vms/vm-a"), lambda: not gone.is_running())
    agent.start()
    _until(lambda: sorted(agent.vms()) == ["vm-b"], "the removal goes on")
    assert agent.call("DELETE", "/api/vms/vm-b")[0] == 200
    assert _zfs("list", "-H", "-t", "all", "-o", "name", "-r", "tank") == [
        "tank", "tank/images", "tank/images/base", "tank/images/base@base", "tank/vms",
    ]  # fmt: skip
    assert [process.name() for process in psutil.process_iter() if process.name().startswith("qemu")] == []
