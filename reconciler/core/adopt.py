"""Turns a VM that a host has and nobody recorded into recorded intent, without touching the VM."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from pydantic import ValidationError

from reconciler.core.expand import with_env_keys
from reconciler.core.model import EnvIntent, Power, VmIntent
from reconciler.core.plan import CREATE_FAILED
from specs.desired import EnvSpec, VmSpec, canonical_env, spec_hash
from specs.names import ClusterId, EnvId, HostId, VmId
from specs.wire import AgentVm, CreateVmReq

NO_ENV = EnvId("")  # of a VM that is destroyed by hand: it never had an environment here
_ASKED_TO_STOP = ("stopped", "paused")


class CannotAdopt(Exception):
    """The message says why not, for people; `code` is a slug."""

    def __init__(self, why: str, code: str = "not_adoptable") -> None:
        super().__init__(why)
        self.code = code


def obstacle(vm: AgentVm, cluster: ClusterId) -> str:
    """Why the VM can be neither adopted nor destroyed from here, "" if it can: its owner would fight back."""
    if vm.cluster_id in ("", cluster):
        return ""
    return f"VM {vm.id} belongs to cluster {vm.cluster_id}; only that one's controller may change it"


def adopt(
    vm: AgentVm,
    request: CreateVmReq | None,
    env: EnvIntent | None,
    *,
    env_id: EnvId,
    name: str | None,
    taken: Collection[str],
    host_id: HostId,
    cluster: ClusterId,
    now: int,
) -> tuple[EnvIntent, VmIntent]:
    """The environment, made or grown by one machine, and the VM as recorded. Raises CannotAdopt.

    `request` is what the agent was asked for when it made the VM; a plain agent does not tell, then what it reports must do,
    and the environment's ssh keys are taken for the VM's. `taken` are the names of the environment's VMs. A new environment
    never expires, and is stopped if the VM was; the spec that made the VM once can be applied to it and replaces nothing.
    """
    if why := obstacle(vm, cluster):
        raise CannotAdopt(why, "foreign_vm")
    if vm.reason == CREATE_FAILED:
        raise CannotAdopt(f"nothing of VM {vm.id} is left on the host: its creation failed ({vm.message})")
    if env is not None and env.deleting:
        raise CannotAdopt(f"environment {env.id} is being deleted", "terminating")
    name = name or (request.name if request and request.name else vm.id)
    if name in taken:
        raise CannotAdopt(f"environment {env_id} has a VM {name} already; give another name", "name_taken")
    power: Power = "stopped" if vm.state in _ASKED_TO_STOP and not vm.reason else "running"
    if env is not None and env.power == "stopped" and power == "running":
        raise CannotAdopt(f"environment {env.id} is stopped and VM {vm.id} runs; start the environment, or name another")
    keys = env.spec.ssh_keys if env else ()
    if request is not None and not set(keys) <= set(request.ssh_keys):
        why = f"environment {env_id} gives its VMs ssh keys that VM {vm.id} does not have"
        raise CannotAdopt(f"{why}: it would be replaced; name another environment", "spec_differs")
    try:
        entry = _entry(vm, request, name, keys)
        spec = _with_entry(env, env_id, entry)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CannotAdopt(f"what the host tells of VM {vm.id} makes no spec ({where}: {first['msg']})") from None
    if env is None:
        env = EnvIntent(env_id, spec, power, generation=1, rolled=1, created_at=now, expires_at=0)
    else:
        is_rolled = env.rolled == env.generation
        generation = env.generation + 1
        env = replace(env, spec=spec, generation=generation, rolled=generation if is_rolled else env.rolled)
    full = with_env_keys(entry, spec.ssh_keys)
    intent = VmIntent(
        id=VmId(vm.id),
        env_id=env_id,
        name=name,
        spec=full,
        spec_hash=spec_hash(full, ()),
        desired=env.power,
        host_id=host_id,
        created_at=vm.created_at or now,
        generation=env.generation,
    )
    return env, intent


def condemned(vm: AgentVm, host_id: HostId, now: int) -> VmIntent:
    """The tombstone of a VM that is destroyed by hand. What the host tells of it need not make sense."""
    try:
        spec = _entry(vm, None, None, ())
    except ValidationError:
        spec = VmSpec(image="unknown", cpu=max(1, vm.cpu), mem=max(1, vm.mem), disk=max(1, vm.disk))
    return VmIntent(VmId(vm.id), NO_ENV, vm.id, spec, spec_hash(spec, ()), "absent", host_id, vm.created_at or now)


def _entry(vm: AgentVm, request: CreateVmReq | None, name: str | None, env_keys: Collection[str]) -> VmSpec:
    if request is not None:
        told = request.model_dump(include={"image", "engine", "cpu", "mem", "disk", "deny_outgoing", "user_data", "ready"})
        ports = [port for port in request.ports if port != 22]
        return VmSpec(**told, ports=ports, name=name, ssh_keys=[key for key in request.ssh_keys if key not in env_keys])
    told = vm.model_dump(include={"image", "engine", "cpu", "mem", "disk"})
    return VmSpec(**told, ports=sorted(int(port) for port in vm.port_map if port.isdigit() and port != "22"), name=name)


def _with_entry(env: EnvIntent | None, env_id: EnvId, entry: VmSpec) -> EnvSpec:
    if env is None:
        return EnvSpec.model_validate({"id": env_id, "ssh_keys": (), "vms": (entry,), "lifetime": "never"})
    body = canonical_env(env.spec)
    return EnvSpec.model_validate({**body, "vms": [*body["vms"], entry.model_dump(mode="json", exclude_defaults=True)]})
