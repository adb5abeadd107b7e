"""The docker (or podman) command line as a typed thing. Called by the docker engine's files; knows nothing of VMs' life.

stderr is turned into typed errors here and nowhere else, so that the engine never compares texts.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import Awaitable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from agent.errors import AgentError, CommandFailed, DoesNotFit, ImageMissing, NoConsole, NotFound
from agent.run import run
from specs.names import VmId

T = TypeVar("T")

OWNER_LABEL = "muster.agent"
VM_LABEL = "muster.vm"
ENV_LABEL = "muster.env"

_LIMIT = 60.0  # seconds


class DaemonDown(AgentError):
    """The daemon does not answer, so nothing is known of its containers."""

    code = "engine_unavailable"


class ContainerMissing(NotFound):
    """The daemon has no container of that name."""


class NetworkMissing(AgentError):
    """A container refers to a docker network that is not there (any more)."""


def container_name(vm_id: VmId) -> str:
    """The name of a VM's container; fits Docker's `[a-zA-Z0-9][a-zA-Z0-9_.-]+` for every VM id."""
    return f"muster-{vm_id}"


@dataclass(frozen=True, slots=True)
class Container:
    """What `inspect` says of one container. `status` in Docker's words: created, running, paused, exited, dead, …"""

    id: str
    name: str
    owner: str
    status: str
    pid: int
    exit_code: int
    oom_killed: bool
    error: str
    mem_mib: int

    @property
    def alive(self) -> bool:
        """Its first process exists; a paused one does too."""
        return self.pid > 0 and self.status in ("running", "paused", "restarting", "stopping")

    @classmethod
    def parse(cls, raw: dict[str, Any]) -> Container:
        """Reads one element of `inspect`'s array (docker and podman agree on these fields)."""
        state, config = raw.get("State") or {}, raw.get("Config") or {}
        return cls(
            id=str(raw["Id"]),
            name=str(raw["Name"]).removeprefix("/"),
            owner=(config.get("Labels") or {}).get(OWNER_LABEL, ""),
            status=str(state.get("Status", "")),
            pid=int(state.get("Pid") or 0),
            exit_code=int(state.get("ExitCode") or 0),
            oom_killed=bool(state.get("OOMKilled")),
            error=str(state.get("Error") or ""),
            mem_mib=int((raw.get("HostConfig") or {}).get("Memory") or 0) >> 20,
        )


@dataclass(frozen=True, slots=True)
class Version:
    """Which command line talks to which API. `api` is (0, 0) for podman, which has no daemon."""

    podman: bool
    client: tuple[int, ...]
    api: tuple[int, ...]

    @property
    def can_set_mac(self) -> bool:
        """Clients from 25 on refuse `--mac-address` with a daemon older than API 1.44, though the daemon could do it."""
        return self.podman or self.client < (25,) or self.api >= (1, 44)


class DockerCli:
    """Runs `argv + words`. `argv` may carry global options: `("docker", "-H", "unix:///run/x.sock")`."""

    def __init__(self, argv: tuple[str, ...]) -> None:
        self.argv = argv
        self._version: Version | None = None

    async def __call__(self, *words: str, stdin: bytes | None = None, limit: float = _LIMIT, merged: bool = False) -> str:
        """Standard output, `merged` with the errors. Raises the errors of this file, of agent/errors.py, or CommandFailed."""
        try:
            return await run(*self.argv, *words, stdin=stdin, limit=limit, merged=merged)
        except CommandFailed as error:
            raise typed_failure(error) from error

    async def version(self) -> Version:
        """Asks once per process; picks another `docker` of PATH when the first cannot set addresses with this daemon."""
        if self._version is None:
            first = await _version(self.argv)
            self._version = first
            for other in () if first.can_set_mac else _other_clients(self.argv):
                version = await _version(other)
                if version.can_set_mac:
                    self.argv, self._version = other, version
                    break
        return self._version

    async def inspect(self, *names: str) -> dict[str, Container]:
        """The containers of these names that exist, by name, in one or two commands whatever their number."""
        if len(names) == 1:
            try:
                return _parse(await self("container", "inspect", names[0]))
            except ContainerMissing:
                return {}
        for _ in range(5):
            listed = (await self("ps", "--all", "--format", "{{.Names}}", "--filter", "name=muster-", limit=30)).split()
            present = [name for name in names if name in set(listed)]
            if not present:
                return {}
            try:
                return _parse(await self("container", "inspect", *present))
            except ContainerMissing:
                continue  # one was removed between the two commands
        raise AgentError("docker's list of containers kept changing while it was read; ask again")


