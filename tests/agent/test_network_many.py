"""Six hundred VMs on one agent: the runtime over the real bridge network in a namespace, machines in memory."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Iterator
from ipaddress import IPv4Network
from pathlib import Path

import pytest

from agent.engines.fake import FakeEngine
from agent.network.host import ruleset_generation
from agent.network.linux import BridgeNetwork
from agent.records import RecordStore
from agent.runtime import Drivers, Runtime
from specs.names import Engine
from tests.agent.runtime_rig import NOBODY, FileBackedFake, Rig, request, until
from tests.netns import Lab, command, inside

MANY = 600
PORTS = tuple(range(8001, 8009))


@pytest.fixture
def own_namespace() -> Iterator[None]:
    lab = Lab()
    try:
        with inside(lab.namespace("h")):
            yield
    finally:
        lab.close()


def forwards() -> set[tuple[int, str, int]]:
    """(host port, address, guest port) of every forward in the kernel."""
    listed = command("nft", "list", "map", "inet", "muster_mtt0", "forwards")
    return {(int(at), ip, int(to)) for at, ip, to in re.findall(r"(\d+) : (\d+\.\d+\.\d+\.\d+) \. (\d+)", listed)}


@pytest.mark.real
async def test_every_one_of_six_hundred_vms_has_all_its_ports_and_one_more_is_one_short_transaction(
    own_namespace: None, tmp_path: Path
) -> None:
    rig = Rig(tmp_path)
    engine = FakeEngine(rig.machines)
    network = BridgeNetwork("mtt0", IPv4Network("10.91.0.0/16"))
    drivers = Drivers({Engine.QEMU: engine}, FileBackedFake(rig.disks), network, {})
    runtime = Runtime(host_id="host-1", store=RecordStore(tmp_path), drivers=drivers, capacity=rig.capacity)
    await runtime.start()
    try:
        await until(lambda: runtime.complete, limit=60)
        took: dict[int, float] = {}
        there = 0
        for size in (10, MANY):
            for number in range(there, size):
                wanted = request(f"vm-{number}", env_id=f"env-{number % 40}", ports=PORTS, deny_outgoing=number % 3 == 0)
                await runtime.create(wanted, NOBODY, wait=False)
            there = size
            await until(lambda: all(vm.state == "running" for vm in runtime.list()), limit=240)
            times = []
            for number in range(5):
                generation = ruleset_generation()
                began = time.perf_counter()
                await runtime.create(request(f"more-{number}", env_id="env-1", ports=PORTS), NOBODY, wait=True)
                times.append(time.perf_counter() - began)
                assert generation is not None
                assert ruleset_generation() == generation + 1
            for number in range(5):
                await runtime.delete(f"more-{number}", NOBODY)
            took[size] = 1000 * statistics.median(times)
        print(f"one more VM at 10: {took[10]:.1f} ms, at {MANY}: {took[MANY]:.1f} ms")  # noqa: T201

        vms = runtime.list()
        wanted_ports = {22, *PORTS}
        assert [vm.id for vm in vms if set(map(int, vm.port_map)) != wanted_ports] == []
        leased = {(at, str(vm.ip), int(to)) for vm in vms for to, at in vm.port_map.items()}
        assert len(vms) == len({vm.ip for vm in vms}) == MANY
        assert len({at for at, _, _ in leased}) == len(leased) == MANY * len(wanted_ports)
        assert forwards() == leased
        command("nft", "flush", "ruleset")
        await runtime.create(request("late"), NOBODY, wait=True)
        late = runtime.get("late")
        assert forwards() == leased | {(at, str(late.ip), int(to)) for to, at in late.port_map.items()}
    finally:
        await runtime.close()
        await engine.close()
