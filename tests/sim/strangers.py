"""VMs on a host that no store knows of."""

from __future__ import annotations

from typing import TYPE_CHECKING

from specs.names import Engine, VmId
from specs.wire import CreateVmReq
from tests.sim.host import Host, Record

if TYPE_CHECKING:
    from tests.sim.world import World


def stranger(world: World, host: Host) -> VmId:
    """Puts a running VM on the host that was made by hand, and makes the agent look again."""
    vm_id = VmId(f"hand-made-{host.name}")
    request = CreateVmReq(vm_id=vm_id, env_id="somebody", image="tiny", engine=Engine.QEMU, cpu=1, mem=64, disk=128)
    record = Record(request, "", int(world.true_wall()), host.lease(request, (), ()), complete=True)
    host.record(vm_id, record)
    host.disks.add(vm_id)
    host.taps.add(vm_id)
    host.boot(vm_id)
    world.agents[host.name].process.kill("a VM was made by hand")
    return vm_id
