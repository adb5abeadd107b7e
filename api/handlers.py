"""The controller's endpoints: read the request, record the intent or read the views, answer in the envelope."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import orjson
from pydantic import ValidationError
from tornado.iostream import StreamClosedError
from tornado.web import StaticFileHandler

from api.hub import KEEP_ALIVE, Hub, TooOld
from api.lists import Lists, list_params, page
from api.views import Views
from reconciler.core.model import Change
from reconciler.core.place import Placement, predict
from reconciler.loop.controller import Controller
from reconciler.loop.intents import Clash, NoSuch, StaleGeneration, parse_if_match
from reconciler.store.database import StoreUnavailable
from specs.desired import EnvSpec, ExtendReq, HostSpec
from specs.http import Failure, Handler, invalid
from specs.names import EnvId
from specs.operations import BadParameter, Param, operation
from specs.wire import Env, EnvDetail, FleetStatus, Host, ImageInfo, Plan, Vm
from specs.wire import Version as VersionInfo

STATIC = Path(__file__).parent / "static"
MAX_WAIT = 3600.0  # seconds a request may be held
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "font-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


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

    def env_detail(self, env_id: str) -> dict[str, Any]:
        """EnvDetail as JSON. Raises NoSuch."""
        env = self.controller.intents.env(env_id)
        detail: dict[str, Any] = {"env": self.views.env(env), "vms": self.views.env_vms(env)}
        warnings = self.views.warnings(env)
        return detail | {"warnings": warnings} if warnings else detail


class Hosts(ApiHandler):
    """/api/hosts"""

    @operation(gives=tuple[Host, ...], query=list_params("hosts"), also=CONTINUE)
    async def on_get(self) -> None:
        """Lists hosts."""
        hosts, token = page(self.lists.hosts(self.asked), "hosts", self.asked)
        self.reply([self.views.host(host) for host in hosts], more={"continue": token} if token else None)

    @operation(takes=HostSpec, gives=Host, ok=(200, 201), fails=(400, 409, 422, 503))
    async def on_post(self) -> None:
        """Registers a host."""
        content = self.json()
        try:
            spec = HostSpec.model_validate(content)
        except ValidationError as error:
            failure = invalid(error)
            if any(item["loc"] == "addr" for item in failure.details):
                failure.status = 400
            raise failure from None
        host, created = await self.controller.add_host(spec.addr)
        self.reply(self.views.host(host), status=201 if created else 200)


class HostItem(ApiHandler):
    """/api/hosts/{id}; the address is accepted for the id."""

    @operation(gives=Host, fails=(404,))
    async def on_get(self, host_id: str) -> None:
        """One host."""
        self.reply(self.views.host(self.controller.intents.host(host_id)))

    @operation(fails=(404, 409, 422, 503))
    async def on_delete(self, host_id: str) -> None:
        """Unregisters a host."""
        await self.controller.remove_host(host_id)
        self.reply()


class HostCordon(ApiHandler):
    """/api/hosts/{id}/cordon and …/uncordon"""

    @operation(fails=(404, 422, 503))
    async def on_post(self, host_id: str, verb: str) -> None:
        """Records whether new VMs may be placed there."""
        self.no_body()
        await self.controller.intents.set_cordon(host_id, verb == "cordon")
        self.reply()


class Envs(ApiHandler):
    """/api/envs"""

    @operation(gives=tuple[Env, ...], query=list_params("envs"), also=CONTINUE)
    async def on_get(self) -> None:
        """Lists environments."""
        envs, token = page(self.lists.envs(self.asked), "envs", self.asked)
        self.reply_json((self.hub.bodies.env(env).json for env in envs), token)

    @operation(takes=EnvSpec, gives=EnvDetail, ok=(200, 201), fails=(409, 422, 503), query=(WAIT,), headers=PREFER)
    async def on_post(self) -> None:
        """Records a new environment."""
        spec = self.read(EnvSpec)
        seconds = self.wait_seconds()
        created = await self.controller.intents.create_env(spec)
        await self.hold(spec.id, seconds)
        self.reply(self.env_detail(spec.id), status=201 if created else 200)


class EnvItem(ApiHandler):
    """/api/envs/{id}"""

    def tag_prefix(self, **where: str) -> str:
        """The generation: the tag of an answer can be sent back in If-Match."""
        env = self.controller.fleet.envs.get(EnvId(where["env_id"]))
        return f"{env.generation}." if env else ""

    @operation(gives=EnvDetail, fails=(404,))
    async def on_get(self, env_id: str) -> None:
        """One environment with its VMs."""
        self.reply(self.env_detail(env_id))

    @operation(
        takes=EnvSpec,
        gives=EnvDetail | Plan,
        ok=(200, 201),
        fails=(404, 409, 412, 422, 503),
        query=(WAIT, Param("dry_run", "Only tell the plan.", values=("true", "false"))),
        headers=PREFER | {"If-Match": 'The generation that is to be replaced, such as "3", or the ETag it was read with.'},
    )
    async def on_put(self, env_id: str) -> None:
        """Creates or replaces the desired state; `?dry_run=true` only says what would happen."""
        spec = self._spec_for(env_id)
        seconds = self.wait_seconds()
        try:
            generation = parse_if_match(self.request.headers.get("If-Match"))
        except ValueError as error:
            raise Failure(400, "invalid", str(error)) from None
        if self.asked.get("dry_run") == "true":
            self.reply({"plan": self._preview(spec)})
            return
        outcome = await self.controller.intents.put_env(spec, generation)
        await self.hold(env_id, seconds)
        self.reply(self.env_detail(env_id), status=201 if outcome == "created" else 200)

    def _spec_for(self, env_id: str) -> EnvSpec:
        content = self.json()
        if isinstance(content, dict) and content.setdefault("id", env_id) != env_id:
            detail = {"loc": "id", "msg": f"must be {env_id}, as in the path"}
            raise Failure(422, "invalid", f"id: {detail['msg']}", details=(detail,))
        try:
            return EnvSpec.model_validate(content)
        except ValidationError as error:
            raise invalid(error) from None

    def _preview(self, spec: EnvSpec) -> list[dict[str, Any]]:
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

    @operation(fails=(404, 422, 503), query=(WAIT,), headers=PREFER)
    async def on_delete(self, env_id: str) -> None:
        """Records that nothing of the environment may be left."""
        seconds = self.wait_seconds()
        await self.controller.intents.delete_env(env_id)
        await self.hold(env_id, seconds)
        self.reply()


class EnvPower(ApiHandler):
    """/api/envs/{id}/stop and …/start"""

    @operation(fails=(404, 409, 422, 503), query=(WAIT,), headers=PREFER)
    async def on_post(self, env_id: str, verb: str) -> None:
        """Records that the environment is to be stopped or to run."""
        self.no_body()
        seconds = self.wait_seconds()
        await self.controller.intents.set_power(env_id, "stopped" if verb == "stop" else "running")
        await self.hold(env_id, seconds)
        self.reply()


class EnvExtend(ApiHandler):
    """/api/envs/{id}/extend"""

    @operation(takes=ExtendReq, gives=Env, fails=(404, 409, 422, 503))
    async def on_post(self, env_id: str) -> None:
        """Records a new lifetime, counted from now."""
        request = self.read(ExtendReq)
        env = await self.controller.intents.extend(env_id, request.lifetime)
        self.reply(self.views.env(env))


class VmItem(ApiHandler):
    """/api/vms/{id}"""

    @operation(gives=Vm, fails=(404,))
    async def on_get(self, vm_id: str) -> None:
        """One VM."""
        vm = self.views.find_vm(vm_id)
        if vm is None:
            raise NoSuch(f"there is no VM {vm_id}")
        self.reply(vm)


class Vms(ApiHandler):
    """/api/vms"""

    @operation(gives=tuple[Vm, ...], query=list_params("vms"), also=CONTINUE)
    async def on_get(self) -> None:
        """Every VM of every environment."""
        vms, token = page(self.lists.vms(self.asked), "vms", self.asked)
        self.reply_json((self.hub.bodies.vm(vm).json for vm in vms), token)


class Images(ApiHandler):
    """/api/images"""

    @operation(gives=tuple[ImageInfo, ...])
    async def on_get(self) -> None:
        """Images of all online hosts."""
        self.reply(self.views.images())


class Status(ApiHandler):
    """/api/status"""

    @operation(gives=FleetStatus)
    async def on_get(self) -> None:
        """Sums over the fleet."""
        self.reply(self.views.fleet_status())


class Version(ApiHandler):
    """/api/version"""

    @operation(gives=VersionInfo)
    async def on_get(self) -> None:
        """What runs here."""
        fleet = self.controller.fleet
        self.reply({"version": version("muster"), "cluster_id": fleet.cluster, "term": self.controller.term})


class Watch(ApiHandler):
    """/api/watch: server-sent events, a snapshot and then every change; `since` resumes after a revision."""

    def entity_tag(self, **_where: str) -> str | None:
        """None: what is told is not the fleet's state."""
        return None

    @operation(
        query=(Param("since", "Only changes after this revision.", kind="integer", says="a revision"),),
        fails=(410,),
        media="text/event-stream",
        headers={"Last-Event-ID": "As `since`, sent by browsers that connect again."},
    )
    async def on_get(self) -> None:
        """Streams until the client goes."""
        at: int | None = self.asked.get("since")
        last_seen = self.request.headers.get("Last-Event-ID")
        if at is None and last_seen is not None:
            if not re.fullmatch(r"[0-9]{1,18}", last_seen):
                raise Failure(400, "invalid", "Last-Event-ID must be a revision")
            at = int(last_seen)
        if at is not None:
            self.hub.since(at)  # answers 410 while it still can
        self._auto_finish = False  # there is nobody left to finish for once the client has gone
        self.set_header("Content-Type", "text/event-stream")
        self.set_header("X-Accel-Buffering", "no")
        try:
            if at is None:
                self.write(self.hub.snapshot())
                at = self.hub.revision
            await self.flush()
            while True:
                frames = self.hub.since(at)
                if frames:
                    at = frames[-1][0]
                    self.write(b"".join(frame for _, frame in frames))
                elif not await self.hub.wait(KEEP_ALIVE):
                    self.write(b": keep-alive\n\n")
                await self.flush()
        except StreamClosedError:
            return
        except TooOld:
            await self.finish()  # too slow to keep up: it resumes, is told 410, and begins anew


