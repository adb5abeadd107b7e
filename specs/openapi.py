"""The OpenAPI document of a server, made of the route table that serves it. Called by the route tables of both servers."""

from __future__ import annotations

import functools
import hashlib
import http.client
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal

import openapi_pydantic as oas
from pydantic import BaseModel, TypeAdapter

from specs.http import Handler
from specs.operations import Operation, Param, operation

PATH = "/api/openapi.json"
_REF = "#/components/schemas/{model}"
_METHODS = ("get", "post", "put", "patch", "delete")
_ANY_CALL = (400, 403, 413, 415, 500)
_GROUP = re.compile(r"\(\?P<(\w+)>((?:[^()\[\]]|\[[^\]]*\])+)\)")
_NAME = {"type": "string", "pattern": r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}$"}
_PLACES = {
    "env_id": ("Name of the environment.", _NAME),
    "vm_id": ("Id of the VM.", _NAME),
    "host_id": ("Id or address of the host.", {"type": "string", "minLength": 1}),
}


class Detail(BaseModel):
    """One mistake in a request: where, and what."""

    loc: str
    msg: str


class Failed(BaseModel):
    """Every answer that is no success."""

    ok: Literal[False]
    error: str
    code: str
    details: tuple[Detail, ...] = ()


def with_document(title: str, routes: Iterable[Any]) -> list[Any]:
    """The routes, and one more that tells of them all."""
    table = list(routes)
    make = functools.cache(lambda: _encode(document(title, table)))
    return [*table, (PATH, OpenApi, {"make": make})]


class OpenApi(Handler):
    """/api/openapi.json"""

    tagged = True

    def initialize(self, make: Callable[[], bytes]) -> None:  # type: ignore[override]  # tornado passes what the route holds
        """Called by tornado with what the route table holds; the document is made when it is first asked for."""
        super().initialize()
        self._make = make

    def entity_tag(self, **_where: str) -> str | None:
        """A digest of the document, which is the same for as long as the process lives."""
        return f'W/"{hashlib.blake2s(self._make(), digest_size=8).hexdigest()}"'

    @operation(gives=dict[str, Any], bare=True)
    async def on_get(self) -> None:
        """This document."""
        self.set_header("Content-Type", "application/json")
        self.finish(self._make())


def _encode(made: oas.OpenAPI) -> bytes:
    return made.model_dump_json(by_alias=True, exclude_none=True).encode()


@dataclass(frozen=True, slots=True)
class _Call:
    """One method of one path, such as POST /api/envs/{env_id}/stop."""

    path: str
    method: str
    handler: type[Handler]
    described: Operation
    about: str


class _Schemas:
    """JSON Schemas of all types the calls name, in one set of components."""

    def __init__(self, calls: Iterable[_Call]) -> None:
        adapters: dict[tuple[str, Any], TypeAdapter[Any]] = {("out", Failed): TypeAdapter(Failed)}
        for call in calls:
            if call.described.takes is not None:
                adapters["in", call.described.takes] = TypeAdapter(call.described.takes)
            told = (call.described.gives, *call.described.gives_on.values(), *call.described.also.values())
            adapters |= {("out", kind): TypeAdapter(kind) for kind in told if kind is not None}
        names = list(adapters)
        modes: dict[str, Literal["validation", "serialization"]] = {"in": "validation", "out": "serialization"}
        wanted = [(number, modes[name[0]], adapters[name]) for number, name in enumerate(names)]
        found, definitions = TypeAdapter.json_schemas(wanted, ref_template=_REF)
        self._found = {names[number]: schema for (number, _), schema in found.items()}
        self.components: dict[str, Any] = definitions.get("$defs", {})

    def of(self, way: Literal["in", "out"], kind: Any) -> dict[str, Any]:
        """The schema of a type, as it may be sent (`in`) or is answered (`out`)."""
        return self._found[way, kind]


def document(title: str, routes: Iterable[Any]) -> oas.OpenAPI:
    """OpenAPI 3.1 of every route whose methods say what they take and answer; the others serve files."""
    calls = list(_calls([*routes, (PATH, OpenApi)]))
    schemas = _Schemas(calls)
    paths: dict[str, Any] = {}
    for call in calls:
        paths.setdefault(call.path, {})[call.method] = _operation(call, schemas)
    return oas.OpenAPI.model_validate(
        {
            "openapi": "3.1.1",
            "info": {"title": title, "version": version("muster")},
            "paths": paths,
            "components": {
                "schemas": schemas.components,
                "securitySchemes": {
                    "key": {"type": "http", "scheme": "bearer", "description": "Needed if the server has one."}
                },
            },
        }
    )


