"""The OpenAPI documents tell of everything that is served, and hold together."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from openapi_pydantic import OpenAPI

from agent.app import make_routes
from api.routes import ROUTES
from specs.http import Handler
from specs.openapi import PATH, document

SERVERS = {"controller": ROUTES, "agent": make_routes()}


@pytest.fixture(params=SERVERS)
def server(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def told(server: str) -> dict[str, Any]:
    made = next(rest[0]["make"] for pattern, _, *rest in SERVERS[server] if pattern == PATH)
    return dict(json.loads(made()))


def values(part: Any, key: str) -> Iterator[Any]:
    """Every value of a key anywhere in a document."""
    if isinstance(part, dict):
        yield from (value for name, value in part.items() if name == key)
    for inner in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
        yield from values(inner, key)


def test_every_method_of_every_handler_says_what_it_takes_and_answers(server: str) -> None:
    silent = [
        f"{method} {pattern}"
        for pattern, handler, *_ in SERVERS[server]
        for method in ("on_get", "on_post", "on_put", "on_delete")
        if issubclass(handler, Handler) and hasattr(handler, method)
        if pattern.startswith(("/api/", "/healthz", "/readyz")) and not hasattr(getattr(handler, method), "operation")
    ]
    assert silent == []


def test_every_path_of_the_servers_is_in_their_documents() -> None:
    assert {"/api/envs/{env_id}/stop", "/api/hosts/{host_id}/uncordon", "/api/watch", "/healthz", PATH} <= told("controller")[
        "paths"
    ].keys()
    assert {"/api/vms/{vm_id}/start", "/api/vms/{vm_id}/disk", "/api/info", PATH} <= told("agent")["paths"].keys()


def test_a_document_is_valid_and_refers_to_nothing_it_lacks(server: str) -> None:
    content = told(server)
    OpenAPI.model_validate(content)
    schemas = {f"#/components/schemas/{name}" for name in content["components"]["schemas"]}
    assert set(values(content, "$ref")) == schemas
    assert max(Counter(values(content, "operationId")).values()) == 1


def test_a_body_and_its_answer_have_schemas_with_names_bounds_and_defaults() -> None:
    schemas = told("controller")["components"]["schemas"]
    vm = schemas["VmSpec"]["properties"]
    assert (vm["cpu"]["exclusiveMinimum"], vm["disk"]["default"], vm["engine"]["default"]) == (0, 40960, "qemu")
    assert schemas["EnvSpec"]["additionalProperties"] is False
    assert set(schemas["Failed"]["required"]) == {"ok", "error", "code"}
    where = told("controller")["paths"]["/api/envs/{env_id}"]["put"]
    assert {"If-Match", "Prefer"} <= {parameter["name"] for parameter in where["parameters"]}
    assert {"200", "201", "404", "409", "412", "422", "503"} <= where["responses"].keys()


def test_a_route_without_declarations_is_left_out() -> None:
    class Files(Handler):
        async def on_get(self) -> None:
            """Serves a file."""

    assert set(document("files", [(r"/(.*)", Files)]).paths or {}) == {PATH}
