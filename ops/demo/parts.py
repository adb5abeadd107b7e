"""Starts and ends what a demo consists of: a docker daemon where none answers, the images, controller and agent."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from api.client import ApiError, Client
from ops.demo.site import ROOT, Site, Trouble

_READY = 150.0  # seconds; an agent may first have to prove KVM with guests that do not boot
_END = 70.0  # seconds for controller and agent to end one after the other
MUSTER = Path(sys.executable).with_name("muster")


def environment(site: Site) -> dict[str, str]:
    """This process's, without settings that were meant for some other controller."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MUSTER_") or name == "MUSTER_CACHE"}
    return {**kept, "MUSTER_URL": site.url}


def muster(site: Site, *words: str) -> None:
    """Runs the command line in the foreground; raises Trouble when it fails."""
    done = subprocess.run([MUSTER, *words], cwd=ROOT, env=environment(site), check=False)
    if done.returncode:
        raise Trouble(f"`muster {' '.join(words)}` failed; what it said is above, the servers' words are in {site.log}")


def start_docker(site: Site) -> str:
    """Makes sure that a daemon answers; what was done, in words."""
    return _dockerd(site, "start")


def stop_docker(site: Site) -> str:
    """Ends the daemon that `start_docker` started, in this run or in one that was cut off."""
    return _dockerd(site, "stop")


def _dockerd(site: Site, verb: str) -> str:
    done = subprocess.run(
        [ROOT / "ops" / "dockerd", verb, "--state", site.dockerd], capture_output=True, text=True, check=False, timeout=150
    )
    if done.returncode:
        raise Trouble(f"{done.stderr.strip()}\nops/up --without-docker goes without containers")
    return done.stdout.strip()


class Servers:
    """Controller and agent as `muster up` runs them. VMs outlive them."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns once both answer and the agent is registered with every engine that is wanted. Raises Trouble."""
        site = self._site
        site.data.mkdir(mode=0o700, parents=True, exist_ok=True)
        words = [
            *("up", "--listen", site.url.removeprefix("http://"), "--agent-listen", site.agent_url.removeprefix("http://")),
            *("--data-dir", site.data, "--runtime-dir", site.vms, "--image-dir", site.images),
            *("--engines", "qemu,docker" if site.docker else "qemu"),
            *("--bridge", site.bridge, "--subnet", site.subnet),
            *("--cpu-total", str(max(2, os.cpu_count() or 1))),  # the example asks for two, on the smallest machine too
        ]
        # Killed outright, this process could not end its servers: then the kernel tells them. In a session of their own they
        # do not hear Ctrl-C, for the environments must go first.
        before = ["setpriv", "--pdeathsig", "TERM"] if shutil.which("setpriv") else []
        with site.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*before, MUSTER, *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=environment(site),
            )
        _await_ready(site, self._process)

    def stop(self) -> None:
        """Ends both. Repeatable."""
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_END)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _await_ready(site: Site, process: subprocess.Popen[bytes]) -> None:
    wanted = {"qemu", "docker"} if site.docker else {"qemu"}
    deadline = time.monotonic() + _READY
    with Client(site.url) as client:
        while True:
            if process.poll() is not None:
                raise Trouble(f"controller and agent did not start:\n{tail(site.log)}")
            with contextlib.suppress(ApiError):
                if any(host.state == "online" and wanted <= set(host.engines) for host in client.hosts()):
                    return
            if time.monotonic() > deadline:
                raise Trouble(f"no host with {', '.join(sorted(wanted))} after {_READY:g} s:\n{tail(site.log)}")
            time.sleep(0.1)


def tail(path: Path, lines: int = 12) -> str:
    """The last lines of a log."""
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) if path.exists() else ""


def destroy_all(site: Site, limit: float = 180.0) -> int:
    """Deletes every environment and returns their number once all are gone. Raises Trouble with what stays."""
    deadline = time.monotonic() + limit
    with Client(site.url) as client:
        number = len(client.envs())
        while envs := client.envs():
            for env in envs:
                if env.phase != "terminating":
                    with contextlib.suppress(ApiError):
                        client.delete_env(env.id)
            if time.monotonic() > deadline:
                told = [f"{vm.name}: {vm.message}" for env in envs for vm in client.env(env.id).vms]
                raise Trouble(
                    f"environments {', '.join(env.id for env in envs)} are not gone after {limit:g} s: {'; '.join(told)}"
                )
            time.sleep(0.2)
    return number