class Health(ApiHandler):
    """/healthz: the process serves."""

    needs_key = False

    def entity_tag(self, **_where: str) -> str | None:
        """None: what is told is not the fleet's state."""
        return None

    @operation(gives=dict[str, str])
    async def on_get(self) -> None:
        """Always fine."""
        self.reply({"status": "ok"})


class Ready(ApiHandler):
    """/readyz: the desired state is loaded, and can be written."""

    needs_key = False

    def entity_tag(self, **_where: str) -> str | None:
        """None: what is told is not the fleet's state."""
        return None

    @operation(gives=dict[str, str], fails=(503,))
    async def on_get(self) -> None:
        """Fine once the controller has started, and while its store takes changes."""
        if not self.settings.get("is_ready", lambda: True)():
            raise Failure(503, "not_ready", "the controller is still loading")
        await self.controller.store.commit(Change())
        self.reply({"status": "ready"})


class _Hardened(StaticFileHandler):
    """Static files under a policy that lets no script of anybody else run."""

    def set_extra_headers(self, path: str) -> None:
        """Called by tornado for every file."""
        self.set_header("Content-Security-Policy", CONTENT_SECURITY_POLICY)
        self.set_header("X-Content-Type-Options", "nosniff")
        self.set_header("Referrer-Policy", "no-referrer")
        self.set_header("Cross-Origin-Opener-Policy", "same-origin")
        self.set_header("Cache-Control", "no-cache")
        self.clear_header("Server")


ROUTES: list[Any] = [
    (r"/api/hosts", Hosts),
    (r"/api/hosts/(?P<host_id>[^/]+)", HostItem),
    (r"/api/hosts/(?P<host_id>[^/]+)/(?P<verb>cordon|uncordon)", HostCordon),
    (r"/api/envs", Envs),
    (r"/api/envs/(?P<env_id>[^/]+)", EnvItem),
    (r"/api/envs/(?P<env_id>[^/]+)/(?P<verb>stop|start)", EnvPower),
    (r"/api/envs/(?P<env_id>[^/]+)/extend", EnvExtend),
    (r"/api/vms", Vms),
    (r"/api/vms/(?P<vm_id>[^/]+)", VmItem),
    (r"/api/images", Images),
    (r"/api/status", Status),
    (r"/api/version", Version),
    (r"/api/watch", Watch),
    (r"/healthz", Health),
    (r"/readyz", Ready),
    (r"/(?P<path>)", _Hardened, {"path": str(STATIC), "default_filename": "index.html"}),
    (r"/static/(?P<path>.*)", _Hardened, {"path": str(STATIC)}),
]
