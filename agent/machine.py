"""The values that runtime and drivers hand each other. No behaviour, no I/O."""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import sha256
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Literal

from specs.names import VmId
from specs.wire import CreateVmReq


def short_hash(vm_id: VmId) -> str:
    """Twelve hex digits derived from a VM id, for names with tight limits (a link name has 15 characters)."""
    return sha256(vm_id.encode()).hexdigest()[:12]


def mac_of(vm_id: VmId) -> str:
    """A locally administered unicast MAC address derived from a VM id."""
    digits = short_hash(vm_id)
    return ":".join(["52", "54", *(digits[i : i + 2] for i in range(0, 8, 2))])


@dataclass(frozen=True, slots=True)
class Lease:
    """What a VM holds on its host's network for as long as it exists. Recorded in vm.json.

    `ports` maps guest port to host port (TCP). `name` is the guest's host name, "" in records of before there was one.
    """

    ip: IPv4Address
    mac: str
    ports: dict[int, int]
    deny_outgoing: bool
    env_id: str
    name: str = ""


@dataclass(frozen=True, slots=True)
class Nic:
    """How an engine plugs a VM into the network that `Network.ensure` prepared.

    kind `tap`: attach to the existing tap `link`, which is on bridge `bridge`. kind `bridge`: no tap was made; the engine
    attaches to `bridge` itself (containers). kind `vnet`: interface `link` is for the jail, its other end is on `bridge`.
    kind `user`: the engine does the networking and forwards `lease.ports` from all of the host's addresses in
    `forward_addrs`; with `lease.deny_outgoing` nothing but replies may leave.
    """

    kind: Literal["tap", "bridge", "vnet", "user"]
    lease: Lease
    subnet: IPv4Network
    gateway: IPv4Address
    dns: tuple[str, ...] = ()
    link: str = ""
    bridge: str = ""
    forward_addrs: tuple[str, ...] = ("0.0.0.0",)  # noqa: S104 forwards are meant to be reachable from other hosts
    mtu: int = 1500


DiskKind = Literal["any", "raw", "rootfs"]
"""What an engine needs of a disk: `any` a clone of a disk image in the format the storage driver does best, `raw` the same
without a format of its own, `rootfs` the root filesystem of a kernel-and-rootfs image (raw, no partitions), grown with it.
"""


StreamFormat = Literal["qcow2", "zfs"]
"""How an exported disk is written: a flat qcow2 file, or the stream of zfs-send(8)."""


@dataclass(frozen=True, slots=True)
class Disk:
    """A VM's own root disk. `path` is a file (`qcow2`, `raw`) or a block device (`raw`)."""

    path: Path
    format: Literal["qcow2", "raw"]


@dataclass(frozen=True, slots=True)
class Machine:
    """Everything an engine needs to know of one VM. `folder` is runtime/<vm_id>; the engine keeps its own files there."""

    id: VmId
    folder: Path
    request: CreateVmReq
    nic: Nic
    disk: Disk | None = None

    @property
    def hostname(self) -> str:
        """The name the guest gets."""
        return hostname_of(self.request)


def hostname_of(request: CreateVmReq) -> str:
    """The VM's name as a DNS label, else one from its id."""
    wanted = request.name or request.vm_id
    label = "".join(char if char.isascii() and char.isalnum() else "-" for char in wanted.lower()).strip("-")
    return label[:63].rstrip("-") or "vm"


@dataclass(frozen=True, slots=True)
class Running:
    """The VM's process (for a container: its first process) is alive. `pid` is on the host."""

    pid: int


@dataclass(frozen=True, slots=True)
class Stopped:
    """The VM exists on this host (disk, container) but nothing of it runs; its memory is free.

    `reason`: "" as asked or never started, `exited` the guest powered itself off (exit status 0), `crashed` otherwise.
    """

    reason: Literal["", "exited", "crashed"] = ""
    message: str = ""


EngineState = Running | Stopped


@dataclass(frozen=True, slots=True)
class Usable:
    """A driver works on this host; `detail` is shown to people (`kvm`, `tcg: /dev/kvm does not boot a guest`)."""

    detail: str = ""
    warnings: tuple[str, ...] = field(default=())


@dataclass(frozen=True, slots=True)
class Unusable:
    """A driver cannot work on this host, and why, with what to do about it."""

    why: str


Probe = Usable | Unusable
