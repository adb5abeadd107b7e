"""A controller and several hosts with docker, each a network namespace of its own: to be killed, cut off and looked at.

What is found on a host (`Host.found`) is read from the host itself: folders, containers, links, rules and processes.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import httpx
import psutil

from tests.docker_fixture import IMAGE, DockerDaemon, box_image
from tests.e2e.rig import Part, until
from tests.netns import Lab, command, inside

KEY = "a-key-of-this-test"
HEARTBEAT = 1.0  # seconds
GRACE = 6.0  # seconds offline until VMs with `on_host_loss: recreate` are made anew
DISK_MIB = 8
Direction = Literal["both ways", "to the host", "from the host", "its data"]
"""`its data`: the host hears everything and connections stand, but nothing it says arrives."""
_FORWARD = re.compile(r"(\d+) : (\d+\.\d+\.\d+\.\d+) \. (\d+)")


@dataclass(frozen=True, slots=True)
class Box:
    """One VM as found on its host. `pid` is 0 while its container does not run."""

    id: str
    env: str
    name: str
    pid: int


@dataclass(frozen=True, slots=True)
class Found:
    """What is really on one host; `stray` has a sentence for each thing that does not belong together."""

    boxes: tuple[Box, ...]
    stray: tuple[str, ...]


@dataclass
class Host:
    """One host: its agent, its docker daemon, its folder."""

    name: str
    addr: str
    namespace: str
    folder: Path
    docker: DockerDaemon
    agent: Part

    @property
    def vms(self) -> Path:
        """The agent's runtime folder."""
        return self.folder / "vms"

    def pids(self) -> dict[str, int]:
        """The first process of every running container, by VM id."""
        return {vm_id: pid for vm_id, pid in self._containers().items() if pid}

    def found(self) -> Found:
        """Looks at everything. Meant for a host at rest: what is under way shows as stray."""
        records = {path.parent.name: json.loads(path.read_text()) for path in sorted(self.vms.glob("*/vm.json"))}
        containers = self._containers()
        boxes = tuple(
            Box(vm_id, record["request"]["env_id"], record["request"]["name"], containers.get(vm_id, 0))
            for vm_id, record in records.items()
        )
        return Found(boxes, tuple(self._strays(records, containers)))

    def _containers(self) -> dict[str, int]:
        words = "{{.Name}} {{.State.Pid}}"
        while True:
            listed = self.docker("ps", "--all", "--quiet", "--no-trunc").split()
            try:
                lines = self.docker("inspect", "--format", words, *listed).splitlines() if listed else []
            except subprocess.CalledProcessError as error:
                if "No such object" in str(error.stderr):
                    continue  # one was removed in between
                raise
            return {line.split()[0].removeprefix("/muster-"): int(line.split()[1]) for line in lines}

    def _strays(self, records: dict[str, Any], containers: dict[str, int]) -> Iterator[str]:
        folders = {path.name for path in self.vms.iterdir() if path.name not in (".lock", ".terms.json", ".ballast")}
        for vm_id in sorted(folders - records.keys()):
            yield f"folder {vm_id} without a record"
        for vm_id in sorted(records.keys() - containers.keys()):
            yield f"record {vm_id} without a container"
        for vm_id in sorted(containers.keys() - records.keys()):
            yield f"container {vm_id} without a record"
        for name in ("complete", "deleting"):
            for vm_id in sorted(vm_id for vm_id, record in records.items() if record[name] is not (name == "complete")):
                yield f"record {vm_id} is left half way ({name})"
        running = sum(pid > 0 for pid in containers.values())
        links = json.loads(command("ip", "-n", self.namespace, "-json", "link"))
        ports = [link["ifname"] for link in links if link.get("master") == "muster0"]
        if len(ports) != running:
            yield f"{len(ports)} links on the bridge for {running} running containers: {', '.join(ports)}"
        yield from self._stray_rules(records)
        networks = [line for line in self.docker("network", "ls", "--format", "{{.Name}}").split() if "muster" in line]
        if len(networks) != bool(records):
            yield f"docker networks {networks} for {len(records)} VMs"
        yield from self._stray_commands(running)

    def _stray_rules(self, records: dict[str, Any]) -> Iterator[str]:
        rules = command("nsenter", f"--net=/run/netns/{self.namespace}", "nft", "list", "ruleset")
        there = {tuple(match) for match in _FORWARD.findall(rules)}
        leases = [record["lease"] for record in records.values()]
        wanted = {(str(host), lease["ip"], guest) for lease in leases for guest, host in lease["ports"].items()}
        if len(wanted) != sum(len(lease["ports"]) for lease in leases):
            yield "a host port is leased twice"
        for forward in sorted(there ^ wanted):
            yield f"forward {forward} {'without a lease' if forward in there else 'is missing'}"

    def _stray_commands(self, running: int) -> Iterator[str]:
        """Commands that an agent started and left behind, and containers' shims that nobody needs."""
        own = self.agent.process.pid if self.agent.process else 0
        shims = 0
        for pid in map(int, command("ip", "netns", "pids", self.namespace).split()):
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                name, parents = process.name(), {parent.pid for parent in process.parents()}
                shims += name.startswith("containerd-shim")
                if pid != own and own not in parents and name in ("docker", "nft", "qemu-img", "setpriv", "python3"):
                    yield f"process {pid} is left: {' '.join(process.cmdline())[:200]}"
        if shims != running:
            yield f"{shims} container shims for {running} running containers"


