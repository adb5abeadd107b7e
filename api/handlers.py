"""The controller's endpoints: read the request, record the intent or read the views, answer in the envelope."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError
from tornado.iostream import StreamClosedError
from tornado.web import StaticFileHandler

from api.hub import KEEP_ALIVE, Hub, TooOld
from api.views import Views
from reconciler.core.place import Placement, predict
from reconciler.loop.controller import Controller
from reconciler.loop.intents import Clash, NoSuch, StaleGeneration, parse_if_match
from reconciler.store.database import StoreUnavailable
from specs.desired import EnvSpec, ExtendReq, HostSpec
from specs.http import Failure, Handler, invalid

STATIC = Path(__file__).parent / "static"
MAX_WAIT = 3600.0  # seconds a request may be held
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "font-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


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

    def wait_seconds(self) -> float:
        """How long the caller wants the answer held: `?wait=` or `Prefer: wait=` (RFC 7240), 0 if not at all."""
        asked = self.get_query_argument("wait", None)
        source = "wait"
        if asked is None:
            wishes = ",".join(self.request.headers.get_list("Prefer"))
            match = re.search(r"(?:^|[,;\s])wait\s*=\s*\"?([^\",;\s]*)", wishes)
            asked, source = (match[1], "Prefer") if match else ("0", "")
        if not re.fullmatch(r"\d{1,9}", asked):
            raise Failure(400, "invalid", f"{source}: wait must be a number of seconds")
        return min(float(asked), MAX_WAIT)

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

    async def on_get(self) -> None:
        """Lists hosts."""
        self.reply([self.views.host(host) for host in self.controller.fleet.hosts.values()])

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

    async def on_get(self, host_id: str) -> None:
        """One host."""
        self.reply(self.views.host(self.controller.intents.host(host_id)))

    async def on_delete(self, host_id: str) -> None:
        """Unregisters a host."""
        await self.controller.remove_host(host_id)
        self.reply()


class HostCordon(ApiHandler):
    """/api/hosts/{id}/cordon and …/uncordon"""

    async def on_post(self, host_id: str, verb: str) -> None:
        """Records whether new VMs may be placed there."""
        self.no_body()
        await self.controller.intents.set_cordon(host_id, verb == "cordon")
        self.reply()


class Envs(ApiHandler):
    """/api/envs"""

    async def on_get(self) -> None:
        """Lists environments."""
        self.reply([self.views.env(env) for env in self.controller.fleet.envs.values()])

    async def on_post(self) -> None:
        """Records a new environment."""
        spec = self.read(EnvSpec)
        seconds = self.wait_seconds()
        created = await self.controller.intents.create_env(spec)
        await self.hold(spec.id, seconds)
        self.reply(self.env_detail(spec.id), status=201 if created else 200)


class EnvItem(ApiHandler):
    """/api/envs/{id}"""

    async def on_get(self, env_id: str) -> None:
        """One environment with its VMs."""
        self.reply(self.env_detail(env_id))

    async def on_put(self, env_id: str) -> None:
        """Creates or replaces the desired state; `?dry_run=true` only says what would happen."""
        spec = self._spec_for(env_id)
        seconds = self.wait_seconds()
        dry_run = self.get_query_argument("dry_run", "false")
        if dry_run not in ("true", "false"):
            raise Failure(400, "invalid", "dry_run must be true or false")
        try:
            generation = parse_if_match(self.request.headers.get("If-Match"))
        except ValueError as error:
            raise Failure(400, "invalid", str(error)) from None
        if dry_run == "true":
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

    async def on_delete(self, env_id: str) -> None:
        """Records that nothing of the environment may be left."""
        seconds = self.wait_seconds()
        await self.controller.intents.delete_env(env_id)
        await self.hold(env_id, seconds)
        self.reply()


class EnvPower(ApiHandler):
    """/api/envs/{id}/stop and …/start"""

    async def on_post(self, env_id: str, verb: str) -> None:
        """Records that the environment is to be stopped or to run."""
        self.no_body()
        seconds = self.wait_seconds()
        await self.controller.intents.set_power(env_id, "stopped" if verb == "stop" else "running")
        await self.hold(env_id, seconds)
        self.reply()


class EnvExtend(ApiHandler):
    """/api/envs/{id}/extend"""

    async def on_post(self, env_id: str) -> None:
        """Records a new lifetime, counted from now."""
        request = self.read(ExtendReq)
        env = await self.controller.intents.extend(env_id, request.lifetime)
        self.reply(self.views.env(env))


class VmItem(ApiHandler):
    """/api/vms/{id}"""

    async def on_get(self, vm_id: str) -> None:
        """One VM."""
        vm = self.views.find_vm(vm_id)
        if vm is None:
            raise NoSuch(f"there is no VM {vm_id}")
        self.reply(vm)


class Vms(ApiHandler):
    """/api/vms"""

    async def on_get(self) -> None:
        """Every VM of every environment."""
        self.reply([self.views.vm(vm) for vm in self.controller.fleet.vms.values() if not vm.gone_at])


class Images(ApiHandler):
    """/api/images"""

    async def on_get(self) -> None:
        """Images of all online hosts."""
        self.reply(self.views.images())


class Status(ApiHandler):
    """/api/status"""

    async def on_get(self) -> None:
        """Sums over the fleet."""
        self.reply(self.views.fleet_status())


class Version(ApiHandler):
    """/api/version"""

    async def on_get(self) -> None:
        """What runs here."""
        fleet = self.controller.fleet
        self.reply({"version": version("muster"), "cluster_id": fleet.cluster, "term": self.controller.term})


class Watch(ApiHandler):
    """/api/watch: server-sent events, a snapshot and then every change; `since` resumes after a revision."""

    async def on_get(self) -> None:
        """Streams until the client goes."""
        asked = self.get_query_argument("since", None) or self.request.headers.get("Last-Event-ID")
        if asked is not None and not re.fullmatch(r"\d{1,18}", asked):
            raise Failure(400, "invalid", "since must be a revision")
        at = int(asked) if asked is not None else None
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

    async def on_get(self) -> None:
        """Always fine."""
        self.reply({"status": "ok"})


class Ready(ApiHandler):
    """/readyz: the desired state is loaded."""

    needs_key = False

    async def on_get(self) -> None:
        """Fine once the controller has started."""
        if not self.settings.get("is_ready", lambda: True)():
            raise Failure(503, "not_ready", "the controller is still loading")
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
