"""Docker networks that stand for our bridges: made on demand, removed with the last container. Called by the docker engine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from agent.engines.docker_cli import OWNER_LABEL, DockerCli, NetworkMissing, container_name, uncut
from agent.engines.docker_create import network_name, network_words
from agent.errors import AgentError
from agent.machine import Nic
from specs.names import VmId


class DockerNetworks:
    """The docker networks of one agent."""

    def __init__(self, cli: DockerCli, owner: str) -> None:
        self._cli = cli
        self._owner = owner
        self._lock = asyncio.Lock()
        self._users = 0

    @asynccontextmanager
    async def in_use(self, nic: Nic) -> AsyncIterator[None]:
        """Makes the nic's network if needed and keeps `remove_unused` from removing it while the block runs."""
        self._users += 1
        try:
            if nic.kind == "bridge":
                async with self._lock:
                    await uncut(self._ensure(nic))
            yield
        finally:
            self._users -= 1

    async def plug_again(self, vm_id: VmId, nic: Nic) -> None:
        """Connects a stopped container to a network of the same name that replaced the one it was made with."""
        name = container_name(vm_id)
        async with self.in_use(nic):
            with suppress(AgentError):
                await self._cli("network", "disconnect", "--force", network_name(nic.bridge), name)
            await self._cli("network", "connect", f"--ip={nic.lease.ip}", network_name(nic.bridge), name)

    async def remove_unused(self) -> tuple[str, ...]:
        """Removes this agent's docker networks once no container of it is left; the bridges stay. Returns their names."""
        removed: list[str] = []
        async with self._lock:
            if self._users or await self._cli("ps", "--all", "--quiet", "--filter", self._label):
                return ()
            listed = await self._cli("network", "ls", "--filter", self._label, "--format", "{{.Name}}")
            for name in listed.split():
                with suppress(NetworkMissing):
                    await self._cli("network", "rm", name)
                    removed.append(name)
        return tuple(removed)

    @property
    def _label(self) -> str:
        return f"label={OWNER_LABEL}={self._owner}"

    async def _ensure(self, nic: Nic) -> None:
        name = network_name(nic.bridge)
        wanted = (str(nic.subnet), str(nic.gateway))
        try:
            found = json.loads(await self._cli("network", "inspect", name))[0]
        except NetworkMissing:
            found = None
        if found is not None:
            if _subnet_of(found) == wanted:
                return
            if found.get("Containers") or found.get("containers"):
                raise AgentError(
                    f"docker network {name} has containers and the subnet {_subnet_of(found)[0]}, "
                    f"but the agent's is {wanted[0]}; delete those containers first"
                )
            await self._cli("network", "rm", name)
        version = await self._cli.version()
        await self._cli(*network_words(nic, self._owner, podman=version.podman))


def _subnet_of(found: dict[str, Any]) -> tuple[str, str]:
    """(subnet, gateway) out of `network inspect`, in docker's or podman's spelling; empty where it does not say."""
    for entry in found.get("subnets") or (found.get("IPAM") or {}).get("Config") or []:
        return str(entry.get("Subnet") or entry.get("subnet")), str(entry.get("Gateway") or entry.get("gateway"))
    return "", ""
