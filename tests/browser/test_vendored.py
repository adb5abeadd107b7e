"""The libraries kept beside the dashboard."""

from __future__ import annotations

import hashlib
import re

from api.site import STATIC


def test_vendored_modules_are_those_their_list_names() -> None:
    listed = dict(re.findall(r"^\| `([\w.-]+\.mjs)` .*`([0-9a-f]{64})` \|$", (STATIC / "vendor/README.md").read_text(), re.M))
    there = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (STATIC / "vendor").glob("*.mjs")}
    assert listed == there
    imports = {
        name for path in STATIC.rglob("*.mjs") for name in re.findall(r"""\bfrom ?["']([^"'\s]+)["']""", path.read_text())
    }
    assert all(name.startswith(("./", "../")) for name in imports)
