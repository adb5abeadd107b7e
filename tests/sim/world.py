"""One schedule: hosts, agents, network, disks, controllers and users made from one seed, run on one event heap."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from reconciler.core.expiry import MAX_JUMP
from reconciler.store.database import TERM_EPOCH
from specs.names import ClusterId, VmId
from specs.wire import CreateVmReq
from tests.sim.agent import Agent, Weather
from tests.sim.checks import Checks
from tests.sim.controllers import EPOCH, SimController, production_in
from tests.sim.faults import FAULT_SECONDS, Fault, plan_faults, top_up
from tests.sim.host import Host
from tests.sim.loop import SimLoop
from tests.sim.network import Network
from tests.sim.outcome import unsettled
from tests.sim.store import CLUSTER, Backup, Disk
from tests.sim.users import Users, Wish, wishes

BOUND = 240.0  # seconds after the last fault within which everything is as it should be
IDLE = 20.0  # seconds a converged fleet is watched doing nothing
LOOK_EVERY = 1.0
TOP_UP = 5.0  # seconds before the end of the faults


@dataclass(frozen=True)
class Result:
    """What came of a schedule. `faults` counts those that really happened, by kind."""

    seed: int
    violations: tuple[str, ...]
    faults: Counter[str]
    hosts: int
    vms: int
    converged_after: float
    calls: int
    granted: Counter[str]
    """What people asked for and were told is recorded, by verb."""


class World:
    """Everything of one schedule. `timeline` collects readable lines if it is a list."""

    def __init__(self, seed: int, *, timeline: list[str] | None = None) -> None:
        self.seed = seed
        self.timeline = timeline
        self.rng = random.Random(f"{seed} world")
        self.loop = SimLoop(self._unexpected)
        self.checks = Checks(self)
        self.network = Network(self)
        self.users = Users(self)
        self.faults: Counter[str] = Counter()
        self.jump = 0.0
        self.jumped_ahead_at = -1000.0
        self.last_jump, self.jump_ended_at = 0.0, -1000.0
        self.lost_power: set[str] = set()
        """Hosts that have been off: nobody starts strangers again."""
        self.is_calm = False
        self.is_over = False
        self.is_cured = False
        self.engine_fails: Counter[str] = Counter()
        """How many times the next create, boot or removal on a host fails: "<step> <host>"."""
        self.strangers: set[VmId] = set()
        self.poisoned: set[str] = set()
        """VMs that have been seen to fail at every start."""
        self.hosts: list[Host] = []
        self.agents: dict[str, Agent] = {}
        self.controllers: list[SimController] = []
        self.disk = Disk.take()
        self._boots = 0
        self._by_addr: dict[str, Host] = {}

    # ---- what parts ask of the world

    def note(self, *words: object) -> None:
        """A line of the timeline."""
        if self.timeline is not None:
            self.timeline.append(f"{self.loop.now:9.3f}  {' '.join(map(str, words))}")

    def injected(self, kind: str, what: object = "") -> None:
        """A fault has happened."""
        self.faults[kind] += 1
        self.note("FAULT", kind, what)

    def true_wall(self) -> float:
        """Unix seconds as they really are."""
        return EPOCH + self.loop.now

    def wall(self) -> float:
        """Unix seconds as the controller's machine has them."""
        return EPOCH + self.loop.now + self.jump

    def set_clock_right(self) -> None:
        """The wall clock jumps back to the truth."""
        if self.jump < -MAX_JUMP:
            self.jumped_ahead_at = self.loop.now
        self.last_jump, self.jump_ended_at = self.jump, self.loop.now
        self.jump = 0.0

    def host_at(self, addr: str) -> Host:
        """The machine behind an address."""
        return self._by_addr[addr]

    def addr_of(self, name: str) -> str:
        """The address of a machine."""
        return next(host.addr for host in self.hosts if host.name == name)

    def store_latency(self) -> float:
        """Seconds a group commit takes."""
        return self.rng.uniform(0.5, 4.0) if self.loop.now < self.disk.slow_until else self.rng.uniform(0.0005, 0.004)

    def serving(self) -> SimController | None:
        """The controller that answers people now."""
        return next((c for c in reversed(self.controllers) if c.is_ready and not c.is_retired), None)

    def _unexpected(self, message: str, error: BaseException | None) -> None:
        self.checks.violated("X", f"{message}: {error!r}")

    # ---- machines and processes

    def add_host(self, name: str, cpu: int, images: Collection[str]) -> Host:
        """A machine with an agent."""
        number = len(self.hosts) + 1
        host = Host(name, f"10.0.0.{number}:9100", cpu, 4096, 8192, set(images), self.checks)
        self.hosts.append(host)
        self._by_addr[host.addr] = host
        self.start_agent(host)
        return host

    def start_agent(self, host: Host) -> None:
        """A new agent process, if the machine is on and none runs."""
        old = self.agents.get(host.name)
        if not host.powered or (old is not None and old.process.alive):
            return
        self._boots += 1

        def pace() -> float:
            slow = self.loop.now < self.network.slow.get(host.name, 0.0)
            return self.rng.uniform(1.0, 8.0) if slow else self.rng.uniform(0.002, 0.4)

        def fails(step: str, request: CreateVmReq) -> str:
            return self._failure(host, step, request)

        def died(label: str) -> None:
            self.note("agent dies", host.name, label)
            self.network.agent_died(agent)
            if host.powered:
                self.loop.call_later(self.rng.uniform(0.2, 3.0), self.start_agent, host)

        agent = Agent(host, self.loop, f"b{self._boots}", Weather(pace, fails, self.true_wall), died)
        self.agents[host.name] = agent
        self.note("agent starts", host.name, agent.boot_id)

    def _failure(self, host: Host, step: str, request: CreateVmReq) -> str:
        key = f"{step} {host.name}"
        if self.engine_fails[key] > 0:
            self.engine_fails[key] -= 1
            self.injected(f"{step} fails", f"{request.vm_id} {host.name}")
            return f"the engine fails at {step}"
        if step == "boot" and request.image == "poison" and not self.is_cured:
            if request.vm_id not in self.poisoned:
                self.poisoned.add(request.vm_id)
                self.injected("poison", request.vm_id)
            return "poison never boots"
        return ""

    def power_on(self, host: Host) -> None:
        """The machine comes back."""
        if not host.powered:
            host.powered = True
            self.note("power on", host.name)
            self.start_agent(host)

    def power_off(self, host: Host) -> None:
        """The machine loses power."""
        self.lost_power.add(host.name)
        host.lose_power()
        self.agents[host.name].process.kill("power off")

    def start_controller(self, disk: Disk | None = None) -> SimController:
        """A new controller process."""
        controller = SimController(self, disk or self.disk, f"controller {len(self.controllers) + 1}")
        self.controllers.append(controller)
        self.note("controller starts", controller.process.name)
        return controller

    def restart_controller_later(self, dead: SimController) -> None:
        """The service manager notices."""
        self.loop.call_later(self.rng.uniform(0.3, 3.0), self._restart, dead)

    def _restart(self, dead: SimController) -> None:
        if not self.is_over and not dead.is_retired:
            self.start_controller(dead.disk)

    def restore_store(self, backup: Backup, disk: Disk) -> None:
        """Somebody puts an older copy in the place of the store, as the handbook says with no controller running."""
        for controller in self.controllers:
            if controller.disk is disk:
                controller.process.kill("the store is put back")
        self.checks.fork(backup.mirror)
        disk.restore(backup)

    def start_second_controller(self) -> SimController:
        """Somebody starts a controller on a copy of the store while the first one runs; returns the first one."""
        first = self.controllers[-1]
        backup = self.disk.copy()
        self.disk = Disk.take()
        self.checks.fork(backup.mirror)
        self.disk.restore(backup)
        first.is_last = True
        self.start_controller()
        return first

    def retire_predecessors(self) -> None:
        """One controller remains."""
        for controller in self.controllers:
            if controller.disk is not self.disk and not controller.is_retired:
                controller.retire()

    def has_term_of_the_future(self) -> bool:
        """Whether a controller has begun with its clock ahead: a store that has forgotten that term has to wait so long."""
        begun = [c.disk.mirror.term for c in self.controllers]  # a call of that term may still be on its way
        known = [host.terms.highest(ClusterId(CLUSTER)) for host in self.hosts]
        return max(begun + known) > self.true_wall() - TERM_EPOCH + len(self.controllers)

    def heed_terms(self) -> None:
        """A controller that began with its clock behind is told by every host that its term is over: it is started again."""
        serving = self.serving()
        if serving is not None and serving.controller is not None:
            highest = max(host.terms.highest(serving.controller.fleet.cluster) for host in self.hosts)
            if serving.controller.term < highest:
                serving.process.kill("its term is over")

    # ---- the run

    def run_until(self, until: float) -> None:
        """Runs everything due before `until`, or up to the first violation."""
        while not self.checks.found and self.loop.step(until):
            pass

    def run_until_settled(self, bound: float, rule: str) -> None:
        """Runs until reality is what was asked for; a violation of `rule` if it is not by `bound`."""
        why = "nothing looked"
        while not self.checks.found:
            self.heed_terms()
            why = unsettled(self)
            if not why or self.loop.now >= bound:
                break
            self.run_until(min(bound, self.loop.now + LOOK_EVERY))
        if why and not self.checks.found:
            self.checks.violated(rule, why)

    def calm(self) -> None:
        """No more faults, but for dead hosts and poison."""
        self.note("---- faults stop")
        self.is_calm = True
        self.set_clock_right()
        self.retire_predecessors()
        self.network.heal()
        self.engine_fails.clear()
        for disk in {id(c.disk): c.disk for c in self.controllers}.values():
            disk.locked_until = disk.full_until = disk.slow_until = 0.0
        for host in self.hosts:
            host.images |= {"tiny", "base", "late", "poison"}
            if self.checks.forked:  # what nobody knows of any more takes room
                host.cpu, host.mem, host.disk = 2 * host.cpu + 32, 2 * host.mem, 2 * host.disk

    def cure(self) -> None:
        """Poison boots and dead hosts come back."""
        self.note("---- dead hosts return, poison boots")
        self.is_cured = True
        for host in self.hosts:
            self.power_on(host)

    def close(self) -> None:
        """Ends every process."""
        self.is_over = True
        for controller in self.controllers:
            controller.retire()
        for agent in self.agents.values():
            agent.process.kill("over")
        for _ in range(10_000):
            if not self.loop.step(self.loop.now):
                break
        for disk in {id(disk): disk for disk in (self.disk, *(c.disk for c in self.controllers))}.values():
            disk.give_back()


