"""Chooses a host for a VM: best fit over what the controller itself has placed. Every refusal has its reason."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from specs.desired import VmSpec
from specs.names import EnvId, HostId


@dataclass(frozen=True, slots=True)
class HostRoom:
    """A host as placement sees it. `used` counts what is placed there by us, or by the agent's own word where that is more.

    `images` maps an engine to its image names; None as a key holds names whose engine the agent did not tell.
    """

    id: HostId
    addr: str
    online: bool
    cordoned: bool
    engines: frozenset[str]
    images: Mapping[str | None, frozenset[str]]
    labels: Mapping[str, str]
    cpu_total: int
    cpu_used: int
    mem_total: int
    mem_used: int
    disk_total: int
    disk_used: int
    env_vms: Mapping[EnvId, int] = field(default_factory=dict)
    why_offline: str = ""


@dataclass(frozen=True, slots=True)
class Placement:
    """The chosen host."""

    host_id: HostId


@dataclass(frozen=True, slots=True)
class Unplaceable:
    """Why each host was refused, in plain words: (host, reason), in the hosts' order. Empty: there is no host at all."""

    reasons: tuple[tuple[str, str], ...]

    def sentence(self) -> str:
        """All reasons as one line for people."""
        if not self.reasons:
            return "no host is registered"
        return "; ".join(f"{host}: {why}" for host, why in self.reasons)


def place(env_id: EnvId, vm: VmSpec, hosts: Iterable[HostRoom]) -> Placement | Unplaceable:
    """The fullest host that still fits (`spread: hosts`: first of all the one with the fewest VMs of the environment).

    Deterministic: ties go to the lower host id.
    """
    best: tuple[tuple[int, float, str], HostId] | None = None
    reasons: list[tuple[str, str]] = []
    for host in hosts:
        why = refusal(vm, host)
        if why:
            reasons.append((host.id, why))
            continue
        mine = rank(vm, host, host.env_vms.get(env_id, 0) if vm.spread == "hosts" else 0)
        if best is None or mine < best[0]:
            best = (mine, host.id)
    return Placement(best[1]) if best else Unplaceable(tuple(reasons))


def rank(vm: VmSpec, host: HostRoom, siblings: int) -> tuple[int, float, str]:
    """What makes one host better than another for a VM: smaller is better."""
    return (siblings, _free_share(vm, host), host.id)


def predict(env_id: EnvId, vms: Sequence[VmSpec], hosts: Sequence[HostRoom]) -> list[Placement | Unplaceable]:
    """Where these VMs would go if they were placed now, one after the other, each counted for the next."""
    rooms = {host.id: host for host in hosts}
    decisions = []
    for vm in vms:
        decision = place(env_id, vm, rooms.values())
        if isinstance(decision, Placement):
            room = rooms[decision.host_id]
            rooms[room.id] = replace(
                room,
                cpu_used=room.cpu_used + vm.cpu,
                mem_used=room.mem_used + vm.mem,
                disk_used=room.disk_used + vm.disk,
                env_vms={**room.env_vms, env_id: room.env_vms.get(env_id, 0) + 1},
            )
        decisions.append(decision)
    return decisions


def refusal(vm: VmSpec, host: HostRoom) -> str:
    """Why this host cannot take the VM, or "" if it can."""
    if not host.online:
        return host.why_offline or "offline"
    if host.cordoned:
        return "cordoned"
    if vm.engine not in host.engines:
        return f"has no engine {vm.engine.value} (it has {', '.join(sorted(host.engines)) or 'none'})"
    missing = vm.host_labels and [f"{key}={value}" for key, value in vm.host_labels.items() if host.labels.get(key) != value]
    if missing:
        return f"lacks the label {', '.join(missing)}"
    if not _has_image(vm, host):
        return f"has no {vm.engine.value} image {vm.image}"
    if (
        host.cpu_used + vm.cpu <= host.cpu_total
        and host.mem_used + vm.mem <= host.mem_total
        and host.disk_used + vm.disk <= host.disk_total
    ):
        return ""
    short = [
        f"{what} ({wanted} wanted, {max(total - used, 0)} of {total} free)"
        for what, wanted, total, used in (
            ("cpu", vm.cpu, host.cpu_total, host.cpu_used),
            ("mem", vm.mem, host.mem_total, host.mem_used),
            ("disk", vm.disk, host.disk_total, host.disk_used),
        )
        if used + wanted > total
    ]
    return f"no room: {', '.join(short)}"


def _has_image(vm: VmSpec, host: HostRoom) -> bool:
    images = host.images
    return vm.image in images.get(vm.engine, ()) or vm.image in images.get(None, ())


def _free_share(vm: VmSpec, host: HostRoom) -> float:
    """The share of the host left free after placing, summed over cpu, mem and disk; smaller is a better fit."""
    return (
        (host.cpu_total - host.cpu_used - vm.cpu) / max(host.cpu_total, 1)
        + (host.mem_total - host.mem_used - vm.mem) / max(host.mem_total, 1)
        + (host.disk_total - host.disk_used - vm.disk) / max(host.disk_total, 1)
    )
