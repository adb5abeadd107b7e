"""The command line of the simulation; ops/sim starts it."""

from __future__ import annotations

import sys
import time
from collections.abc import Collection

import click

from tests.sim import crashes
from tests.sim.campaign import Summary, campaign, few_collections
from tests.sim.faults import KINDS
from tests.sim.planted import PLANTED, hunt
from tests.sim.world import run

SHOWN = 20  # violations shown in full


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--seeds", type=click.IntRange(1), default=500, show_default=True, help="How many schedules to run.")
@click.option("--first", type=click.IntRange(0), default=0, show_default=True, help="The first seed.")
@click.option("--faults", default="", metavar="KIND,…", help="Only these kinds of faults (default: all).")
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="Processes to run schedules in.")
@click.option("--timeline", type=click.IntRange(0), metavar="SEED", help="Run one schedule and tell everything that happens.")
@click.option("--planted", is_flag=True, help="Plant classic mistakes one at a time: each must be caught.")
@click.option("--crash-points", is_flag=True, help="Kill controller and agents at every port call of a reference run.")
@click.option("--crash-at", metavar="POINT", help="Tell the reference run with a kill at this point.")
@click.option("--kinds", is_flag=True, help="List the kinds of faults.")
def main(
    seeds: int,
    first: int,
    faults: str,
    jobs: int,
    timeline: int | None,
    planted: bool,
    crash_points: bool,
    crash_at: str | None,
    kinds: bool,
) -> None:
    """Runs the production controller against simulated hosts, networks and disks under faults, in virtual time.

    A schedule is made from its seed alone: the same seed is the same run, always.
    """
    chosen = _chosen(faults)
    if kinds:
        click.echo("\n".join(KINDS))
    elif timeline is not None:
        sys.exit(_tell(timeline, chosen))
    elif crash_points:
        sys.exit(_crash_everywhere())
    elif crash_at is not None:
        sys.exit(_tell_crash(crash_at))
    elif planted:
        sys.exit(_hunt_all(first, seeds))
    else:
        sys.exit(_run_many(seeds, first, chosen, jobs))


def _chosen(faults: str) -> Collection[str] | None:
    if not faults:
        return None
    names = {name.strip() for name in faults.split(",")}
    unknown = sorted(names - KINDS.keys())
    if unknown:
        raise click.BadParameter(f"no such kind: {', '.join(unknown)}; there are {', '.join(KINDS)}", param_hint="--faults")
    return names


def replay(seed: int, chosen: Collection[str] | None) -> str:
    """The command that shows a schedule again."""
    return f"ops/sim --timeline {seed}" + (f" --faults '{','.join(sorted(chosen))}'" if chosen else "")


def _run_many(seeds: int, first: int, chosen: Collection[str] | None, jobs: int) -> int:
    begin = time.monotonic()

    def progress(summary: Summary) -> None:
        if sys.stderr.isatty() and summary.schedules % 20 == 0:
            click.echo(f"\r{summary.schedules} of {seeds}, {len(summary.failed)} with violations", nl=False, err=True)

    summary = campaign(range(first, first + seeds), chosen, jobs, progress)
    took = time.monotonic() - begin
    if sys.stderr.isatty():
        click.echo("\r\033[K", nl=False, err=True)
    click.echo(
        f"{summary.schedules} schedules in {took:.1f} s: {summary.schedules / took:.1f} a second, {summary.rate:.1f} a core"
    )
    click.echo(
        f"each with {summary.fewest_hosts} hosts, {summary.fewest_vms} VMs and {summary.fewest_faults} faults or more; "
        f"converged within {summary.slowest:.0f} virtual seconds of the last fault"
    )
    click.echo("faults injected:")
    for kind, times in summary.faults.most_common():
        click.echo(f"  {times:7} {kind} (in {summary.schedules_with[kind]} schedules)")
    click.echo("granted to people: " + ", ".join(f"{times} {verb}" for verb, times in summary.granted.most_common()))
    for seed, what in sorted(summary.failed.items())[:SHOWN]:
        click.echo(f"seed {seed}: {what}\n    {replay(seed, chosen)}")
    click.echo(f"violations: {len(summary.failed)}")
    return 1 if summary.failed else 0


def _tell(seed: int, chosen: Collection[str] | None) -> int:
    lines: list[str] = []
    result = run(seed, chosen, timeline=lines)
    click.echo("\n".join(lines))
    click.echo(f"{result.faults.total()} faults, {result.calls} calls, {len(result.violations)} violations")
    for what in result.violations:
        click.echo(what)
    return 1 if result.violations else 0


def _hunt_all(first: int, limit: int) -> int:
    caught = 0
    for name in PLANTED:
        found = hunt(name, first, limit)
        caught += found is not None
        click.echo(f"{name}: " + (f"caught after {found[0]} schedules: {found[1]}" if found else f"NOT CAUGHT in {limit}"))
    click.echo(f"{caught} of {len(PLANTED)} caught")
    return 0 if caught == len(PLANTED) else 1


def _crash_everywhere() -> int:
    begin = time.monotonic()
    whole, points = crashes.crash_points()
    failed = {}
    with few_collections():
        for point, ran in crashes.enumerate_crashes(points):
            if not ran.died_at:
                ran.violations = (*ran.violations, "X: nothing died there: the run is not the same twice")
            if ran.violations:
                failed[point] = ran.violations[0]
    for kind, times in sorted(crashes.by_kind(whole.labels).items()):
        click.echo(f"  {times:5} {kind}")
    for point, what in list(failed.items())[:SHOWN]:
        click.echo(f"{point} ({whole.labels[point]}): {what}\n    ops/sim --crash-at {point}")
    click.echo(f"{len(points)} crash points in {time.monotonic() - begin:.1f} s, violations: {len(failed)}")
    return 1 if failed or whole.violations else 0


def _tell_crash(text: str) -> int:
    try:
        point = crashes.CrashPoint.parse(text)
    except ValueError:
        raise click.BadParameter("must be as --crash-points shows it, such as 3:17", param_hint="--crash-at") from None
    lines: list[str] = []
    ran = crashes.reference(point, lines)
    click.echo("\n".join([*lines, *ran.violations]))
    return 1 if ran.violations else 0


if __name__ == "__main__":
    main(prog_name="ops/sim")
