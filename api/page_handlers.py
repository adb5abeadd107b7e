"""The endpoints the dashboard has beside everybody's: counts of the last hour, specs as YAML, checks of YAML."""

from __future__ import annotations

from typing import Any, cast

from api.base import ApiHandler
from api.history import History
from specs.desired import EnvSpec, canonical_env
from specs.documents import SpecErrors, load
from specs.failures import Failure
from specs.operations import operation
from specs.wire import Checked, EnvSpecText, SpecMistake
from specs.wire import History as HistoryInfo

_YAML = ("application/yaml", "application/x-yaml", "text/yaml", "text/x-yaml")
_SHOWN = 100  # mistakes


class Counts(ApiHandler):
    """/api/history"""

    tagged = False  # counts are taken while nothing changes, too

    @operation(gives=HistoryInfo)
    async def on_get(self) -> None:
        """How many VMs were desired, running and not as desired, over the last hour of this process."""
        self.reply(cast(History, self.settings["history"]).shown())


class EnvSpecItem(ApiHandler):
    """/api/envs/{id}/spec"""

    @operation(gives=EnvSpecText, fails=(404,))
    async def on_get(self, env_id: str) -> None:
        """An environment's desired state as YAML, beside what is observed of each VM."""
        self.reply(self.views.spec_text(self.controller.intents.env(env_id)))


class Validate(ApiHandler):
    """/api/validate"""

    @operation(gives=Checked, fails=(400, 415), takes_media="application/yaml")
    async def on_post(self) -> None:
        """Checks one environment written as YAML: every mistake with its line, or what applying it would do."""
        kind = self.request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if kind not in _YAML:
            raise Failure(415, "unsupported_media_type", "the body must be YAML, sent with Content-Type: application/yaml")
        try:
            text = bytes(self.raw).decode()
        except UnicodeDecodeError:
            raise Failure(400, "malformed_yaml", "the body must be UTF-8") from None
        self.reply(self._checked(text))

    def _checked(self, text: str) -> dict[str, Any]:
        try:
            documents = load(text, "spec", None)
        except SpecErrors as errors:
            return {
                "errors": [
                    SpecMistake(line=e.line, column=e.column, field=e.field, message=e.message) for e in errors.errors[:_SHOWN]
                ]
            }
        first = documents[0]
        if len(documents) > 1:
            return _mistake(documents[1].line, "one environment at a time can be applied here; use `muster apply` for several")
        if not isinstance(first.spec, EnvSpec):
            return _mistake(first.line, "only an Environment can be applied here; register hosts with `muster host add`")
        env = self.controller.fleet.envs.get(cast(Any, first.spec.id))
        checked: dict[str, Any] = {"errors": [], "spec": canonical_env(first.spec), "exists": env is not None}
        if env is not None and env.deleting:
            return _mistake(first.line, f"environment {env.id} is being deleted; apply it again once it is gone")
        return checked | {"generation": env.generation if env else 0, "plan": self.preview(first.spec)}


def _mistake(line: int, message: str) -> dict[str, Any]:
    return {"errors": [SpecMistake(line=line, column=1, field="", message=message)]}


ROUTES: list[Any] = [
    (r"/api/history", Counts),
    (r"/api/envs/(?P<env_id>[^/]+)/spec", EnvSpecItem),
    (r"/api/validate", Validate),
]
