"""What pydantic finds wrong with a document, as a place in it and a sentence for people. Called by the document loader."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from specs.desired import EnvSpec, HostSpec, HttpProbe, Ready, VmSpec
from specs.yaml_nodes import Mapping, Path, Scalar, Sequence, locate

# What others call our fields and spelling distance does not find.
_ELSEWHERE = {
    "ram": "mem", "memory": "mem", "cores": "cpu", "vcpus": "cpu", "cpus": "cpu", "replicas": "count", "instances": "count",
    "keys": "ssh_keys", "sshkeys": "ssh_keys", "ttl": "lifetime", "machines": "vms", "containers": "vms", "address": "addr",
    "cloud_init": "user_data", "userdata": "user_data", "type": "engine", "hypervisor": "engine", "labels": "host_labels",
}  # fmt: skip
STAND_IN_KEY = "ssh-ed25519 AAAA"
# What stands in for a field that failed, so that the rest can still be checked; others are left out.
_STAND_IN: dict[str, object] = {"id": "x", "image": "x", "engine": "docker", "ssh_keys": [STAND_IN_KEY]}


def printable(text: str) -> str:
    """The text with control characters and line separators as escapes, safe on a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def explain(detail: ErrorDetails, model: type[BaseModel], body: Mapping) -> tuple[Path, str] | None:
    """What pydantic found as a path into the document and a sentence for people; None when it follows from another mistake."""
    loc = detail["loc"]
    node = locate(body, loc)[2]
    got = f", not {printable(node.raw)[:40]!r}" if isinstance(node, Scalar) else ""
    context = detail.get("ctx", {})
    match detail["type"]:
        case "missing":
            return loc, "is required"
        case "extra_forbidden":
            return loc, _unknown(loc, model)
        case "int_type" | "int_from_float" | "int_parsing":
            return loc, f"must be a whole number{got}"
        case "bool_type":
            return loc, f"must be true or false{got}"
        case "string_type":
            quoted = f'; write it in quotes: "{printable(node.raw)[:40]}"' if isinstance(node, Scalar) and node.raw else ""
            return loc, f"must be text{quoted}"
        case "tuple_type":
            return loc, "must be a list, an entry a line, each after '- '"
        case "model_type" | "model_attributes_type" | "dict_type":
            return loc, "must be a set of fields, such as `image: tiny`"
        case "enum" | "literal_error":
            expected = str(context["expected"]).replace("'", "")
            return loc, f"must be {expected}{got}{did_you_mean(str(detail['input']), re.split(', | or ', expected))}"
        case "greater_than" | "greater_than_equal" | "less_than" | "less_than_equal":
            return loc, re.sub(r"^Input should", "must", detail["msg"]) + got
        case "too_short":
            # Entries that failed do not count for pydantic.
            return None if isinstance(node, Sequence) and node.items else (loc, "must have at least one entry")
        case "value_error":
            return _of_field(loc, str(context["error"]), body)
    return loc, re.sub(r"^(Input|String|Value|Tuple|Dictionary) should ", "must ", detail["msg"])


def _of_field(loc: Path, message: str, body: Mapping) -> tuple[Path, str]:
    """A sentence about a whole model that begins with a field's name belongs to that field."""
    first, _, rest = message.partition(" ")
    if loc and first == loc[-1]:
        return loc, rest
    known = {*VmSpec.model_fields, *EnvSpec.model_fields, *HostSpec.model_fields}
    about_field = isinstance(locate(body, loc)[2], Mapping) and first in known
    return ((*loc, first), rest) if about_field else (loc, message)


def _unknown(loc: Path, model: type[BaseModel]) -> str:
    name = str(loc[-1])
    if len(loc) > 3 and loc[2] == "ready":
        known = HttpProbe.model_fields if "http" in loc[3:-1] else [spelt.replace("_", "-") for spelt in Ready.model_fields]
        return f"is not a known field{did_you_mean(name, known)}"
    here: type[BaseModel] = VmSpec if len(loc) == 3 else model
    if here is VmSpec and name in EnvSpec.model_fields:
        return "belongs to the environment, not to a VM"
    if here is EnvSpec and name in VmSpec.model_fields:
        return "belongs to a VM, under vms"
    alias = _ELSEWHERE.get(name.lower().replace("-", "_"), "")
    if here is EnvSpec and alias in VmSpec.model_fields:
        return f"is not a known field; a VM has '{alias}', under vms"
    hint = f"; did you mean '{alias}'?" if alias in here.model_fields else did_you_mean(name, here.model_fields)
    return f"is not a known field{hint}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the known word that is spelt nearly so, or nothing."""
    folded = {word.lower(): word for word in known}
    close = difflib.get_close_matches(name.lower()[:100], folded, n=1)
    return f"; did you mean '{folded[close[0]]}'?" if close else ""


def without(data: dict[str, Any], loc: Path) -> bool:
    """Takes the field at `loc` out of the data, or puts something valid in its place; False when it must not be missing."""
    holder, rest = data, loc
    if len(loc) >= 2 and loc[0] == "vms" and isinstance(loc[1], int):
        if len(loc) == 2:
            data["vms"][loc[1]] = {"image": "x", "engine": "docker"}
            return True
        holder, rest = data["vms"][loc[1]], loc[2:]
    if not rest or rest[0] in ("vms", "addr"):
        return False
    name = str(rest[0])
    if name in _STAND_IN:
        holder[name] = _STAND_IN[name]
    else:
        holder.pop(name, None)
    return True
