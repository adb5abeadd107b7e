"""Turns the fleet into the wire objects of specs.wire. Pure reading; knows nothing of HTTP."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

from reconciler.core import events as core
from reconciler.core.explain import ACCEPTED, Progress, explain_vm
from reconciler.core.model import EnvIntent, VmIntent
from reconciler.fleet import DrainProgress, Fleet, HostState, VmStatus
from reconciler.loop.clock import Clock
from specs.documents import dump
from specs.names import EnvId, HostId, Storage, VmId
from specs.wire import (
    AgentVm,
    BlockedVm,
    Condition,
    Drain,
    Env,
    EnvSpecText,
    Event,
    FleetStatus,
    Host,
    ImageInfo,
    ObservedVm,
    Phase,
    Resource,
    Sample,
    Step,
    Vm,
    VmState,
)

_CLOCK_WAS_SET = 2.0  # seconds of difference; less is drift, and following it would make times flicker


class Views:
    """Reads one fleet. Times on the wire are Unix seconds; the fleet's are monotonic."""

    def __init__(self, fleet: Fleet, clock: Clock) -> None:
        self._fleet = fleet
        self._clock = clock
        self._offset: float | None = None
        self.steps: Callable[[str], tuple[Step, ...]] = lambda _: ()
        """How a VM came to where it is."""

    def _unix(self, monotonic: float) -> int:
        """A monotonic time as Unix seconds, the same answer every time unless the wall clock was set anew."""
        offset = self._clock.wall() - self._clock.monotonic()
        if self._offset is None or abs(offset - self._offset) > _CLOCK_WAS_SET:
            self._offset = offset
        return int(self._offset + monotonic)

    @property
    def epoch(self) -> int:
        """Differs once the wall clock was set anew, and times on the wire with it."""
        return self._unix(0)

    # ---- VMs

    def vm(self, vm: VmIntent) -> Vm:
        """A VM, wanted and seen."""
        status = self._fleet.status.get(vm.id, VmStatus())
        there = self._last_report(vm)
        phase: Phase = "terminating" if vm.desired == "absent" else status.phase
        settled = status.settled and vm.desired != "absent"
        progress = self._progress(vm, status)
        return Vm(
            id=vm.id,
            env_id=vm.env_id,
            host_id=vm.host_id or "",
            image=vm.spec.image,
            engine=vm.spec.engine,
            cpu=vm.spec.cpu,
            mem=vm.spec.mem,
            disk=vm.spec.disk,
            ip=there.ip if there else "",
            port_map=there.port_map if there else {},
            state=_state(vm, there),
            created_at=vm.created_at,
            name=vm.name,
            desired=vm.desired,
            phase=phase,
            message=explain_vm(vm, progress, _utc),
            attempts=0 if settled else status.retry.attempts,
            next_attempt_at=self._unix(status.next_at) if status.next_at is not None else None,
            generation=vm.generation,
            observed_generation=vm.generation if settled else vm.generation - 1,
            conditions=self._vm_conditions(vm, status, progress),
            steps=self.steps(vm.id),
        )

    def step(self, vm: VmIntent) -> str:
        """The last step a VM has reached on its way to what is desired."""
        status = self._fleet.status.get(vm.id, VmStatus())
        if vm.desired == "absent":
            return "leaving"
        if status.settled:
            return status.phase
        there = self._last_report(vm)
        if there is not None and there.state == "failed":
            return "failed"
        if there is not None and there.step and there.step != "accepted":
            return there.step
        if there is not None and there.state == "running":
            return "booting"  # its process is there; whether it is as desired is judged next
        return "placed" if vm.host_id else "accepted"

    def counts(self, at: int) -> Sample:
        """The fleet's VMs, counted."""
        desired = actual = unconverged = 0
        for vm in self._fleet.vms.values():
            if vm.gone_at:
                continue
            status = self._fleet.status.get(vm.id)
            there = self._last_report(vm)
            desired += vm.desired == "running"
            actual += there is not None and there.state == "running"
            unconverged += vm.desired == "absent" or status is None or not status.settled
        return Sample(at=at, desired=desired, actual=actual, unconverged=unconverged)

    def spec_text(self, env: EnvIntent) -> EnvSpecText:
        """What is desired of an environment as YAML, beside what its hosts reported last."""
        return EnvSpecText(
            yaml=dump(env.spec),
            generation=env.generation,
            vms=tuple(self._observed(vm) for vm in self._fleet.env_vms(env.id) if vm.desired != "absent"),
        )

    def _observed(self, vm: VmIntent) -> ObservedVm:
        there = self._last_report(vm)
        spec = vm.spec
        wanted = {"state": vm.desired, "engine": spec.engine, "image": spec.image, "cpu": spec.cpu, "mem": spec.mem}
        wanted |= {"disk": spec.disk, "ports": sorted({22, *spec.ports})}
        seen = None
        if there is not None:
            state = _state(vm, there)
            seen = {"state": state, "engine": there.engine, "image": there.image, "cpu": there.cpu, "mem": there.mem}
            seen |= {"disk": there.disk, "ports": sorted(int(port) for port in there.port_map if port.isdigit())}
        return ObservedVm(id=vm.id, name=vm.name, host=vm.host_id or "", desired=wanted, observed=seen)

    def _progress(self, vm: VmIntent, status: VmStatus) -> Progress:
        env = self._fleet.envs.get(vm.env_id)
        since = status.settled_at if status.settled else status.since
        return Progress(
            settled=status.settled,
            since=vm.created_at if since is None else self._unix(since),
            why=status.message,
            tried=status.tried,
            attempts=status.retry.attempts,
            error=status.retry.error,
            next_at=None if status.next_at is None else self._unix(status.next_at),
            outdated=env is not None and vm.generation < env.generation and env.rolled != env.generation,
            drain=self._waits_to_leave(vm),
        )

    def _waits_to_leave(self, vm: VmIntent) -> str:
        host = self._fleet.host(vm.host_id) if vm.host_id else None
        if host is None or host.intent.drain_total is None:
            return ""
        blocked = dict(host.drain.blocked) if host.drain else {}
        return blocked.get(vm.id, "one VM of an environment moves at a time, and its turn will come")

    def _vm_conditions(self, vm: VmIntent, status: VmStatus, progress: Progress) -> tuple[Condition, ...]:
        settled = progress.settled and vm.desired != "absent"
        there = self._last_report(vm)
        probed = there.ready if there is not None and vm.desired == "running" else None
        return (
            Condition(
                type="Placed",
                status=vm.host_id is not None,
                reason="Placed" if vm.host_id else "Unplaced",
                message=f"on host {vm.host_id}" if vm.host_id else status.message,
                since=vm.created_at,
            ),
            Condition(
                type="Ready",
                status=settled and status.phase == "ready",
                reason=probed.reason if probed else status.phase.capitalize(),
                message=explain_vm(vm, progress, _utc),
                since=progress.since,
            ),
        )

    def _last_report(self, vm: VmIntent) -> AgentVm | None:
        host = self._fleet.host(vm.host_id) if vm.host_id else None
        return host.vms.get(vm.id) if host else None

    def find_vm(self, vm_id: str) -> Vm | None:
        """A VM that is not forgotten yet."""
        vm = self._fleet.vms.get(VmId(vm_id))
        return self.vm(vm) if vm and not vm.gone_at else None

    # ---- environments

    def env(self, env: EnvIntent) -> Env:
        """An environment."""
        vms = self._fleet.env_vms(env.id)
        phase = self._env_phase(env, vms)
        return Env(
            id=env.id,
            owner=env.spec.owner,
            vm_ids=tuple(vm.id for vm in vms),
            created_at=env.created_at,
            expires_at=env.expires_at,
            state="active" if env.power == "running" else "stopped",
            phase=phase,
            generation=env.generation,
            observed_generation=env.generation if self.converged(env) else env.generation - 1,
            warnings=tuple(self.warnings(env)),
        )

    def find_env(self, env_id: str) -> Env | None:
        """An environment by id."""
        env = self._fleet.envs.get(EnvId(env_id))
        return self.env(env) if env else None

    def env_vms(self, env: EnvIntent) -> list[Vm]:
        """The environment's VMs, retired ones included until they are gone."""
        return [self.vm(vm) for vm in self._fleet.env_vms(env.id)]

    def converged(self, env: EnvIntent) -> bool:
        """Whether everything asked for is there and nothing else."""
        vms = self._fleet.env_vms(env.id)
        return (
            not env.deleting
            and env.rolled == env.generation
            and all(self._fleet.status[vm.id].settled and vm.desired != "absent" for vm in vms)
        )

    def _env_phase(self, env: EnvIntent, vms: list[VmIntent]) -> Phase:
        if env.deleting:
            return "terminating"
        phases = {self._fleet.status[vm.id].phase for vm in vms if vm.desired != "absent"}
        if "degraded" in phases:
            return "degraded"
        if self.converged(env):
            # A guest that powered itself off, with a restart policy that leaves it so, is as it should be.
            return "stopped" if phases <= {"stopped"} else "ready"
        return "pending" if "pending" in phases else "progressing"

    def warnings(self, env: EnvIntent) -> list[str]:
        """What keeps the environment from being as asked, and what an engine cannot honour; one sentence each."""
        lines: list[str] = []
        for vm in self._fleet.env_vms(env.id):
            status = self._fleet.status[vm.id]
            there = self._last_report(vm)
            progress = self._progress(vm, status)
            held_up = status.phase in ("pending", "degraded") and status.message != ACCEPTED
            held_up |= vm.desired == "absent" and bool(progress.error or _is_silent(self._fleet, vm))
            held_up |= vm.desired == "running" and status.phase == "stopped"
            if held_up and (sentence := explain_vm(vm, progress, _utc)):
                lines.append(f"{vm.name}: {sentence}")
            lines += [f"{vm.name}: {line}" for line in (there.warnings if there else ())]
            if vm.spec.ready and there is not None and there.state == "running" and there.ready is None:
                lines.append(f"{vm.name}: host {vm.host_id} cannot probe a guest; it counts as ready while its process runs")
        return list(dict.fromkeys(lines))

    # ---- hosts

    def host(self, host: HostState) -> Host:
        """A host. `cpu_used` and so on are what is placed there, strangers included."""
        info = host.info
        load = self._fleet.load(HostId(host.shown_id))
        strangers = self._fleet.strangers(host)
        told = info.resource if info else Resource()
        return Host(
            id=host.shown_id,
            addr=host.intent.addr,
            resource=Resource(
                cpu_total=told.cpu_total,
                cpu_used=load.cpu + sum(vm.cpu for vm in strangers),
                mem_total=told.mem_total,
                mem_used=load.mem + sum(vm.mem for vm in strangers),
                disk_total=told.disk_total,
                disk_used=load.disk + sum(vm.disk for vm in strangers),
                vm_count=load.count + len(strangers),
            ),
            state="online" if host.online else "offline",
            engines=tuple(engine.value for engine in info.engines) if info else (),
            storage=info.storage if info else Storage.FILE,
            registered_at=host.intent.registered_at,
            cordoned=host.intent.cordoned,
            drain=self._drain(host),
            heartbeat_age=None if host.heard_at is None else int(self._clock.monotonic() - host.heard_at),
            message="" if host.online else host.why,
        )

    def _drain(self, host: HostState) -> Drain | None:
        if host.intent.drain_total is None:
            return None
        progress = host.drain or DrainProgress(self._fleet.load(HostId(host.shown_id)).count, 0)
        blocked = [(self._fleet.vms[vm_id], why) for vm_id, why in progress.blocked if vm_id in self._fleet.vms]
        return Drain(
            state="draining" if progress.left else "drained",
            total=host.intent.drain_total,
            left=progress.left,
            moving=progress.moving,
            blocked=tuple(BlockedVm(vm=vm.id, name=vm.name, env=vm.env_id, why=why) for vm, why in blocked),
        )

    def find_host(self, host_id: str) -> Host | None:
        """A host by id or address."""
        host = self._fleet.host(host_id)
        return self.host(host) if host else None

    def event(self, event: core.Event) -> Event:
        """An event."""
        return Event(
            id=str(event.id),
            revision=event.revision,
            type="Warning" if event.is_warning else "Normal",
            reason=event.reason,
            message=event.message,
            count=event.count,
            first_seen=event.first_seen,
            last_seen=event.last_seen,
            env=event.env,
            vm=event.vm,
            vm_name=event.vm_name,
            host=event.host,
        )

    def find_event(self, event_id: str) -> Event | None:
        """An event that is still kept."""
        event = self._fleet.events.get(int(event_id))
        return self.event(event) if event else None

    def images(self) -> list[ImageInfo]:
        """Every image of every online host."""
        return [
            ImageInfo(name=name, host_id=host.shown_id)
            for host in self._fleet.hosts.values()
            if host.online and host.info
            for name in host.info.images
        ]

    def fleet_status(self) -> FleetStatus:
        """Sums; capacity and use of online hosts."""
        hosts = [self.host(host) for host in self._fleet.hosts.values()]
        online = [host.resource for host in hosts if host.state == "online"]
        return FleetStatus(
            hosts=len(hosts),
            hosts_online=len(online),
            total_vms=sum(not vm.gone_at for vm in self._fleet.vms.values()),
            total_envs=len(self._fleet.envs),
            cpu_total=sum(room.cpu_total for room in online),
            cpu_used=sum(room.cpu_used for room in online),
            mem_total=sum(room.mem_total for room in online),
            mem_used=sum(room.mem_used for room in online),
            disk_total=sum(room.disk_total for room in online),
            disk_used=sum(room.disk_used for room in online),
        )


def _utc(unix: int) -> str:
    return datetime.fromtimestamp(unix, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _is_silent(fleet: Fleet, vm: VmIntent) -> bool:
    host = fleet.host(vm.host_id) if vm.host_id else None
    return host is not None and not host.online


def _state(vm: VmIntent, there: AgentVm | None) -> VmState:
    """The reference's five words: what the host last reported, else what is under way."""
    if there is not None:
        return "stopped" if there.state == "paused" and vm.desired == "stopped" else there.state
    return "creating" if vm.desired == "running" else "stopped"
