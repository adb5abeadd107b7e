"""The host that the stand-ins share: one JSON file under a lock. Nothing but small modules is loaded, to start fast."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

HOST = "STANDIN_HOST"  # the environment variable that names the folder of the host's state
EMPTY: dict[str, Any] = {
    "interfaces": {
        "em0": {"family": "em", "flags": ["UP"], "inet": ["192.0.2.10/24"], "ether": "52:54:00:ff:00:01", "groups": []},
        "lo0": {"family": "lo", "flags": ["UP", "LOOPBACK"], "inet": ["127.0.0.1/8"], "ether": "", "groups": ["lo"]},
    },
    "arp": {},
    "sysctl": {
        "net.inet.ip.forwarding": "0",
        "net.link.bridge.pfil_member": "1",
        "net.link.bridge.pfil_local_phys": "0",
        "net.link.bridge.pfil_bridge": "1",
        "net.link.bridge.pfil_onlyip": "1",
        "net.pf.filter_local": "0",
        "kern.racct.enable": "1",
        "hw.vmm.maxcpu": "16",
        "kern.features.vimage": "1",
    },
    "pf": {"enabled": True, "calls": True, "anchors": {}},
    "modules": ["if_bridge", "pf"],
    "vmm": {},
    "jails": {},
    "rctl": [],
    "mounts": {},
    "rulesets": ["4", "5"],
    "datasets": {},
    "next_jid": 1,
}


def folder() -> str:
    """Where the host's state is."""
    return os.environ[HOST]


@contextlib.contextmanager
def state() -> Iterator[dict[str, Any]]:
    """The host's state for one command; what it changes is kept unless the command fails."""
    with open(os.path.join(folder(), "lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        value = read()
        yield value
        path = os.path.join(folder(), "state.json")
        with open(path + ".new", "w") as file:
            json.dump(value, file)
        os.replace(path + ".new", path)


def read() -> dict[str, Any]:
    """The host's state now."""
    try:
        with open(os.path.join(folder(), "state.json")) as file:
            value: dict[str, Any] = json.load(file)
            return value
    except FileNotFoundError:
        return json.loads(json.dumps(EMPTY))  # type: ignore[no-any-return]


def say(line: str) -> None:
    """A line of output."""
    sys.stdout.write(f"{line}\n")


def fail(message: str, status: int = 1) -> NoReturn:
    """Ends the command with a message on standard error."""
    sys.stderr.write(f"{message}\n")
    sys.exit(status)


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False
