"""Rounds of kill -9 under load, judged by what is really on the hosts. `ops/chaos` runs it; a few rounds are ordinary tests.

People (threads) change environments all the time and remember what was acknowledged; controller and agents are killed at
random moments; when all of it has converged, every host is looked at and compared with what people remember.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import httpx

from tests.e2e.rig import Part, until
from tests.e2e.site import Box, Found, Site, asked, box, site
from tests.netns import inside

PEOPLE = 2
ENVS_EACH = 3
STEADY = "steady"  # an environment nobody touches
KILLS = (2, 4)  # fewest and most moments of killing a round
PAUSE = 1.2  # seconds at most between them


@dataclass(frozen=True, slots=True)
class Wish:
    """What was last acknowledged of an environment. `vms`: name → how often a VM of that name has been asked for anew."""

    vms: Mapping[str, int]
    power: str = "running"
    boots: int = 0
    """How often it was stopped or started: a VM keeps its process as long as this stays."""


@dataclass
class Person:
    """Changes environments of its own, one call after the other, and repeats a call until it is answered."""

    name: str
    chance: random.Random
    wishes: dict[str, Wish] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)
    surprises: list[str] = field(default_factory=list)
    _lives: Counter[tuple[str, str]] = field(default_factory=Counter)

    def work(self, built: Site, ended: threading.Event) -> None:
        """Goes on until told to end; runs in a thread of its own."""
        with inside(built.namespace), built.client() as client:
            while not ended.is_set():
                self._change(client, f"{self.name}-{self.chance.randrange(ENVS_EACH)}")
                ended.wait(self.chance.uniform(0, 0.3))

    def _change(self, client: httpx.Client, env: str) -> None:
        wish = self.wishes.get(env)
        if wish is None:
            names = self.chance.sample("abc", self.chance.randint(1, 3))
            self._put(client, env, Wish({name: self._life_of(env, name) for name in names}))
            return
        match self.chance.choice(["change", "change", "stop", "start", "delete"]):
            case "change":
                self._put(client, env, replace(wish, vms=self._changed(env, wish.vms)))
            case "delete":
                if self._ask(client, "DELETE", env)[0] in (200, 404):
                    del self.wishes[env]
            case verb:
                power = "running" if verb == "start" else "stopped"
                if self._ask(client, "POST", env, f"/{verb}")[0] == 200 and wish.power != power:
                    self.wishes[env] = replace(wish, power=power, boots=wish.boots + 1)

    def _changed(self, env: str, vms: Mapping[str, int]) -> dict[str, int]:
        name = self.chance.choice("abc")
        if len(vms) > 1 and name in vms and self.chance.random() < 0.5:
            return {other: life for other, life in vms.items() if other != name}
        return {**vms, name: self._life_of(env, name)}

    def _life_of(self, env: str, name: str) -> int:
        self._lives[env, name] += 1
        return self._lives[env, name]

    def _put(self, client: httpx.Client, env: str, wish: Wish) -> None:
        vms = [box(name, ports=[1000 + life]) for name, life in sorted(wish.vms.items())]
        if self._ask(client, "PUT", env, body={"id": env, "vms": vms})[0] in (200, 201):
            self.wishes[env] = wish

    def _ask(self, client: httpx.Client, method: str, env: str, verb: str = "", body: object = None) -> tuple[int, object]:
        self.calls[verb.removeprefix("/") or method.lower()] += 1
        while True:
            try:
                status, answer = asked(client, method, f"/api/envs/{env}{verb}", body)
            except httpx.HTTPError:
                time.sleep(0.05)  # the controller is dead just now; whether it heard the call only a repetition tells
                continue
            # 409: an environment of this name is still being deleted.
            if status not in (200, 201, 404) and not (status == 409 and method == "PUT"):
                self.surprises.append(f"{method} {env}{verb}: {status} {answer}")
            return status, answer


@dataclass(frozen=True, slots=True)
class Sight:
    """A VM as it was after an earlier round, with what was wished then."""

    box: Box
    host: str
    wish: Wish


class Judge:
    """Compares what is on the hosts with what was wished, and with the rounds before."""

    def __init__(self) -> None:
        self._before: dict[tuple[str, str], Sight] = {}
        self.kept = 0
        """Processes that were there in an earlier round and had to be the same, and were."""

    def violations(self, wishes: Mapping[str, Wish], found: Mapping[str, Found]) -> Iterator[str]:
        """A sentence for each VM that is lost, duplicated, leaked or not the process it was."""
        copies: defaultdict[tuple[str, str], list[tuple[str, Box]]] = defaultdict(list)
        for host, there in found.items():
            yield from (f"leaked: {host}: {stray}" for stray in there.stray)
            for each in there.boxes:
                copies[each.env, each.name].append((host, each))
        wanted = {(env, name): wish for env, wish in wishes.items() for name in wish.vms}
        for key in sorted(copies.keys() - wanted.keys()):
            yield f"leaked: {key} on {[host for host, _ in copies[key]]} is wished for by nobody"
        sights: dict[tuple[str, str], Sight] = {}
        for key, wish in wanted.items():
            if len(copies[key]) > 1:
                yield f"duplicated: {key} is {copies[key]}"
            elif copies[key]:
                host, there_box = copies[key][0]
                sights[key] = Sight(there_box, host, wish)
                if bool(there_box.pid) != (wish.power == "running"):
                    yield f"lost: {key} on {host} has process {there_box.pid}, but should be {wish.power}"
            elif wish.power == "running" or self._is_same(key, wish):
                yield f"lost: {key} is on no host"
        yield from self._compared(sights)
        self._before = sights

    def _is_same(self, key: tuple[str, str], wish: Wish) -> bool:
        """Whether the VM was there before and nobody has asked for another in its place."""
        before = self._before.get(key)
        return before is not None and before.wish.vms[key[1]] == wish.vms[key[1]]

    def _compared(self, sights: Mapping[tuple[str, str], Sight]) -> Iterator[str]:
        for key, sight in sights.items():
            if not self._is_same(key, sight.wish):
                continue
            before = self._before[key]
            if (before.host, before.box.id) != (sight.host, sight.box.id):
                yield f"lost: {key} was {before.box} on {before.host} and is {sight.box} on {sight.host}"
            elif before.wish.boots == sight.wish.boots and before.box.pid != sight.box.pid:
                yield f"restarted: {key} had process {before.box.pid} and has {sight.box.pid}"
            elif before.wish.boots == sight.wish.boots and sight.box.pid:
                self.kept += 1


@dataclass(frozen=True, slots=True)
class Round:
    """What one round was and came to. `seconds` from the end of the faults until all had converged."""

    number: int
    calls: Counter[str]
    kills: Counter[str]
    vms: int
    seconds: float
    violations: tuple[str, ...]


class Chaos:
    """Rounds on one site, from one seed. The seed fixes what is tried, not how the machine's timing falls."""

    def __init__(self, built: Site, seed: int) -> None:
        self.site = built
        self.seed = seed
        self.judge = Judge()
        self._people = [Person(f"p{number}", random.Random(f"{seed} person {number}")) for number in range(PEOPLE)]
        self._steady = Wish(dict.fromkeys((f"s-{number}" for number in range(2 * len(built.hosts))), 0))

    def begin(self) -> None:
        """Starts everything and the environment nobody touches."""
        self.site.start()
        self.site.put(STEADY, box("s", count=len(self._steady.vms), spread="hosts"))
        self.site.await_phase(STEADY)
        self._check()

    def round(self, number: int) -> Round:
        """Load and kills, then peace, then judgement."""
        chance = random.Random(f"{self.seed} round {number}")
        kills: Counter[str] = Counter()
        before = sum((person.calls for person in self._people), Counter())
        ended = threading.Event()
        threads = [threading.Thread(target=person.work, args=(self.site, ended)) for person in self._people]
        for thread in threads:
            thread.start()
        try:
            for _ in range(chance.randint(*KILLS)):
                time.sleep(chance.uniform(0, PAUSE))
                self._kill_some(chance, kills)
        finally:
            ended.set()
            for part in self._parts().values():
                if part.process is None:
                    part.start()
            for thread in threads:
                thread.join()
        began = time.monotonic()
        self.site.start()
        self._await_peace()
        seconds = time.monotonic() - began
        violations = self._check()
        calls = sum((person.calls for person in self._people), Counter()) - before
        vms = sum(len(wish.vms) for wish in self._wishes().values())
        return Round(number, calls, kills, vms, seconds, violations)

    def _parts(self) -> dict[str, Part]:
        return {"controller": self.site.controller, **{host.name: host.agent for host in self.site.hosts}}

    def _kill_some(self, chance: random.Random, kills: Counter[str]) -> None:
        parts = self._parts()
        names = chance.sample(sorted(parts), chance.choice([1, 1, 1, 2, len(parts)]))
        for name in names:
            if parts[name].process is not None:
                parts[name].kill()
                kills["controller" if name == "controller" else "agent"] += 1
        time.sleep(chance.uniform(0, 0.6))
        for name in names:
            parts[name].start()

    def _wishes(self) -> dict[str, Wish]:
        wishes = {STEADY: self._steady}
        for person in self._people:
            wishes |= person.wishes
        return wishes

    def _await_peace(self) -> None:
        for name, wish in self._wishes().items():
            self.site.await_phase(name, "ready" if wish.power == "running" else "stopped")
        wished = self._wishes().keys()
        until(lambda: {env["id"] for env in self.site.data("/api/envs")} == wished, "deleted environments are gone")

    def _check(self) -> tuple[str, ...]:
        surprises = [surprise for person in self._people for surprise in person.surprises]
        for person in self._people:
            person.surprises.clear()
        return (*surprises, *self.judge.violations(self._wishes(), self.site.settled()))