async def uncut(step: Awaitable[T]) -> T:
    """Awaits `step` to its end even if the caller is cancelled meanwhile (the cancellation follows then).

    A daemon finishes what a killed command asked for: a container would appear after `destroy` had looked for it.
    """
    task = asyncio.ensure_future(step)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        if not task.cancelled():
            task.exception()
        raise


def typed_failure(error: CommandFailed) -> AgentError:
    """Turns a failed docker or podman command into the error that says what to do; anything unknown stays as it is."""
    text = " ".join(error.stderr.split())
    for pattern, kind, advice in _FAILURES:
        if re.search(pattern, text, re.IGNORECASE):
            detail = text.removeprefix("Error response from daemon: ")[:600]
            return kind(advice.format(detail=detail, host=os.environ.get("DOCKER_HOST", "the default socket")))
    return error


_FAILURES: tuple[tuple[str, type[AgentError], str], ...] = (
    (
        r"cannot connect to the docker daemon|error during connect|is the docker daemon running|dial unix"
        r"|permission denied while|failed to connect to the docker api",
        DaemonDown,
        "the docker daemon does not answer ({detail}); start it (ops/dockerd, or systemctl start docker)",
    ),
    (
        r"no such image|unable to find image|image not known|pull access denied|initializing source|manifest unknown",
        ImageMissing,
        "the image is not on this host and is never pulled implicitly ({detail}); "
        "bring it with `docker pull`, `docker load` or `muster image build`",
    ),
    (r"no such container|no such object: muster-|no container with name", ContainerMissing, "{detail}"),
    (
        r"logging driver does not support reading",
        NoConsole,
        "the container's output is not kept by its daemon ({detail}); let the daemon use the log driver json-file or local",
    ),
    (r"network \S+ not found|no such network|could not find bridge|unable to find network", NetworkMissing, "{detail}"),
    (
        r"port is already allocated|bind: address already in use|rootlessport listen",
        DoesNotFit,
        "a host port of this container is in use by something else on the host: {detail}",
    ),
    (
        r"address already in use|requested (ip )?address .* (already|in use)|ip address .* already allocated",
        DoesNotFit,
        "the container's address is held by another container on the same docker network: {detail}; "
        "see `docker network inspect`, and remove the container that has it",
    ),
    (
        r"pool overlaps|subnet .* (is )?already used|conflicts with network",
        AgentError,
        "another docker network already has this subnet: {detail}; "
        "remove it (`docker network ls`, `docker network rm`) or give the agent another --subnet",
    ),
    (r"no space left on device", DoesNotFit, "the disk that holds containers is full: {detail}"),
    (
        r"specify mac-address per network.? requires",
        AgentError,
        "this docker client is too new for its daemon ({detail}); install the client that came with the daemon",
    ),
)


def _parse(text: str) -> dict[str, Container]:
    found = [Container.parse(raw) for raw in json.loads(text)]
    return {container.name: container for container in found}


async def _version(argv: tuple[str, ...]) -> Version:
    client = await run(*argv, "--version", limit=20)
    numbers = _numbers(client)
    if "podman" in client.lower():
        return Version(podman=True, client=numbers, api=(0, 0))
    try:
        api = await run(*argv, "version", "--format", "{{.Server.APIVersion}}", limit=20)
    except CommandFailed as error:
        raise typed_failure(error) from error
    return Version(podman=False, client=numbers, api=_numbers(api))


def _numbers(text: str) -> tuple[int, ...]:
    found = re.search(r"[0-9]+(?:\.[0-9]+)+", text)
    return tuple(map(int, found[0].split("."))) if found else (0,)


def _other_clients(argv: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The same words with every other program of that name on PATH."""
    if "/" in argv[0]:
        return []
    folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
    found = [Path(folder) / argv[0] for folder in folders if folder]
    programs = dict.fromkeys(path.resolve() for path in found if path.is_file() and os.access(path, os.X_OK))
    return [(str(program), *argv[1:]) for program in list(programs)[1:]]
