"""What an endpoint takes and answers, said once: the servers check requests against it, the OpenAPI document is made of it.

Called by the handlers of both servers; knows nothing of tornado.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from pydantic import BaseModel

F = TypeVar("F", bound=Callable[..., Any])
_WHOLE = re.compile(r"[0-9]{1,18}")


class BadParameter(ValueError):
    """A query parameter that is unknown, given twice or not of its kind; the message begins with its name."""


@dataclass(frozen=True, slots=True)
class Param:
    """A query parameter. `says` completes "NAME must be …" for a value that `pattern` or the range refuses."""

    name: str
    about: str
    kind: Literal["string", "integer"] = "string"
    says: str = ""
    pattern: str = ""
    values: tuple[str, ...] = ()
    least: int = 0
    most: int = 10**18 - 1

    def read(self, text: str) -> str | int:
        """The value of a text. Raises BadParameter."""
        if self.kind == "integer":
            if not _WHOLE.fullmatch(text) or not self.least <= int(text) <= self.most:
                raise BadParameter(f"{self.name} must be {self.says or f'a whole number from {self.least} to {self.most}'}")
            return int(text)
        if self.values and text not in self.values:
            raise BadParameter(f"{self.name} must be {' or '.join((', '.join(self.values[:-1]), self.values[-1]))}")
        if self.pattern and not re.fullmatch(self.pattern, text):
            raise BadParameter(f"{self.name} must be {self.says}")
        return text


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of one path.

    `gives` is the type of `data` in the answer, None where there is none, `gives_on` the same for single statuses; `also` are
    further keys beside it. `ok` and `fails` are every status an answer can have, but for those any call can have. `media` is
    the answer's content type, `takes_media` the body's; what is `bare` comes without the envelope.
    """

    takes: type[BaseModel] | None = None
    gives: Any = None
    ok: tuple[int, ...] = (200,)
    fails: tuple[int, ...] = ()
    query: tuple[Param, ...] = ()
    headers: Mapping[str, str] = field(default_factory=dict)
    also: Mapping[str, Any] = field(default_factory=dict)
    media: str = "application/json"
    takes_media: str = "application/json"
    gives_on: Mapping[int, Any] = field(default_factory=dict)
    bare: bool = False

    def read_query(self, given: Mapping[str, Sequence[bytes]]) -> dict[str, Any]:
        """The parameters by name. Raises BadParameter."""
        known = {param.name: param for param in self.query}
        found: dict[str, Any] = {}
        for name, values in given.items():
            if name not in known:
                has = f"; there are {', '.join(known)}" if known else "; there are none"
                raise BadParameter(f"{_printable(name)} is no query parameter of this call{has}")
            if len(values) > 1:
                raise BadParameter(f"{name} is given more than once")
            try:
                text = values[0].decode()
            except UnicodeDecodeError:
                raise BadParameter(f"{name} must be UTF-8") from None
            found[name] = known[name].read(text)
        return found


TAIL_LINES = 100
TAIL = Param("tail", f"So many of the last lines; {TAIL_LINES} if left out.", kind="integer", least=1, most=1000)


def _printable(name: str) -> str:
    return "".join(char if char.isprintable() else "?" for char in name[:100]) or "an empty name"


def operation(
    *,
    takes: type[BaseModel] | None = None,
    gives: Any = None,
    ok: tuple[int, ...] = (200,),
    fails: tuple[int, ...] = (),
    query: tuple[Param, ...] = (),
    headers: Mapping[str, str] | None = None,
    also: Mapping[str, Any] | None = None,
    media: str = "application/json",
    takes_media: str = "application/json",
    gives_on: Mapping[int, Any] | None = None,
    bare: bool = False,
) -> Callable[[F], F]:
    """Says of a handler's `on_…` method what it takes and answers."""
    described = Operation(takes, gives, ok, fails, query, headers or {}, also or {}, media, takes_media, gives_on or {}, bare)

    def mark(method: F) -> F:
        method.operation = described  # type: ignore[attr-defined]
        return method

    return mark
