"""Both servers answer as their OpenAPI documents say, whatever they are sent; the requests are made from the documents."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance, unsupported_method

from ops.measure.site import Site, env_body, running_site

pytestmark = [pytest.mark.e2e]

EXAMPLES = 20  # requests an operation
EXCLUDED = [
    unsupported_method,  # asks with TRACE and the like, which the server refuses before it knows of paths
    positive_data_acceptance,  # what a schema cannot say (a name that is taken, a page that was never told) is refused
]
bounded = settings(
    max_examples=EXAMPLES,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A controller with two simulated hosts, and with environments some of the requests meet."""
    with running_site(tmp_path_factory.mktemp("site"), 2) as site:
        for name in ("0", "a"):
            site.http.post("/api/envs", json=env_body(name, 2)).raise_for_status()
        site.await_ready(2)
        yield site


def hasty(context: Any, asked: dict[str, Any] | None) -> bool:
    """Whether an answer comes at once: holding one is tested where something is waited for."""
    return not {"wait", "watch", "Prefer"} & set(asked or {})


def faults(url: str) -> dict[str, str]:
    """What is wrong with the answers, by method and path."""
    document = httpx.get(f"{url}/api/openapi.json", trust_env=False).raise_for_status().json()
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=url)
    schema.hook("filter_query")(hasty)
    schema.hook("filter_headers")(hasty)
    found = {}
    for result in schema.get_all_operations():
        described = result.ok()
        if described.path == "/api/watch":  # never ends
            continue
        try:
            _asked(described)
        except (Exception, BaseExceptionGroup) as error:
            found[described.label] = _told(error)
    return found


def _asked(described: Any) -> None:
    @bounded
    @given(case=described.as_strategy())
    def ask(case: schemathesis.Case) -> None:
        case.call_and_validate(excluded_checks=EXCLUDED, timeout=30)

    ask()


def _told(error: BaseException) -> str:
    if isinstance(error, BaseExceptionGroup):
        return "\n".join(_told(one) for one in error.exceptions)
    return f"{type(error).__name__}: {error} {getattr(error, 'message', '')}"


def test_the_controller_answers_as_its_document_says(fleet: Site) -> None:
    assert faults(fleet.url) == {}


def test_an_agent_answers_as_its_document_says(fleet: Site) -> None:
    assert faults(f"http://{fleet.addresses[0]}") == {}
