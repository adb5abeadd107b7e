"""What goes over the wire in answers, and between controller and agent. All sizes MiB, all times Unix seconds."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from specs.desired import Port, Quantity, Ready, UserData
from specs.names import EngineName, Name, SshKey, Storage, StorageName, check_docker_reference, check_name

VmState = Literal["running", "stopped", "paused", "creating", "failed"]
Phase = Literal["pending", "progressing", "ready", "degraded", "stopped", "terminating"]
U32 = Annotated[int, Field(ge=0, le=2**32 - 1)]

CLUSTER_HEADER = "X-Muster-Cluster"
TERM_HEADER = "X-Muster-Term"
DISK_FORMAT_HEADER = "X-Muster-Disk-Format"
DISK_TYPE = "application/octet-stream"


class Message(BaseModel):
    """Base of answers: frozen, unknown fields ignored so that either side may be newer."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Resource(Message):
    """Capacity and use of a host; `cpu` in vCPUs."""

    cpu_total: U32 = 0
    cpu_used: U32 = 0
    mem_total: U32 = 0
    mem_used: U32 = 0
    disk_total: U32 = 0
    disk_used: U32 = 0
    vm_count: U32 = 0


class Readiness(Message):
    """Whether a running VM answers as its spec's `ready` wants, and since when that is so or not.

    `reason` is `Probing` until it answers, `TimedOut` once `ready.timeout` has passed (probing goes on), `Answered` from the
    first answer until the VM's process ends.
    """

    status: bool
    reason: Literal["Probing", "TimedOut", "Answered"]
    message: str = ""
    since: int = 0


class AgentVm(Message):
    """One VM as an agent reports it. Only the fields up to `created_at` exist on a plain agent.

    `reason` says why a VM is `failed` or `stopped`: `create_failed` (nothing of it is left on the host; only another
    create helps), `start_failed`, `crashed`, `exited` (the guest powered itself off), `remove_failed` (the agent goes on
    clearing up), `state_unknown` (its engine cannot tell; `state` is then what was asked last), or "" (as asked, or not told).
    `cause` is the slug of the error behind `create_failed`, such as `does_not_fit` or `image_missing`.
    """

    id: Name
    env_id: str
    host_id: str = ""
    image: str
    engine: EngineName
    cpu: U32
    mem: U32
    disk: U32
    ip: str = ""
    port_map: dict[str, int] = Field(default_factory=dict)
    state: VmState
    created_at: int = 0
    reason: str = ""
    cause: str = ""
    message: str = ""
    cluster_id: str = ""
    spec_hash: str = ""
    pid: int | None = None
    step: str = ""
    warnings: tuple[str, ...] = ()
    ready: Readiness | None = None
    """None for a VM that does not run, or of which nobody asked more than that its process runs."""


class UnknownVm(AgentVm):
    """A VM nobody recorded. `obstacle` says why it can be neither adopted nor destroyed from here, "" if it can."""

    obstacle: str = ""


class AgentInfo(Message):
    """GET /api/info of an agent. `version`, `boot_id` and `network` are ours."""

    host_id: Name
    resource: Resource
    engines: tuple[EngineName, ...]
    storage: StorageName
    images: tuple[str, ...] = ()
    version: str = ""
    boot_id: str = ""
    network: str = ""
    labels: dict[str, str] = Field(default_factory=dict)
    images_by_engine: dict[str, tuple[str, ...]] = Field(default_factory=dict)


class CreateVmReq(BaseModel):
    """POST /api/vms of an agent. The second group is ours and is left out when it says nothing."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    vm_id: Name
    env_id: Name
    image: str
    engine: EngineName
    cpu: Quantity
    mem: Quantity
    disk: Quantity
    ports: tuple[Port, ...] = ()
    deny_outgoing: bool = False
    ssh_keys: tuple[SshKey, ...] = ()

    name: Name | None = None
    user_data: UserData = ""
    spec_hash: str = ""
    ready: Ready | None = None

    @model_validator(mode="after")
    def _image_suits_engine(self) -> CreateVmReq:
        try:
            (check_docker_reference if self.engine == "docker" else check_name)(self.image)
        except ValueError as error:
            raise ValueError(f"image {error}") from None
        return self

    def wire(self) -> dict[str, Any]:
        """The JSON object to send: the reference's fields always, ours only when they say something."""
        body = self.model_dump(mode="json")
        for ours in ("name", "user_data", "spec_hash", "ready"):
            if not body[ours]:
                del body[ours]
        return body


class Condition(Message):
    """One observed fact about an object, as Kubernetes' conditions: `since` is when `status` last changed."""

    type: str
    status: bool
    reason: str
    message: str
    since: int


class BlockedVm(Message):
    """A VM that cannot leave a host that is being drained, and why."""

    vm: str
    name: str
    env: str
    why: str


