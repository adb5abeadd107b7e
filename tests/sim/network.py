"""The wire between controllers and agents: delays, losses, duplicates, cuts; and the client the production loop gets.

SimClient stands where reconciler.agents.AgentClient stands, with the same methods and the same typed failures.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from reconciler.agents import (
    CALL_TIMEOUT,
    CONNECT_TIMEOUT,
    MAX_REPLY,
    READ_TIMEOUT,
    AgentClient,
    AgentFailure,
    BadReply,
    Listing,
    Refused,
    Reply,
    Unreachable,
)
from specs.names import ClusterId, VmId
from specs.wire import AgentInfo, CreateVmReq
from tests.sim.agent import Agent
from tests.sim.checks import Sight
from tests.sim.host import Host
from tests.sim.loop import Process, current_process

if TYPE_CHECKING:
    from tests.sim.world import World

Respond = Callable[[Any], None]
CORRUPTIONS = ("garbage", "truncated", "huge")
HEALED_WITHIN = 3.0  # seconds until TCP tells both ends of what was lost, once the network works again


@dataclass(slots=True)
class MessageFault:
    """What happens to the next message that fits. `leg` is request or reply; `seconds` of delay."""

    kind: str
    host: str
    leg: str
    mutating: bool
    seconds: float = 0.0


class Exchange:
    """One call under way: whoever is first of answer, reset and time limit settles it."""

    __slots__ = ("future", "host", "is_lost", "mutating", "verb", "vm_id")

    def __init__(self, future: asyncio.Future[Any], host: Host, verb: str, vm_id: str) -> None:
        self.future = future
        self.host = host
        self.verb = verb
        self.vm_id = vm_id
        self.mutating = bool(vm_id)
        self.is_lost = False

    def settle(self, outcome: Any) -> None:
        """Tells the caller, unless it has been told already."""
        if self.future.done():
            return
        if isinstance(outcome, BaseException):
            self.future.set_exception(outcome)
        else:
            self.future.set_result(outcome)


class Network:
    """Carries messages. `armed` faults hit the next message that fits; cuts last until the given time."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.armed: list[MessageFault] = []
        self.cut_to: dict[str, float] = {}
        self.cut_from: dict[str, float] = {}
        self.slow: dict[str, float] = {}
        self.under_way = 0
        """Mutating requests that have been sent and have not arrived."""
        self._open: dict[Agent, dict[Exchange, None]] = {}
        self._lost: list[Exchange] = []

    def send(self, exchange: Exchange, act: Callable[[Agent, Respond], None]) -> None:
        """Puts a request on its way; `act` is what the agent does with it."""
        host, loop = exchange.host, self.world.loop
        delay = self._delay(host)
        fault = self._fault(exchange, "request")
        if loop.now < self.cut_to.get(host.name, 0.0) or (fault and fault.kind == "lose request"):
            self._lose(exchange)
            return
        if fault and fault.kind == "duplicate":
            self.under_way += exchange.mutating
            loop.call_later(delay + fault.seconds, self._arrive, exchange, act)
        elif fault:
            delay += fault.seconds
        self.under_way += exchange.mutating
        loop.call_later(delay, self._arrive, exchange, act)

    def _arrive(self, exchange: Exchange, act: Callable[[Agent, Respond], None]) -> None:
        self.under_way -= exchange.mutating
        host = exchange.host
        agent = self.world.agents.get(host.name)
        if not host.powered:
            self.world.loop.call_later(CONNECT_TIMEOUT, exchange.settle, Unreachable(f"{host.addr}: no connection"))
            return
        if agent is None or not agent.process.alive:
            self._reply(exchange, Unreachable(f"{host.addr}: connection refused"))
            return
        self._open.setdefault(agent, {})[exchange] = None

        def respond(outcome: Any) -> None:
            self._open.get(agent, {}).pop(exchange, None)
            self._reply(exchange, outcome)

        act(agent, respond)

    def _reply(self, exchange: Exchange, outcome: Any) -> None:
        host, loop = exchange.host, self.world.loop
        fault = self._fault(exchange, "reply")
        if loop.now < self.cut_from.get(host.name, 0.0) or (fault and fault.kind == "lose reply"):
            self._lose(exchange)
            return
        if fault and fault.kind in CORRUPTIONS:
            outcome = _misread(fault.kind, host.addr, exchange.verb, outcome)
        loop.call_later(self._delay(host) + (fault.seconds if fault else 0.0), exchange.settle, outcome)

    def is_served(self, agent: Agent) -> bool:
        """Whether the agent works on a mutating request."""
        return any(exchange.mutating for exchange in self._open.get(agent, ()))

    def agent_died(self, agent: Agent) -> None:
        """Its connections are reset."""
        for exchange in self._open.pop(agent, {}):
            if agent.host.powered:
                self._reply(exchange, Unreachable(f"{agent.host.addr}: connection reset"))
            else:
                self._lose(exchange)

    def heal(self) -> None:
        """Everything works from now on; both ends of what was lost learn of it soon."""
        self.armed.clear()
        self.cut_to.clear()
        self.cut_from.clear()
        self.slow.clear()
        for exchange in self._lost:
            self.world.loop.call_later(
                self.world.rng.uniform(0, HEALED_WITHIN), exchange.settle, Unreachable("connection lost")
            )
        self._lost.clear()

    def _lose(self, exchange: Exchange) -> None:
        self._lost.append(exchange)
        if self.world.is_calm:
            self.world.loop.call_later(HEALED_WITHIN, exchange.settle, Unreachable("connection lost"))

    def _delay(self, host: Host) -> float:
        delay = self.world.rng.uniform(0.0003, 0.003)
        if self.world.loop.now < self.slow.get(host.name, 0.0):
            delay *= self.world.rng.uniform(50, 1000)
        return delay

    def _fault(self, exchange: Exchange, leg: str) -> MessageFault | None:
        for position, fault in enumerate(self.armed):
            if fault.leg == leg and fault.host == exchange.host.name and (exchange.mutating or not fault.mutating):
                del self.armed[position]
                self.world.injected(fault.kind, f"{exchange.verb} {exchange.vm_id} {exchange.host.name}")
                if fault.leg == "request" and exchange.verb in ("create", "destroy") and fault.kind in ("duplicate", "delay"):
                    self.world.checks.excuse(VmId(exchange.vm_id))
                return fault
        return None


