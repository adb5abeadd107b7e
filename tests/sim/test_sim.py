"""The simulation in the ordinary test run: enough schedules to notice, and the proof that its checks can fail."""

from __future__ import annotations

import os

import pytest

from tests.sim.campaign import Summary, campaign
from tests.sim.crashes import crash_points, enumerate_crashes
from tests.sim.faults import KINDS
from tests.sim.planted import hunt
from tests.sim.users import VERBS
from tests.sim.world import run

SEEDS = int(os.environ.get("MUSTER_SIM_SEEDS", "500"))  # ops/test --deep asks for 10,000


@pytest.fixture(scope="module")
def summary() -> Summary:
    """All schedules of this run."""
    return campaign(range(SEEDS), jobs=os.cpu_count() or 1)


@pytest.mark.timeout(3600)
def test_no_schedule_violates_a_rule(summary: Summary) -> None:
    assert summary.schedules == SEEDS
    assert summary.failed == {}, "show one with: ops/sim --timeline SEED"


def test_every_schedule_has_enough_hosts_vms_and_faults(summary: Summary) -> None:
    assert (summary.fewest_hosts >= 3, summary.fewest_vms >= 8, summary.fewest_faults >= 20) == (True, True, True)


def test_every_kind_of_fault_really_happens_in_many_schedules(summary: Summary) -> None:
    rare = {kind: summary.schedules_with[kind] for kind in KINDS if summary.schedules_with[kind] < 10}
    assert rare == {}


def test_every_kind_of_fault_and_every_wish_of_people_occurs_within_50_schedules(summary: Summary) -> None:
    late = {what: summary.first_with.get(what) for what in (*KINDS, "poison", *VERBS) if summary.first_with.get(what, 50) >= 50}
    assert late == {}


def test_the_same_seed_is_the_same_run() -> None:
    runs: list[list[str]] = [[], []]
    for timeline in runs:
        run(3, timeline=timeline)
    assert runs[0] == runs[1] and len(runs[0]) > 100


@pytest.mark.parametrize(
    "mistake", ["non-idempotent create", "forgets the tombstone", "acts before commit", "double placement", "lost wake-up"]
)
def test_a_planted_mistake_is_caught(mistake: str) -> None:
    assert hunt(mistake, 0, 50) is not None


def test_a_kill_at_a_port_call_of_controller_or_agent_leaves_nothing_undone() -> None:
    whole, points = crash_points()
    assert whole.violations == () and len(points) > 500
    chosen = points if SEEDS >= 10_000 else points[::12]
    outcomes = {str(point): (bool(ran.died_at), ran.violations) for point, ran in enumerate_crashes(chosen)}
    wrong = {point: outcome for point, outcome in outcomes.items() if outcome != (True, ())}
    assert wrong == {}, "show one with: ops/sim --crash-at POINT"
