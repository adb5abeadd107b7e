"""A machine of its own, as a network namespace, on which the product's processes run and are killed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.docker_fixture import DockerDaemon
from tests.netns import command, inside

PATIENCE = 90.0  # seconds; guests start without KVM on a busy machine
CLI = (sys.executable, "-P", "-m", "api.cli.main")
_OPS_DOCKERD = Path(__file__).parents[2] / "ops" / "dockerd"


def until(true: Callable[[], object], what: str, limit: float = PATIENCE, pause: float = 0.05) -> None:
    """Looks until a condition holds; a failure says what was waited for."""
    deadline = time.monotonic() + limit
    while not true():
        assert time.monotonic() < deadline, f"not within {limit:g} s: {what}"
        time.sleep(pause)


@dataclass
class Part:
    """One process of ours: its arguments, its log, and the process while it runs."""

    words: list[str]
    log: Path
    namespace: str
    process: psutil.Popen | None = None
    boot_id: Path | None = None
    """A file to stand for the kernel's boot id (proc(5)): after a reboot of its host a process reads another."""

    def start(self) -> None:
        """Starts it; who needs it to answer has to wait for that."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MUSTER_")}
        words = ["nsenter", f"--net=/run/netns/{self.namespace}", *self._own_boot(), *CLI, *self.words]
        with self.log.open("ab") as log:
            self.process = psutil.Popen(
                words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, env=environment
            )

    def _own_boot(self) -> list[str]:
        if self.boot_id is None:
            return []
        mounted = 'mount --bind "$0" /proc/sys/kernel/random/boot_id && exec "$@"'
        return ["unshare", "--mount", "sh", "-c", mounted, str(self.boot_id)]

    def kill(self) -> None:
        """kill -9, and reaped."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.process = None

    def end(self) -> None:
        """As an administrator would."""
        if self.process is not None:
            with contextlib.suppress(psutil.NoSuchProcess):  # it ended by itself
                self.process.terminate()
            self.process.wait(40)
            self.process = None

    def cpu_seconds(self) -> float:
        """Processor time of the process and of the commands it ran, its VMs left out."""
        assert self.process is not None
        times = self.process.cpu_times()
        total = sum(times[:4])  # of its own, and of its children that ended
        for child in self.process.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if "qemu" not in child.name():
                    total += sum(child.cpu_times()[:4])
        return float(total)

    def words_logged(self, *words: str) -> int:
        """How many lines of the log contain one of some words."""
        lines = self.log.read_text(errors="replace").splitlines()
        return sum(any(word in line for word in words) for line in lines)


