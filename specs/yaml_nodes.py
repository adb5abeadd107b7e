"""YAML text as a tree of nodes that know where they were written. Called by the document loader; knows no field names.

Reads ruamel.yaml's events and resolves plain scalars by the YAML 1.2 core schema (https://yaml.org/spec/1.2.2/#103-core-schema),
so `no` and `22:22` are text. Every mistake of the text is collected, each with its place, up to the first that ends parsing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

MAX_BYTES = 1024 * 1024  # of one YAML text
MAX_DEPTH = 24  # collections inside each other
MAX_WEIGHT = 100_000  # values of one text with every alias written out; 16 characters of text weigh as much as a value

_UNPRINTABLE = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"(true|True|TRUE)|(false|False|FALSE)")
_INT = re.compile(r"[-+]?[0-9]{1,40}|0o[0-7]{1,40}|0x[0-9a-fA-F]{1,40}")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")
_TEXT_TAGS = ("!", "!!str", "tag:yaml.org,2002:str")

Mark = tuple[int, int]  # line and column, both from 1
Path = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Fault:
    """Something wrong with the text, at a place, in the field that was being read."""

    mark: Mark
    path: Path
    message: str


@dataclass(slots=True)
class Scalar:
    """A leaf: `value` as the core schema resolves it, `raw` as it was written."""

    value: str | int | float | bool | None
    raw: str
    mark: Mark
    weight: int = 1
    height: int = 0


@dataclass(slots=True)
class Sequence:
    """A list. `labels` are the entries' positions in the text, which differ once an entry was expanded into several."""

    mark: Mark
    items: list[Node] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    weight: int = 1
    height: int = 1

    def add(self, node: Node, label: int) -> None:
        """Appends an entry written at position `label`."""
        self.items.append(node)
        self.labels.append(label)


@dataclass(slots=True)
class Mapping:
    """Fields by name, each with the place of its name."""

    mark: Mark
    entries: dict[str, tuple[Mark, Node]] = field(default_factory=dict)
    weight: int = 1
    height: int = 1


Node = Scalar | Sequence | Mapping


def plain(node: Node) -> Any:
    """The node as plain Python values; aliased parts are shared, not copied."""
    if isinstance(node, Scalar):
        return node.value
    if isinstance(node, Sequence):
        return [plain(item) for item in node.items]
    return {key: plain(value) for key, (_, value) in node.entries.items()}


def locate(node: Node, path: Path) -> tuple[Mark, Path, Node | None]:
    """Where `path` was written: the name's place in a mapping, the entry's in a list, the parent's where the part is missing.

    Returns the place, the path as the reader of the text counts, and the node itself, None when it is missing.
    """
    mark, shown, found = node.mark, (), node  # type: tuple[Mark, Path, Node | None]
    for part in path:
        if isinstance(found, Mapping) and part in found.entries:
            mark, found = found.entries[str(part)]
            shown = (*shown, part)
        elif isinstance(found, Sequence) and isinstance(part, int) and part < len(found.items):
            shown = (*shown, found.labels[part])
            found = found.items[part]
            mark = found.mark
        elif found is not None and part != "[key]":
            shown, found = (*shown, part), None
    return mark, shown, found


def read_documents(text: str) -> tuple[list[Node], list[Fault]]:
    """Parses every document of a text; empty ones are left out. Never raises: what is wrong is in the faults."""
    text = text.removeprefix("\ufeff")
    if len(text) > MAX_BYTES or len(text.encode(errors="surrogatepass")) > MAX_BYTES:
        return [], [Fault((1, 1), (), f"is larger than {MAX_BYTES // 1024} KiB")]
    bad = _UNPRINTABLE.search(text)
    if bad:
        line = text.count("\n", 0, bad.start()) + 1
        column = bad.start() - (text.rfind("\n", 0, bad.start()) + 1) + 1
        return [], [Fault((line, column), (), f"the character U+{ord(bad[0]):04X} is not allowed in YAML")]
    builder = _Builder()
    try:
        for event in YAML(typ="safe", pure=True).parse(text):
            if not builder.take(event):
                break
    except MarkedYAMLError as error:
        at = error.problem_mark or error.context_mark
        builder.fault((at.line + 1, at.column + 1) if at else (1, 1), _explain(error))
    except (YAMLError, UnicodeError, ValueError, RecursionError):
        # Such as an escape that stands for no character: the parser gives it no place of its own.
        builder.fault(builder.last, "is not readable as YAML from here on")
    return builder.documents, builder.faults


def _explain(error: MarkedYAMLError) -> str:
    problem = str(error.problem or error.context or "is not valid YAML")
    begun = error.context_mark
    since = (
        f" (begun in line {begun.line + 1})" if begun and error.problem_mark and begun.line != error.problem_mark.line else ""
    )
    if "character '\\t'" in problem:
        return "a tab cannot indent YAML; use spaces"
    starts = re.search(r"character ('.'|\"'\") that cannot start", problem)
    if starts:
        return f"text that starts with {starts[1]} must be in quotes"
    if problem.startswith("mapping values are not allowed"):
        return "a ':' is not expected here; check the indentation, or put the text in quotes"
    if "unexpected end of stream" in problem and "quoted" in str(error.context):
        return f"the closing quote is missing{since}"
    if "but found" in problem and "<block end>" in problem:
        return f"does not line up with the lines before it{since}"
    return problem.replace("('<stream end>',)", "the end").replace("<stream end>", "the end") + since


@dataclass(slots=True)
class _Frame:
    node: Sequence | Mapping
    anchor: str | None
    key: tuple[Mark, str | None] | None = None  # of a mapping whose value comes next; None inside: an unusable key
    count: int = 0
    merges: list[tuple[Mark, Node]] = field(default_factory=list)