def _misread(kind: str, addr: str, verb: str, outcome: Any) -> AgentFailure:
    """What the production client makes of a reply that something on the way has spoiled."""
    if isinstance(outcome, AgentFailure):
        return BadReply(f"{addr} answered nothing that could be read")
    if kind == "huge":
        return BadReply(f"{addr} answered more than {MAX_REPLY} bytes")
    whole = b'{"ok": true, "boot_id": "b1", "seq": 7, "data": []}'
    body = whole[: len(whole) // 2] if kind == "truncated" else b"<html>\xff\x00</html>"
    try:
        AgentClient._envelope(cast(AgentClient, SimpleNamespace(addr=addr)), verb, "/", 200, body)
    except BadReply as error:
        return error
    raise AssertionError(f"the client takes {body!r} for an answer")


class SimClient:
    """One host's client in one controller process."""

    def __init__(self, world: World, addr: str, cluster: ClusterId, term: int) -> None:
        self.addr = addr
        self._world = world
        self._process: Process = current_process()
        self._host = world.host_at(addr)
        self._cluster = cluster
        self._term = term

    async def close(self) -> None:
        """Nothing is held open."""

    async def info(self) -> AgentInfo:
        """As AgentClient.info: tried twice."""

        def act(agent: Agent, respond: Respond) -> None:
            respond(agent.info())

        try:
            return await self._ask("info", READ_TIMEOUT, act)  # type: ignore[no-any-return]
        except Unreachable:
            await asyncio.sleep(random.uniform(0, 0.1))
            return await self._ask("info", READ_TIMEOUT, act)  # type: ignore[no-any-return]

    async def list_vms(self, *, watch: float = 0, after: str = "") -> Listing:
        """As AgentClient.list_vms; what really was on the host is noted as evidence."""
        evidence: list[Sight] = []

        def act(agent: Agent, respond: Respond) -> None:
            def answer(listing: Listing) -> None:
                ids = frozenset(agent.host.records)
                evidence[:] = [Sight(self._world.loop.now, listing.boot_id, listing.seq, listing.complete, ids)]
                respond(listing)

            agent.poll(watch, after, answer)

        listing: Listing = await self._ask("list", watch + READ_TIMEOUT, act)
        self._world.note("report", self._host.name, listing.boot_id, listing.seq, "" if listing.complete else "incomplete")
        self._world.checks.listed(self._process, self._host, evidence[0])
        return listing

    async def spec(self, vm_id: VmId) -> CreateVmReq | None:
        """As AgentClient.spec."""

        def act(agent: Agent, respond: Respond) -> None:
            entry = agent.entries.get(vm_id)
            respond(entry.request if entry is not None else Refused(404, "not_found", f"no VM {vm_id}"))

        try:
            return await self._ask("spec", READ_TIMEOUT, act)  # type: ignore[no-any-return]
        except Refused:
            return None

    async def create(self, request: CreateVmReq) -> Reply:
        """As AgentClient.create."""
        vm_id = VmId(request.vm_id)
        return await self._call("create", vm_id, lambda agent: agent.create(request, self._cluster, self._term))

    async def start(self, vm_id: VmId) -> Reply:
        """As AgentClient.start."""
        return await self._call("start", vm_id, lambda agent: agent.power_to("running", vm_id, self._cluster, self._term))

    async def stop(self, vm_id: VmId) -> Reply:
        """As AgentClient.stop."""
        return await self._call("stop", vm_id, lambda agent: agent.power_to("stopped", vm_id, self._cluster, self._term))

    async def destroy(self, vm_id: VmId) -> Reply:
        """As AgentClient.destroy."""
        return await self._call("destroy", vm_id, lambda agent: agent.destroy(vm_id, self._cluster, self._term))

    async def _call(self, verb: str, vm_id: VmId, work: Callable[[Agent], Any]) -> Reply:
        def act(agent: Agent, respond: Respond) -> None:
            self._world.note("arrives", verb, vm_id, agent.host.name)
            agent.process.spawn(_served(work(agent), respond))

        self._world.checks.sending(self._process, self._host, verb, vm_id)
        try:
            reply: Reply = await self._ask(verb, CALL_TIMEOUT, act, vm_id)
        except AgentFailure as error:
            self._world.checks.answered(self._process, self._host, vm_id, None, error)
            self._world.note("failed", verb, vm_id, self._host.name, error)
            raise
        self._world.checks.answered(self._process, self._host, vm_id, reply)
        self._world.note("answered", verb, vm_id, self._host.name)
        return reply

    async def _ask(self, verb: str, limit: float, act: Callable[[Agent, Respond], None], vm_id: str = "") -> Any:
        self._process.point(f"agent {verb}")
        loop = self._world.loop
        exchange = Exchange(loop.create_future(), self._host, verb, vm_id)
        timer = loop.call_later(limit, exchange.settle, Unreachable(f"{self.addr}: no answer in time"))
        self._world.network.send(exchange, act)
        try:
            answer = await exchange.future
        finally:
            timer.cancel()
        self._process.point(f"agent {verb} done")
        return answer


async def _served(work: Any, respond: Respond) -> None:
    try:
        outcome: Any = await work
    except Refused as error:
        outcome = error
    respond(outcome)