@dataclass
class Machine:
    """Controller, agent and docker daemon of one host. `docker` is None where containers take no part."""

    folder: Path
    namespace: str
    controller: Part
    agent: Part
    docker: DockerDaemon | None = None
    key: str = field(default="")

    @property
    def vms(self) -> Path:
        """The agent's runtime folder."""
        return self.folder / "vms"

    def call(self, method: str, path: str, body: object = None, *, port: int = 9200) -> tuple[int, Any]:
        """(status, whole body) of a call to the controller, or on port 9100 to the agent. Raises httpx.HTTPError."""
        with inside(self.namespace), httpx.Client(trust_env=False, timeout=10.0) as client:
            answer = client.request(method, f"http://127.0.0.1:{port}{path}", json=body)
            return answer.status_code, answer.json()

    def answers(self, port: int) -> bool:
        """Whether the server on a port is ready."""
        with contextlib.suppress(httpx.HTTPError):
            return self.call("GET", "/readyz", port=port)[0] == 200
        return False

    def start(self) -> None:
        """Starts what does not run, and registers the agent."""
        for part, port in ((self.agent, 9100), (self.controller, 9200)):
            if part.process is None:
                part.start()
            until(lambda port=port: self.answers(port), f"port {port} answers; see {part.log}")  # type: ignore[misc]
        self.call("POST", "/api/hosts", {"addr": "127.0.0.1:9100"})
        until(lambda: self.call("GET", "/api/hosts")[1]["data"][0]["state"] == "online", "the host is online")

    def env(self, name: str) -> dict[str, Any]:
        """EnvDetail of an environment."""
        return dict(self.call("GET", f"/api/envs/{name}")[1]["data"])

    def await_ready(self, name: str) -> dict[str, Any]:
        """Waits until an environment is as desired."""
        try:
            until(lambda: self.env(name)["env"]["phase"] == "ready", f"environment {name} is ready")
        except AssertionError as error:
            for vm in self.env(name)["vms"]:
                error.add_note(f"{vm['name']} {vm['phase']}, {vm['state']}: {vm['message']}")
            for part in (self.controller, self.agent):
                error.add_note("\n".join(part.log.read_text(errors="replace").splitlines()[-20:]))
            raise
        return self.env(name)

    def on_agent(self) -> list[dict[str, Any]]:
        """What the agent lists; nothing while it does not answer."""
        with contextlib.suppress(httpx.HTTPError):
            return list(self.call("GET", "/api/vms", port=9100)[1]["data"])
        return []

    def pids(self) -> dict[str, int]:
        """The processes of running VMs, as the agent tells."""
        return {vm["id"]: vm["pid"] for vm in self.on_agent() if vm["state"] == "running"}

    def there(self) -> dict[str, list[str]]:
        """What is really on the machine: VM ids of folders, of QEMU processes and of containers; names of taps."""
        links = json.loads(command("ip", "-n", self.namespace, "-json", "link"))
        processes = [process.info for process in psutil.process_iter(("cwd", "name"))]
        below = [Path(info["cwd"]) for info in processes if info["cwd"] and "qemu" in info["name"]]
        names = self.docker("ps", "--all", "--format", "{{.Names}}").split() if self.docker else []
        return {
            "folders": sorted(path.name for path in self.vms.iterdir() if path.is_dir()),
            "processes": sorted(path.name for path in below if path.parent == self.vms),
            "containers": sorted(name.removeprefix("muster-") for name in names),
            "taps": sorted(link["ifname"] for link in links if link.get("link_type") == "ether" and link["ifname"][:2] == "mt"),
        }

    def forwards(self) -> list[str]:
        """Host ports that the rules forward, each as `port : address . port`."""
        rules = command("nsenter", f"--net=/run/netns/{self.namespace}", "nft", "list", "ruleset")
        return [line.strip() for line in rules.splitlines() if " . 22" in line or " . 80" in line]

    def delete(self, name: str) -> None:
        """Deletes an environment and waits until it is gone."""
        assert self.call("DELETE", f"/api/envs/{name}") == (200, {"ok": True})
        until(lambda: self.call("GET", f"/api/envs/{name}")[0] == 404, f"environment {name} is gone; see {self.agent.log}")


NOTHING: dict[str, list[str]] = {"folders": [], "processes": [], "containers": [], "taps": []}


@contextlib.contextmanager
def machine(namespace: str, tiny: Path, *words: str) -> Iterator[Machine]:
    """A machine with QEMU, Docker, the images tiny and muster/busybox; nothing runs yet. `words` are for its agent."""
    folder = Path(tempfile.mkdtemp(prefix="mte"))  # short: sockets below it must fit into 107 characters
    docker = DockerDaemon(folder / "dk", namespace)
    socket = folder / "dk" / "docker.sock"
    common = ["--data-dir", str(folder / "data")]
    controller = Part(["controller", *common], folder / "controller.log", namespace)
    agent = Part(
        [
            *("agent", *common, "--runtime-dir", str(folder / "vms"), "--image-dir", str(tiny.parent), "--accel", "tcg"),
            *(
                "--cpu-total",
                "16",
                "--mem-total",
                "8192",
                "--engines",
                "qemu,docker",
                "--network",
                "bridge",
                "--docker",
                f"docker -H unix://{socket}",
            ),
            *words,
        ],
        folder / "agent.log",
        namespace,
    )
    built = Machine(folder, namespace, controller, agent, docker)
    try:
        docker.start()
        image = ["image", "build", "busybox", "--image-dir", str(folder / "images"), "--docker", f"docker -H unix://{socket}"]
        command(*CLI, *image)
        yield built
    finally:
        for part in (controller, agent):
            part.end()
        _end_vms(folder / "vms")
        docker.stop()
        shutil.rmtree(folder)


def _end_vms(runtime: Path) -> None:
    """After a failed test: VMs outlive their agent, by design."""
    for process in psutil.process_iter(("cwd",)):
        if process.info["cwd"] and Path(process.info["cwd"]).parent == runtime:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
