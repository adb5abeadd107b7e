"""People and scripts: what they ask of the live controller about environments, hosts and unknown VMs."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from reconciler.loop.controller import Controller
from reconciler.loop.intents import IntentError, Intents, NoSuch
from reconciler.store.database import StoreUnavailable
from specs.desired import NEVER, EnvSpec, VmSpec, canonical_env
from specs.names import EnvId
from tests.sim.store import Mirror

if TYPE_CHECKING:
    from tests.sim.world import World

PATIENCE = 20  # tries, a second apart
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIBJbDrk6WHYGFqkzL1M2t3gYKEcvXYo6ZS1lnzFDpq8J me@here"
ENVS = 3
OF_HOSTS = ("host", "forget", "cordon", "uncordon", "drain")
VERBS = (*OF_HOSTS, "adopt", "destroy unknown", "create", "put", "put if-match", "stop", "start", "extend", "delete")
THINKING = 3.0  # seconds at most between reading an environment and putting it


@dataclass(frozen=True)
class Wish:
    """One request at one time; `target` is an environment or, for the verbs of OF_HOSTS, a host's address."""

    at: float
    verb: str
    target: str
    spec: EnvSpec | None = None
    lifetime: int = 0


def wishes(seed: int, hosts: list[str], until: float) -> list[Wish]:
    """What people ask for in a schedule: all hosts, at least eight VMs early on, and then changes."""
    rng = random.Random(f"{seed} users")
    out = [Wish(rng.uniform(0.05, 0.5 if position < 2 else 10.0), "host", addr) for position, addr in enumerate(hosts)]
    total = 0
    names = [f"e{number}" for number in range(ENVS)]
    for position, name in enumerate(names):
        spec = _spec(rng, name, needed=8 - total if position == ENVS - 1 else 1)
        total += len(spec.machines())
        out.append(Wish(rng.uniform(0.1, 4.9), "create", name, spec))
    for _ in range(rng.randint(4, 7)):
        name = rng.choice(names)
        verb = rng.choice(["put", "put if-match", "stop", "start", "extend", "delete", "create"])
        spec = _spec(rng, name) if verb in ("put", "put if-match", "create") else None
        out.append(Wish(rng.uniform(5.0, until), verb, name, spec, rng.choice([30, 3600, NEVER])))
    for addr in rng.sample(hosts, rng.choice([0, 1, 1])):
        verb = rng.choice(["cordon", "drain"])
        at = rng.uniform(8.0, until)
        out.append(Wish(at, verb, addr))
        if rng.random() < 0.6:
            out.append(Wish(at + rng.uniform(0.1, 15.0), "uncordon", addr))
    for _ in range(rng.choice([0, 1, 2])):
        out.append(Wish(rng.uniform(12.0, until + 10.0), rng.choice(["adopt", "destroy unknown"]), "unknown"))
    if rng.random() < 0.25:
        addr, at = rng.choice(hosts), rng.choice([rng.uniform(0.2, 3.0), rng.uniform(3.0, until - 10.0)])
        out += [Wish(at, "forget", addr), Wish(at + rng.uniform(0.0, 8.0), "host", addr)]
    return sorted(out, key=lambda wish: wish.at)


def _spec(rng: random.Random, name: str, needed: int = 1) -> EnvSpec:
    entries: list[VmSpec] = []
    while not entries or sum(entry.count for entry in entries) < needed or rng.random() < 0.4:
        image = rng.choices(["tiny", "base", "late", "poison"], [10, 6, 2, 1])[0]
        entries.append(
            VmSpec(
                image=image,
                name=f"m{len(entries)}",
                cpu=rng.choice([1, 1, 2]),
                mem=rng.choice([64, 128]),
                disk=rng.choice([128, 256]),
                ports=rng.choice([(), (80,), (80, 443)]),
                count=rng.choice([1, 1, 1, 2, 3]),
                restart=rng.choices(["always", "on-failure", "never"], [8, 1, 1])[0],  # type: ignore[arg-type]
                spread=rng.choice(["pack", "hosts"]),  # type: ignore[arg-type]
            )
        )
    lifetime = rng.choices(["never", 21600, 25], [6, 2, 1])[0]
    loss = rng.choice(["wait", "wait", "wait", "recreate"])
    return EnvSpec(id=name, ssh_keys=(KEY,), vms=tuple(entries), lifetime=lifetime, on_host_loss=loss)  # type: ignore[arg-type]


