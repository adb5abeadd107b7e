"""Containers through the docker or podman command line. Made by the composition root, called by the runtime alone.

A VM's container is `muster-<vm_id>`, labelled with its agent: several agents may share a daemon. In the VM's folder
`docker.id` holds the id of the container that `prepare` finished, `docker.stop-asked` says that a stop was asked for.
"""

from __future__ import annotations

import contextlib
import math
from datetime import timedelta
from hashlib import sha256
from pathlib import Path

from agent.engines.base import OnExit
from agent.engines.docker_cli import (
    OWNER_LABEL,
    VM_LABEL,
    Container,
    ContainerMissing,
    DockerCli,
    NetworkMissing,
    container_name,
    uncut,
)
from agent.engines.docker_create import MIN_MEM_MIB, create_words, keys_archive
from agent.engines.docker_events import EventStream
from agent.engines.docker_network import DockerNetworks
from agent.engines.docker_probe import find_facts
from agent.engines.docker_states import StateReader
from agent.errors import AgentError, Conflict, Unsupported
from agent.machine import DiskKind, EngineState, Machine, Probe, Running, Stopped, Unusable, Usable
from specs.names import Engine, VmId
from specs.wire import CreateVmReq

_PREPARED = "docker.id"
_LOG_LINES = 1000  # as many as may be asked for; the daemon splits a line after 16 KiB
_STOP_ASKED = "docker.stop-asked"
_START_LIMIT = 120.0  # seconds
_STOP_MARGIN = 30.0  # seconds beyond the grace time until a daemon that does not manage to kill is given up


def owner_of(runtime_dir: Path) -> str:
    """The tag by which an agent knows its containers: it depends on where its records are, not on the process."""
    return sha256(str(runtime_dir.resolve()).encode()).hexdigest()[:16]