class Drain(Message):
    """How far a drain is: of `total` VMs at its beginning `left` are still bound to the host, `moving` of them on their way."""

    state: Literal["draining", "drained"]
    total: int
    left: int
    moving: int = 0
    blocked: tuple[BlockedVm, ...] = ()


class Host(Message):
    """A registered host as the controller answers it."""

    id: str
    addr: str
    resource: Resource
    state: Literal["online", "offline"]
    engines: tuple[str, ...]
    storage: Storage
    registered_at: int
    cordoned: bool = False
    drain: Drain | None = None
    heartbeat_age: int | None = None
    message: str = ""


class Step(Message):
    """What a VM reached when: `accepted`, `placed`, the agent's steps (`disk`, `network`, `prepare`, `booting`, …), `ready`."""

    name: str
    at_ms: int
    """Unix milliseconds: a step may last less than a second."""


class Vm(Message):
    """A VM as the controller answers it; the last group is ours."""

    id: str
    env_id: str
    host_id: str
    image: str
    engine: EngineName
    cpu: int
    mem: int
    disk: int
    ip: str
    port_map: dict[str, int]
    state: VmState
    created_at: int

    name: str
    desired: Literal["running", "stopped", "absent"]
    phase: Phase
    message: str = ""
    attempts: int = 0
    next_attempt_at: int | None = None
    generation: int = 1
    observed_generation: int = 0
    conditions: tuple[Condition, ...] = ()
    steps: tuple[Step, ...] = ()


class Env(Message):
    """An environment as the controller answers it; `expires_at` 0 means never."""

    id: str
    owner: str
    vm_ids: tuple[str, ...]
    created_at: int
    expires_at: int
    state: Literal["active", "stopped"]

    phase: Phase
    generation: int = 1
    observed_generation: int = 0
    conditions: tuple[Condition, ...] = ()
    warnings: tuple[str, ...] = ()


class Event(Message):
    """Something that happened, `count` times; `env`, `vm`, `vm_name` and `host` are "" where none is concerned.

    `revision` grows with every event and repeat over the controller's whole life; `id` stays.
    """

    id: str
    revision: int
    type: Literal["Normal", "Warning"]
    reason: str
    message: str
    count: int
    first_seen: int
    last_seen: int
    env: str = ""
    vm: str = ""
    vm_name: str = ""
    host: str = ""


class EnvDetail(Message):
    """An environment with its VMs, and what keeps it from converging in plain words."""

    env: Env
    vms: tuple[Vm, ...] = ()
    warnings: tuple[str, ...] = ()


class PlanLine(Message):
    """What applying a spec would do to one VM; `replace` and `destroy` lose its disk."""

    action: str
    name: str
    vm_id: str | None = None
    fields: tuple[str, ...] = ()
    host: str | None = None
    message: str = ""


class Plan(Message):
    """The answer of a dry run."""

    plan: tuple[PlanLine, ...] = ()
    warnings: tuple[str, ...] = ()


class ImageInfo(Message):
    """An image on a host."""

    name: str
    host_id: str


class FleetStatus(Message):
    """Sums over the fleet; totals count online hosts only."""

    hosts: int = 0
    hosts_online: int = 0
    total_vms: int = 0
    total_envs: int = 0
    cpu_total: int = 0
    cpu_used: int = 0
    mem_total: int = 0
    mem_used: int = 0
    disk_total: int = 0
    disk_used: int = 0


class Sample(Message):
    """Counts of VMs at a time: meant to run, running as their hosts last reported, and not as desired."""

    at: int
    desired: int = 0
    actual: int = 0
    unconverged: int = 0


class History(Message):
    """Samples of the last hour at most, `step` seconds apart, oldest first."""

    step: int
    samples: tuple[Sample, ...] = ()


class SpecMistake(Message):
    """A mistake in a YAML text; `line` and `column` count from 1, `field` is dotted."""

    line: int
    column: int
    field: str
    message: str


class Checked(Message):
    """What is wrong with a YAML text; without mistakes the environment it describes, as JSON and with what it would do."""

    errors: tuple[SpecMistake, ...] = ()
    spec: dict[str, Any] | None = None
    plan: tuple[PlanLine, ...] = ()
    exists: bool = False
    generation: int = 0


class ObservedVm(Message):
    """A VM as it should be and as its host reported it last; `observed` is None while no host has it."""

    id: str
    name: str
    host: str = ""
    desired: dict[str, Any]
    observed: dict[str, Any] | None = None


class EnvSpecText(Message):
    """The desired state of an environment as YAML, beside what is observed."""

    yaml: str
    generation: int
    vms: tuple[ObservedVm, ...] = ()


class Console(Message):
    """The end of what a guest wrote on its console, control characters and all."""

    text: str


class Version(Message):
    """What runs here: `term` grows with every start of the controller of `cluster_id`."""

    version: str
    cluster_id: str
    term: int


class CreateVmResp(Message):
    """The answer to a create, and to a start or stop that was accepted."""

    vm: AgentVm
