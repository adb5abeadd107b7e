"""Where one demo lives: its folder, ports, bridge and addresses. Starts nothing.

The choices are kept in `site.json` as long as anything of a run may be left, so that the next run finds it again.
"""

from __future__ import annotations

import fcntl
import hashlib
import ipaddress
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent.parent
_WANTED = {"controller": 9200, "agent": 9100}
_LET_GO = 40.0  # seconds that the processes of a killed run get to leave their ports
_SUBNETS = tuple(f"10.{n}.0.0/20" for n in (77, 78, 79, 177, 178, 179, 214, 215, 216))


class Trouble(Exception):
    """The demo cannot go on; the message says why and what to do."""


@dataclass(frozen=True)
class Site:
    """Fixed facts of one demo. `docker` tells whether containers take part, `bridge` is used by root alone."""

    state: Path
    controller_port: int
    agent_port: int
    bridge: str
    subnet: str
    docker: bool

    @property
    def url(self) -> str:
        """The controller."""
        return f"http://127.0.0.1:{self.controller_port}"

    @property
    def agent_url(self) -> str:
        """The agent."""
        return f"http://127.0.0.1:{self.agent_port}"

    @property
    def data(self) -> Path:
        """Controller's database and agent's own files."""
        return self.state / "data"

    @property
    def vms(self) -> Path:
        """One folder a VM."""
        return self.state / "vms"

    @property
    def images(self) -> Path:
        """Base images; they stay for the next run."""
        return self.state / "images"

    @property
    def dockerd(self) -> Path:
        """Pidfile and log of the docker daemon this demo started, if it did."""
        return self.state / "dockerd"

    @property
    def log(self) -> Path:
        """What controller and agent say."""
        return self.state / "muster.log"

    @property
    def key(self) -> Path:
        """The private key for the VMs; its public half lies beside it."""
        return self.state / "id_ed25519"


def state_folder() -> Path:
    """$MUSTER_STATE, else `.state` of the checkout."""
    return Path(os.environ.get("MUSTER_STATE") or ROOT / ".state").absolute()


@contextmanager
def alone(state: Path) -> Iterator[None]:
    """Holds the state folder. Raises Trouble where another demo has it."""
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (state / "lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Trouble(f"ops/up runs on {state} already; end it, or set MUSTER_STATE to another folder") from None
        yield


def choose(state: Path, *, docker: bool) -> tuple[Site, tuple[str, ...]]:
    """The site to use, and what is worth telling about it. Raises Trouble."""
    kept = _kept(state)
    if kept:
        site = replace(kept, docker=docker or kept.docker)
        for port in (kept.controller_port, kept.agent_port):
            _await_free(port)
        told = ["an earlier run was cut off; what is left of it is taken over"]
    else:
        ports = {name: _free_port(wanted) for name, wanted in _WANTED.items()}
        told = [
            f"port {wanted} is taken; the {name} listens on {ports[name]}"
            for name, wanted in _WANTED.items()
            if ports[name] != wanted
        ]
        bridge = f"mup{hashlib.sha256(os.fsencode(state)).hexdigest()[:6]}"
        site = Site(state, ports["controller"], ports["agent"], bridge, _free_subnet(), docker)
    facts = {name: value for name, value in asdict(site).items() if name != "state"}
    (state / "site.json").write_text(json.dumps(facts))
    return site, tuple(told)


def forget(site: Site) -> None:
    """Removes the state of a run that left nothing. Images, the key, logs and the accelerator's proof stay."""
    for path in (
        *site.data.glob("muster.db*"),
        site.data / "cluster-id",
        site.data / "controller.lock",
        site.data / "host-id",
        site.state / "site.json",
    ):
        path.unlink(missing_ok=True)
    shutil.rmtree(site.vms, ignore_errors=True)


def make_key(site: Site) -> None:
    """An ssh key without passphrase, made once."""
    if not site.key.exists():
        site.key.with_suffix(".pub").unlink(missing_ok=True)
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "ops/up", "-f", site.key], check=True)


def _kept(state: Path) -> Site | None:
    try:
        return Site(state=state, **json.loads((state / "site.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _is_free(port: int) -> bool:
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def _free_port(wanted: int) -> int:
    if _is_free(wanted):
        return wanted
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return int(trial.getsockname()[1])


def _await_free(port: int) -> None:
    deadline = time.monotonic() + _LET_GO
    while not _is_free(port):
        if time.monotonic() > deadline:
            raise Trouble(
                f"the last run used port {port} and its machines are still there, but something listens on it; stop that"
            )
        time.sleep(0.2)


def _free_subnet() -> str:
    """The first that overlaps no network this machine has an address in."""
    taken = [
        ipaddress.ip_interface(f"{address.address}/{address.netmask}").network
        for addresses in psutil.net_if_addrs().values()
        for address in addresses
        if address.family == socket.AF_INET and address.netmask
    ]
    for candidate in _SUBNETS:
        if not any(ipaddress.ip_network(candidate).overlaps(network) for network in taken):
            return candidate
    raise Trouble(f"this machine has addresses in all of {', '.join(_SUBNETS)}; no network is left for VMs")
