"""Answers that are no success, and what pydantic finds wrong with a request as one of them. Knows nothing of tornado."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

_SHOWN_ERRORS = 20


class Failure(Exception):
    """An answer that is no success. `details` are `{"loc": "vms.0.cpu", "msg": "…"}`."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        details: tuple[dict[str, str], ...] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.details = details
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The envelope."""
        body: dict[str, Any] = {"ok": False, "error": self.message, "code": self.code}
        return body | {"details": self.details} if self.details else body


Explain = Callable[[BaseException], Failure | None]
"""Turns an application's own exceptions into failures; None for what it does not know."""


def invalid(error: ValidationError) -> Failure:
    """422 with one sentence about the first mistake and every mistake's place in `details`."""
    every = error.errors(include_url=False, include_context=False, include_input=False)
    # Entries that failed do not count for pydantic, so a list of one bad entry is "too short" as well.
    found = [item for item in every if item["type"] != "too_short" or not _has_inner(item, every)]
    details = tuple(
        {"loc": ".".join(str(part)[:100] for part in item["loc"])[:300], "msg": _plain(item["type"], item["msg"])}
        for item in found[:_SHOWN_ERRORS]
    )
    first = details[0]
    place = f"{first['loc']}: " if first["loc"] else ""
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return Failure(422, "invalid", f"{place}{first['msg']}{more}", details=details)


def _has_inner(item: ErrorDetails, every: list[ErrorDetails]) -> bool:
    depth = len(item["loc"])
    return any(len(other["loc"]) > depth and other["loc"][:depth] == item["loc"] for other in every)


def _plain(kind: str, message: str) -> str:
    if kind == "extra_forbidden":
        return "unknown field"
    if kind == "missing":
        return "is required"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return "must be a JSON object"
    if kind == "tuple_type":
        return "must be a list"
    if kind == "too_short":
        return "must have at least one entry"
    plain = message.removeprefix("Value error, ").removeprefix("Input ")
    return plain[:500].replace("should be", "must be", 1)
