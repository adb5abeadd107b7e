"""Is reality what was asked for? Compares what is recorded with what is on the hosts, and with nothing anybody reports."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING

from reconciler.core.model import VmIntent
from reconciler.fleet import Fleet
from reconciler.loop.timers import RESYNC_EVERY
from specs.names import VmId
from tests.sim.host import Host
from tests.sim.loop import Process
from tests.sim.store import Mirror

if TYPE_CHECKING:
    from tests.sim.world import World

REST = 22.0  # seconds nothing may be about to happen by itself before a fleet counts as settled


def unsettled(world: World, rest: float = REST) -> str:
    """The first thing that is not as it should be or will not be for `rest` seconds, or "".

    Until the cure nothing is asked of poison and of dead hosts.
    """
    serving = world.serving()
    if serving is None or serving.controller is None:
        return "no controller serves"
    mirror = serving.disk.mirror
    sick = {host.name for host in world.hosts if not host.powered}
    excepting = {vm.id for vm in mirror.vms.values() if vm.host_id in sick or _is_poison(world, vm)}
    return (
        _envs_unsettled(world, mirror, excepting, rest)
        or _vms_unsettled(world, mirror, excepting)
        or _drains_unsettled(world, mirror)
        or _still_under_way(world, serving.controller.fleet, serving.process, mirror, excepting)
        or next(filter(None, (_leftovers(world, host, mirror.vms, excepting) for host in world.hosts if host.powered)), "")
    )


def _is_poison(world: World, vm: VmIntent) -> bool:
    return vm.spec.image == "poison" and not world.is_cured


def _envs_unsettled(world: World, mirror: Mirror, excepting: AbstractSet[VmId], rest: float) -> str:
    # One VM that cannot be had holds up the roll-out and the end of its own environment, as it should.
    held = {mirror.vms[vm_id].env_id for vm_id in excepting}
    waiting = held | {vm.env_id for vm in mirror.vms.values() if _has_no_room(world, mirror, vm)}
    for env in mirror.envs.values():
        if env.deleting:
            if env.id not in held:
                return f"environment {env.id} is still being deleted"
        elif 0 < env.expires_at <= world.wall() + rest and not _is_held(world, env.expires_at):
            return f"environment {env.id} is about to expire"
        elif env.rolled != env.generation and env.id not in waiting:
            return f"environment {env.id} has rolled out generation {env.rolled} of {env.generation}"
    return ""


def _vms_unsettled(world: World, mirror: Mirror, excepting: AbstractSet[VmId]) -> str:
    hosts = {host.name: host for host in world.hosts}
    for vm in mirror.vms.values():
        if not vm.gone_at and vm.id not in excepting:
            why = _vm_unsettled(world, mirror, vm, hosts)
            if why:
                return f"{vm.env_id}/{vm.name} {vm.id}: {why}"
    return ""


def _drains_unsettled(world: World, mirror: Mirror) -> str:
    """Before the cure a VM that cannot be had holds up the drain of its environment, as it holds up the roll-out."""
    if not world.is_cured:
        return ""
    waiting = {vm.env_id for vm in mirror.vms.values() if _has_no_room(world, mirror, vm)}
    draining = {host.id for host in mirror.hosts.values() if host.id is not None and host.drain_total is not None}
    for vm in mirror.vms.values():
        is_to_leave = vm.host_id in draining and not vm.gone_at and vm.env_id not in waiting
        if is_to_leave and any(_fits(mirror, vm, host) for host in world.hosts):
            return f"VM {vm.id} is still on {vm.host_id}, which is being drained"
    return ""


def _still_under_way(world: World, fleet: Fleet, process: Process, mirror: Mirror, excepting: AbstractSet[VmId]) -> str:
    if world.checks.calls_under_way(process) or world.network.under_way or world.users.pending:
        return "a call is still under way"
    for agent in world.agents.values():
        if agent.process.alive and (world.network.is_served(agent) or agent.is_busy(excepting)):
            return f"the agent of {agent.host.name} is still at work"
    for vm in mirror.vms.values():
        if not vm.gone_at and vm.host_id and vm.id not in excepting and not fleet.status[vm.id].settled:
            return f"the controller does not take {vm.id} to be settled: {fleet.status[vm.id].message}"
    for state in fleet.hosts.values():
        mine = [mirror.vms[vm_id] for vm_id in state.vms if vm_id in mirror.vms]
        ghosts = [vm.id for vm in mine if vm.gone_at and vm.host_id == state.intent.id]
        if ghosts and state.online:
            return f"{ghosts[0]} is still taken to be on {state.shown_id}"
    return ""


def _is_held(world: World, expires_at: int) -> bool:
    """Whether expiry pauses, as it does for one resync after the clock has jumped ahead, and goes on doing so for a while."""
    return expires_at < world.wall() - 2.0 and world.loop.now + REST < world.jumped_ahead_at + RESYNC_EVERY


def _vm_unsettled(world: World, mirror: Mirror, vm: VmIntent, hosts: dict[str, Host]) -> str:
    if vm.desired == "absent":
        return f"is still to be removed from {vm.host_id}"
    if vm.host_id is None:
        if vm.desired == "stopped":
            return ""
        roomy = [host.name for host in hosts.values() if _fits(mirror, vm, host)]
        return f"is placed nowhere though {', '.join(roomy)} would do" if roomy else ""
    host = hosts[vm.host_id]
    record = host.records.get(vm.id)
    state = host.engine.get(vm.id)
    if vm.desired == "stopped":
        if state == "running":
            return f"runs on {host.name} and should not"
        if record is not None and record.power != "stopped" and state != "running":
            return f"is {state} on {host.name}, where nobody was told that this is as wanted"
        return "" if record is None or record.complete else f"is being created on {host.name}"
    if record is None:
        return f"is not on {host.name}"
    if not record.complete or record.deleting:
        return f"is half made on {host.name}"
    if state == "running":
        return ""
    if vm.spec.restart == "never" and (state != "off" or record.power == "running"):
        return ""  # it has ended, or the one start it was to have has failed or was cut short
    if state == "exited" and vm.spec.restart != "always":
        return ""
    return f"is {state} on {host.name} and should run"


def _has_no_room(world: World, mirror: Mirror, vm: VmIntent) -> bool:
    waits = not vm.gone_at and vm.host_id is None and vm.desired == "running"
    return waits and not any(_fits(mirror, vm, host) for host in world.hosts)


def _fits(mirror: Mirror, vm: VmIntent, host: Host) -> bool:
    registered = mirror.hosts.get(host.addr)
    if not host.powered or vm.spec.image not in host.images or registered is None or registered.cordoned:
        return False
    placed = [other.spec for other in mirror.vms.values() if other.host_id == host.name and not other.gone_at]
    ours = {vm.id for vm in mirror.vms.values() if vm.host_id == host.name}
    others = [record.request for vm_id, record in host.records.items() if vm_id not in ours]
    return all(
        sum(getattr(one, what) for one in (*placed, *others, vm.spec)) <= getattr(host, what) for what in ("cpu", "mem", "disk")
    )


def _leftovers(world: World, host: Host, vms: dict[VmId, VmIntent], excepting: AbstractSet[VmId]) -> str:
    loose = host.leftovers()
    if loose:
        return f"parts of {', '.join(sorted(loose))} are left on {host.name} without a record"
    for vm_id in host.records:
        vm = vms.get(vm_id)
        is_stranger = vm_id in world.strangers and vm is None
        if is_stranger or vm_id in excepting:
            if is_stranger and host.engine[vm_id] != "running" and host.name not in world.lost_power:
                return f"the stranger {vm_id} on {host.name} does not run any more"
            continue
        if world.checks.forked and (vm is None or (vm.host_id != host.name and vm_id in world.checks.tolerates_copies)):
            continue  # made by a branch of the store that is no more: shown as unknown, and left to people
        if vm is None or vm.gone_at or vm.host_id != host.name:
            return f"VM {vm_id} is left on {host.name}"
    return ""
