"""Placement reads views of the hosts that are kept until something of them changes; they must never be out of date."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reconciler.core.model import Change, HostIntent, VmIntent
from reconciler.core.place import HostRoom, Unplaceable, place, rank
from reconciler.core.rooms import Rooms
from reconciler.fleet import Fleet, Report
from specs.desired import VmSpec
from specs.names import ClusterId, EnvId, HostId, VmId
from specs.wire import AgentInfo, AgentVm, Resource

ADDRS = ("127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3")
IDS = tuple(VmId(f"vm-{n}") for n in range(6))
SPEC = VmSpec(image="tiny", cpu=1, mem=128, disk=256)


def host_id(addr: str) -> HostId:
    return HostId(f"host-{addr[-1]}")


def info(addr: str, labels: dict[str, str]) -> AgentInfo:
    room = Resource(cpu_total=8, mem_total=8192, disk_total=90_000)
    return AgentInfo(host_id=host_id(addr), resource=room, engines=("qemu",), storage="file", images=("tiny",), labels=labels)  # type: ignore[arg-type]


def there(vm_id: VmId, cpu: int) -> AgentVm:
    return AgentVm(id=vm_id, env_id="web", image="tiny", engine="qemu", cpu=cpu, mem=128, disk=256, state="running")  # type: ignore[arg-type]


def intent(vm_id: VmId, **changes: Any) -> VmIntent:
    vm = VmIntent(vm_id, EnvId("web"), vm_id, SPEC, "hash", "running", None, 1)
    return replace(vm, **changes)


EVENTS = st.lists(
    st.tuples(st.integers(0, 9), st.sampled_from(ADDRS), st.sampled_from(IDS), st.integers(1, 4)), min_size=20, max_size=60
)


@settings(max_examples=250, deadline=None)
@given(EVENTS)
def test_the_kept_views_always_equal_fresh_ones(events: list[tuple[int, str, VmId, int]]) -> None:  # noqa: PLR0912 one branch an event
    fleet = Fleet(ClusterId("prod"))
    for number, (kind, addr, vm_id, size) in enumerate(events):
        vm, host = fleet.vms.get(vm_id), fleet.hosts.get(addr)
        if kind == 0:
            fleet.apply(Change(hosts=(HostIntent(addr, host_id(addr), 1, cordoned=size == 1),)))
        elif kind == 1 and vm is None:
            fleet.apply(Change(vms=(intent(vm_id, host_id=host_id(addr) if size == 1 and host else None),)))
        elif kind == 2 and vm and not vm.host_id and not vm.gone_at and host:
            fleet.reserve(vm, host_id(addr))
            if size == 1:
                fleet.release(vm_id)
            else:
                fleet.apply(Change(placed=((vm_id, host_id(addr)),)))
        elif kind == 3 and vm and not vm.gone_at:
            fleet.apply(Change(vms=(replace(vm, desired="absent"),), gone=((vm_id, 5),)))
        elif kind == 4 and vm and vm.gone_at:
            fleet.apply(Change(drop_vms=(vm_id,)))
        elif kind == 5 and host:
            fleet.observe_info(addr, info(addr, {"size": str(size)}), float(number))
        elif kind == 6 and host:
            seen = {other: there(other, size) for other in IDS[:size]}
            fleet.observe(addr, Report(seen, fleet.tick(), "boot", number), float(number))
        elif kind == 7 and host:
            fleet.observe_reply(addr, vm_id, there(vm_id, size) if size > 1 else None, "boot", number)
        elif kind == 8:
            fleet.lost(addr, f"silent {size}", float(number))
        elif kind == 9 and host and not fleet.host_vms(host_id(addr)):
            fleet.apply(Change(drop_hosts=(addr,)))
        assert fleet.rooms() == [fleet._room(host) for host in fleet.hosts.values()]
        for spread in ("pack", "hosts"):
            assert_chosen_as_by_looking_at_all(fleet, SPEC.model_copy(update={"spread": spread}))


def assert_chosen_as_by_looking_at_all(fleet: Fleet, spec: VmSpec) -> None:
    rooms = {room.id: room for room in fleet.rooms()}
    chosen, best = fleet.place(EnvId("web"), spec), place(EnvId("web"), spec, rooms.values())
    if isinstance(best, Unplaceable) or isinstance(chosen, Unplaceable):
        assert chosen == best
        return
    mine, least = (_rank(rooms[one.host_id], spec) for one in (chosen, best))
    assert mine == pytest.approx(least)


def _rank(room: HostRoom, spec: VmSpec) -> tuple[int, float]:
    return rank(spec, room, room.env_vms.get(EnvId("web"), 0) if spec.spread == "hosts" else 0)[:2]


SIZES = st.sampled_from([(4, 4096), (8, 4096), (8, 9000)])
HOSTS = st.lists(st.tuples(SIZES, st.integers(0, 8), st.integers(0, 9000), st.integers(0, 2), st.booleans()), max_size=9)


@settings(max_examples=200, deadline=None)
@given(HOSTS, HOSTS, st.integers(1, 8), st.integers(1, 9000), st.sampled_from(["pack", "hosts"]))
def test_the_place_found_by_kinds_and_levels_is_one_of_the_best(
    hosts: list[Any], changed: list[Any], cpu: int, mem: int, spread: Any
) -> None:
    spec = VmSpec(image="tiny", cpu=cpu, mem=mem, disk=1, spread=spread)
    kept, rooms = Rooms(), {}
    for number, ((cpus, memory), used, mem_used, siblings, online) in [*enumerate(hosts), *enumerate(changed)]:
        room = HostRoom(
            id=HostId(f"h{number}"),
            addr=f"a{number}",
            online=online,
            cordoned=False,
            engines=frozenset({spec.engine}),
            images={None: frozenset({"tiny"})},
            labels={},
            cpu_total=cpus,
            cpu_used=min(used, cpus),
            mem_total=memory,
            mem_used=min(mem_used, memory),
            disk_total=10,
            disk_used=0,
            env_vms={EnvId("web"): siblings} if siblings else {},
        )
        kept.put(room)
        rooms[room.id] = room
    if hosts:
        kept.remove("a0")
        del rooms[HostId("h0")]
    chosen = kept.choose(spec, {room.id: room.env_vms[EnvId("web")] for room in rooms.values() if room.env_vms})
    best = place(EnvId("web"), spec, rooms.values())
    assert {room.id for room in kept} == set(rooms)
    if chosen is None or isinstance(best, Unplaceable):
        assert chosen is None and isinstance(best, Unplaceable)
    else:
        assert _rank(rooms[chosen.host_id], spec) == pytest.approx(_rank(rooms[best.host_id], spec))
