"""The jail one VM's Firecracker runs in: a folder that is all it sees, a user of its own, a limit to its memory.

Called by the firecracker driver. Made anew for every start from links to the VM's files, so nothing in it needs to be kept.
The jailer's rules: Firecracker's docs/jailer.md.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import json
import os
import shutil
import stat
import struct
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from agent.engines.firecracker_config import DISK, SEED
from agent.errors import AgentError
from agent.machine import Machine, short_hash
from specs.names import VmId

JAIL = "jail"
PARENT = "muster"
# The users of VMs: 2^28 ids from the first that no distribution, container manager or systemd hands out
# (https://systemd.io/UIDS-GIDS, "unused").
UID_FIRST = 1879048192
_UID_BITS = 28
CGROUP_LIMIT = 10.0  # seconds
_LOOK_EVERY = 0.02  # seconds
_OVERHEAD = 256  # MiB of memory for Firecracker itself and the cache of its files
_MIB = 1024 * 1024
_CGROUPS = Path("/sys/fs/cgroup")

# linux/if_tun.h
_TUNSETIFF, _TUNSETOWNER = 0x400454CA, 0x400454CC
_TAP_FLAGS = 0x0002 | 0x1000 | 0x4000  # IFF_TAP, IFF_NO_PI, IFF_VNET_HDR: as Firecracker opens it


@dataclass(frozen=True, slots=True)
class Binaries:
    """The two programs of a Firecracker release, absolute and without symbolic links."""

    firecracker: Path
    jailer: Path


@dataclass(frozen=True, slots=True)
class Cgroups:
    """Where memory is limited on this host: the version of the hierarchy, its root, and the file that takes the limit."""

    version: Literal["1", "2"]
    root: Path
    file: str


def find_binaries(name: str) -> Binaries:
    """Firecracker by name or path, and the jailer beside it or on PATH. Raises AgentError that says what to install."""
    found = shutil.which(name)
    if found is None:
        raise AgentError(
            f"{name} is not installed; put firecracker and jailer of one release on PATH, or give --firecracker-bin"
        )
    binary = Path(found).resolve()
    suffix = binary.name.removeprefix("firecracker")  # releases name both firecracker-VERSION-ARCH, jailer-VERSION-ARCH
    beside = (Path(found).parent / "jailer", binary.parent / f"jailer{suffix}")
    jailer = next((str(path) for path in beside if os.access(path, os.X_OK)), None) or shutil.which("jailer")
    if jailer is None:
        raise AgentError(f"there is no jailer beside {binary} or on PATH; it comes with every Firecracker release")
    if "firecracker" not in binary.name:
        raise AgentError(f"{binary} must have firecracker in its name, or the jailer refuses it")
    return Binaries(binary, Path(jailer).resolve())


@cache
def find_cgroups() -> Cgroups | None:
    """The hierarchy that limits memory here (cgroups(7)); None if there is none, as in many containers."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, where, kind, options, *_ = line.split()
        if kind == "cgroup" and "memory" in options.split(","):
            return Cgroups("1", Path(where), "memory.limit_in_bytes")
        if kind == "cgroup2" and "memory" in _words(Path(where) / "cgroup.controllers"):
            return Cgroups("2", Path(where), "memory.max")
    return None


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


def agent_mark(runtime_dir: Path) -> str:
    """Twelve hex digits that tell the VMs of this runtime folder from those of other agents on the machine."""
    return sha256(str(runtime_dir).encode()).hexdigest()[:12]


def jail_id(runtime_dir: Path, vm_id: VmId) -> str:
    """The VM's name for jailer and cgroups, which take letters, digits and hyphens alone, at most 64."""
    return f"{agent_mark(runtime_dir)}-{short_hash(vm_id)}"


def config_name(vm_id: VmId) -> str:
    """The configuration's name. It carries the whole VM id: a process is found by it when its folder is gone."""
    return f"{vm_id}.json"


def uid_of(machine: Machine, runtime_dir: Path) -> int:
    """The VM's user and group id: its own among the VMs of an agent, as its address is, and most likely among all agents'."""
    offset = int(machine.nic.lease.ip) - int(machine.nic.subnet.network_address)
    mask = (1 << _UID_BITS) - 1
    return UID_FIRST + ((offset ^ int(agent_mark(runtime_dir), 16)) & mask)