class DockerEngine:
    """Engine driver for containers. `argv` is the command with its global options, `("podman",)` for podman."""

    kind = Engine.DOCKER
    needs_disk = False
    disk_kind: DiskKind = "any"

    def __init__(self, runtime_dir: Path, argv: tuple[str, ...] = ("docker",), owner: str = "") -> None:
        self.on_exit: OnExit = lambda _vm_id: None
        self.owner = owner or owner_of(runtime_dir)
        self._cli = DockerCli(argv)
        self._networks = DockerNetworks(self._cli, self.owner)
        self._reader = StateReader(self._cli)
        self._known: set[VmId] = set()
        self._events = EventStream(
            self._cli,
            self.owner,
            look_at=self._look_at,
            look_at_all=self._look_at_all,
        )
        self._quota = False
        self._quota_why = "its storage was not asked for quotas yet"

    async def probe(self) -> Probe:
        """Runs an empty container with the limits a VM gets, and learns whether disks can be limited."""
        try:
            facts = await find_facts(self._cli, self.owner)
        except AgentError as error:
            return Unusable(error.message)
        self._quota, self._quota_why = facts.quota, facts.quota_why
        detail = facts.detail if facts.ran else f"{facts.detail}; running a container was not tried on this processor"
        return Usable(detail, facts.warnings)

    async def images(self) -> tuple[str, ...]:
        """Every way to name an image that is here: `repo:tag`, `repo` for the tag `latest`, and both with `@digest`."""
        listed = await self._cli("image", "ls", "--digests", "--format", "{{.Repository}}\t{{.Tag}}\t{{.Digest}}")
        names: set[str] = set()
        for line in listed.splitlines():
            names.update(_names_of(*line.split("\t")))
        return tuple(sorted(names))

    def check(self, request: CreateVmReq) -> tuple[str, ...]:
        """Raises Unsupported for user_data (nothing in a container would run it) and for less memory than Docker takes."""
        if request.user_data:
            raise Unsupported(
                "user_data needs an image with cloud-init, which containers do not have; build what it does into the image"
            )
        if request.mem < MIN_MEM_MIB:
            raise Unsupported(f"mem is {request.mem} MiB, but a container needs at least {MIN_MEM_MIB} MiB")
        if self._quota:
            return ()
        return (f"disk: {request.disk} MiB is not enforced for this container, because {self._quota_why}",)

    async def prepare(self, machine: Machine) -> None:
        """Creates the container with its keys, not started. Raises ImageMissing, Unsupported, Conflict, AgentError."""
        self._events.ensure()
        self._known.add(machine.id)
        found = await self._reader.read(machine.id)
        if found is not None:
            if found.owner != self.owner:
                raise Conflict(f"the container {found.name} belongs to another agent; remove it there", "foreign_vm")
            # A container that ran once was complete, and holds the guest's data: never made anew.
            if found.status != "created" or found.id == _read(machine.folder / _PREPARED):
                return
            await self._remove(found)
        await uncut(self._cli.version())
        words = create_words(machine, self.owner, quota=self._quota)
        async with self._networks.in_use(machine.nic):
            container_id = (await uncut(self._cli(*words))).split()[-1]
        keys = machine.request.ssh_keys
        if keys:
            await uncut(self._cli("cp", "-", f"{container_name(machine.id)}:/", stdin=keys_archive(keys)))
        _write(machine.folder / _PREPARED, container_id)

    async def start(self, machine: Machine) -> None:
        """Starts the container again with the same filesystem; one that runs already is left alone."""
        self._events.ensure()
        self._known.add(machine.id)
        (machine.folder / _STOP_ASKED).unlink(missing_ok=True)
        name = container_name(machine.id)
        try:
            await self._cli("start", name, limit=_START_LIMIT)
        except NetworkMissing:
            if machine.nic.kind != "bridge":
                raise
            await self._networks.plug_again(machine.id, machine.nic)
            await self._cli("start", name, limit=_START_LIMIT)

    async def stop(self, machine: Machine, grace: timedelta) -> None:
        """The image's stop signal (SIGTERM), then SIGKILL after `grace`, rounded up to seconds."""
        found = await self._reader.read(machine.id)
        if found is None or found.owner != self.owner:
            return
        _write(machine.folder / _STOP_ASKED, "")
        seconds = max(0, math.ceil(grace.total_seconds()))
        with contextlib.suppress(ContainerMissing):
            await self._cli("stop", f"--time={seconds}", found.id, limit=seconds + _STOP_MARGIN)

    async def destroy(self, vm_id: VmId, folder: Path) -> None:
        """Removes the container with its anonymous volumes; the docker network too when it was the last one."""
        found = await self._reader.read(vm_id)
        # The name may be another agent's on a shared daemon; what is not labelled as ours is not touched.
        if found is not None and found.owner == self.owner:
            await self._remove(found)
        self._known.discard(vm_id)
        for name in (_PREPARED, _STOP_ASKED):
            (folder / name).unlink(missing_ok=True)
            _unfinished(folder / name).unlink(missing_ok=True)
        await self._networks.remove_unused()

    async def state(self, vm_id: VmId, folder: Path) -> EngineState | None:
        """Asks the daemon; concurrent calls share one question. Raises DaemonDown (an AgentError) when it is silent."""
        self._events.ensure()
        found = await self._reader.read(vm_id)
        if found is None or found.owner != self.owner:
            return None
        self._known.add(vm_id)
        return state_of(found, stop_asked=(folder / _STOP_ASKED).exists())

    async def console(self, vm_id: VmId, folder: Path, limit: int) -> bytes:
        """The end of what the daemon kept of the container's output and errors."""
        try:
            said = await self._cli("logs", "--tail", str(_LOG_LINES), container_name(vm_id), merged=True)
        except ContainerMissing:
            return b""
        return said.encode()[-limit:]

    async def leftovers(self, known: frozenset[VmId]) -> tuple[str, ...]:
        """Removes this agent's containers of unknown VMs, and its docker networks when nothing uses them."""
        label = f"label={OWNER_LABEL}={self.owner}"
        columns = f'{{{{.ID}}}}\t{{{{.Names}}}}\t{{{{.Label "{VM_LABEL}"}}}}'
        listed = await self._cli("ps", "--all", "--no-trunc", "--filter", label, "--format", columns)
        removed = []
        for line in listed.splitlines():
            container_id, name, vm_id = line.split("\t")
            if VmId(vm_id) not in known:
                with contextlib.suppress(ContainerMissing):
                    await self._cli("rm", "--force", "--volumes", container_id)
                removed.append(f"container {name}")
        return (*removed, *(f"docker network {name}" for name in await self._networks.remove_unused()))

    async def close(self) -> None:
        """Ends the event stream. Containers keep running."""
        await self._events.close()
        await self._reader.close()

    def _look_at(self, vm_id: VmId) -> None:
        self.on_exit(vm_id)  # looked up now: the runtime sets it after this engine is made

    def _look_at_all(self) -> None:
        for vm_id in tuple(self._known):
            self.on_exit(vm_id)

    async def _remove(self, container: Container) -> None:
        try:
            await self._cli("rm", "--force", "--volumes", container.id)
        except ContainerMissing:
            return
        except AgentError:
            # Somebody else is removing it already, or it is stuck: only its absence counts.
            if container.name in await self._cli.inspect(container.name):
                raise


def state_of(container: Container, *, stop_asked: bool) -> EngineState:
    """What a container's state means for its VM."""
    if container.alive:
        return Running(container.pid)
    if container.status == "created":
        return Stopped("crashed", f"did not start: {container.error}") if container.error else Stopped()
    if stop_asked:
        return Stopped()
    if container.oom_killed:
        return Stopped("crashed", f"killed by the kernel: it used up its {container.mem_mib} MiB of memory")
    if container.exit_code == 0 and not container.error:
        return Stopped("exited", "its main program ended with status 0")
    why = f"its main program ended with status {container.exit_code}"
    if container.exit_code > 128:
        why += f" (signal {container.exit_code - 128})"
    return Stopped("crashed", f"{why}: {container.error}" if container.error else why)


def _names_of(repository: str, tag: str, digest: str) -> set[str]:
    if repository == "<none>":
        return set()
    # podman shows short names in full; specs use the short ones with both.
    short = repository.removeprefix("localhost/").removeprefix("docker.io/library/").removeprefix("docker.io/")
    names: set[str] = set()
    for base in {repository, short}:
        tagged = {f"{base}:{tag}"} if tag != "<none>" else set()
        if tag == "latest":
            tagged.add(base)
        names |= tagged
        if digest not in ("", "<none>"):
            names |= {f"{name}@{digest}" for name in {base, *tagged}}
    return names


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        return ""


def _write(path: Path, text: str) -> None:
    new = _unfinished(path)
    new.write_text(text)
    new.replace(path)


def _unfinished(path: Path) -> Path:
    return path.with_name(path.name + ".new")
