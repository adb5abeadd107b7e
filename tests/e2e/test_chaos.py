"""Rounds of kill -9 under load, and the judge of those rounds."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.e2e.chaos import Chaos, Judge, Wish
from tests.e2e.site import Box, Found, Site

TWO = Wish({"a": 1, "b": 1})
A, B = Box("vm-1", "env", "a", 101), Box("vm-2", "env", "b", 102)


def judged(judge: Judge, wish: Wish | None, *hosts: tuple[Box, ...], stray: str = "") -> list[str]:
    """The kinds of violations on hosts with these VMs."""
    found = {f"host-{number}": Found(boxes, (stray,) if stray else ()) for number, boxes in enumerate(hosts)}
    return [line.partition(":")[0] for line in judge.violations({"env": wish} if wish else {}, found)]


@pytest.mark.parametrize(
    ("wish", "hosts", "kinds"),
    [
        (TWO, ((A,), (B,)), []),
        (TWO, ((A,), ()), ["lost"]),
        (TWO, ((A,), (B, A)), ["duplicated"]),
        (TWO, ((A,), (B, replace(A, id="vm-3"))), ["duplicated"]),
        (TWO, ((A,), (replace(B, pid=0),)), ["lost", "restarted"]),
        (TWO, ((A, B), ()), ["lost"]),
        (TWO, ((replace(A, pid=103),), (B,)), ["restarted"]),
        (TWO, ((replace(A, id="vm-3"),), (B,)), ["lost"]),
        (TWO, ((B,), (A,)), ["lost", "lost"]),
        (replace(TWO, boots=1), ((replace(A, pid=103),), (B,)), []),
        (replace(TWO, boots=1, power="stopped"), ((replace(A, pid=0),), (B,)), ["lost"]),
        (replace(TWO, boots=1, power="stopped"), ((replace(A, pid=0),), ()), ["lost"]),
        (Wish({"a": 2, "b": 1}), ((replace(A, id="vm-3", pid=103),), (B,)), []),
        (Wish({"a": 1}), ((A,), (B,)), ["leaked"]),
        (None, ((A,), (B,)), ["leaked", "leaked"]),
        (None, ((), ()), []),
    ],
)
def test_what_is_lost_duplicated_leaked_or_restarted_is_told(
    wish: Wish | None, hosts: tuple[tuple[Box, ...], ...], kinds: list[str]
) -> None:
    judge = Judge()
    assert judged(judge, TWO, (A,), (B,)) == []
    assert judged(judge, wish, *hosts) == kinds


def test_what_does_not_belong_together_on_a_host_is_leaked() -> None:
    assert judged(Judge(), None, (), stray="container vm-9 without a record") == ["leaked"]


@pytest.mark.real
@pytest.mark.e2e
def test_what_an_agent_never_made_is_found_on_its_host(fleet: Site) -> None:
    host = fleet.hosts[0]
    (host.vms / "vm-stray").mkdir()
    host.docker("run", "--detach", "--name=muster-stray", "--network=none", "muster-test/box")
    rule = "add table inet stray; add chain inet stray c; add rule inet stray c tcp dport 1 counter"
    host.docker.host("nft", f"{rule}; add map inet stray m {{ type inet_service : ipv4_addr . inet_service; }}")
    host.docker.host("nft", "add element inet stray m { 20000 : 10.91.0.9 . 22 }")
    try:
        told = " | ".join(host.found().stray)
    finally:
        host.docker("rm", "--force", "muster-stray")
        host.docker.host("nft", "delete", "table", "inet", "stray")
        (host.vms / "vm-stray").rmdir()
    for sign in ("folder vm-stray", "container stray without", "'10.91.0.9', '22') without a lease", "links on the bridge"):
        assert sign in told, told


@pytest.mark.real
@pytest.mark.e2e
def test_killed_at_random_moments_under_load_nothing_is_lost_duplicated_leaked_or_restarted(fleet: Site) -> None:
    chaos = Chaos(fleet, seed=1)
    chaos.begin()
    done = chaos.round(1)
    assert done.violations == ()
    assert done.kills.total() > 0 and done.calls.total() > 0 and chaos.judge.kept >= len(fleet.hosts)
