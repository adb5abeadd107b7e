"""What happens by the clock alone: lifetimes end, old tombstones are dropped, everything is looked at again now and then."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from reconciler.core.expiry import clock_jumped, expired
from reconciler.core.model import Change
from reconciler.fleet import Fleet
from reconciler.loop.clock import Clock
from reconciler.store.database import Database, StoreUnavailable
from specs.names import EnvId, HostId

log = structlog.get_logger()

EXPIRY_EVERY = 1.0  # seconds
RESYNC_EVERY = 300.0
EVENTS_EVERY = 5.0  # seconds; what a kill may cost of the events, and nothing else
TOMBSTONES_KEPT = 86400  # seconds; a create may be that late


async def expire_forever(fleet: Fleet, expire_env: Callable[[EnvId], Awaitable[None]], clock: Clock) -> None:
    """Has environments deleted whose lifetime is over; pauses for one resync when the wall clock jumps ahead."""
    wall, monotonic = clock.wall(), clock.monotonic()
    paused_until = 0.0
    while True:
        await asyncio.sleep(EXPIRY_EVERY)
        before_wall, before_monotonic = wall, monotonic
        wall, monotonic = clock.wall(), clock.monotonic()
        if clock_jumped(wall - before_wall, monotonic - before_monotonic):
            paused_until = monotonic + RESYNC_EVERY
            log.warning("the clock jumped ahead: no environment expires for now", seconds=RESYNC_EVERY)
            fleet.note("ClockJumped", f"the clock jumped ahead: no environment expires for {RESYNC_EVERY:.0f} s")
        if monotonic < paused_until:
            continue
        for env_id in expired(fleet.envs.values(), int(wall)):
            try:
                await expire_env(env_id)
            except StoreUnavailable as error:
                log.warning("expiry waits for the store", env=env_id, error=str(error))


async def recreate_forever(
    fleet: Fleet, recreate_lost: Callable[[EnvId, HostId], Awaitable[None]], clock: Clock, grace: float
) -> None:
    """Once a host has been offline for `grace` seconds, has the VMs that ask for it made anew elsewhere."""
    while True:
        await asyncio.sleep(EXPIRY_EVERY)
        now = clock.monotonic()
        for host in list(fleet.hosts.values()):
            if host.intent.id is None or host.offline_since is None or now - host.offline_since < grace:
                continue
            concerned = {vm.env_id for vm in fleet.host_vms(host.intent.id) if vm.desired == "running"}
            for env_id in sorted(concerned):
                try:
                    await recreate_lost(env_id, host.intent.id)
                except StoreUnavailable as error:
                    log.warning("recreation waits for the store", env=env_id, error=str(error))


async def keep_events_forever(fleet: Fleet, store: Database) -> None:
    """Writes new events in batches, apart from what people and the loop wait for."""
    while True:
        await asyncio.sleep(EVENTS_EVERY)
        await save_events(fleet, store)


async def save_events(fleet: Fleet, store: Database) -> None:
    """Writes what is unsaved of the log of events; what the store refuses stays unsaved."""
    events, dropped = fleet.events.take_unsaved()
    if not events and not dropped:
        return
    try:
        await store.commit(Change(events=events, drop_events=dropped))
    except StoreUnavailable as error:
        fleet.events.put_back(events, dropped)
        log.warning("events wait for the store", events=len(events), error=str(error))


async def resync_forever(fleet: Fleet, store: Database, clock: Clock) -> None:
    """Looks at every VM again, so that a lost wake-up costs latency only, and drops tombstones that have been kept enough."""
    while True:
        await asyncio.sleep(RESYNC_EVERY)
        limit = int(clock.wall()) - TOMBSTONES_KEPT
        old = tuple(vm.id for vm in fleet.vms.values() if 0 < vm.gone_at < limit)
        if old:
            try:
                change = Change(drop_vms=old)
                await store.commit(change)
                fleet.apply(change)
            except StoreUnavailable as error:
                log.warning("tombstones kept for want of the store", error=str(error))
        for vm_id in list(fleet.vms):
            fleet.wake(vm_id)
