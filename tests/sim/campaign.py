"""Many schedules one after the other, on as many cores as asked for, and what came of them."""

from __future__ import annotations

import gc
import multiprocessing
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

from tests.sim.world import Result, run

SHARE = 10  # schedules handed to a process at a time


@dataclass
class Summary:
    """The sums over all schedules. `fewest_*` are the smallest numbers any schedule had; `cpu` seconds over all cores."""

    schedules: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    schedules_with: Counter[str] = field(default_factory=Counter)
    granted: Counter[str] = field(default_factory=Counter)
    first_with: dict[str, int] = field(default_factory=dict)
    """The lowest seed in which each kind of fault happened or each verb was granted."""
    failed: dict[int, str] = field(default_factory=dict)
    fewest_hosts: int = 1 << 30
    fewest_vms: int = 1 << 30
    fewest_faults: int = 1 << 30
    slowest: float = 0.0
    cpu: float = 0.0

    def add(self, result: Result, cpu: float) -> None:
        """Counts one schedule."""
        self.schedules += 1
        self.cpu += cpu
        self.faults.update(result.faults)
        self.schedules_with.update(result.faults.keys())
        self.granted.update(result.granted)
        for what in (*result.faults, *result.granted):
            self.first_with[what] = min(self.first_with.get(what, result.seed), result.seed)
        self.fewest_hosts = min(self.fewest_hosts, result.hosts)
        self.fewest_vms = min(self.fewest_vms, result.vms)
        self.fewest_faults = min(self.fewest_faults, result.faults.total())
        self.slowest = max(self.slowest, result.converged_after)
        if result.violations:
            self.failed[result.seed] = result.violations[0]

    @property
    def rate(self) -> float:
        """Schedules a second of one core."""
        return self.schedules / self.cpu if self.cpu else 0.0


def campaign(
    seeds: Iterable[int],
    kinds: Collection[str] | None = None,
    jobs: int = 1,
    progress: Callable[[Summary], None] = lambda _: None,
) -> Summary:
    """Runs a schedule for each seed; `kinds` limits the faults. `progress` is called after every schedule."""
    summary = Summary()
    for result, cpu in _results(seeds, kinds, jobs):
        summary.add(result, cpu)
        progress(summary)
    return summary


def _results(seeds: Iterable[int], kinds: Collection[str] | None, jobs: int) -> Iterator[tuple[Result, float]]:
    work = partial(_timed, kinds=kinds)
    if jobs == 1:
        with few_collections():
            yield from map(work, seeds)
        return
    with multiprocessing.get_context("spawn").Pool(jobs, _prepare_process) as pool:
        yield from pool.imap_unordered(work, seeds, SHARE)


def _timed(seed: int, kinds: Collection[str] | None) -> tuple[Result, float]:
    begin = time.process_time()
    result = run(seed, kinds)
    return result, time.process_time() - begin


def _prepare_process() -> None:
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@contextmanager
def few_collections() -> Iterator[None]:
    """Garbage is collected less often inside: a schedule makes a lot of it and is short."""
    before = gc.get_threshold()
    _prepare_process()
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()