class Users:
    """Sends the wishes and holds the controller to what it acknowledges."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.deleting: set[str] = set()
        """Environments that somebody has asked to delete: they may go before their lifetime is over."""
        self.pending = 0
        """Wishes that have not been answered yet."""
        self.granted: Counter[str] = Counter()
        """What was acknowledged, by verb."""
        self._under_way: Counter[str] = Counter()
        """Requests that the controller works on, by target."""
        self._first: dict[str, Wish] = {}
        """The creation of each environment while it has not been answered: nobody asks anything else of it before."""

    def plan(self, wishes: list[Wish]) -> None:
        """Sends every wish at its time."""
        self.pending += len(wishes)
        self._first = {wish.target: wish for wish in reversed(wishes) if wish.verb == "create"}
        for wish in wishes:
            self._world.loop.call_at(wish.at, self.send, wish)

    def send(self, wish: Wish, tries: int = PATIENCE) -> None:
        """Asks whichever controller serves; asks again later if none does or its store refuses."""
        world = self._world
        serving = world.serving()
        if serving is None:
            self._again(wish, tries)
            return
        if self._first.get(wish.target, wish) is not wish:
            world.loop.call_later(1.0, self.send, wish, tries)
            return
        controller = serving.controller
        assert controller is not None
        task = serving.process.spawn(self._ask(controller, wish))

        def ended(done: asyncio.Task[bool]) -> None:
            if done.cancelled() or (not done.exception() and not done.result()):
                self._again(wish, tries)
            else:
                self.pending -= 1
                self._first.pop(wish.target, None)

        task.add_done_callback(ended)

    def _again(self, wish: Wish, tries: int) -> None:
        if (tries or wish.target in self._first) and not self._world.is_over:
            self._world.loop.call_later(1.0, self.send, wish, max(tries - 1, 0))
        else:
            self.pending -= 1

    async def _ask(self, controller: Controller, wish: Wish) -> bool:
        world = self._world
        world.note("user", wish.verb, wish.target)
        if wish.verb == "delete":
            self.deleting.add(wish.target)
        self._under_way[wish.target] += 1
        try:
            await self._do(controller, wish)
        except IntentError as error:
            world.note("user refused", wish.verb, wish.target, error)
            return True
        except StoreUnavailable as error:
            world.note("user told 503", wish.verb, wish.target, error)
            return False
        finally:
            self._under_way[wish.target] -= 1
        world.note("user acknowledged", wish.verb, wish.target)
        self.granted[wish.verb] += 1
        self._hold_to(controller, wish)
        return True

    async def _do(self, controller: Controller, wish: Wish) -> Any:
        intents = controller.intents
        match wish.verb:
            case "host":
                return await controller.add_host(wish.target)
            case "cordon" | "uncordon":
                return await intents.set_cordon(wish.target, wish.verb == "cordon")
            case "drain":
                return await intents.drain(wish.target)
            case "create":
                assert wish.spec is not None
                return await intents.create_env(wish.spec)
            case "put":
                assert wish.spec is not None
                return await intents.put_env(wish.spec)
            case "put if-match":
                assert wish.spec is not None
                return await self._put_what_was_read(intents, wish.spec)
            case "adopt" | "destroy unknown":
                return await self._judge_unknown(controller, wish)
            case "forget":
                return await controller.remove_host(wish.target)
            case "stop" | "start":
                return await intents.set_power(wish.target, "stopped" if wish.verb == "stop" else "running")
            case "extend":
                return await intents.extend(wish.target, wish.lifetime)
            case _:
                return await intents.delete_env(wish.target)

    async def _put_what_was_read(self, intents: Intents, spec: EnvSpec) -> None:
        generation = intents.env(spec.id).generation
        await asyncio.sleep(self._world.rng.uniform(0.0, THINKING))
        outcome = await intents.put_env(spec, generation)
        now = intents.env(spec.id).generation
        # Whoever put in between would have been told that it is recorded, and be overwritten unseen.
        is_next = now > generation if outcome == "changed" else now >= generation
        self._world.checks.acknowledged(f"put of {spec.id} over generation {generation}", is_next)

    async def _judge_unknown(self, controller: Controller, wish: Wish) -> None:
        quarantine = controller.quarantine
        unknown = [
            (addr, vm.id) for addr in controller.fleet.hosts for vm, obstacle in quarantine.unknown(addr) if not obstacle
        ]
        if not unknown:
            raise NoSuch("no host has an unknown VM")
        addr, vm_id = self._world.rng.choice(sorted(unknown))
        self._world.note("user", wish.verb, vm_id)
        if wish.verb == "adopt":
            await quarantine.adopt(addr, vm_id, self._world.rng.choice(["e0", "adopted"]), None)
        else:
            await quarantine.destroy(addr, vm_id)

    def _hold_to(self, controller: Controller, wish: Wish) -> None:
        mirror = controller.store.disk.mirror  # type: ignore[attr-defined]
        env = mirror.envs.get(EnvId(wish.target))
        is_kept = env is not None
        if wish.verb in OF_HOSTS:
            is_kept = self._is_host_as_wished(mirror, wish)
        elif wish.verb in ("adopt", "destroy unknown"):
            is_kept = True  # what is recorded of it is the fleet's matter from now on
        elif wish.verb == "delete":
            is_kept = env is None or env.deleting
        elif env is not None and not env.deleting:
            if wish.spec is not None:
                is_kept = canonical_env(env.spec) == canonical_env(wish.spec)
            elif wish.verb in ("stop", "start"):
                is_kept = env.power == ("stopped" if wish.verb == "stop" else "running")
        self._world.checks.acknowledged(f"{wish.verb} of {wish.target}", is_kept)

    def _is_host_as_wished(self, mirror: Mirror, wish: Wish) -> bool:
        host = mirror.hosts.get(wish.target)
        if self._under_way[wish.target]:  # somebody else's wish may have been recorded after this one
            return True
        if host is None or wish.verb == "forget":
            return (host is None) == (wish.verb == "forget")
        match wish.verb:
            case "cordon" | "uncordon":
                return host.cordoned == (wish.verb == "cordon")
            case "drain":
                return host.drain_total is not None
            case _:
                return True
