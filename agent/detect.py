"""What this machine is: its id, its processors and memory. Called once at agent start."""

from __future__ import annotations

import os
import re
import secrets
import socket
from pathlib import Path

import psutil

from agent.errors import AgentError
from agent.inventory import Capacity
from agent.records import write_durably
from specs.names import check_name

_MIB = 1024 * 1024
_RESERVE_SHARE = 8
_RESERVE_MAX = 512  # MiB


def cpus() -> int:
    """Processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_mib() -> int:
    """Memory for VMs: all there is but a reserve for the host itself (an eighth, at most 512 MiB)."""
    total = int(psutil.virtual_memory().total) // _MIB
    return total - min(_RESERVE_MAX, total // _RESERVE_SHARE)


def capacity(*, cpu: int, mem: int, disk: int, disk_found: int) -> Capacity:
    """What VMs may use; 0 stands for what is found. `disk_found` in MiB, as the storage driver tells."""
    return Capacity(cpu=cpu or cpus(), mem=mem or memory_mib(), disk=disk or disk_found)


def host_id(file: Path) -> str:
    """The id this host has had since its first start: the host name and six random digits, since names repeat in a fleet.

    Raises AgentError if the file is unreadable or holds no id: under a new id the controller would take this for a new host.
    """
    try:
        known = file.read_text().strip()
    except FileNotFoundError:
        known = f"{_plain_hostname(socket.gethostname())}-{secrets.token_hex(3)}"
        write_durably(file, f"{known}\n".encode())
        return known
    except OSError as error:
        raise AgentError(f"{file} cannot be read: {error.strerror}") from error
    try:
        return check_name(known)
    except ValueError as error:
        raise AgentError(f"{file} holds no host id: it {error}; restore it, or give --host-id") from None


def _plain_hostname(name: str) -> str:
    label = re.sub(r"[^A-Za-z0-9-]+", "-", name.partition(".")[0]).strip("-")
    return label[:63] or "host"
