"""YAML documents of environments and hosts. Called by the command line and by the dashboard's editor; knows no HTTP.

A text holds one or more documents: `kind: Environment` (the default, with the fields of the REST body) or `kind: Host`.
All mistakes of all documents are reported at once, each as `file:line:column: field: what is wrong`.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.scalarstring import DoubleQuotedScalarString, LiteralScalarString

from specs.desired import EnvSpec, HostSpec, canonical_env
from specs.mistakes import STAND_IN_KEY, did_you_mean, explain, printable, without
from specs.names import check_ssh_key
from specs.yaml_nodes import Mapping, Mark, Node, Scalar, Sequence, locate, plain, read_documents
from specs.yaml_nodes import Path as Loc

KINDS: dict[str, type[EnvSpec] | type[HostSpec]] = {"Environment": EnvSpec, "Host": HostSpec}
_KEY_FILE_BYTES = 256 * 1024
_UNQUOTED = re.compile(r"[A-Za-z][A-Za-z0-9 _./+=-]*(?<! )")
_NOT_TEXT = ("null", "true", "false", "yes", "no", "on", "off", "y", "n")
_ROUNDS = 6  # of validation, each without the fields that failed before


@dataclass(frozen=True, slots=True)
class SpecError:
    """One mistake. `line` and `column` count from 1; `field` is dotted (`vms.0.cpu`), "" for the document itself."""

    file: str
    line: int
    column: int
    field: str
    message: str

    def __str__(self) -> str:
        """`file:line:column: field: what is wrong`, free of control characters."""
        where = f"{self.file}:{self.line}:{self.column}"
        return printable(f"{where}: {self.field}: {self.message}" if self.field else f"{where}: {self.message}")


class SpecErrors(ValueError):
    """Everything wrong with one or more texts, in the order of their lines."""

    def __init__(self, errors: Iterable[SpecError]) -> None:
        self.errors = tuple(errors)
        super().__init__("\n".join(map(str, self.errors)))


@dataclass(frozen=True, slots=True)
class Document:
    """One valid document and where it begins."""

    spec: EnvSpec | HostSpec
    source: str
    line: int

    @property
    def identity(self) -> str:
        """`env/NAME` or `host/ADDR`: what may be defined once only."""
        return f"env/{self.spec.id}" if isinstance(self.spec, EnvSpec) else f"host/{self.spec.addr}"


def load(text: str, source: str, base: Path | None) -> tuple[Document, ...]:
    """Loads every document of a YAML text of at most 1 MiB.

    `source` names the text in errors. `ssh_keys` entries `@path` are read relative to `base`; None forbids them, for texts
    that come from somebody else's machine. Raises SpecErrors with every mistake of every document.
    """
    return load_all([(text, source, base)])


def load_all(texts: Iterable[tuple[str, str, Path | None]]) -> tuple[Document, ...]:
    """Like `load` for several texts, given as `(text, source, base)`; the same name in two of them is a mistake too."""
    documents: list[Document] = []
    errors: list[SpecError] = []
    for text, source, base in texts:
        nodes, faults = read_documents(text)
        found = [SpecError(source, *f.mark, ".".join(map(str, f.path)), f.message) for f in faults]
        for node in nodes:
            reader = _Reader(source, base)
            spec = reader.read(node)
            found += reader.errors
            if spec:
                documents.append(Document(spec, source, node.mark[0]))
        if not nodes and not faults:
            found.append(SpecError(source, 1, 1, "", "holds no document"))
        errors += sorted(found, key=lambda error: (error.line, error.column))
    errors += _defined_twice(documents)
    if errors:
        raise SpecErrors(errors)
    return tuple(documents)


def read_source(path: Path) -> str:
    """Reads a YAML file as text for `load`. Raises SpecErrors when it cannot be read, is too large or is not UTF-8."""
    try:
        with path.open("rb") as file:
            data = file.read(1024 * 1024 + 1)
        return data.decode() if len(data) <= 1024 * 1024 else " " * len(data)
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise SpecErrors([SpecError(str(path), line, 1, "", "is not UTF-8 text")]) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise SpecErrors([SpecError(str(path), 1, 1, "", f"cannot be read: {reason}")]) from None


def _defined_twice(documents: Iterable[Document]) -> list[SpecError]:
    first: dict[str, Document] = {}
    errors = []
    for doc in documents:
        earlier = first.setdefault(doc.identity, doc)
        if earlier is not doc:
            field = "id" if isinstance(doc.spec, EnvSpec) else "addr"
            message = f"{doc.identity} is already defined at {earlier.source}:{earlier.line}"
            errors.append(SpecError(doc.source, doc.line, 1, field, message))
    return errors


class _Reader:
    """Reads one document; collects its mistakes."""

    def __init__(self, source: str, base: Path | None) -> None:
        self.errors: list[SpecError] = []
        self._source = source
        self._base = base

    def read(self, node: Node) -> EnvSpec | HostSpec | None:
        if not isinstance(node, Mapping):
            self._add(node.mark, (), "a document is a set of fields, such as `id: hello`")
            return None
        kind_mark, kind = node.entries.get("kind", (node.mark, None))
        name = kind.value if isinstance(kind, Scalar) else None
        if kind is not None and name not in KINDS:
            self._add(kind_mark, ("kind",), f"must be Environment or Host{did_you_mean(str(name), KINDS)}")
            return None
        fields = {key: entry for key, entry in node.entries.items() if key != "kind"}
        body = Mapping(node.mark, fields)
        model = KINDS[str(name)] if kind else EnvSpec
        if model is EnvSpec:
            body = self._expand_keys(body)
        spec = self._validate(model, body)
        return None if self.errors else spec

    def _add(self, mark: Mark, path: Loc, message: str) -> None:
        error = SpecError(self._source, *mark, ".".join(map(str, path)), message)
        if error not in self.errors:
            self.errors.append(error)

    def _validate(self, model: type[EnvSpec] | type[HostSpec], body: Mapping) -> EnvSpec | HostSpec | None:
        """Validates, then again without what failed, since a model checks the whole only when each part is right."""
        data = plain(body)
        for attempt in range(_ROUNDS):
            try:
                spec = model.model_validate(data)
            except ValidationError as error:
                if attempt == 0:
                    data = _copy(data)
                checkable = True
                for detail in error.errors(include_url=False):
                    told = explain(detail, model, body)
                    if told:
                        mark, path, _ = locate(body, told[0])
                        self._add(mark, path, told[1])
                        checkable = without(data, told[0]) and checkable
                if not checkable:
                    return None
            else:
                return spec
        return None

    def _expand_keys(self, body: Mapping) -> Mapping:
        """The document with every `@path` in `ssh_keys` replaced by the keys of that file."""
        entries = dict(body.entries)
        if "ssh_keys" in entries:
            mark, node = entries["ssh_keys"]
            entries["ssh_keys"] = (mark, self._expanded(node, ("ssh_keys",)))
        vms = entries.get("vms")
        if vms and isinstance(vms[1], Sequence):
            expanded = Sequence(vms[1].mark)
            for index, vm in enumerate(vms[1].items):
                if isinstance(vm, Mapping) and "ssh_keys" in vm.entries:
                    mark, node = vm.entries["ssh_keys"]
                    keys = self._expanded(node, ("vms", index, "ssh_keys"))
                    vm = Mapping(vm.mark, {**vm.entries, "ssh_keys": (mark, keys)})  # noqa: PLW2901
                expanded.add(vm, index)
            entries["vms"] = (vms[0], expanded)
        return Mapping(body.mark, entries)

    def _expanded(self, node: Node, path: Loc) -> Node:
        if not isinstance(node, Sequence):
            return node
        out = Sequence(node.mark)
        for index, entry in enumerate(node.items):
            if not (isinstance(entry, Scalar) and isinstance(entry.value, str) and entry.value.startswith("@")):
                out.add(entry, index)
                continue
            try:
                for key in _read_keys(entry.value[1:], self._base):
                    out.add(Scalar(key, key, entry.mark), index)
            except ValueError as error:
                self._add(entry.mark, (*path, index), str(error))
                out.add(Scalar(STAND_IN_KEY, "", entry.mark), index)
        return out


def _read_keys(name: str, base: Path | None) -> tuple[str, ...]:
    """The public keys in a file. Raises ValueError with a sentence that never quotes the file's content."""
    if base is None:
        raise ValueError("@files are read by the muster command only; paste the public key itself")
    if not name.strip():
        raise ValueError("names no file after the @")
    try:
        path = base / Path(name).expanduser()
        if path.exists() and not path.is_file():
            raise ValueError(f"{path} is not a plain file")
        with path.open("rb") as file:
            data = file.read(_KEY_FILE_BYTES + 1)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; make a key with: ssh-keygen -t ed25519") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except RuntimeError as error:
        raise ValueError(f"{name} cannot be read: {error}") from None
    if len(data) > _KEY_FILE_BYTES:
        raise ValueError(f"{path} is larger than {_KEY_FILE_BYTES // 1024} KiB; is it a file of public keys?")
    if b"PRIVATE KEY-----" in data:
        raise ValueError(f"{path} is a private key; name the public one, which ends in .pub")
    keys = []
    for number, line in enumerate(data.decode(errors="replace").splitlines(), start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            try:
                keys.append(check_ssh_key(line.strip()))
            except ValueError as error:
                raise ValueError(f"{path} line {number} {error}") from None
    if not keys:
        raise ValueError(f"{path} holds no key")
    return tuple(keys)


def _copy(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _copy(value) for key, value in data.items()}
    return [_copy(item) for item in data] if isinstance(data, list) else data


def dump(env: EnvSpec) -> str:
    """The environment as a YAML document that `load` reads back as the same environment."""
    yaml = YAML()
    yaml.width = 10_000
    yaml.indent(mapping=2, sequence=4, offset=2)
    out = io.StringIO()
    yaml.dump(_written(_in_reading_order(canonical_env(env))), out)
    return out.getvalue()


def _in_reading_order(body: dict[str, Any]) -> dict[str, Any]:
    first: dict[str, Any] = {
        name: body[name] for name in ("id", "owner", "lifetime", "on_host_loss", "ssh_keys") if name in body
    }
    vms = [{**({"name": vm["name"]} if "name" in vm else {}), **vm} for vm in body["vms"]]
    return {**first, "vms": vms}


def _written(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _written(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_written(item) for item in value]
    if not isinstance(value, str):
        return value
    if _fits_block(value):
        return LiteralScalarString(value)
    # Unquoted only where no reader, not even one of YAML 1.1, takes it for anything but text.
    is_safe = _UNQUOTED.fullmatch(value) and value.lower() not in _NOT_TEXT
    return value if is_safe else DoubleQuotedScalarString(value)


def _fits_block(value: str) -> bool:
    """Several lines that a literal block (`|`) keeps to the letter."""
    lines = value.split("\n")
    ends_well = not value.endswith("\n\n") and all(line == line.rstrip() for line in lines)
    return len(lines) > 1 and not value.startswith((" ", "\n")) and ends_well and "".join(lines).isprintable()
