"""Every crash point of a reference run: the same run again and again, with one process killed at one call of a port each time.

A controller's ports are its store, its agents and its clocks; an agent's are the steps by which it changes its machine. Each
call has two points, one before it and one after it; the reading of a clock has one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from specs.desired import EnvSpec, VmSpec
from tests.sim.controllers import production_in
from tests.sim.loop import Process
from tests.sim.users import KEY, Wish
from tests.sim.world import World, build, finish

SEED = 1
QUIET = 12.0  # seconds after which nobody wants anything more


@dataclass(frozen=True)
class CrashPoint:
    """The `number`-th port call of the process that was the `birth`-th to begin."""

    birth: int
    number: int

    def __str__(self) -> str:
        return f"{self.birth}:{self.number}"

    @classmethod
    def parse(cls, text: str) -> CrashPoint:
        """The reverse of str. Raises ValueError."""
        birth, _, number = text.partition(":")
        return cls(int(birth), int(number))


@dataclass
class Reference:
    """What a run has been through: the names of its processes in the order of birth, and each one's points."""

    processes: list[Process] = field(default_factory=list)
    labels: dict[CrashPoint, str] = field(default_factory=dict)
    violations: tuple[str, ...] = ()
    died_at: str = ""


def story() -> list[Wish]:
    """Hosts, a creation, a roll-out, a stop, a start, a deletion: every kind of call there is."""

    def env(name: str, cpu: int, count: int) -> EnvSpec:
        entry = VmSpec(image="tiny", name="m", cpu=cpu, mem=64, disk=128, ports=(80,), count=count)
        return EnvSpec(id=name, ssh_keys=(KEY,), vms=(entry,), lifetime="never")  # type: ignore[arg-type]

    hosts = [Wish(0.1 * number, "host", f"10.0.0.{number}:9100") for number in (1, 2, 3)]
    return [
        *hosts,
        Wish(0.4, "create", "one", env("one", 1, 2)),
        Wish(0.5, "create", "two", env("two", 1, 1)),
        Wish(4.0, "put", "one", env("one", 2, 2)),
        Wish(6.0, "stop", "two"),
        Wish(8.0, "start", "two"),
        Wish(9.0, "extend", "two", None, 3600),
        Wish(10.0, "delete", "one"),
    ]


def reference(victim: CrashPoint | None = None, timeline: list[str] | None = None) -> Reference:
    """Runs the story; the victim's process is killed at its point, and whoever starts such processes starts another."""
    world = World(SEED, timeline=timeline)
    ran = Reference()

    def born(process: Process) -> None:
        birth = len(ran.processes)
        ran.processes.append(process)
        process.on_point = lambda label: ran.labels.setdefault(CrashPoint(birth, process.points), f"{process.name}: {label}")
        if victim is not None and victim.birth == birth:
            process.die_at = victim.number

    world.loop.on_birth = born
    with production_in(world):
        try:
            build(world, requests=story())
            world.run_until(QUIET)
            finish(world)
            ran.violations = tuple(world.checks.found)
        finally:
            world.loop.on_birth = None
            world.close()
    if victim is not None and victim.birth < len(ran.processes):
        ran.died_at = ran.processes[victim.birth].died_at_label
    return ran


def crash_points() -> tuple[Reference, list[CrashPoint]]:
    """The reference run without a crash, and all of its points."""
    whole = reference()
    return whole, list(whole.labels)


def enumerate_crashes(points: list[CrashPoint]) -> Iterator[tuple[CrashPoint, Reference]]:
    """Runs the story once for each point, and kills there."""
    for point in points:
        yield point, reference(point)


def by_kind(labels: dict[CrashPoint, str]) -> Counter[str]:
    """How many points there are of each kind, the names of processes cut to what they are."""
    return Counter(f"{label.split()[0]}: {label.partition(': ')[2]}" for label in labels.values())
