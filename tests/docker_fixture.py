"""A docker daemon of the tests' own, in a network namespace of its own, with a small image. Needs root and docker.io.

Use: `from tests.docker_fixture import docker_daemon  # noqa: F401` and take the fixture `docker` as an argument.
"""

from __future__ import annotations

import io
import itertools
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest

from agent.machine import Lease, Machine, Nic, mac_of
from specs.names import VmId
from specs.wire import CreateVmReq

OPS_DOCKERD = Path(__file__).parent.parent / "ops" / "dockerd"
IMAGE = "muster-test/box"
SUBNET = IPv4Network("10.66.0.0/16")
GATEWAY = IPv4Address("10.66.0.1")
_numbers = itertools.count()

# Ends at once on SIGTERM, as a well-behaved main program does, and counts its boots on its own disk.
_INIT = """#!/bin/sh
hostname > /www/index.html
httpd -p 80 -h /www
trap 'exit 0' TERM
echo booted >> /boots
while :; do sleep 1000 & wait $!; done
"""


@dataclass
class DockerDaemon:
    """One private daemon. `netns` is its network namespace; `state` has its socket, data and log."""

    state: Path
    netns: str
    _links: list[str] = field(default_factory=list)

    @property
    def argv(self) -> tuple[str, ...]:
        """The command words for DockerEngine."""
        return ("docker", "-H", f"unix://{self.state}/docker.sock")

    def start(self) -> None:
        """Starts it, or does nothing if it answers."""
        self._ops("start", "--netns", self.netns)

    def stop(self, *, keep: bool = False) -> None:
        """Ends it; `keep` leaves its containers running."""
        self._ops("stop", "--private", *(["--keep"] if keep else []))

    def __call__(self, *words: str, stdin: bytes = b"") -> str:
        """Runs a docker command; its output without the last newline."""
        return _run(*self.argv, *words, stdin=stdin)

    def host(self, *argv: str) -> str:
        """Runs a command in the daemon's network namespace, where its containers' addresses can be reached."""
        return _run("nsenter", f"--net=/run/netns/{self.netns}", *argv)

    def get(self, url: str) -> str:
        """The body behind a URL, asked from the daemon's namespace; "" when there is no answer within two seconds."""
        try:
            return self.host("curl", "-s", "-m", "2", "--noproxy", "*", url)
        except subprocess.CalledProcessError:
            return ""

    def containers(self) -> list[str]:
        """Names of all containers, running or not, sorted."""
        return sorted(self("ps", "-a", "--format", "{{.Names}}").split())

    def make_bridge(self, name: str) -> None:
        """A bridge as the network driver makes it: with the gateway's address, up."""
        self.host("ip", "link", "add", name, "type", "bridge")
        self.host("ip", "addr", "add", f"{GATEWAY}/{SUBNET.prefixlen}", "dev", name)
        self.host("ip", "link", "set", name, "up")

    def _ops(self, command: str, *words: str) -> None:
        _run(str(OPS_DOCKERD), command, "--state", str(self.state), *words)


def make_machine(
    folder: Path,
    vm_id: str,
    *,
    kind: str = "user",
    bridge: str = "",
    ip: str = "10.66.0.5",
    ports: dict[int, int] | None = None,
    deny_outgoing: bool = False,
    **request: object,
) -> Machine:
    """A machine as the runtime would hand it over; `folder` is the runtime folder, the VM's own is made in it."""
    own = folder / vm_id
    own.mkdir(parents=True, exist_ok=True)
    fields = {"image": IMAGE, "cpu": 1, "mem": 64, "disk": 512, "env_id": "env", **request}
    lease = Lease(IPv4Address(ip), mac_of(VmId(vm_id)), ports or {}, deny_outgoing, "env")
    nic = Nic(
        kind=kind,  # type: ignore[arg-type]
        lease=lease,
        subnet=SUBNET,
        gateway=GATEWAY,
        bridge=bridge,
        forward_addrs=("127.0.0.1",),
    )
    wire = CreateVmReq.model_validate({"vm_id": vm_id, "engine": "docker", "deny_outgoing": deny_outgoing, **fields})
    return Machine(VmId(vm_id), own, wire, nic)


def box_image() -> bytes:
    """A root filesystem of busybox alone, as a tar for `docker import`."""
    busybox = Path(shutil.which("busybox") or "/usr/bin/busybox").read_bytes()
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:

        def add(name: str, content: bytes = b"", *, mode: int = 0o755, link: str = "", folder: bool = False) -> None:
            entry = tarfile.TarInfo(name)
            entry.mode, entry.size, entry.linkname = mode, len(content), link
            entry.type = tarfile.SYMTYPE if link else tarfile.DIRTYPE if folder else tarfile.REGTYPE
            tar.addfile(entry, io.BytesIO(content))

        for name in ("bin", "etc", "www", "root", "proc", "sys", "dev", "tmp"):
            add(name, folder=True)
        add("bin/busybox", busybox)
        for tool in (
            "sh",
            "httpd",
            "sleep",
            "cat",
            "stat",
            "ip",
            "nc",
            "nslookup",
            "hostname",
            "kill",
            "wget",
            "dd",
            "id",
            "tail",
        ):
            add(f"bin/{tool}", link="busybox")
        add("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\n", mode=0o644)
        add("init", _INIT.encode())
    return out.getvalue()


@pytest.fixture(scope="session", name="docker")
def docker_daemon() -> Iterator[DockerDaemon]:
    """A running daemon with the image IMAGE."""
    number = f"{os.getpid()}-{next(_numbers)}"
    # A short path: containerd's socket inside it must fit into 107 characters.
    daemon = DockerDaemon(Path(tempfile.mkdtemp(prefix="mdk")), f"mdk{number}")
    _run("ip", "netns", "add", daemon.netns)
    try:
        _run("ip", "-n", daemon.netns, "link", "set", "lo", "up")
        daemon.start()
        daemon("import", "-c", 'CMD ["/init"]', "-", f"{IMAGE}:latest", stdin=box_image())
        yield daemon
    finally:
        daemon.stop()
        _run("ip", "netns", "delete", daemon.netns)
        shutil.rmtree(daemon.state)


def _run(*argv: str, stdin: bytes = b"") -> str:
    done = subprocess.run(argv, input=stdin, capture_output=True, check=False, timeout=120)
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, argv, done.stdout, f"{argv}: {done.stderr.decode()}")
    return done.stdout.decode().rstrip("\n")