@dataclass
class Site:
    """The whole: `controller` in a namespace of its own, a cable to each host."""

    folder: Path
    namespace: str
    controller: Part
    hosts: list[Host]
    _cut: dict[str, Direction] = field(default_factory=dict)

    @property
    def database(self) -> Path:
        """The controller's store."""
        return self.folder / "store" / "muster.db"

    def call(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        """(status, whole body) of a call to the controller. Raises httpx.HTTPError."""
        with inside(self.namespace), self.client() as client:
            return asked(client, method, path, body)

    @staticmethod
    def client() -> httpx.Client:
        """A client of the controller; it must be used inside the site's namespace. Without TLS: reading the CAs is slow."""
        headers = {"Authorization": f"Bearer {KEY}"}
        return httpx.Client(base_url="http://127.0.0.1:9200", trust_env=False, verify=False, timeout=20.0, headers=headers)

    def data(self, path: str) -> Any:
        """What a GET answers."""
        status, body = self.call("GET", path)
        assert status == 200, f"{path}: {status} {body}"
        return body["data"]

    def answers(self, host: Host | None = None) -> bool:
        """Whether the controller, or a host's agent, is ready."""
        namespace, url = (host.namespace, host.addr) if host else (self.namespace, "127.0.0.1:9200")
        with contextlib.suppress(httpx.HTTPError), inside(namespace), self.client() as client:
            return client.get(f"http://{url}/readyz").status_code == 200
        return False

    def start(self) -> None:
        """Starts what does not run and waits until everything answers and every host is registered and online."""
        parts = [self.controller, *(host.agent for host in self.hosts)]
        for part in parts:
            if part.process is None:
                part.start()
        for host, part in zip((None, *self.hosts), parts, strict=True):
            until(lambda host=host, part=part: self.answers(host) or ended(part), f"{part.log.stem} answers")  # type: ignore[misc]
            assert not ended(part), f"it ended: {part.log.read_text(errors='replace')[-500:]}"
        known = {host["addr"] for host in self.data("/api/hosts")}
        for host in self.hosts:
            if host.addr not in known:
                assert self.call("POST", "/api/hosts", {"addr": host.addr})[0] == 201
        for host in self.hosts:
            until(lambda host=host: self.state(host) == "online", f"{host.name} is online")  # type: ignore[misc]

    def state(self, host: Host) -> str:
        """online or offline, as the controller sees it."""
        return str(self.data(f"/api/hosts/{host.addr}")["state"])

    def env(self, name: str) -> dict[str, Any]:
        """EnvDetail of an environment."""
        return dict(self.data(f"/api/envs/{name}"))

    def put(self, name: str, *vms: dict[str, Any], **fields: Any) -> None:
        """Records an environment."""
        status, body = self.call("PUT", f"/api/envs/{name}", {"id": name, "vms": list(vms), **fields})
        assert status in (200, 201), body

    def await_phase(self, name: str, phase: str = "ready") -> dict[str, Any]:
        """Waits until an environment is so and every host has reported."""
        try:
            until(lambda: self.env(name)["env"]["phase"] == phase, f"environment {name} is {phase}")
        except AssertionError as error:
            error.add_note(self.told(name))
            raise
        return self.env(name)

    def told(self, name: str) -> str:
        """What the controller says of each VM of an environment, and the ends of the logs."""
        lines = [f"{vm['name']} {vm['phase']}, {vm['state']}: {vm['message']}" for vm in self.env(name)["vms"]]
        for part in (self.controller, *(host.agent for host in self.hosts)):
            lines += part.log.read_text(errors="replace").splitlines()[-15:]
        return "\n".join(lines)

    def delete(self, name: str) -> None:
        """Deletes an environment and waits until it is gone; one that is gone already is fine."""
        assert self.call("DELETE", f"/api/envs/{name}")[0] in (200, 404)
        until(lambda: self.call("GET", f"/api/envs/{name}")[0] == 404, f"environment {name} is gone")

    def pids(self) -> dict[str, int]:
        """The processes of all running VMs, asked of the hosts."""
        with ThreadPoolExecutor(len(self.hosts)) as pool:
            return {vm_id: pid for pids in pool.map(Host.pids, self.hosts) for vm_id, pid in pids.items()}

    def found(self) -> dict[str, Found]:
        """What is on every host, by its name."""
        with ThreadPoolExecutor(len(self.hosts)) as pool:
            return dict(zip((host.name for host in self.hosts), pool.map(Host.found, self.hosts), strict=True))

    def settled(self) -> dict[str, Found]:
        """The same of hosts at rest: what is stray at first may only be on its way."""
        deadline = time.monotonic() + 15.0
        found = self.found()
        while any(there.stray for there in found.values()) and time.monotonic() < deadline:
            time.sleep(0.2)
            found = self.found()
        return found

    def cut(self, host: Host, direction: Direction) -> None:
        """From now on packets between controller and host are lost, both ways or one way."""
        self._cut[host.addr.partition(":")[0]] = direction
        self._apply_cuts()

    def mend(self) -> None:
        """Everything gets through again."""
        self._cut.clear()
        self._apply_cuts()

    def _apply_cuts(self) -> None:
        rules = {"prerouting": "", "output": ""}
        for address, direction in self._cut.items():
            if direction == "its data":
                rules["prerouting"] += f"ip saddr {address} tcp flags & psh == psh drop\n"
                continue
            if direction != "to the host":
                rules["prerouting"] += f"ip saddr {address} drop\n"
            if direction != "from the host":
                rules["output"] += f"ip daddr {address} drop\n"
        chains = "".join(
            f"chain {hook} {{ type filter hook {hook} priority raw; policy accept; {text} }}\n" for hook, text in rules.items()
        )
        text = f"add table ip cut\ndelete table ip cut\ntable ip cut {{ {chains} }}\n"
        command("nsenter", f"--net=/run/netns/{self.namespace}", "nft", "-f", "-", stdin=text)


def box(name: str = "box", **fields: Any) -> dict[str, Any]:
    """A small container of an environment."""
    return {"name": name, "image": IMAGE, "engine": "docker", "cpu": 1, "mem": 16, "disk": 64, **fields}


def ended(part: Part) -> bool:
    """Whether a process has ended that nobody killed."""
    return part.process is None or part.process.poll() is not None


def asked(client: httpx.Client, method: str, path: str, body: object = None) -> tuple[int, Any]:
    """(status, whole body) of a call."""
    answer = client.request(method, path, json=body) if body is not None else client.request(method, path)
    return answer.status_code, answer.json()


@contextlib.contextmanager
def site(hosts: int, *, small_disks: bool = False) -> Iterator[Site]:
    """A site whose docker daemons run and have IMAGE; `Site.start` starts the rest. Everything is gone afterwards.

    `small_disks`: the store and each host's folder of VMs are filesystems of DISK_MIB of their own, which can be filled.
    """
    folder = Path(tempfile.mkdtemp(prefix="mts"))  # short: sockets below it must fit into 107 characters
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder)
        lab = Lab()
        stack.callback(lab.close)
        key = folder / "key"
        key.write_text(KEY)
        namespace = lab.namespace("c")
        words = [
            *("controller", "--api-key-file", str(key), "--data-dir", str(folder / "store")),
            *("--heartbeat", str(HEARTBEAT), "--host-loss-grace", str(GRACE)),
        ]
        built = Site(folder, namespace, Part(words, folder / "controller.log", namespace), [])
        for number in range(hosts):
            host = _host(folder / f"h{number}", number, lab.namespace(f"h{number}"), key)
            lab.cable(namespace, f"10.90.{number}.1/30", host.namespace, f"10.90.{number}.2/30")
            built.hosts.append(host)
        (folder / "store").mkdir()
        if small_disks:
            for place in (folder / "store", *(host.vms for host in built.hosts)):
                stack.enter_context(_small_disk(place))
        stack.callback(_end, built)
        with ThreadPoolExecutor(hosts) as pool:
            list(pool.map(_start_docker, built.hosts))
        yield built