class _Builder:
    def __init__(self) -> None:
        self.documents: list[Node] = []
        self.faults: list[Fault] = []
        self.last: Mark = (1, 1)
        self._frames: list[_Frame] = []
        self._anchors: dict[str, Node | None] = {}
        self._weight = 0

    def fault(self, mark: Mark, message: str, path: Path | None = None) -> None:
        self.faults.append(Fault(mark, self._path() if path is None else path, message))

    def take(self, event: Any) -> bool:
        """Takes one event; False when reading must end here."""
        self.last = mark = (event.start_mark.line + 1, event.start_mark.column + 1)
        match type(event).__name__:
            case "DocumentStartEvent":
                self._anchors = {}
            case "ScalarEvent":
                scalar = self._scalar(event, mark)
                return self._fits(scalar) and self._finish(scalar, event.anchor)
            case "AliasEvent":
                return self._alias(event.anchor, mark)
            case "SequenceStartEvent" | "MappingStartEvent":
                self._refuse_tag(event, mark)
                node = Sequence(mark) if type(event).__name__ == "SequenceStartEvent" else Mapping(mark)
                if event.anchor:
                    self._anchors[event.anchor] = None
                self._frames.append(_Frame(node, event.anchor))
                return self._fits(node)
            case "SequenceEndEvent" | "MappingEndEvent":
                frame = self._frames.pop()
                self._merge(frame)
                return self._finish(frame.node, frame.anchor)
        return True

    def _path(self) -> Path:
        parts: list[str | int] = []
        for frame in self._frames:
            if isinstance(frame.node, Sequence):
                parts.append(frame.count)
            elif frame.key and frame.key[1] is not None:
                parts.append(frame.key[1])
        return tuple(parts)

    def _refuse_tag(self, event: Any, mark: Mark) -> None:
        if event.tag and event.tag not in _TEXT_TAGS:
            self.fault(mark, f"the tag {str(event.tag)[:60]} is not supported; write plain values")

    def _scalar(self, event: Any, mark: Mark) -> Scalar:
        text = str(event.value)
        if _SURROGATE.search(text):
            self.fault(mark, "holds an escape that stands for no character")
            text = _SURROGATE.sub("\ufffd", text)
        self._refuse_tag(event, mark)
        is_plain = not event.tag and event.implicit[0]
        return Scalar(_resolve(text) if is_plain else text, text, mark, 1 + len(text) // 16)

    def _alias(self, name: str, mark: Mark) -> bool:
        if name not in self._anchors:
            self.fault(mark, f"*{name} refers to no &{name} before it")
            return self._finish(Scalar(None, "", mark), None)
        target = self._anchors[name]
        if target is None:
            self.fault(mark, f"*{name} refers to itself")
            return False
        return self._fits(target) and self._finish(target, None)

    def _finish(self, node: Node, anchor: str | None) -> bool:
        if anchor:
            self._anchors[anchor] = node
        frame = self._frames[-1] if self._frames else None
        if frame is None:
            if not (isinstance(node, Scalar) and node.value is None):
                self.documents.append(node)
            return True
        if isinstance(frame.node, Sequence):
            frame.node.add(node, frame.count)
            frame.count += 1
        elif frame.key is None:
            frame.key = self._key(node)
        else:
            mark, name = frame.key
            if name == "<<":
                frame.merges.append((mark, node))
            elif name is not None and name not in frame.node.entries:
                frame.node.entries[name] = (mark, node)
            frame.key = None
        frame.node.weight += node.weight
        frame.node.height = max(frame.node.height, node.height + 1)
        return True

    def _fits(self, node: Node) -> bool:
        # An alias counts with all it stands for: a few lines of aliases to aliases would else become gigabytes.
        self._weight += node.weight
        if self._weight > MAX_WEIGHT:
            self.fault(self.last, f"asks for more than {MAX_WEIGHT} values in one text (aliases written out)")
        elif len(self._frames) + node.height > MAX_DEPTH:
            self.fault(self.last, f"is nested more than {MAX_DEPTH} levels deep")
        else:
            return True
        return False

    def _key(self, node: Node) -> tuple[Mark, str | None]:
        frame = self._frames[-1]
        mark = self.last if isinstance(node, Scalar) else node.mark
        if not isinstance(node, Scalar) or not isinstance(frame.node, Mapping):
            self.fault(mark, "a field's name must be plain text; put text with braces or brackets in quotes")
            return mark, None
        if node.raw in frame.node.entries:
            line = frame.node.entries[node.raw][0][0]
            self.fault(mark, f"is given twice; the first is in line {line}", (*self._path(), node.raw))
        return mark, node.raw

    def _merge(self, frame: _Frame) -> None:
        """`<<: *base` (https://yaml.org/type/merge.html): fields given directly win, then the earlier of several bases."""
        for mark, node in frame.merges:
            for base in node.items if isinstance(node, Sequence) else [node]:
                if not isinstance(base, Mapping) or not isinstance(frame.node, Mapping):
                    self.fault(mark, "'<<' takes fields from a mapping, such as *base, or a list of them")
                    continue
                for key, entry in base.entries.items():
                    frame.node.entries.setdefault(key, entry)


def _resolve(text: str) -> str | int | float | bool | None:
    if _NULL.fullmatch(text):
        return None
    boolean = _BOOL.fullmatch(text)
    if boolean:
        return boolean[1] is not None
    if _INT.fullmatch(text):
        return int(text, 0) if text.startswith(("0o", "0x")) else int(text)
    if len(text) <= 64 and _FLOAT.fullmatch(text):
        return float(re.sub(r"\.(inf|nan)", r"\1", text.lower()))
    return text
