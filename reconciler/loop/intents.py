"""Records what people ask for. Every method returns once its change is durable; the loop does the rest."""

from __future__ import annotations

import asyncio
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import structlog

from reconciler.core.expand import EnvChange, expand, recreate
from reconciler.core.expiry import expired
from reconciler.core.model import Change, EnvIntent, HostIntent, VmIntent
from reconciler.fleet import Fleet, HostState, Load
from reconciler.loop.clock import Clock
from reconciler.loop.notes import note_replaced, told
from reconciler.loop.reconciler import Reconciler
from reconciler.store.database import Database
from specs.desired import NEVER, EnvSpec, canonical_env
from specs.names import EnvId, HostId, VmId

log = structlog.get_logger()


class IntentError(Exception):
    """A request that contradicts what is recorded; the message is for people."""


class NoSuch(IntentError):
    """The object is not recorded."""


class Clash(IntentError):
    """The object's present state forbids the request. `code` is a slug."""

    def __init__(self, message: str, code: str = "conflict") -> None:
        super().__init__(message)
        self.code = code


class StaleGeneration(IntentError):
    """If-Match names another generation than the recorded one."""


def make_vm_id(random_hex: Callable[[int], str]) -> VmId:
    """A new uid."""
    return VmId(f"vm-{random_hex(6)}")