def _host(folder: Path, number: int, namespace: str, key: Path) -> Host:
    (folder / "vms").mkdir(parents=True)
    docker = DockerDaemon(folder / "dk", namespace)
    addr = f"10.90.{number}.2:9100"
    words = [
        *("agent", "--listen", addr, "--api-key-file", str(key), "--data-dir", str(folder / "data")),
        *("--runtime-dir", str(folder / "vms"), "--host-id", f"host-{number}", "--engines", "docker"),
        *("--network", "bridge", "--subnet", f"10.{91 + number}.0.0/24", "--docker", " ".join(docker.argv)),
        *("--cpu-total", "64", "--mem-total", "8192", "--disk-total", "81920", "--labels", f"host=host-{number}"),
    ]
    return Host(f"host-{number}", addr, namespace, folder, docker, Part(words, folder / "agent.log", namespace))


@contextlib.contextmanager
def _small_disk(place: Path) -> Iterator[None]:
    """A filesystem of DISK_MIB, in a file beside the folder it is mounted on."""
    image = place.with_suffix(".ext4")
    with image.open("wb") as file:
        file.truncate(DISK_MIB << 20)
    command("mkfs.ext4", "-q", "-m", "0", "-O", "^has_journal", str(image))
    command("mount", "-o", "loop", str(image), str(place))
    (place / "lost+found").rmdir()
    try:
        yield
    finally:
        command("umount", str(place))


@contextlib.contextmanager
def filled(place: Path) -> Iterator[None]:
    """The filesystem of a folder is full to the last byte."""
    ballast = place / ".ballast"
    try:
        with ballast.open("wb", buffering=0) as file:
            for size in (1 << 16, 1 << 10, 1):
                with contextlib.suppress(OSError):
                    while file.write(bytes(size)):
                        pass
        yield
    finally:
        ballast.unlink()


def _start_docker(host: Host) -> None:
    host.docker.start()
    host.docker("import", "-c", 'CMD ["/init"]', "-", f"{IMAGE}:latest", stdin=box_image())


def _end(built: Site) -> None:
    def end(host: Host) -> None:
        host.agent.end()
        with contextlib.suppress(subprocess.CalledProcessError):
            host.docker.stop()

    built.controller.end()
    with ThreadPoolExecutor(len(built.hosts)) as pool:
        list(pool.map(end, built.hosts))
