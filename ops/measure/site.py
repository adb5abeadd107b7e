"""A controller and simulated hosts as processes of their own, with their files in one folder. For the bench and for tests."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil

PATIENCE = 120.0  # seconds; machines are slow and loaded
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIBJbDrk6WHYGFqkzL1M2t3gYKEcvXYo6ZS1lnzFDpq8J me@here"
CALLS = ("call made", "call failed")
"""What the controller's log says of each mutating call to an agent."""


def free_ports(count: int) -> int:
    """The first of `count` consecutive ports, below the ephemeral ones, on which nobody listens now."""
    while True:
        first = random.randrange(10000, 19900 - count)
        with contextlib.ExitStack() as held, contextlib.suppress(OSError):
            for port in range(first, first + count):
                held.enter_context(socket.create_server(("127.0.0.1", port)))
            return first


def until(true: Callable[[], object], what: str, limit: float = PATIENCE, pause: float = 0.02) -> None:
    """Looks until a condition holds. Raises TimeoutError that says what was waited for."""
    deadline = time.monotonic() + limit
    while not true():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {limit:g} s: {what}")
        time.sleep(pause)


def env_body(name: str, vms: int, **changes: Any) -> dict[str, Any]:
    """A request for an environment of so many small, equal VMs."""
    return {
        "id": name,
        "ssh_keys": [KEY],
        "lifetime": "never",
        "vms": [{"name": "vm", "image": "tiny", "cpu": 1, "mem": 128, "disk": 256, "count": vms, **changes}],
    }


class Part:
    """One process of ours and its log."""

    def __init__(self, name: str, words: list[str], folder: Path) -> None:
        self.words = words
        self.log = folder / f"{name}.log"
        self._process: psutil.Popen | None = None

    @property
    def process(self) -> psutil.Popen:
        """The running process. Raises RuntimeError if there is none."""
        if self._process is None:
            raise RuntimeError(f"{self.words[0]} is not running")
        return self._process

    def start(self, url: str) -> None:
        """Returns once it answers. Raises RuntimeError with its last words if it ends instead, TimeoutError."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MUSTER_")}
        with self.log.open("ab") as log:
            self._process = psutil.Popen(
                [sys.executable, "-P", "-m", "api.cli.main", *self.words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=environment,
            )
        until(lambda: self._answers(url), f"{self.words[0]} answers at {url}; see {self.log}")

    def _answers(self, url: str) -> bool:
        if self.process.poll() is not None:
            raise RuntimeError(f"{self.words[0]} ended: {self.log.read_text(errors='replace')[-2000:]}")
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(f"{url}/readyz", trust_env=False, timeout=5).status_code == 200
        return False

    def kill(self) -> None:
        """kill -9, and reaped."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self._process = None

    def end(self) -> None:
        """As an administrator would; nothing if it does not run."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(40)
        except psutil.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def cpu(self) -> float:
        """Processor seconds used so far."""
        times = self.process.cpu_times()
        return float(times.user + times.system)

    def memory(self) -> int:
        """Bytes of its own (unique set size)."""
        return int(self.process.memory_full_info().uss)

    def lines(self, *words: str) -> int:
        """How many lines of the log contain one of some words."""
        with self.log.open(errors="replace") as log:
            return sum(any(word in line for word in words) for line in log)


class Site:
    """`hosts` simulated hosts in one process, and a controller that knows them once `register` has been called."""

    def __init__(self, folder: Path, hosts: int, *flags: str) -> None:
        base = free_ports(hosts + 1)
        self.url = f"http://127.0.0.1:{base + hosts}"
        self.addresses = [f"127.0.0.1:{port}" for port in range(base, base + hosts)]
        self.database = folder / "controller" / "muster.db"
        self.controller = Part(
            "controller",
            ["controller", "--listen", self.url.removeprefix("http://"), "--data-dir", str(folder / "controller")],
            folder,
        )
        self.agents = Part("agents", ["agent", "--simulate", str(hosts), "--listen", self.addresses[0], *flags], folder)
        self.http = httpx.Client(base_url=self.url, trust_env=False, timeout=60)

    def start_agents(self) -> None:
        """Returns once every host answers."""
        self.agents.start(f"http://{self.addresses[-1]}")

    def start_controller(self) -> None:
        """Returns once it answers."""
        self.controller.start(self.url)

    def register(self) -> None:
        """Makes every host known, and waits until all are online."""
        with ThreadPoolExecutor(8) as pool:
            for answer in pool.map(lambda addr: self.http.post("/api/hosts", json={"addr": addr}), self.addresses):
                answer.raise_for_status()
        until(lambda: self.status()["hosts_online"] == len(self.addresses), "every host is online", pause=0.1)

    def close(self) -> None:
        """Ends both processes."""
        self.http.close()
        self.controller.end()
        self.agents.end()

    def data(self, path: str) -> Any:
        """What a GET answers. Raises httpx.HTTPError."""
        return self.http.get(path).raise_for_status().json()["data"]

    def status(self) -> dict[str, int]:
        """FleetStatus."""
        return dict(self.data("/api/status"))

    def phases(self) -> list[str]:
        """The phase of every environment."""
        return [env["phase"] for env in self.data("/api/envs")]

    def await_ready(self, envs: int) -> None:
        """Waits until so many environments are recorded and all are as asked for."""
        until(lambda: self.phases() == ["ready"] * envs, f"{envs} environments are ready")

    def term(self) -> int:
        """The running controller's term: agents refuse calls of any lower one."""
        with contextlib.closing(sqlite3.connect(f"file:{self.database}?mode=ro", uri=True)) as connection:
            (value,) = connection.execute("SELECT value FROM meta WHERE key = 'term'").fetchone()
        return int(value)

    def calls(self) -> int:
        """Mutating calls that controllers of this site made."""
        return self.controller.lines(*CALLS)

    def on_agents(self) -> dict[str, list[dict[str, Any]]]:
        """What each host lists, by address."""
        with httpx.Client(trust_env=False, timeout=30) as client:
            return {addr: client.get(f"http://{addr}/api/vms").raise_for_status().json()["data"] for addr in self.addresses}

    def positions(self) -> dict[str, int]:
        """How many changes each host has ever shown, by address."""
        with httpx.Client(trust_env=False, timeout=30) as client:
            return {addr: client.get(f"http://{addr}/api/vms").json()["seq"] for addr in self.addresses}


@contextlib.contextmanager
def running_site(folder: Path, hosts: int, *flags: str) -> Iterator[Site]:
    """A site with every host online; it is gone afterwards."""
    site = Site(folder, hosts, *flags)
    try:
        site.start_agents()
        site.start_controller()
        site.register()
        yield site
    finally:
        site.close()