class Intents:
    """The desired state, as requests change it. One change of an environment at a time."""

    def __init__(
        self, fleet: Fleet, store: Database, reconciler: Reconciler, new_vm_id: Callable[[], VmId], clock: Clock
    ) -> None:
        self._fleet = fleet
        self._store = store
        self._reconciler = reconciler
        self._new_vm_id = new_vm_id
        self._clock = clock
        self._registering: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def _commit(self, change: Change) -> None:
        if change != Change():
            await self._store.commit(change)
            self._fleet.apply(change)

    def env(self, env_id: str) -> EnvIntent:
        """The environment. Raises NoSuch."""
        env = self._fleet.envs.get(EnvId(env_id))
        if env is None:
            raise NoSuch(f"there is no environment {env_id}")
        return env

    def _live(self, env_id: EnvId) -> list[VmIntent]:
        return [vm for vm in self._fleet.env_vms(env_id) if vm.desired != "absent"]

    async def create_env(self, spec: EnvSpec) -> bool:
        """Records a new environment; False if the very same one is there. Raises Clash."""
        async with self._reconciler.env_locks[EnvId(spec.id)]:
            there = self._fleet.envs.get(EnvId(spec.id))
            if there is not None:
                self._refuse_if_deleting(there)
                if canonical_env(there.spec) != canonical_env(spec):
                    raise Clash(f"environment {spec.id} exists with a different spec; PUT replaces it", "exists")
                return False
            await self._put(spec, None)
            return True

    async def put_env(self, spec: EnvSpec, if_match: int | None = None) -> Literal["created", "changed", "same"]:
        """Records the environment as new or as a change of what is there. Raises Clash, StaleGeneration."""
        async with self._reconciler.env_locks[EnvId(spec.id)]:
            there = self._fleet.envs.get(EnvId(spec.id))
            if if_match is not None and if_match != (there.generation if there else 0):
                has = f"is at generation {there.generation}" if there else "does not exist"
                raise StaleGeneration(f"environment {spec.id} {has}, not at {if_match}")
            if there is not None:
                self._refuse_if_deleting(there)
                if canonical_env(there.spec) == canonical_env(spec):
                    return "same"
            await self._put(spec, there)
            return "changed" if there else "created"

    def preview(self, spec: EnvSpec) -> EnvChange:
        """What `put_env` would do, without doing it. Raises Clash."""
        there = self._fleet.envs.get(EnvId(spec.id))
        if there is not None:
            self._refuse_if_deleting(there)
        live = self._live(EnvId(spec.id))
        return expand(self._next(spec, there), live, self._new_vm_id, int(self._clock.wall()), max_replaced=len(live))

    def _next(self, spec: EnvSpec, there: EnvIntent | None) -> EnvIntent:
        now = int(self._clock.wall())
        expires_at = 0 if spec.lifetime == NEVER else now + spec.lifetime
        if there is None:
            return EnvIntent(
                id=EnvId(spec.id),
                spec=spec,
                power="running",
                generation=1,
                rolled=0,
                created_at=now,
                expires_at=expires_at,
            )
        if spec.lifetime == there.spec.lifetime:
            expires_at = there.expires_at
        return replace(there, spec=spec, generation=there.generation + 1, expires_at=expires_at)

    async def _put(self, spec: EnvSpec, there: EnvIntent | None) -> None:
        env = self._next(spec, there)
        live = self._live(env.id)
        settled = {vm.id for vm in live if self._fleet.status[vm.id].settled}
        plan = expand(env, live, self._new_vm_id, int(self._clock.wall()), settled=settled)
        if not plan.pending:
            env = replace(env, rolled=env.generation)
        await self._commit(Change(envs=(env,), vms=plan.put))
        self._fleet.note("Recorded", f"generation {env.generation} is recorded: {told(plan)}", env=env.id)
        note_replaced(self._fleet, plan.put, f"generation {env.generation} asks for another machine")
        log.info("environment recorded", env=env.id, generation=env.generation, vms=len(plan.plan))

    async def set_power(self, env_id: str, power: Literal["running", "stopped"]) -> None:
        """Records that the environment is to be stopped or to run. Raises NoSuch, Clash."""
        async with self._reconciler.env_locks[EnvId(env_id)]:
            env = self.env(env_id)
            self._refuse_if_deleting(env)
            changed = () if env.power == power else (replace(env, power=power),)
            vms = tuple(replace(vm, desired=power) for vm in self._live(env.id) if vm.desired != power)
            await self._commit(Change(envs=changed, vms=vms))
            if changed:
                wish = "run" if power == "running" else "be stopped"
                self._fleet.note("Recorded", f"environment {env_id} is to {wish}", env=env_id)

    async def delete_env(self, env_id: str) -> None:
        """Records that nothing of the environment may be left. Raises NoSuch."""
        async with self._reconciler.env_locks[EnvId(env_id)]:
            env = self.env(env_id)
            changed = () if env.deleting else (replace(env, deleting=True),)
            vms = tuple(replace(vm, desired="absent") for vm in self._live(env.id))
            await self._commit(Change(envs=changed, vms=vms))
            if changed:
                self._fleet.note("Recorded", f"environment {env_id} is to be deleted", env=env_id)

    async def recreate_lost(self, env_id: EnvId, host_id: HostId) -> None:
        """Records successors for the environment's VMs that a lost host keeps, if they are wanted to run."""
        async with self._reconciler.env_locks[env_id]:
            env = self._fleet.envs.get(env_id)
            if env is None or env.deleting or env.spec.on_host_loss != "recreate":
                return
            lost = [vm for vm in self._live(env_id) if vm.host_id == host_id and vm.desired == "running"]
            rows = recreate(env, lost, self._new_vm_id, int(self._clock.wall()))
            await self._commit(Change(vms=rows))
            if lost:
                message = (
                    f"host {host_id} is given up for lost by environment {env_id}, whose VMs there are made anew elsewhere"
                )
                self._fleet.note("HostLost", message, env=env_id, host=host_id)
            note_replaced(self._fleet, rows, f"host {host_id} is lost")
            for vm in lost:
                log.warning("vm recreated elsewhere", vm=vm.id, name=vm.name, env=env_id, host=host_id)

    async def set_cordon(self, host_id: str, cordoned: bool) -> None:
        """Records whether new VMs may be placed on the host; those there stay, and uncordoning ends a drain. Raises NoSuch."""
        async with self.host(host_id).lock:
            host = self.host(host_id)
            drain_total = host.intent.drain_total if cordoned else None
            if (host.intent.cordoned, host.intent.drain_total) == (cordoned, drain_total):
                return
            await self._commit(Change(hosts=(replace(host.intent, cordoned=cordoned, drain_total=drain_total),)))
            may = "gets no new VMs" if cordoned else "may get new VMs"
            self._fleet.note("Cordoned" if cordoned else "Uncordoned", f"host {host_id} {may}", host=host.shown_id)

    async def drain(self, host_id: str) -> None:
        """Records that the host's VMs are to be moved elsewhere, their disks lost, and no new ones placed. Raises NoSuch."""
        async with self.host(host_id).lock:
            host = self.host(host_id)
            if host.intent.drain_total is not None:
                return
            total = len(self._fleet.host_vms(host.intent.id)) if host.intent.id else 0
            await self._commit(Change(hosts=(replace(host.intent, cordoned=True, drain_total=total),)))
            message = f"host {host.shown_id} is being drained of {total} VMs; they are made anew elsewhere, without their disks"
            self._fleet.note("Draining", message, host=host.shown_id)

    async def expire_env(self, env_id: str) -> None:
        """Deletes the environment unless its lifetime has been changed, or it has gone, while this waited for its turn."""
        async with self._reconciler.env_locks[EnvId(env_id)]:
            env = self._fleet.envs.get(EnvId(env_id))
            if env is None or not expired((env,), int(self._clock.wall())):
                return
            vms = tuple(replace(vm, desired="absent") for vm in self._live(env.id))
            await self._commit(Change(envs=(replace(env, deleting=True),), vms=vms))
            self._fleet.note("Expired", f"the lifetime of environment {env_id} is over; it is being deleted", env=env_id)
            log.info("environment expired", env=env_id)

    async def extend(self, env_id: str, lifetime: int) -> EnvIntent:
        """Records that the environment lives `lifetime` seconds from now (NEVER: for good). Raises NoSuch, Clash."""
        async with self._reconciler.env_locks[EnvId(env_id)]:
            env = self.env(env_id)
            self._refuse_if_deleting(env)
            expires_at = 0 if lifetime == NEVER else int(self._clock.wall()) + lifetime
            env = replace(env, expires_at=expires_at)
            await self._commit(Change(envs=(env,)))
            until = f"ends {lifetime} s from now" if expires_at else "never ends"
            self._fleet.note("Recorded", f"the lifetime of environment {env_id} {until}", env=env_id)
            return env

    @staticmethod
    def _refuse_if_deleting(env: EnvIntent) -> None:
        if env.deleting:
            raise Clash(f"environment {env.id} is being deleted", "terminating")

    # ---- hosts

    def host(self, host_id: str) -> HostState:
        """A host by id or address. Raises NoSuch."""
        host = self._fleet.host(host_id)
        if host is None:
            raise NoSuch(f"there is no host {host_id}")
        return host

    async def add_host(self, addr: str, told_id: HostId | None) -> bool:
        """Registers a host; False if the address is registered. `told_id`: what its agent says, if it answers. Raises Clash."""
        async with self._registering[addr]:  # of two at once the later one would forget what the first has recorded
            if addr in self._fleet.hosts:
                return False
            other = self._fleet.host(told_id) if told_id else None
            if other is not None:
                raise Clash(f"host id {told_id} is registered under another address, {other.intent.addr}", "host_id_taken")
            await self._commit(Change(hosts=(HostIntent(addr, told_id, int(self._clock.wall())),)))
            self._fleet.note("HostRegistered", f"host {told_id or addr} is registered at {addr}", host=told_id or addr)
            return True

    async def remove_host(self, host_id: str) -> str:
        """Unregisters a host and returns its address. Raises NoSuch, Clash while VMs are placed there."""
        async with self.host(host_id).lock:
            host = self.host(host_id)
            load = self._fleet.load(host.intent.id) if host.intent.id else Load()  # placements on their way to the disk too
            if load.count:
                envs = ", ".join(sorted({vm.env_id for vm in self._fleet.host_vms(HostId(host.shown_id))})[:5])
                raise Clash(
                    f"host {host.shown_id} still has {load.count} VMs placed on it (of {envs or 'some just placed'})",
                    "host_in_use",
                )
            self._fleet.set_leaving(host, True)
            try:
                await self._commit(Change(drop_hosts=(host.intent.addr,)))
            except BaseException:
                self._fleet.set_leaving(host, False)
                raise
            self._fleet.note("HostRemoved", f"host {host.shown_id} is registered no more", host=host.shown_id)
            return host.intent.addr


def parse_if_match(value: str | None) -> int | None:
    """The generation in If-Match (RFC 9110 §13.1.1): `"3"`, an environment's ETag, or `*` for any. Raises ValueError."""
    if value is None or value.strip() == "*":
        return None
    match = re.fullmatch(r'\s*(?:W/)?"?(\d{1,18})(?:\.[^"]*)?"?\s*', value)
    if not match:
        raise ValueError('If-Match must be a generation such as "3"')
    return int(match[1])
