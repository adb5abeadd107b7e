"""What goes wrong in a schedule: which faults, when, drawn from the seed. Each kind can be switched off by name."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from reconciler.core.expiry import MAX_JUMP
from specs.names import VmId
from tests.sim.host import Host
from tests.sim.network import MessageFault

if TYPE_CHECKING:
    from tests.sim.world import World

FAULT_SECONDS = 45.0
DRAWS = 26
ATLEAST = 20  # faults that really happen in a schedule
Strike = Callable[["World", random.Random], None]


@dataclass(frozen=True)
class Fault:
    """One blow at one time; its details come from its own seed, so that leaving others out changes nothing about it."""

    at: float
    kind: str
    seed: str

    def strike(self, world: World) -> None:
        """Does it, unless the schedule is past that."""
        if not world.is_calm:
            KINDS[self.kind][1](world, random.Random(self.seed))


def plan_faults(seed: int, kinds: Collection[str] | None = None) -> list[Fault]:
    """The faults of a schedule in the order of time; those whose kind is not in `kinds` are left out."""
    rng = random.Random(f"{seed} faults")
    names, weights = list(KINDS), [weight for weight, _ in KINDS.values()]
    plan = []
    for number in range(DRAWS):
        kind = rng.choices(names, weights)[0]
        at = rng.uniform(0.5, FAULT_SECONDS - 1.0) if rng.random() < 0.6 else rng.uniform(0.5, 15.0)
        if kinds is None or kind in kinds:
            plan.append(Fault(at, kind, f"{seed} {number}"))
    return sorted(plan, key=lambda fault: fault.at)


def top_up(world: World) -> None:
    """Some faults find nothing to strike: hosts are cut off and slowed until ATLEAST have happened."""
    missing = ATLEAST - world.faults.total()
    for number in range(missing):
        kind = ("cut to", "slow host", "cut from")[number % 3]  # these always find something
        world.loop.call_later(number * 0.2, Fault(world.loop.now, kind, f"{world.seed} more {number}").strike, world)


def _host(world: World, rng: random.Random) -> Host:
    return rng.choice(world.hosts)


def _message(kind: str, leg: str, seconds: tuple[float, float], chance_mutating: float = 0.7) -> Strike:
    def strike(world: World, rng: random.Random) -> None:
        for _ in range(2):
            fault = MessageFault(kind, _host(world, rng).name, leg, rng.random() < chance_mutating, rng.uniform(*seconds))
            world.network.armed.append(fault)

    return strike


def _reorder(world: World, rng: random.Random) -> None:
    host = _host(world, rng).name
    for leg in ("request", "reply"):
        world.network.armed.append(MessageFault("reorder", host, leg, rng.random() < 0.7, rng.uniform(0.01, 3.0)))


def _cut(*directions: str) -> Strike:
    def strike(world: World, rng: random.Random) -> None:
        host, until = _host(world, rng).name, world.loop.now + rng.choice([2.0, 10.0, 35.0, 50.0])
        for direction in directions:
            (world.network.cut_to if direction == "to" else world.network.cut_from)[host] = until
        world.injected(f"cut {' and '.join(directions)}", f"{host} until {until:.1f}")

    return strike


def _slow(world: World, rng: random.Random) -> None:
    host = _host(world, rng).name
    world.network.slow[host] = world.loop.now + rng.uniform(2, 20)
    world.injected("slow host", host)


def _kill_agent(world: World, rng: random.Random) -> None:
    agent = world.agents[_host(world, rng).name]
    if agent.process.alive:
        agent.process.die_at = agent.process.points + rng.randint(1, 12)
        world.injected("agent killed", agent.host.name)


def _reboot(world: World, rng: random.Random) -> None:
    host = _host(world, rng)
    if host.powered:
        world.injected("host reboot", host.name)
        world.power_off(host)
        world.loop.call_later(rng.uniform(3, 15), world.power_on, host)


def _dead(world: World, rng: random.Random) -> None:
    host = _host(world, rng)
    if sum(host.powered for host in world.hosts) > 2:
        world.injected("dead host", host.name)
        if host.powered:
            world.power_off(host)


def _running(world: World, rng: random.Random) -> tuple[Host, VmId] | None:
    running = [
        (host, vm_id)
        for host in world.hosts
        for vm_id, state in host.engine.items()
        if state == "running" and vm_id not in world.strangers
    ]
    return rng.choice(running) if running else None


def _vm_ends(state: str) -> Strike:
    def strike(world: World, rng: random.Random) -> None:
        victim = _running(world, rng)
        if victim is not None:
            world.injected(f"vm {state}", victim[1])
            victim[0].halt(victim[1], state, "fault")  # type: ignore[arg-type]

    return strike


def _lose_record(world: World, rng: random.Random) -> None:
    victim = _running(world, rng)
    if victim is None:
        return
    host, vm_id = victim
    agent = world.agents[host.name]
    world.injected("record deleted", f"{vm_id} {host.name}")
    agent.process.kill("records deleted by hand")  # nobody removes records under a running agent
    host.lose(vm_id)


def _kill_controller(world: World, rng: random.Random) -> None:
    controller = world.controllers[-1]
    if controller.process.alive:
        controller.process.die_at = controller.process.points + rng.randint(1, 40)
        world.injected("controller killed", controller.process.name)


def _restore(world: World, rng: random.Random) -> None:
    disk, backup = world.disk, world.disk.copy()

    def put_back() -> None:
        if not world.is_calm and world.disk is disk and not world.has_term_of_the_future():
            world.injected("store restored", f"as it was at {taken_at:.1f}")
            world.restore_store(backup, disk)

    taken_at = world.loop.now
    world.loop.call_later(rng.uniform(0.5, 20.0), put_back)


def _second_controller(world: World, rng: random.Random) -> None:
    if world.controllers[-1].is_ready:
        world.injected("two controllers")
        first = world.start_second_controller()
        world.loop.call_later(rng.uniform(1.0, 25.0), first.retire)


def _store(attribute: str, kind: str, seconds: tuple[float, float]) -> Strike:
    def strike(world: World, rng: random.Random) -> None:
        setattr(world.disk, attribute, world.loop.now + rng.uniform(*seconds))
        world.injected(kind)

    return strike


def _jump(world: World, rng: random.Random) -> None:
    if world.jump:
        return
    world.jump = rng.choice([7200.0, 86_400.0, 900.0, 300.0, -300.0, -7200.0])
    if world.jump > MAX_JUMP:
        world.jumped_ahead_at = world.loop.now
    world.injected("clock jump", world.jump)

    world.loop.call_later(rng.uniform(2, 40), world.set_clock_right)


def _fails(step: str) -> Strike:
    def strike(world: World, rng: random.Random) -> None:
        world.engine_fails[f"{step} {_host(world, rng).name}"] += rng.randint(1, 3)

    return strike


def _late_image(world: World, rng: random.Random) -> None:
    host = _host(world, rng)
    missing = sorted({"base", "late"} - host.images)
    if missing:
        world.injected("late image", f"{missing[0]} on {host.name}")
        host.images.add(missing[0])


def _late_room(world: World, rng: random.Random) -> None:
    host = _host(world, rng)
    world.injected("late room", host.name)
    host.cpu += 2


KINDS: dict[str, tuple[int, Strike]] = {
    "lose request": (4, _message("lose request", "request", (0, 0))),
    "lose reply": (4, _message("lose reply", "reply", (0, 0))),
    "delay": (4, _message("delay", "request", (0.5, 60.0), 0.9)),
    "delay reply": (3, _message("delay reply", "reply", (0.5, 60.0), 0.9)),
    "duplicate": (4, _message("duplicate", "request", (0.0, 30.0), 1.0)),
    "garbage": (2, _message("garbage", "reply", (0, 0), 0.5)),
    "truncated": (2, _message("truncated", "reply", (0, 0), 0.5)),
    "huge": (2, _message("huge", "reply", (0, 0), 0.5)),
    "reorder": (4, _reorder),
    "cut to and from": (2, _cut("to", "from")),
    "cut to": (2, _cut("to")),
    "cut from": (2, _cut("from")),
    "slow host": (2, _slow),
    "agent killed": (6, _kill_agent),
    "host reboot": (2, _reboot),
    "dead host": (1, _dead),
    "vm crashed": (3, _vm_ends("crashed")),
    "vm exited": (2, _vm_ends("exited")),
    "record deleted": (2, _lose_record),
    "controller killed": (5, _kill_controller),
    "store restored": (1, _restore),
    "two controllers": (1, _second_controller),
    "store locked": (2, _store("locked_until", "store locked", (0.1, 12.0))),
    "store full": (2, _store("full_until", "store full", (0.5, 12.0))),
    "store slow": (1, _store("slow_until", "store slow", (0.5, 8.0))),
    "clock jump": (2, _jump),
    "disk fails": (2, _fails("disk")),
    "boot fails": (2, _fails("boot")),
    "remove fails": (2, _fails("remove")),
    "late image": (2, _late_image),
    "late room": (1, _late_room),
}
