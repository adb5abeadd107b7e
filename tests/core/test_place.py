"""Where VMs go, and what is said when they go nowhere."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given

from reconciler.core.place import HostRoom, Placement, Unplaceable, place, predict, refusal
from specs.desired import VmSpec
from specs.names import EnvId, HostId
from tests.core.worlds import entries, fleets

WEB = EnvId("web")


def room(host_id: str = "h1", **changes: object) -> HostRoom:
    fields: dict[str, object] = {
        "id": HostId(host_id),
        "addr": "10.0.0.1:9100",
        "online": True,
        "cordoned": False,
        "engines": frozenset({"qemu"}),
        "images": {"qemu": frozenset({"tiny"})},
        "labels": {},
        "cpu_total": 8,
        "cpu_used": 0,
        "mem_total": 8192,
        "mem_used": 0,
        "disk_total": 100_000,
        "disk_used": 0,
    }
    return HostRoom(**(fields | changes))  # type: ignore[arg-type]


def changed(host: HostRoom, **fields: object) -> HostRoom:
    return replace(host, **fields)  # type: ignore[arg-type]


TINY = VmSpec(image="tiny", cpu=2, mem=1024, disk=1000)


@given(entries, fleets)
def test_a_placement_is_allowed_and_its_opposite_explained(vm: VmSpec, hosts: list[HostRoom]) -> None:
    decision = place(WEB, vm, hosts)
    assert decision == place(WEB, vm, hosts) == place(WEB, vm, list(reversed(hosts))) or isinstance(decision, Unplaceable)
    if isinstance(decision, Placement):
        chosen = next(host for host in hosts if host.id == decision.host_id)
        assert chosen.online and not chosen.cordoned and vm.engine.value in chosen.engines
        assert chosen.cpu_used + vm.cpu <= chosen.cpu_total
        assert chosen.mem_used + vm.mem <= chosen.mem_total
        assert chosen.disk_used + vm.disk <= chosen.disk_total
        assert vm.host_labels.items() <= chosen.labels.items()
    else:
        assert [host for host, _ in decision.reasons] == [host.id for host in hosts]
        assert all(why for _, why in decision.reasons)
        assert decision.sentence()


@given(fleets)
def test_many_placements_never_exceed_a_host(hosts: list[HostRoom]) -> None:
    vms = [VmSpec(image="tiny", cpu=3, mem=7, disk=5)] * 12
    used = {host.id: (host.cpu_used, host.mem_used, host.disk_used) for host in hosts}
    for decision in predict(WEB, vms, hosts):
        if isinstance(decision, Placement):
            cpu, mem, disk = used[decision.host_id]
            used[decision.host_id] = (cpu + 3, mem + 7, disk + 5)
    for host in hosts:
        if used[host.id] != (host.cpu_used, host.mem_used, host.disk_used):
            cpu, mem, disk = used[host.id]
            assert cpu <= host.cpu_total and mem <= host.mem_total and disk <= host.disk_total


def test_the_fullest_host_that_fits_is_chosen() -> None:
    hosts = [room("h1"), room("h2", cpu_used=4), room("h3", cpu_used=7)]
    assert place(WEB, TINY, hosts) == Placement(HostId("h2"))


def test_spread_prefers_the_host_with_fewest_vms_of_the_environment() -> None:
    hosts = [room("h1", cpu_used=4, env_vms={WEB: 2}), room("h2", env_vms={EnvId("other"): 9})]
    assert place(WEB, TINY, hosts) == Placement(HostId("h1"))
    assert place(WEB, TINY.model_copy(update={"spread": "hosts"}), hosts) == Placement(HostId("h2"))


def test_every_refusal_says_why() -> None:
    hosts = [
        room("a", online=False, why_offline="offline: connection refused"),
        room("b", cordoned=True),
        room("c", engines=frozenset({"docker"})),
        room("d", images={"docker": frozenset({"tiny"})}),
        room("e", cpu_used=7, mem_used=8000, disk_used=99_500),
        room("f", labels={"zone": "b"}),
    ]
    vm = TINY.model_copy(update={"host_labels": {"zone": "a"}})
    labelled = [replace(host, labels={"zone": "a"}) if host.id != "f" else host for host in hosts]
    assert place(WEB, vm, labelled) == Unplaceable(
        (
            ("a", "offline: connection refused"),
            ("b", "cordoned"),
            ("c", "has no engine qemu (it has docker)"),
            ("d", "has no qemu image tiny"),
            (
                "e",
                "no room: cpu (2 wanted, 1 of 8 free), mem (1024 wanted, 192 of 8192 free), "
                "disk (1000 wanted, 500 of 100000 free)",
            ),
            ("f", "lacks the label zone=a"),
        )
    )
    assert place(WEB, vm, []) == Unplaceable(())
    assert Unplaceable(()).sentence() == "no host is registered"


def test_an_agent_that_does_not_tell_the_engine_of_an_image_is_believed() -> None:
    assert place(WEB, TINY, [room(images={None: frozenset({"tiny"})})]) == Placement(HostId("h1"))


def test_what_fits_exactly_fits_and_one_more_does_not() -> None:
    exact = room(cpu_total=2, mem_total=1024, disk_total=1000)
    assert place(WEB, TINY, [exact]) == Placement(HostId("h1"))
    for total, field in ((1, "cpu"), (1023, "mem"), (999, "disk")):
        less = changed(exact, **{f"{field}_total": total})
        wanted = getattr(TINY, field)
        assert place(WEB, TINY, [less]) == Unplaceable(
            (("h1", f"no room: {field} ({wanted} wanted, {total} of {total} free)"),)
        )
    over = replace(exact, cpu_used=5)
    assert refusal(TINY, over) == "no room: cpu (2 wanted, 0 of 2 free)"


def test_refusals_read_well() -> None:
    assert refusal(TINY, room(online=False)) == "offline"
    assert refusal(TINY, room(engines=frozenset())) == "has no engine qemu (it has none)"
    assert refusal(TINY, room(engines=frozenset({"jail", "docker"}))) == "has no engine qemu (it has docker, jail)"
    picky = TINY.model_copy(update={"host_labels": {"zone": "a", "disk": "ssd"}})
    assert refusal(picky, room(labels={"zone": "b"})) == "lacks the label zone=a, disk=ssd"
    assert Unplaceable((("a", "cordoned"), ("b", "offline"))).sentence() == "a: cordoned; b: offline"


def test_how_full_a_host_is_counts_cpu_memory_and_disk_alike() -> None:
    empty = {"cpu_total": 10, "mem_total": 10_000, "disk_total": 100_000}
    for field, total in (("cpu", 10), ("mem", 10_000), ("disk", 100_000)):
        half, third = (
            room("half", **{**empty, f"{field}_used": total // 2}),
            room("a", **{**empty, f"{field}_used": total // 3}),
        )
        assert place(WEB, TINY, [third, half]) == Placement(HostId("half")), f"the fuller in {field}"
        huge = room("a", **{**empty, f"{field}_total": total * 100, f"{field}_used": total})
        assert place(WEB, TINY, [huge, half]) == Placement(HostId("half")), f"shares of {field}, not amounts"
    assert place(WEB, TINY, [room("b", **empty), room("a", **empty)]) == Placement(HostId("a")), "ties go to the lower id"


def test_a_vm_weighs_more_on_a_smaller_host() -> None:
    small, large = room("z", cpu_total=4, cpu_used=0), room("a", cpu_total=8, cpu_used=1)
    # Left free of cpu after placing: 2 of 4 there, 5 of 8 here; before placing it was 4 of 4 against 7 of 8.
    assert place(WEB, TINY, [large, small]) == Placement(HostId("z"))


def test_a_host_without_the_environment_has_fewest_of_it() -> None:
    spread = TINY.model_copy(update={"spread": "hosts"})
    with_one = room("a", env_vms={WEB: 1})
    assert place(WEB, spread, [with_one, room("b")]) == Placement(HostId("b"))
    assert place(WEB, TINY, [with_one, room("b")]) == Placement(HostId("a"))


def test_predictions_count_each_vm_for_the_next() -> None:
    two = [room("a", cpu_total=4, mem_total=2048, disk_total=2000), room("b", cpu_total=4, mem_total=2048, disk_total=2000)]
    for field in ("cpu", "mem", "disk"):
        roomy = [
            changed(host, **{f"{other}_total": 10**6 for other in ("cpu", "mem", "disk") if other != field}) for host in two
        ]
        chosen = predict(WEB, [TINY] * 5, roomy)
        assert [item.host_id for item in chosen if isinstance(item, Placement)] == ["a", "a", "b", "b"], field
        assert chosen[4] == Unplaceable(tuple((str(host.id), refusal(TINY, full(host, field))) for host in roomy))


def full(host: HostRoom, field: str) -> HostRoom:
    return changed(host, **{f"{field}_used": getattr(host, f"{field}_total")})


def test_predictions_spread_an_environment_over_hosts() -> None:
    spread = TINY.model_copy(update={"spread": "hosts"})
    other = EnvId("other")
    hosts = [room("a", env_vms={other: 9}), room("b", cpu_used=1, env_vms={WEB: 1}), room("c", cpu_used=2, env_vms={WEB: 1})]
    chosen = predict(WEB, [spread] * 4, hosts)
    assert [item.host_id for item in chosen if isinstance(item, Placement)] == ["a", "a", "c", "b"]
