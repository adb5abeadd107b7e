"""What the controller's endpoints share: its parts, tags of answers, holding one until converged, exceptions as failures."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from typing import Any, cast

import orjson

from api.hub import Hub, TooOld
from api.lists import Lists
from api.views import Views
from reconciler.core.place import Placement, predict
from reconciler.loop.controller import Controller
from reconciler.loop.intents import Clash, NoSuch, StaleGeneration
from reconciler.store.database import StoreUnavailable
from specs.desired import EnvSpec
from specs.failures import Failure
from specs.http import Handler
from specs.operations import BadParameter, Param

MAX_WAIT = 3600.0  # seconds a request may be held

WAIT = Param(
    "wait",
    f"Hold the answer until converged, at most so many seconds (no more than {MAX_WAIT:g}); `Prefer: wait=` means the same.",
    kind="integer",
    says="a number of seconds",
    most=10**9 - 1,
)
PREFER = {"Prefer": "`wait=<seconds>` holds the answer until converged (RFC 7240)."}
CONTINUE = {"continue": str}
"""Beside the data of a page that is not the last: what `?continue=` takes for the next one."""


def explain(error: BaseException) -> Failure | None:
    """The controller's own exceptions as answers."""
    match error:
        case NoSuch():
            return Failure(404, "not_found", str(error))
        case Clash():
            return Failure(409, error.code, str(error))
        case StaleGeneration():
            return Failure(412, "stale_generation", str(error))
        case StoreUnavailable():
            return Failure(503, "store_unavailable", str(error), headers={"Retry-After": "1"})
        case BadParameter():
            return Failure(400, "bad_query", str(error))
        case TooOld():
            return Failure(410, "revision_gone", str(error))
    return None


class ApiHandler(Handler):
    """Base of the controller's endpoints."""

    tagged = True

    @property
    def controller(self) -> Controller:
        """What records and reconciles."""
        return cast(Controller, self.settings["controller"])

    @property
    def views(self) -> Views:
        """What is shown."""
        return cast(Views, self.settings["views"])

    @property
    def hub(self) -> Hub:
        """What tells of changes."""
        return cast(Hub, self.settings["hub"])

    def entity_tag(self, **_where: str) -> str | None:
        """The state of this process's fleet, and which view of it: nothing is encoded to find out that nothing changed.

        The age of a heartbeat is no reason for another tag.
        """
        view = hashlib.blake2s(self.request.uri.encode() if self.request.uri else b"", digest_size=6).hexdigest()
        return f'W/"{self.tag_prefix(**_where)}{self.hub.process}-{self.hub.version:x}-{self.views.epoch:x}-{view}"'

    def tag_prefix(self, **_where: str) -> str:
        """What the tag begins with."""
        return ""

    @property
    def lists(self) -> Lists:
        """What chooses among objects."""
        return Lists(self.controller.fleet, self.hub.bodies)

    def reply_json(self, parts: Iterable[bytes], token: str | None) -> None:
        """A page of a list from encoded objects."""
        more = {"continue": token} if token else None
        self.reply(orjson.Fragment(b"[" + b",".join(parts) + b"]"), more=more)

    def wait_seconds(self) -> float:
        """How long the caller wants the answer held: `?wait=` or `Prefer: wait=` (RFC 7240), 0 if not at all."""
        if "wait" in self.asked:
            return min(float(self.asked["wait"]), MAX_WAIT)
        wishes = ",".join(self.request.headers.get_list("Prefer"))
        match = re.search(r"(?:^|[,;\s])wait\s*=\s*\"?([^\",;\s]*)", wishes)
        if match and not re.fullmatch(r"[0-9]{1,9}", match[1]):
            raise Failure(400, "invalid", "Prefer: wait must be a number of seconds")
        return min(float(match[1]), MAX_WAIT) if match else 0.0

    async def hold(self, env_id: str, seconds: float) -> None:
        """Waits until the environment has converged or is gone, if that was asked for."""
        if not seconds:
            return
        fleet = self.controller.fleet

        def reached() -> bool:
            env = fleet.envs.get(cast(Any, env_id))
            return env is None or self.views.converged(env)

        await self.hub.until(reached, seconds)
        self.set_header("Preference-Applied", f"wait={seconds:g}")

    def preview(self, spec: EnvSpec) -> list[dict[str, Any]]:
        """What applying a spec would do, as PlanLines."""
        change = self.controller.intents.preview(spec)
        new = {vm.name: vm for vm in change.put if vm.desired != "absent" and vm.id not in self.controller.fleet.vms}
        decisions = predict(cast(Any, spec.id), [vm.spec for vm in new.values()], self.controller.fleet.rooms())
        where = dict(zip(new, decisions, strict=True))
        lines = []
        for line in change.plan:
            item: dict[str, Any] = {"action": line.action, "name": line.name, "vm_id": line.vm_id, "fields": line.fields}
            decision = where.get(line.name)
            if isinstance(decision, Placement):
                item["host"] = decision.host_id
            elif decision is not None:
                item["message"] = decision.sentence()
            if line.action == "create":
                item["vm_id"] = None
            lines.append(item)
        return lines

    def env_detail(self, env_id: str) -> dict[str, Any]:
        """EnvDetail as JSON. Raises NoSuch."""
        env = self.controller.intents.env(env_id)
        detail: dict[str, Any] = {"env": self.views.env(env), "vms": self.views.env_vms(env)}
        warnings = self.views.warnings(env)
        return detail | {"warnings": warnings} if warnings else detail
