"""FreeBSD jails as machines, one keeper each. Called by the runtime, one call at a time per VM.

Every jail has a network stack of its own (vnet): sharing the host's would put its packets to other jails and to the host on
lo0, past every rule for guests. Its first process is jail-init beside this file, started by jexec(8): its pid is the VM's, its
exit status says how the VM ended. Parameters are given on the command line; no jail.conf(5) is read or written.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from pathlib import Path

from agent.engines.jail_root import MARKER, ROOT, JailRoots, images_in, write_inside
from agent.engines.keeper import PLAN, Plan
from agent.engines.kept import KeptEngine, ended_with, host_prefix, installed, uncut
from agent.errors import AgentError, CommandFailed, Unsupported
from agent.machine import DiskKind, Machine, Probe, Stopped, Unusable, Usable
from agent.run import run
from specs.names import Engine as EngineKind
from specs.names import VmId
from specs.wire import CreateVmReq

INIT = "var/db/muster/init"
_INIT_SCRIPT = Path(__file__).parent / "jail-init"
_USER_DATA = "var/db/muster/user-data"
_RULESET = "4"  # devfsrules_jail of /etc/defaults/devfs.rules: no disks, no memory, no host terminals
_PROCESSES = 4096
_MIB = 1024 * 1024
_LIMIT = 60.0  # seconds
_TOOLS = ("jail", "jls", "jexec", "ifconfig", "devfs", "mount", "umount", "rctl")
# Keys are of use only where sshd runs and lets root in with one.
_SSHD = b'sshd_enable="YES"\nsshd_flags="-o PermitRootLogin=prohibit-password"\n'


class JailEngine(KeptEngine):
    """The jail driver."""

    kind = EngineKind.JAIL
    needs_disk = False
    disk_kind: DiskKind = "any"

    def __init__(self, runtime_dir: Path, image_dir: Path) -> None:
        super().__init__(runtime_dir)
        self._image_dir = image_dir
        self._roots = JailRoots(image_dir, self._runtime_dir)
        self._limits = True
        self._pool_known = False

    async def probe(self) -> Probe:
        """Makes a jail with a network stack of its own and removes it; learns whether limits and disk sizes can be enforced."""
        missing = installed(*_TOOLS)
        if missing:
            return Unusable(f"{missing} not found: jails need a FreeBSD host, where they are part of the base system")
        if os.geteuid() != 0:
            return Unusable("jails need root; run the agent as root")
        trial = f"{host_prefix(self._runtime_dir)}probe{os.getpid()}"
        try:
            if not (await run("devfs", "rule", "-s", _RULESET, "show", limit=_LIMIT)).strip():
                return Unusable(f"devfs ruleset {_RULESET} is not loaded, jails would see every device: service devfs restart")
            self._limits = (await run("sysctl", "-n", "kern.racct.enable", limit=_LIMIT)).strip() == "1"
            await uncut(self._try(trial))
        except CommandFailed as error:
            return Unusable(f"this host does not run jails with their own network stack: {error.message}")
        await self._learn_pool()
        disks = f"ZFS {self._roots.dataset}" if self._roots.dataset else "copies"
        return Usable(f"vnet, roots: {disks}", () if self._limits else (_UNLIMITED,))

    async def _try(self, name: str) -> None:
        await run("jail", "-c", "-q", f"name={name}", "path=/", "vnet=new", "persist", limit=_LIMIT)
        await run("jail", "-q", "-R", name, limit=_LIMIT)

    async def _learn_pool(self) -> None:
        await self._roots.find_pool()
        self._pool_known = True

    async def images(self) -> tuple[str, ...]:
        """Userlands in the image directory: directories and archives."""
        return tuple(sorted(await asyncio.to_thread(images_in, self._image_dir)))

    def check(self, request: CreateVmReq) -> tuple[str, ...]:
        """Raises Unsupported for user data that is no script; warns of limits that this host does not enforce."""
        if request.user_data and not request.user_data.startswith("#!"):
            raise Unsupported("user_data of a jail must be a script that starts with #!: a jail has no cloud-init to read more")
        warnings = []
        if not self._limits:
            warnings.append(_UNLIMITED)
        if self._pool_known and not self._roots.dataset:
            warnings.append(
                f"disk: {request.disk} MiB is not enforced for this jail, because the runtime folder of its host is not on ZFS"
            )
        return tuple(warnings)

    async def prepare(self, machine: Machine) -> None:
        """Makes the root filesystem, with keys, resolvers and user data in it; a finished one is kept as its guest left it."""
        if await self._live(machine.id, machine.folder) is not None or self._is_prepared(machine.folder):
            return
        await uncut(self._prepare(machine))

    async def _prepare(self, machine: Machine) -> None:
        if not self._pool_known:
            await self._learn_pool()
        name, request = self.name_of(machine.id), machine.request
        root = await self._roots.make(machine.id, machine.folder, name, request.image, request.disk)
        await asyncio.to_thread(_furnish, root, machine)
        (machine.folder / MARKER).touch()

    def _is_prepared(self, folder: Path) -> bool:
        return (folder / MARKER).is_file()

    def _is_up(self, machine: Machine) -> bool:
        return True  # jexec(8) becomes the first process

    def _plan(self, machine: Machine) -> Plan:
        name, root = self.name_of(machine.id), machine.folder / ROOT
        return Plan(
            main=("jexec", name, "/bin/sh", f"/{INIT}"),
            load=jail_argvs(machine, name, root, limits=self._limits),
            clean=self._clean_argvs(name, root, machine.nic.link),
        )

    def _clean_argvs(self, name: str, root: Path, link: str = "") -> tuple[tuple[str, ...], ...]:
        return (
            # First: the interface of a dying jail comes back only when its last connection is forgotten.
            *((("ifconfig", link, "-vnet", name),) if link else ()),
            ("jail", "-q", "-R", name),
            ("umount", str(root / "dev")),
            *((("rctl", "-r", f"jail:{name}"),) if self._limits else ()),
        )

    async def _force_off(self, vm_id: VmId, folder: Path) -> None:
        await self._remove_stray(self.name_of(vm_id))

    async def _free(self, vm_id: VmId, folder: Path) -> None:
        if not (folder / PLAN).exists():
            return  # no keeper ever made anything
        name = self.name_of(vm_id)
        for argv in self._clean_argvs(name, folder / ROOT):
            with contextlib.suppress(CommandFailed):  # most often there is nothing to clean; what counts comes next
                await run(*argv, limit=_LIMIT)
        if name in await self._jails():
            raise AgentError(f"jail {name} of VM {vm_id} cannot be removed; look at it with `jls -v` and `ps -J {name}`")

    async def destroy(self, vm_id: VmId, folder: Path) -> None:
        """What every kept VM leaves, and the root filesystem."""
        await super().destroy(vm_id, folder)
        if not self._pool_known:
            await self._learn_pool()
        await self._roots.remove(folder, self.name_of(vm_id))

    def _ending(self, status: int, said: str) -> Stopped:
        if status == 0:
            return Stopped("exited", "the jail was powered off from inside")
        return Stopped("crashed", f"the first process of the jail {ended_with(status)}{said}")

    async def _jails(self) -> dict[str, Path]:
        listed = json.loads(await run("jls", "--libxo=json", "name", "path", limit=_LIMIT))
        return {each["name"]: Path(each["path"]) for each in listed["jail-information"]["jail"]}

    async def _strays(self) -> dict[str, VmId | None]:
        prefix = host_prefix(self._runtime_dir)
        return {
            name: VmId(path.parent.name) if path.parent.parent == self._runtime_dir else None
            for name, path in (await self._jails()).items()
            if name.startswith(prefix)
        }

    async def _remove_stray(self, name: str) -> None:
        path = (await self._jails()).get(name)
        if path is None:
            return
        for argv in self._clean_argvs(name, path):
            with contextlib.suppress(CommandFailed):
                await run(*argv, limit=_LIMIT)


_UNLIMITED = "cpu and mem are not enforced for jails of this host; set kern.racct.enable=1 in /boot/loader.conf and reboot it"


def jail_argvs(machine: Machine, name: str, root: Path, *, limits: bool) -> tuple[tuple[str, ...], ...]:
    """The commands that make a jail ready for its first process, in order. Raises AgentError without an interface for it."""
    nic, request = machine.nic, machine.request
    if nic.kind != "vnet":
        raise AgentError("a jail needs an interface of its own; run the agent as root with --network bridge")
    made = (
        *("jail", "-c", "-q", f"name={name}", f"path={root}", f"host.hostname={machine.hostname}"),
        *("vnet=new", f"vnet.interface={nic.link}"),
        *(f"devfs_ruleset={_RULESET}", "enforce_statfs=2", "allow.raw_sockets", "persist"),
    )
    rules = (f"memoryuse:deny={request.mem * _MIB}", f"pcpu:deny={request.cpu * 100}", f"maxproc:deny={_PROCESSES}")
    return (
        ("mount", "-t", "devfs", "-o", f"ruleset={_RULESET}", "devfs", str(root / "dev")),
        made,
        *(("rctl", "-a", f"jail:{name}:{rule}") for rule in rules if limits),
        ("jexec", name, "/sbin/ifconfig", "lo0", "inet", "127.0.0.1/8", "up"),
        ("jexec", name, "/sbin/ifconfig", nic.link, "inet", f"{nic.lease.ip}/{nic.subnet.prefixlen}", "up"),
        ("jexec", name, "/sbin/route", "-q", "add", "default", str(nic.gateway)),
    )


def _furnish(root: Path, machine: Machine) -> None:
    request = machine.request
    keys = "".join(f"{key}\n" for key in request.ssh_keys).encode()
    (root / "dev").mkdir(exist_ok=True)
    write_inside(root, INIT, _INIT_SCRIPT.read_bytes(), 0o755)
    write_inside(root, "etc/resolv.conf", "".join(f"nameserver {server}\n" for server in machine.nic.dns).encode(), 0o644)
    if keys:
        write_inside(root, "root/.ssh/authorized_keys", keys, 0o600)
        (root / "root" / ".ssh").chmod(0o700)
        write_inside(root, "etc/rc.conf.d/sshd", _SSHD, 0o644)
    if request.user_data:
        write_inside(root, _USER_DATA, request.user_data.encode(), 0o700)