def _calls(routes: Iterable[Any]) -> Iterator[_Call]:
    for pattern, handler, *_ in routes:
        for method in _METHODS:
            action = getattr(handler, f"on_{method}", None)
            described: Operation | None = getattr(action, "operation", None)
            if action is not None and described is not None:
                about = " ".join((action.__doc__ or "").split())
                for path in _expanded(pattern):
                    yield _Call(path, method, handler, described, about)


def _expanded(pattern: str) -> Iterator[str]:
    """`/x/(?P<id>[^/]+)/(?P<verb>stop|start)` as /x/{id}/stop and /x/{id}/start."""
    pieces = _GROUP.split(pattern)
    choices = [[piece] for piece in pieces[:1]]
    for name, inner, literal in zip(pieces[1::3], pieces[2::3], pieces[3::3], strict=True):
        choices += [inner.split("|") if re.fullmatch(r"[a-z|]+", inner) else [f"{{{name}}}"], [literal]]
    return ("".join(choice) for choice in itertools.product(*choices))


def _operation(call: _Call, schemas: _Schemas) -> dict[str, Any]:
    described = call.described
    words = re.findall(r"[A-Za-z]+", call.path.removeprefix("/api").replace("_id", "").replace(".json", ""))
    made: dict[str, Any] = {
        "operationId": call.method + "".join(word.capitalize() for word in words),
        "summary": call.about,
        "parameters": list(_parameters(call)),
        "responses": dict(_responses(call, schemas)),
        "security": [{"key": []}, {}] if call.handler.needs_key else [],
    }
    if described.takes is not None:
        made["requestBody"] = {
            "required": True,
            "content": {described.takes_media: {"schema": schemas.of("in", described.takes)}},
        }
    elif described.takes_media != "application/json":
        made["requestBody"] = {"required": True, "content": {described.takes_media: {}}}
    return made


def _parameters(call: _Call) -> Iterator[dict[str, Any]]:
    for name in re.findall(r"\{(\w+)\}", call.path):
        about, schema = _PLACES[name]
        yield {"name": name, "in": "path", "required": True, "description": about, "schema": schema}
    for param in call.described.query:
        yield {"name": param.name, "in": "query", "description": param.about, "schema": _parameter_schema(param)}
    tags = {"If-None-Match": "Entity tags the caller has an answer of: 304 if it still holds."} if _is_tagged(call) else {}
    for name, about in {**call.described.headers, **tags}.items():
        yield {"name": name, "in": "header", "description": about, "schema": {"type": "string"}}


def _parameter_schema(param: Param) -> dict[str, Any]:
    if param.kind == "integer":
        return {"type": "integer", "minimum": param.least, "maximum": param.most}
    if param.values:
        return {"type": "string", "enum": list(param.values)}
    named = re.compile(r"\(\?P<\w+>")  # Python's alone
    return {"type": "string", "pattern": f"^(?:{named.sub('(', param.pattern)})$"} if param.pattern else {"type": "string"}


def _is_tagged(call: _Call) -> bool:
    return call.method == "get" and call.handler.tagged


def _responses(call: _Call, schemas: _Schemas) -> Iterator[tuple[str, dict[str, Any]]]:
    described = call.described
    for status in described.ok:
        answer: dict[str, Any] = {"description": http.client.responses[status]}
        answer["content"] = {described.media: _content(described, status, schemas)}
        if _is_tagged(call):
            answer["headers"] = {"ETag": {"description": "Differs whenever the answer would.", "schema": {"type": "string"}}}
        yield str(status), answer
    if _is_tagged(call):
        yield "304", {"description": "What the caller has still holds."}
    failures = {
        *_ANY_CALL,
        *described.fails,
        *((401,) if call.handler.needs_key else ()),
        *((404,) if "{" in call.path else ()),
    }
    for status in sorted(failures):
        content = {"application/json": {"schema": schemas.of("out", Failed)}}
        yield str(status), {"description": http.client.responses[status], "content": content}


def _content(described: Operation, status: int, schemas: _Schemas) -> dict[str, Any]:
    if described.media != "application/json":
        return {}
    gives = described.gives_on.get(status, described.gives)
    if described.bare:
        return {"schema": schemas.of("out", gives)}
    fields: dict[str, Any] = {"ok": {"const": True}, **{name: schemas.of("out", kind) for name, kind in described.also.items()}}
    if gives is None:
        # Strict clients of calls that give no data fail where there is some.
        return {"schema": {"type": "object", "properties": fields, "required": ["ok"], "not": {"required": ["data"]}}}
    fields["data"] = schemas.of("out", gives)
    return {"schema": {"type": "object", "properties": fields, "required": ["ok", "data"]}}
