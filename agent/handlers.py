"""The agent's endpoints: reads requests, calls the runtime, writes answers. Decides nothing about VMs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, cast

import orjson

from agent.entry import Caller
from agent.errors import AgentError
from agent.host import HostFacts
from agent.runtime import Outcome, Runtime
from agent.transfers import Transfers
from agent.watch import MAX_WAIT
from specs.failures import Failure
from specs.http import Handler
from specs.names import ClusterId, check_name
from specs.operations import TAIL, TAIL_LINES, Param, operation
from specs.wire import CLUSTER_HEADER, TERM_HEADER, AgentInfo, AgentVm, Console, CreateVmReq, CreateVmResp

_STATUS: dict[Outcome, int] = {"created": 201, "existing": 200, "accepted": 202}
_MAX_TERM = 2**63 - 1
_POSITION = r"(?P<boot>[^:]{1,64}):(?P<seq>[0-9]{1,19})"

WATCH = Param(
    "watch",
    "Hold the answer until something is newer than `after`, at most so many seconds.",
    says=f"seconds, at most {MAX_WAIT:g}",
    pattern=r"[0-9]{1,6}(\.[0-9]{1,6})?",
)
AFTER = Param(
    "after",
    "The position the caller has seen; nothing if left out.",
    says="<boot_id>:<seq> as an earlier answer told them",
    pattern=rf"({_POSITION})?",
)
POSITION = {"boot_id": str, "seq": int}
CLUSTER = {CLUSTER_HEADER: "The controller's cluster.", TERM_HEADER: "Its term; a lower one than before is refused."}
PREFER = {"Prefer": "`respond-async` answers 202 at once (RFC 7240)."}


@dataclass(frozen=True, slots=True)
class Services:
    """What the endpoints call."""

    runtime: Runtime
    facts: HostFacts
    transfers: Transfers


def explain(error: BaseException) -> Failure | None:
    """The HTTP answer to a typed error of the agent."""
    return Failure(error.status, error.code, error.message) if isinstance(error, AgentError) else None


class AgentHandler(Handler):
    """Base of the agent's endpoints."""

    @property
    def services(self) -> Services:
        """The application's services."""
        return cast(Services, self.settings["services"])

    @property
    def runtime(self) -> Runtime:
        """The VMs."""
        return self.services.runtime

    def caller(self) -> Caller:
        """Who calls, by the cluster headers. Raises Failure 400 if only one of them is there or one makes no sense."""
        cluster = self.request.headers.get(CLUSTER_HEADER, "")
        term = self.request.headers.get(TERM_HEADER, "")
        if not cluster and not term:
            return Caller()
        try:
            check_name(cluster)
        except ValueError as error:
            raise Failure(400, "bad_header", f"{CLUSTER_HEADER} {error}") from None
        if not re.fullmatch(r"[0-9]{1,19}", term) or int(term) > _MAX_TERM:
            raise Failure(400, "bad_header", f"{TERM_HEADER} must be a whole number, sent together with {CLUSTER_HEADER}")
        return Caller(ClusterId(cluster), int(term))

    @property
    def is_async(self) -> bool:
        """Whether the caller does not want to wait for the engine."""
        return self.prefers("respond-async")

    def position(self) -> dict[str, object]:
        """Where in the order of changes this answer stands: the change just made is in every list from `seq` on."""
        return {"boot_id": self.runtime.watch.boot_id, "seq": self.runtime.watch.seq}

    def reply_done(self) -> None:
        """Success without data. Plain callers get `{"ok": true}` and nothing else; a controller of ours also the position."""
        self.reply(more=self.position() if self.request.headers.get(CLUSTER_HEADER) else None)

    def reply_vm(self, vm: AgentVm, outcome: Outcome) -> None:
        """A VM that was asked for, as CreateVmResp."""
        if outcome == "accepted":
            self.set_header("Preference-Applied", "respond-async")
        self.reply({"vm": vm}, status=_STATUS[outcome], more=self.position())


class InfoHandler(AgentHandler):
    """GET /api/info"""

    @operation(gives=AgentInfo)
    async def on_get(self) -> None:
        """AgentInfo."""
        self.reply(await self.services.facts.info())


class ImagesHandler(AgentHandler):
    """GET /api/images"""

    @operation(gives=tuple[str, ...])
    async def on_get(self) -> None:
        """Names of all images some engine here can start, sorted."""
        self.reply((await self.services.facts.info()).images)


