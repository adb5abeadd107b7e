"""JSON that two readers could understand differently is refused, quickly and by name."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specs.strict_json import MAX_DEPTH, BadJson, loads

BAD: list[tuple[bytes, str]] = [
    (b'{"id": "a", "id": "b"}', 'the key "id" more than once'),
    (b'{"vms": [{"cpu": 1, "cpu": 2}]}', 'the key "cpu" more than once'),
    (b'{"a": 1, "\\u0061": 2}', 'the key "a" more than once'),
    (b"NaN", "unexpected character"),
    (b"[Infinity]", "unexpected character"),
    (b"[-Infinity]", ""),
    (b"[1e999]", "infinity"),
    (b"[18446744073709551616]", "does not fit into 64 bits"),
    (b"[-9223372036854775809]", "does not fit into 64 bits"),
    (b"1" + b"0" * 100_000, ""),
    (b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), "nested more than 64"),
    (b'{"a":' * 100 + b"1" + b"}" * 100, "nested more than 64"),
    (b"[" * 500_000, ""),
    (b"\xff", "UTF-8"),
    (b'"\xed\xa0\x80"', "UTF-8"),
    (b'"\\ud800"', "surrogate"),
    (b"\xef\xbb\xbf{}", "byte order mark"),
    ("{}".encode("utf-16"), ""),
    ("{}".encode("utf-16-be"), ""),
    (b'"a\nb"', ""),
    (b"[1,]", ""),
    (b"{} {}", ""),
    (b"01", ""),
    (b"", ""),
    (b'"a\\' * 200_000, ""),
]


@pytest.mark.parametrize(("raw", "says"), BAD, ids=[raw[:24].decode("latin-1") for raw, _ in BAD])
def test_what_readers_would_not_agree_on_is_refused(raw: bytes, says: str) -> None:
    with pytest.raises(BadJson, match=says or "."):
        loads(raw)


def test_brackets_within_strings_do_not_count_as_depth() -> None:
    assert loads(b'{"a": "' + b'[{\\"' * 200 + b'"}') == {"a": '[{"' * 200}
    assert loads(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH)


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(2**63), 2**64 - 1)
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
        max_leaves=12,
    )
)
def test_everything_else_is_read_as_it_was_written(value: Any) -> None:
    assert loads(json.dumps(value, ensure_ascii=False).encode()) == value
    assert loads(json.dumps(value).encode()) == value
