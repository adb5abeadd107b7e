"""VMs that a host has and the store has never heard of: shown and left alone until somebody adopts or destroys them by hand."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable

import structlog

from reconciler.agents import AgentClient, AgentFailure
from reconciler.core.adopt import NO_ENV, CannotAdopt, adopt, condemned, obstacle
from reconciler.core.model import Change
from reconciler.fleet import Fleet, HostState
from reconciler.loop.clock import Clock
from reconciler.loop.intents import Clash, NoSuch
from reconciler.store.database import Database
from specs.names import EnvId, HostId, VmId
from specs.wire import AgentVm

log = structlog.get_logger()


class Quarantine:
    """What people do with unknown VMs. Every method returns once its change is durable."""

    def __init__(
        self,
        fleet: Fleet,
        store: Database,
        env_locks: defaultdict[EnvId, asyncio.Lock],
        client: Callable[[str], AgentClient | None],
        clock: Clock,
    ) -> None:
        self._fleet = fleet
        self._store = store
        self._env_locks = env_locks
        self._client = client
        self._clock = clock
        self._judging = asyncio.Lock()
        """Held while a verdict is being committed: a VM that somebody adopts must not be destroyed by another at once."""

    def unknown(self, host_id: str) -> list[tuple[AgentVm, str]]:
        """What the host reported last and nobody recorded, each with why it cannot be had from here, "" if it can."""
        return [(vm, obstacle(vm, self._fleet.cluster)) for vm in self._fleet.strangers(self._host(host_id))]

    async def adopt(self, host_id: str, vm_id: str, env_id: str, name: str | None) -> None:
        """Records the VM as part of an environment, new or not; it runs on. Raises NoSuch, Clash, StoreUnavailable."""
        host = self._host(host_id)
        self._find(host, vm_id)
        client = self._client(host.intent.addr)
        if client is None or not host.online or host.intent.id is None:
            raise Clash(f"host {host.shown_id} is offline: {host.why}; whether it still has VM {vm_id} is not known", "offline")
        try:
            request = await client.spec(VmId(vm_id))
        except AgentFailure as error:
            raise Clash(f"host {host.shown_id} does not tell what VM {vm_id} is: {error}", "offline") from error
        async with self._env_locks[EnvId(env_id)], self._judging:
            fleet = self._fleet
            vm = self._find(host, vm_id)
            self._check_room(host, vm)
            try:
                env, intent = adopt(
                    vm,
                    request,
                    fleet.envs.get(EnvId(env_id)),
                    env_id=EnvId(env_id),
                    name=name,
                    taken={other.name for other in fleet.env_vms(EnvId(env_id)) if other.desired != "absent"},
                    host_id=HostId(host.shown_id),
                    cluster=fleet.cluster,
                    now=int(self._clock.wall()),
                )
            except CannotAdopt as error:
                raise Clash(str(error), error.code) from None
            change = Change(envs=(env,), vms=(intent,), placed=((intent.id, HostId(host.shown_id)),))
            await self._store.commit(change)
            fleet.apply(change)
            fleet.note("Adopted", f"found on host {host.shown_id} and made part of environment {env_id}", vm=intent)
            log.info("vm adopted", vm=vm_id, host=host.shown_id, env=env_id)

    async def destroy(self, host_id: str, vm_id: str) -> None:
        """Records that nothing of the VM may be left; asked again, it changes nothing. Raises NoSuch, Clash."""
        async with self._judging:
            host = self._host(host_id)
            known = self._fleet.vms.get(VmId(vm_id))
            if known is not None and known.env_id == NO_ENV and known.host_id == host.intent.id:
                return
            vm = self._find(host, vm_id)
            if why := obstacle(vm, self._fleet.cluster):
                raise Clash(why, "foreign_vm")
            intent = condemned(vm, HostId(host.shown_id), int(self._clock.wall()))
            change = Change(vms=(intent,), placed=((intent.id, HostId(host.shown_id)),))
            await self._store.commit(change)
            self._fleet.apply(change)
        self._fleet.note("UnknownVmDestroyed", f"host {host.shown_id} is to destroy it; nobody recorded it", vm=intent)
        log.info("unknown vm condemned", vm=vm_id, host=host.shown_id)

    def _host(self, host_id: str) -> HostState:
        host = self._fleet.host(host_id)
        if host is None:
            raise NoSuch(f"there is no host {host_id}")
        return host

    def _find(self, host: HostState, vm_id: str) -> AgentVm:
        known = self._fleet.vms.get(VmId(vm_id))
        if known is not None:
            whose = f"environment {known.env_id}" if known.env_id else "those that are being destroyed by hand"
            raise Clash(f"VM {vm_id} is not unknown: it is one of {whose}", "known_vm")
        vm = host.vms.get(VmId(vm_id))
        if vm is None:
            raise NoSuch(f"host {host.shown_id} has no VM {vm_id}")
        return vm

    def _check_room(self, host: HostState, vm: AgentVm) -> None:
        load = self._fleet.load(HostId(host.shown_id))
        total = host.info.resource if host.info else None
        if total is None:
            return
        fits = (
            load.cpu + vm.cpu <= total.cpu_total
            and load.mem + vm.mem <= total.mem_total
            and load.disk + vm.disk <= total.disk_total
        )
        if not fits:
            raise Clash(f"host {host.shown_id} has no room for VM {vm.id} beside what is placed there already", "no_room")