class Jail:
    """The jail of one VM. All methods block for the time of small file operations."""

    def __init__(self, folder: Path, name: str) -> None:
        """`folder` is the VM's, `name` its jail id."""
        self._top = folder / JAIL
        self.name = name

    def root(self) -> Path:
        """The folder the process sees as `/`; of a running VM also when Firecracker was renamed by an upgrade since."""
        found = sorted(self._top.glob(f"*/{self.name}/root"))
        return found[0] if found else self._top / "firecracker" / self.name / "root"

    def argv(self, binaries: Binaries, uid: int, *, memory: int, arguments: tuple[str, ...]) -> list[str]:
        """The jailer's command line. `memory` in MiB is the guest's; `arguments` go to Firecracker."""
        limits: tuple[str, ...] = ()
        cgroups = find_cgroups()
        if cgroups is not None:
            value = f"{cgroups.file}={(memory + _OVERHEAD) * _MIB}"
            limits = ("--cgroup-version", cgroups.version, "--parent-cgroup", PARENT, "--cgroup", value)
        return [
            str(binaries.jailer),
            *("--id", self.name),
            *("--exec-file", str(binaries.firecracker)),
            *("--uid", str(uid), "--gid", str(uid)),
            *("--chroot-base-dir", str(self._top)),
            *limits,
            *("--resource-limit", "no-file=1024"),
            "--",
            *arguments,
        ]

    def build(self, binaries: Binaries, uid: int, files: dict[str, Path], config: tuple[str, dict[str, Any]]) -> None:
        """Fills a new jail: `files` maps names in the jail to files or block devices, `config` is a name and what it says.

        What lies in `files` as DISK or SEED becomes the user's own. Raises AgentError naming the file.
        """
        self.remove()
        root = self._top / binaries.firecracker.name / self.name / "root"
        root.mkdir(parents=True)
        for name, source in files.items():
            try:
                _bring(source, root / name, uid if name in (DISK, SEED) else None)
            except OSError as error:
                raise AgentError(f"{source} cannot be brought into the jail {root}: {error.strerror or error}") from error
        words = root / config[0]
        words.write_text(json.dumps(config[1], indent=1) + "\n")
        words.chmod(0o444)  # whatever the umask of the process

    def remove(self) -> None:
        """Removes the jail's folder; for a VM whose process is gone."""
        shutil.rmtree(self._top, onerror=_unless_gone)

    def cgroup(self) -> Path | None:
        """The VM's control group, which outlives its process; None where there are none."""
        cgroups = find_cgroups()
        return cgroups.root / PARENT / self.name if cgroups is not None else None


def _unless_gone(_function: object, _path: str, error: tuple[type[BaseException], BaseException, object]) -> None:
    """What vanishes meanwhile, as by a removal that was cut off in its thread, is as good as removed."""
    if not isinstance(error[1], FileNotFoundError):
        raise error[1]


async def remove_cgroup(path: Path | None, limit: float = CGROUP_LIMIT) -> None:
    """Removes a control group whose processes are gone or about to be: the kernel lets go of a dead one's group a little later.

    One that is not there is fine. Raises AgentError if it is still in use after `limit` seconds.
    """
    if path is None:
        return
    deadline = asyncio.get_running_loop().time() + limit
    while (why := _remove(path)) is not None:
        if asyncio.get_running_loop().time() >= deadline:
            raise AgentError(f"the control group {path} cannot be removed: {why}")
        await asyncio.sleep(_LOOK_EVERY)


def _remove(path: Path) -> str | None:
    try:
        path.rmdir()
    except FileNotFoundError:
        return None
    except OSError as error:
        return error.strerror or str(error)
    return None


def stray_cgroups(runtime_dir: Path, known: frozenset[VmId]) -> list[Path]:
    """Control groups of this runtime folder's VMs that are not in `known`."""
    cgroups = find_cgroups()
    names = {jail_id(runtime_dir, vm_id) for vm_id in known}
    found = (cgroups.root / PARENT).glob(f"{agent_mark(runtime_dir)}-*") if cgroups else ()
    return sorted(path for path in found if path.name not in names)


def remove_parent_cgroup() -> None:
    """Removes the group above all VMs' if it is empty."""
    cgroups = find_cgroups()
    if cgroups is not None:
        _remove(cgroups.root / PARENT)


def own_tap(link: str, uid: int) -> None:
    """Lets a user open an existing tap. Raises AgentError, also when another process holds it."""
    try:
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", link.encode(), _TAP_FLAGS))
            fcntl.ioctl(fd, _TUNSETOWNER, uid)
        finally:
            os.close(fd)
    except OSError as error:
        raise AgentError(f"the tap {link} cannot be given to user {uid}: {error.strerror}") from error


def keep(source: Path, target: Path) -> None:
    """Keeps a file of an image as it is now under another name, by a hard link where that is possible. Raises OSError."""
    if target.exists():
        return
    temporary = target.with_name(f".{target.name}.new")
    temporary.unlink(missing_ok=True)
    _bring(source, temporary, None)
    temporary.rename(target)


def _bring(source: Path, target: Path, owner: int | None) -> None:
    facts = source.stat()
    if stat.S_ISBLK(facts.st_mode):
        os.mknod(target, stat.S_IFBLK | 0o600, facts.st_rdev)
    elif owner is not None:
        os.link(source, target)  # never a copy: what the guest writes must be on the VM's disk
    elif not facts.st_mode & stat.S_IROTH or not _linked(source, target):
        # A file for root alone cannot be read in the jail, and an image's mode is not ours to change.
        shutil.copyfile(source, target)
        target.chmod(0o444)
    if owner is not None:
        os.chown(target, owner, owner)


def _linked(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK):
            raise
        return False
    return True
