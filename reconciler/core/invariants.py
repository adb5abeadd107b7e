"""The safety invariants over a whole fleet's durable state, for the teardown of every test that has one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping

from reconciler.core.adopt import NO_ENV
from reconciler.core.model import EnvIntent, VmIntent
from specs.names import EnvId, HostId


def violations(
    envs: Mapping[EnvId, EnvIntent], vms: Collection[VmIntent], rooms: Mapping[HostId, tuple[int, int, int]]
) -> tuple[str, ...]:
    """What is wrong, one sentence each; empty when all is well. `rooms` is each host's (cpu, mem, disk) total.

    Checked: no two live VMs of one name in an environment; every live VM has its environment; nothing of a deleting
    environment is wanted; tombstones are absent; placements fit their hosts. A VM that is destroyed by hand has no
    environment, and nobody placed it.
    """
    found: list[str] = []
    live = [vm for vm in vms if vm.gone_at == 0]
    names = Counter((vm.env_id, vm.name) for vm in live if vm.desired != "absent")
    found += [f"{times} VMs are named {name} in {env}" for (env, name), times in names.items() if times > 1]
    for vm in live:
        env = envs.get(vm.env_id)
        if env is None and vm.env_id == NO_ENV and vm.desired == "absent":
            continue
        if env is None:
            found.append(f"VM {vm.id} has no environment {vm.env_id}")
        elif env.deleting and vm.desired != "absent":
            found.append(f"VM {vm.id} is {vm.desired} though {vm.env_id} is being deleted")
    found += [f"VM {vm.id} is a tombstone but desired {vm.desired}" for vm in vms if vm.gone_at and vm.desired != "absent"]
    for host, totals in rooms.items():
        here = [vm.spec for vm in live if vm.host_id == host and vm.env_id != NO_ENV]
        sums = (sum(s.cpu for s in here), sum(s.mem for s in here), sum(s.disk for s in here))
        found += [
            f"host {host} has {what} {used} of {total} placed"
            for what, used, total in zip(("cpu", "mem", "disk"), sums, totals, strict=True)
            if used > total
        ]
    return tuple(found)
