"""Reaches into what runs: ssh into a VM, a page from a web server, the process behind a VM."""

from __future__ import annotations

import shlex
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable

import httpx

from api.client import Client
from ops.demo.site import Site, Trouble
from specs.wire import EnvDetail, Vm

_GUEST_LIMIT = 240.0  # seconds for a guest to boot without KVM on a busy machine
# What a VM of the whole Debian is asked for beyond the example; its guest is ready once its sshd speaks.
DEBIAN: dict[str, object] = {
    "image": "debian",
    "mem": 768,
    "disk": 8192,
    "ready": {"ssh-banner": 22, "timeout": "10m"},
    "user_data": "#cloud-config\nwrite_files:\n  - path: /root/told\n    content: by user_data\n",
}
_OPTIONS = ("StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR", "ConnectTimeout=10", "BatchMode=yes")


def vm_of(detail: EnvDetail, engine: str) -> Vm:
    """The environment's VM of that engine."""
    return next(vm for vm in detail.vms if vm.engine == engine)


def ssh_words(site: Site, vm: Vm, *command: str, quiet: bool = False) -> list[str]:
    """The argv that enters a VM, or runs a command in it."""
    options = [word for option in (_OPTIONS if quiet else _OPTIONS[:2]) for word in ("-o", option)]
    return ["ssh", *options, "-i", str(site.key), "-p", str(vm.port_map["22"]), "root@127.0.0.1", *command]


def ssh_line(site: Site, vm: Vm) -> str:
    """The command for people to paste."""
    return shlex.join(ssh_words(site, vm))


def in_guest(site: Site, vm: Vm, command: str) -> str:
    """Runs a command in a VM as soon as it lets one in; its output. Raises Trouble."""

    def attempt() -> str | None:
        words = ssh_words(site, vm, command, quiet=True)
        done = subprocess.run(words, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False, timeout=60)
        if done.returncode not in (0, 255):  # 255 is ssh's own: not reachable yet
            raise Trouble(f"`{command}` in {vm.name} ended with {done.returncode}: {done.stderr.strip()}")
        return done.stdout.strip() if done.returncode == 0 else None

    return patiently(attempt, f"{vm.name} let nobody in over ssh")


def page(vm: Vm) -> str:
    """The page behind a VM's forwarded port 80, asked for as soon as it answers. Raises Trouble."""
    url = f"http://127.0.0.1:{vm.port_map['80']}/"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def attempt() -> str | None:
        try:
            with opener.open(url, timeout=5) as answer:
                return str(answer.read().decode())
        except (OSError, urllib.error.URLError):
            return None

    return patiently(attempt, f"{vm.name} served no page at {url}")


def pid_of(site: Site, vm: Vm) -> int:
    """The process of a running VM on this machine, 0 if none runs."""
    answer = httpx.get(f"{site.agent_url}/api/vms/{vm.id}", trust_env=False).json()
    return int(answer["data"].get("pid") or 0)


def detail(site: Site, env: str) -> EnvDetail:
    """The environment as the controller tells it now."""
    with Client(site.url) as client:
        return client.env(env)


def patiently(attempt: Callable[[], str | None], failure: str, limit: float = _GUEST_LIMIT) -> str:
    """Repeats `attempt` until it returns something. Raises Trouble(failure) after `limit` seconds."""
    deadline = time.monotonic() + limit
    while (found := attempt()) is None:
        if time.monotonic() > deadline:
            raise Trouble(f"{failure} within {limit:g} s")
        time.sleep(0.3)
    return found
