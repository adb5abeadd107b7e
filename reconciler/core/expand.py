"""Turns an environment into VMs: which to add, keep, repower, replace and retire. Called on every change and roll-out step."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from typing import Literal

from reconciler.core.model import EnvIntent, VmIntent
from specs.desired import VmSpec, spec_hash
from specs.names import VmId


@dataclass(frozen=True, slots=True)
class VmChange:
    """One line of a plan. `fields` are those that differ; only `replace` and `destroy` lose a disk."""

    action: Literal["keep", "update", "create", "replace", "destroy", "start", "stop"]
    name: str
    vm_id: VmId | None
    fields: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class EnvChange:
    """`put`: VM rows to write (new, updated, retired). `pending`: replacements that must wait for their turn."""

    put: tuple[VmIntent, ...]
    plan: tuple[VmChange, ...]
    pending: int = 0


def with_env_keys(vm: VmSpec, env_keys: tuple[str, ...]) -> VmSpec:
    """The entry as one machine's full specification: the environment's keys added, `count` and `name` resolved away."""
    keys = tuple(dict.fromkeys((*env_keys, *vm.ssh_keys)))
    return vm.model_copy(update={"ssh_keys": keys, "count": 1, "name": None})


def expand(
    env: EnvIntent,
    existing: Iterable[VmIntent],
    new_id: Callable[[], VmId],
    now: int,
    *,
    settled: Collection[VmId] = (),
    max_replaced: int = 1,
) -> EnvChange:
    """What to write so that the recorded VMs become those `env` asks for.

    `existing` are the environment's VMs that are not retired yet; `settled` those among them that are where they should be.
    VMs that are unsettled anyway are replaced at once, so that a broken roll-out can be mended by the next one; of the
    settled ones only as many as keep the VMs out of service at `max_replaced` or fewer.
    """
    have = {vm.name: vm for vm in existing}
    wanted = _resolve(env)
    put: list[VmIntent] = []
    plan: list[VmChange] = []
    outdated: list[tuple[VmIntent, VmSpec, str]] = []
    unsettled = 0
    for name, spec, digest in wanted:
        old = have.pop(name, None)
        if old is None:
            put.append(_new_vm(env, name, spec, digest, new_id, now))
            plan.append(VmChange("create", name, put[-1].id))
        elif old.spec_hash != digest:
            outdated.append((old, spec, digest))
        else:
            kept, line = _keep(env, old, spec)
            unsettled += old.id not in settled
            if kept != old:
                put.append(kept)
            plan.append(line)
    for old in have.values():
        put.append(replace(old, desired="absent"))
        plan.append(VmChange("destroy", old.name, old.id))

    pending = 0
    for old, spec, digest in outdated:
        plan.append(VmChange("replace", old.name, old.id, _differing(old.spec, spec)))
        if old.id in settled and unsettled >= max_replaced:
            pending += 1
            continue
        unsettled += 1
        put.append(replace(old, desired="absent"))
        put.append(_new_vm(env, old.name, spec, digest, new_id, now))
    return EnvChange(tuple(put), tuple(plan), pending)


def recreate(env: EnvIntent, lost: Iterable[VmIntent], new_id: Callable[[], VmId], now: int) -> tuple[VmIntent, ...]:
    """What to write so that VMs on a host that is lost run elsewhere: each is retired and gets a successor of its name.

    The successor has another uid, so a host that returns loses its stale copy instead of running a second one.
    """
    rows: list[VmIntent] = []
    for vm in lost:
        rows.append(replace(vm, desired="absent"))
        rows.append(_new_vm(env, vm.name, vm.spec, vm.spec_hash, new_id, now))
    return tuple(rows)


def _resolve(env: EnvIntent) -> list[tuple[str, VmSpec, str]]:
    """Name, full specification and digest of every machine; the `count` machines of an entry share one value."""
    shared: dict[int, tuple[VmSpec, str]] = {}
    out = []
    for name, entry in env.spec.machines():
        if id(entry) not in shared:
            spec = with_env_keys(entry, env.spec.ssh_keys)
            shared[id(entry)] = (spec, spec_hash(spec, ()))
        out.append((name, *shared[id(entry)]))
    return out


def _new_vm(env: EnvIntent, name: str, spec: VmSpec, digest: str, new_id: Callable[[], VmId], now: int) -> VmIntent:
    return VmIntent(
        id=new_id(),
        env_id=env.id,
        name=name,
        spec=spec,
        spec_hash=digest,
        desired=env.power,
        host_id=None,
        created_at=now,
        generation=env.generation,
    )


def _keep(env: EnvIntent, old: VmIntent, spec: VmSpec) -> tuple[VmIntent, VmChange]:
    fields = _differing(old.spec, spec)
    kept = replace(old, spec=spec if fields else old.spec, desired=env.power, generation=env.generation)
    action: Literal["keep", "update", "start", "stop"] = "update" if fields else "keep"
    if old.desired != env.power:
        action = "start" if env.power == "running" else "stop"
    return kept, VmChange(action, old.name, old.id, fields)


def _differing(old: VmSpec, new: VmSpec) -> tuple[str, ...]:
    return tuple(name for name in VmSpec.model_fields if getattr(old, name) != getattr(new, name))
