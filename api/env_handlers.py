"""The endpoints of environments: read the request, record the intent, answer in the envelope."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from api.base import CONTINUE, PREFER, WAIT, ApiHandler
from api.lists import list_params, page
from reconciler.loop.intents import parse_if_match
from specs.desired import EnvSpec, ExtendReq
from specs.failures import Failure, invalid
from specs.names import EnvId
from specs.operations import Param, operation
from specs.wire import Env, EnvDetail, Plan


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
            self.reply({"plan": self.preview(spec)})
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


ROUTES: list[Any] = [
    (r"/api/envs", Envs),
    (r"/api/envs/(?P<env_id>[^/]+)", EnvItem),
    (r"/api/envs/(?P<env_id>[^/]+)/(?P<verb>stop|start)", EnvPower),
    (r"/api/envs/(?P<env_id>[^/]+)/extend", EnvExtend),
]