class VmsHandler(AgentHandler):
    """/api/vms"""

    @operation(gives=tuple[AgentVm, ...], query=(WATCH, AFTER), also=POSITION | {"complete": bool})
    async def on_get(self) -> None:
        """All VMs; with `?watch=<seconds>&after=<boot_id>:<seq>` as soon as there is something newer."""
        runtime = self.runtime
        limit, boot_id, seq = self._watched()
        if limit > 0:
            await runtime.watch.wait(boot_id, seq, limit)
            if self._is_gone:
                return
        self.reply(orjson.Fragment(runtime.list_json()), more={**self.position(), "complete": runtime.complete})

    @operation(
        takes=CreateVmReq,
        gives=CreateVmResp,
        ok=(200, 201, 202),
        fails=(409, 422, 503, 507),
        headers=CLUSTER | PREFER,
        also=POSITION,
    )
    async def on_post(self) -> None:
        """CreateVmReq → CreateVmResp: 201 once it runs, 200 if it was there, 202 with `Prefer: respond-async`."""
        caller, request = self.caller(), self.read(CreateVmReq)
        twice = sorted({port for port in request.ports if request.ports.count(port) > 1})
        if twice:
            message = f"lists {', '.join(map(str, twice[:5]))} more than once"
            raise Failure(422, "invalid", f"ports: {message}", details=({"loc": "ports", "msg": message},))
        self.reply_vm(*await self.runtime.create(request, caller, wait=not self.is_async))

    _is_gone = False

    def on_connection_close(self) -> None:
        """Nobody waits for the list any more."""
        super().on_connection_close()
        self._is_gone = True

    def _watched(self) -> tuple[float, str, int]:
        """(seconds to wait, boot_id, seq); a call without `after` has seen nothing."""
        seconds, after = self.asked.get("watch", "0"), self.asked.get("after", "")
        position = re.fullmatch(_POSITION, after)
        return float(seconds), position["boot"] if position else "", int(position["seq"]) if position else 0


class VmHandler(AgentHandler):
    """/api/vms/{id}"""

    @operation(gives=AgentVm, fails=(404,))
    async def on_get(self, vm_id: str) -> None:
        """One VM."""
        self.reply(self.runtime.get(vm_id))

    @operation(fails=(409, 422, 503, 507), headers=CLUSTER, also=POSITION)
    async def on_delete(self, vm_id: str) -> None:
        """Removes the VM with all it had; nothing there is fine."""
        self.no_body()
        await self.runtime.delete(vm_id, self.caller())
        self.reply_done()


class SpecHandler(AgentHandler):
    """GET /api/vms/{id}/spec"""

    @operation(gives=CreateVmReq, fails=(404, 409))
    async def on_get(self, vm_id: str) -> None:
        """The CreateVmReq the VM was made from, so that a controller that lost its records can take the VM over."""
        self.reply(self.runtime.spec(vm_id).wire())


class ConsoleHandler(AgentHandler):
    """GET /api/vms/{id}/console"""

    @operation(gives=Console, fails=(404, 409, 501), query=(TAIL,))
    async def on_get(self, vm_id: str) -> None:
        """The last lines the guest wrote on its console, at most 64 KiB; bytes that are no UTF-8 are replaced."""
        self.reply(Console(text=await self.runtime.console(vm_id, int(self.asked.get("tail", TAIL_LINES)))))


class PowerHandler(AgentHandler):
    """/api/vms/{id}/stop and /api/vms/{id}/start"""

    @operation(
        ok=(200, 202),
        fails=(404, 409, 422, 503, 507),
        headers=CLUSTER | PREFER,
        also=POSITION,
        gives_on={202: CreateVmResp},
    )
    async def on_post(self, vm_id: str, verb: str) -> None:
        """Stops or starts the VM; 202 with `Prefer: respond-async`."""
        self.no_body()
        power: Any = "stopped" if verb == "stop" else "running"
        vm, outcome = await self.runtime.set_power(vm_id, power, self.caller(), wait=not self.is_async)
        if outcome == "accepted":
            self.reply_vm(vm, outcome)
        else:
            self.reply_done()


class HealthHandler(Handler):
    """GET /healthz"""

    needs_key = False

    @operation()
    async def on_get(self) -> None:
        """The process answers."""
        self.reply()


class ReadyHandler(AgentHandler):
    """GET /readyz"""

    needs_key = False

    @operation(fails=(503,))
    async def on_get(self) -> None:
        """200 once everything on the host is re-adopted and new VMs can be connected, else 503 with the reason's slug."""
        if not self.runtime.complete:
            raise Failure(503, "not_ready", "not everything on this host is known yet")
        if self.runtime.trouble:
            raise Failure(503, "not_ready", "the network of this host is not ready")
        self.reply()
