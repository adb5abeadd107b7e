"""Reads a request's JSON as strictly as RFC 8259 allows: what two parsers could read differently is an error.

Called by specs.http for every body of both servers; knows nothing of HTTP.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

import orjson

MAX_DEPTH = 64  # arrays and objects inside one another; a specification needs six
_LEAST, _MOST = -(2**63), 2**64 - 1  # what a 64-bit reader can hold
_DIGITS = 20  # of _MOST; a longer text need not be turned into a number, which takes quadratic time
_BRACKETS = re.compile(rb'"(?:[^"\\]|\\.)*+"|([\[{])|[\]}]', re.DOTALL)


class BadJson(ValueError):
    """The text is no JSON, or JSON that readers would not agree on; the message says where or what."""


def loads(raw: bytes) -> Any:
    """The value of a UTF-8 text.

    Raises BadJson on a byte order mark, invalid UTF-8, lone surrogates, NaN and Infinity, a key that an object has twice,
    numbers that 64 bits cannot hold, and more than MAX_DEPTH levels.
    """
    if raw.startswith(b"\xef\xbb\xbf"):
        raise BadJson("it begins with a byte order mark")
    try:
        # The first reader knows the grammar and the encoding best, the second lets keys and numbers be looked at.
        orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise BadJson(str(error)) from None
    _check_depth(raw)
    return json.loads(raw.decode(), object_pairs_hook=_object, parse_int=_integer, parse_float=_number)


def _check_depth(raw: bytes) -> None:
    # Of valid JSON alone: where a string has no end, looking for it from every quote would take quadratic time.
    depth = 0
    for match in _BRACKETS.finditer(raw):
        if match[1]:
            depth += 1
            if depth > MAX_DEPTH:
                raise BadJson(f"it is nested more than {MAX_DEPTH} levels deep")
        elif match[0] in (b"]", b"}"):
            depth -= 1


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        times = Counter(key for key, _ in pairs)
        twice = next(key for key in times if times[key] > 1)
        raise BadJson(f"an object has the key {json.dumps(twice[:100])} more than once")
    return found


def _integer(text: str) -> int:
    if len(text) > _DIGITS + 1 or not _LEAST <= int(text) <= _MOST:
        raise BadJson(f"the number {_short(text)} does not fit into 64 bits")
    return int(text)


def _number(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise BadJson(f"the number {_short(text)} is too large")
    return number


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:40]}…"
