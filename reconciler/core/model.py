"""The values decisions are made from and the steps they lead to. Durations and `until` in seconds of the caller's clock."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from reconciler.core.events import Event
from specs.desired import EnvSpec, VmSpec
from specs.names import EnvId, HostId, VmId
from specs.wire import Phase, Readiness, VmState

Power = Literal["running", "stopped"]
Desired = Literal["running", "stopped", "absent"]


@dataclass(frozen=True, slots=True)
class EnvIntent:
    """An environment as recorded. `generation` counts spec changes; `rolled` is the last one whose VMs are all made."""

    id: EnvId
    spec: EnvSpec
    power: Power
    generation: int
    rolled: int
    created_at: int
    expires_at: int
    deleting: bool = False


@dataclass(frozen=True, slots=True)
class VmIntent:
    """A VM as recorded. `id` is a uid: never reused, new on every replacement.

    `spec.ssh_keys` already holds the environment's keys too. `host_id` stays until that host confirms the VM is gone;
    `gone_at` (wall seconds, 0 before) marks a tombstone that has ended and is kept to catch a late duplicate create.
    """

    id: VmId
    env_id: EnvId
    name: str
    spec: VmSpec
    spec_hash: str
    desired: Desired
    host_id: HostId | None
    created_at: int
    generation: int = 1
    gone_at: int = 0


@dataclass(frozen=True, slots=True)
class HostIntent:
    """A registered host. `id` is None until the agent has told it.

    `drain_total` is how many VMs it held when its draining began; None: it is not being drained.
    """

    addr: str
    id: HostId | None
    registered_at: int
    cordoned: bool = False
    drain_total: int | None = None


@dataclass(frozen=True, slots=True)
class Present:
    """The host has the VM. `reason`, `cause` and `message` as in specs.wire.AgentVm."""

    state: VmState
    reason: str = ""
    message: str = ""
    cause: str = ""
    step: str = ""
    ip: str = ""
    ports: Mapping[str, int] = field(default_factory=dict)
    cluster_id: str = ""
    warnings: tuple[str, ...] = ()
    ready: Readiness | None = None


@dataclass(frozen=True, slots=True)
class Absent:
    """A complete report, newer than the last call about this VM, lacks it."""


@dataclass(frozen=True, slots=True)
class Unknown:
    """Nobody can say: the host is silent, its report incomplete or older than the last call. Never leads to an action.

    `silent`: the host has missed its heartbeats, so this may last; otherwise the next report is due in moments.
    """

    why: str
    silent: bool = False


Observation = Present | Absent | Unknown


@dataclass(frozen=True, slots=True)
class Retry:
    """How often the present goal was tried in vain, and the earliest time of the next try.

    `refused`: the last try failed because the host cannot take the VM now. `refused_by`: the hosts that said so lately, each
    with the time until which it is not asked again.
    """

    attempts: int = 0
    not_before: float = 0.0
    error: str = ""
    refused: bool = False
    refused_by: tuple[tuple[HostId, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Place:
    """The VM needs a host."""


@dataclass(frozen=True, slots=True)
class Create:
    """Ask the host to create and start the VM."""


@dataclass(frozen=True, slots=True)
class Start:
    """Ask the host to boot the VM's existing disk."""


@dataclass(frozen=True, slots=True)
class Stop:
    """Ask the host to power the VM down."""


@dataclass(frozen=True, slots=True)
class Destroy:
    """Ask the host to remove the VM."""


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing to do until something changes, or until `until` if given."""

    why: str
    until: float | None = None
    phase: Phase = "progressing"


@dataclass(frozen=True, slots=True)
class Done:
    """Reality is what was asked for, or as near as the restart policy allows (`degraded`)."""

    phase: Phase
    message: str = ""


@dataclass(frozen=True, slots=True)
class Forget:
    """The host confirms that nothing of the retired VM is left, or it never had a host."""


Call = Create | Start | Stop | Destroy
Step = Place | Call | Wait | Done | Forget


@dataclass(frozen=True, slots=True)
class Change:
    """One atomic change of desired state, committed by the store and then applied by the fleet.

    `vms` inserts rows or updates what people decide (everything but `host_id` and `gone_at`); `placed` and `gone` set those
    two alone, so that a placement and a deletion on their way at the same time cannot undo each other. `events` are kept for
    people to read; nothing is decided by them.
    """

    envs: tuple[EnvIntent, ...] = ()
    drop_envs: tuple[EnvId, ...] = ()
    vms: tuple[VmIntent, ...] = ()
    placed: tuple[tuple[VmId, HostId], ...] = ()
    gone: tuple[tuple[VmId, int], ...] = ()
    drop_vms: tuple[VmId, ...] = ()
    hosts: tuple[HostIntent, ...] = ()
    drop_hosts: tuple[str, ...] = ()
    events: tuple[Event, ...] = ()
    drop_events: tuple[int, ...] = ()
