"""The bench runs and says what it must; its figures are nobody's business here."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

BENCH = (sys.executable, "-m", "ops.measure")


def bench(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*BENCH, *words], capture_output=True, text=True, timeout=200, check=False)


@pytest.mark.e2e
def test_a_quick_run_tells_figures_and_goals_as_json() -> None:
    told = bench("p1", "--quick", "-o", "json")
    assert (told.returncode, told.stderr) == (0, "")
    report = json.loads(told.stdout)
    assert report["machine"]["quick"] is True
    (result,) = report["results"]
    assert (result["metric"], result["figures"]["vms"], result["figures"]["calls_per_vm"]) == ("P1", 100, 1.0)
    assert [check["name"] for check in result["checks"]] == ["× floor", "VMs/s"]
    assert all(isinstance(check["met"], bool) for check in result["checks"])


def test_an_unknown_metric_is_refused_with_those_there_are() -> None:
    told = bench("p99")
    assert told.returncode == 2
    assert "there is no metric P99; there are P1, P2," in told.stderr
