"""kill -9 of controller and agent while four VMs are being created, with real QEMU, Docker and nftables."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.network.nft import tap_name
from specs.names import VmId
from tests.e2e.rig import NOTHING, Machine, machine, until
from tests.images_fixture import SshKey, ssh_key, tiny  # noqa: F401
from tests.netns import Lab

pytestmark = [pytest.mark.real, pytest.mark.e2e]


@pytest.fixture(scope="module", name="host")
def a_machine(tiny: Path) -> Iterator[Machine]:  # noqa: F811
    """One machine for all tests of this file."""
    lab = Lab()
    try:
        with machine(lab.namespace("k"), tiny) as built:
            built.start()
            yield built
    finally:
        lab.close()


def spec(name: str, key: SshKey) -> dict[str, Any]:
    """Two QEMU VMs and two containers."""
    small = {"cpu": 1, "mem": 128, "disk": 256, "ports": [80], "count": 2}
    return {
        "id": name,
        "ssh_keys": [key.public],
        "vms": [
            {"name": "vm", "image": "tiny", **small},
            {"name": "box", "image": "muster/busybox", "engine": "docker", **small},
        ],
    }


def running(host: Machine) -> int:
    return len(host.pids())


MOMENTS: dict[str, Callable[[Machine], object]] = {
    "as soon as it is recorded": lambda host: True,
    "when the agent has the first": lambda host: host.on_agent(),
    "when the first runs": lambda host: running(host) >= 1,
    "when three run": lambda host: running(host) >= 3,
}


@pytest.mark.parametrize("part", ["controller", "agent"])
@pytest.mark.parametrize("moment", MOMENTS, ids=lambda moment: moment.replace(" ", "-"))
def test_killed_while_four_vms_are_created_it_goes_on_where_it_was(
    host: Machine,
    ssh_key: SshKey,  # noqa: F811
    part: str,
    moment: str,
) -> None:
    name = f"four-{part}-{list(MOMENTS).index(moment)}"
    assert host.call("POST", "/api/envs", spec(name, ssh_key))[0] == 201
    until(lambda: MOMENTS[moment](host), moment, pause=0.005)
    before = host.pids()
    getattr(host, part).kill()
    host.start()
    detail = host.await_ready(name)

    ids = sorted(vm["id"] for vm in detail["vms"])
    machines = sorted(vm["id"] for vm in detail["vms"] if vm["engine"] == "qemu")
    containers = sorted(set(ids) - set(machines))
    assert (len(machines), len(containers)) == (2, 2)
    assert host.there() == {
        "folders": ids,
        "processes": machines,
        "containers": containers,
        "taps": sorted(tap_name(VmId(vm_id)) for vm_id in machines),
    }
    after = host.pids()
    assert sorted(after) == ids
    assert {vm_id: after[vm_id] for vm_id in before} == before
    ports = [port for vm in detail["vms"] for port in vm["port_map"].values()]
    assert len(set(ports)) == len(ports) == 8

    host.delete(name)
    assert host.there() == NOTHING
    assert host.forwards() == []
    assert host.on_agent() == []
    assert host.call("GET", "/api/envs") == (200, {"ok": True, "data": []})