def build(world: World, requests: list[Wish] | None = None, faults: list[Fault] | None = None, tops_up: bool = False) -> None:
    """Hosts, the first controller, and everything that is to happen, on the heap."""
    rng = random.Random(f"{world.seed} hosts")
    for number in range(rng.choice([3, 3, 4])):
        images = {"tiny", "poison"} | ({"base"} if rng.random() < 0.7 else set())
        host = world.add_host(f"h{number}", rng.choice([6, 8, 12]), images)
        if rng.random() < 0.3:
            _add_stranger(world, host)
    world.start_controller()
    if requests is None:
        requests = wishes(world.seed, [host.addr for host in world.hosts], FAULT_SECONDS)
    world.users.plan(requests)
    for fault in faults or ():
        world.loop.call_at(fault.at, fault.strike, world)
    if faults and tops_up:
        world.loop.call_at(FAULT_SECONDS - TOP_UP, top_up, world)


def _add_stranger(world: World, host: Host) -> None:
    """A VM that somebody made by hand: nothing may ever happen to it."""
    from tests.sim.strangers import stranger

    world.strangers.add(stranger(world, host))


def run(seed: int, kinds: Collection[str] | None = None, *, timeline: list[str] | None = None) -> Result:
    """One whole schedule: faults until FAULT_SECONDS, then calm, then nothing but rest. `kinds` limits the faults."""
    world = World(seed, timeline=timeline)
    with production_in(world):
        try:
            build(world, faults=plan_faults(seed, kinds), tops_up=kinds is None)
            world.run_until(FAULT_SECONDS)
            converged = finish(world)
        finally:
            world.close()
    vms = len(world.checks.wished)
    checks, granted = world.checks, world.users.granted
    return Result(seed, tuple(checks.found), world.faults, len(world.hosts), vms, converged, checks.mutating, granted)


def finish(world: World) -> float:
    """The end of every schedule: L1 to L4, L2 and O1. Returns the seconds from the last fault until all was well."""
    world.calm()
    begin = world.loop.now
    world.run_until_settled(begin + BOUND, "L3")
    world.cure()
    world.run_until_settled(world.loop.now + BOUND, "L1")
    took = world.loop.now - begin
    if not world.checks.found:
        world.note("---- converged")
        calls = world.checks.mutating
        world.run_until(world.loop.now + IDLE)
        if not world.checks.found and world.checks.mutating != calls:
            world.checks.violated("L2", f"{world.checks.mutating - calls} mutating calls on a converged fleet")
        if world.serving() is None:  # killed in its rest, which only a crash point can do
            world.run_until(world.loop.now + IDLE)
        why = unsettled(world, rest=0.0)
        if why and not world.checks.found:
            world.checks.violated("L1", f"it did not stay so: {why}")
        world.checks.check_counts()
    return took
