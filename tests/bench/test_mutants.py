"""The sums of mutation testing are right, and nothing but a fault that was noticed counts as one."""

from __future__ import annotations

from ops.measure.mutants import summary, verdicts

TOLD = """
    reconciler.core.place.x_place__mutmut_1: killed
    reconciler.core.place.x_place__mutmut_2: survived
    reconciler.core.place.xǁUnplaceableǁsentence__mutmut_1: timeout
    reconciler.core.plan.x_plan_vm__mutmut_1: no tests
    To run one of them, type its name: see above
"""


def test_each_fault_counts_for_its_module_and_only_noticed_ones_as_such() -> None:
    found = verdicts(TOLD)
    assert found["reconciler.core.place.x_place__mutmut_2"] == ("reconciler.core.place", "survived")
    lines, share = summary(found)
    assert [line.split() for line in lines] == [
        ["reconciler.core.place", "2", "of", "3", "66.7%"],
        ["reconciler.core.plan", "0", "of", "1", "0.0%"],
        ["all", "of", "it", "2", "of", "4", "50.0%"],
    ]
    assert share == 0.5


def test_no_faults_are_no_success() -> None:
    assert summary({})[1] == 0.0