def run(rounds: int, seed: int, hosts: int, say: Callable[[str], None]) -> list[Round]:
    """Runs rounds, each told as a line, then takes everything down again and looks whether anything stays."""
    done: list[Round] = []
    with site(hosts) as built:
        chaos = Chaos(built, seed)
        chaos.begin()
        for number in range(1, rounds + 1):
            done.append(chaos.round(number))
            say(_line(done[-1]))
        say(
            f"{len(done)} rounds, {sum(sum(each.calls.values()) for each in done)} calls, "
            f"{sum(each.kills['controller'] for each in done)} kills of the controller, "
            f"{sum(each.kills['agent'] for each in done)} of agents, {chaos.judge.kept} processes kept, "
            f"converged within {max(each.seconds for each in done):.1f} s, "
            f"{sum(len(each.violations) for each in done)} violations"
        )
    return done


def _line(done: Round) -> str:
    calls = ", ".join(f"{times} {verb}" for verb, times in sorted(done.calls.items()))
    kills = ", ".join(f"{times} {part}" for part, times in sorted(done.kills.items()))
    told = [f"round {done.number}: {calls}; killed {kills}; {done.vms} VMs, converged after {done.seconds:.1f} s"]
    return "\n".join(told + [f"  VIOLATION {violation}" for violation in done.violations])


def main() -> None:
    """The command line of `ops/chaos`."""
    parser = argparse.ArgumentParser(prog="ops/chaos", description=__doc__)
    parser.add_argument("--rounds", type=int, default=10, metavar="N")
    parser.add_argument("--seed", type=int, default=None, metavar="S", help="repeats what an earlier run tried")
    parser.add_argument("--hosts", type=int, default=3, metavar="N")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ops/chaos: told to end"))  # an exception: everything is taken down
    seed = given.seed if given.seed is not None else random.randrange(10**6)
    print(f"seed {seed}, {given.rounds} rounds on {given.hosts} hosts", flush=True)  # noqa: T201
    done = run(given.rounds, seed, given.hosts, lambda line: print(line, flush=True))  # noqa: T201
    if any(each.violations for each in done):
        sys.exit(f"ops/chaos: violations; try again with --seed {seed}")


if __name__ == "__main__":
    main()
