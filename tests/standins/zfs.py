"""A stand-in of zfs(8): datasets in a JSON file, contents in plain files and folders, the real one's words and exit statuses.

`install` puts an executable `zfs` into a folder. The state lives in the folder that $STANDIN_ZFS names: `state.json`,
`dev/POOL/…` (one file a volume, as /dev/zvol has one device) and `data/GUID` (what snapshots hold). Filesystems are folders at
their mountpoint. It knows what zfs-create(8), -clone, -snapshot, -destroy, -rename, -promote, -list, -get, -set, -inherit,
-send and -recv say of the options used here, and refuses every other option: exit status 2 for wrong usage, 1 for failure.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

ROOT = "STANDIN_ZFS"
MIB = 1024 * 1024
BLOCK = 8192
_COMPONENT = re.compile(r"[A-Za-z0-9_.: -]+")
_USER_PROPERTY = re.compile(r"[a-z0-9:._+-]*:[a-z0-9:._+-]*")
_SIZES = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_NATIVE = {
    "volmode", "readonly", "compression", "refreservation", "reservation", "mountpoint", "canmount", "quota", "refquota",
    "volsize", "snapdev", "atime", "sync", "primarycache", "logbias",
}  # fmt: skip
_ONLY_FOR = {
    **dict.fromkeys(("mountpoint", "canmount", "quota", "refquota", "atime"), "filesystem"),
    **dict.fromkeys(("volsize",), "volume"),
}
_STREAM = b"STANDIN-ZFS-STREAM 1\n"

Dataset = dict[str, Any]  # type, props, origin, guid, txg


def install(folder: Path) -> Path:
    """Writes the executable into `folder` (to be put on PATH) and returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "zfs"
    here = Path(__file__)
    # As a module, so that it is compiled once.
    program.write_text(
        f"#!{sys.executable} -IS\nimport sys\nsys.path.append({str(here.parent)!r})\n"
        f"import {here.stem}\nsys.exit({here.stem}.main(sys.argv[1:]))\n"
    )
    program.chmod(0o755)
    return program


def make_pool(root: Path, name: str, size_mib: int = 10_000) -> None:
    """An empty pool in the state folder."""
    root.mkdir(parents=True, exist_ok=True)
    pool = {"type": "filesystem", "props": {"mountpoint": "none"}, "origin": "-", "guid": 1, "txg": 1}
    (root / "state.json").write_text(json.dumps({"size": size_mib * MIB, "last": 1, "datasets": {name: pool}}))


class Refusal(Exception):
    """The real one's message and exit status."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


def usage(message: str) -> NoReturn:
    """Wrong usage, as zfs(8) says it."""
    raise Refusal(f"{message}\nusage:\n\tzfs command args ...", 2)


class Options:
    """getopt(3): single letters, together or apart; `valued` take the next word."""

    def __init__(self, words: list[str], plain: str, valued: str = "") -> None:
        self.flags: set[str] = set()
        self.values: dict[str, list[str]] = {}
        rest = list(words)
        while rest and rest[0].startswith("-") and rest[0] != "-":
            word = rest.pop(0)
            if word == "--":
                break
            for place, letter in enumerate(word[1:], 1):
                if letter in valued:
                    value = word[place + 1 :] or (rest.pop(0) if rest else usage(f"missing argument for '{letter}' option"))
                    self.values.setdefault(letter, []).append(value)
                    break
                if letter not in plain:
                    usage(f"invalid option '{letter}'")
                self.flags.add(letter)
        self.words = rest

    def one(self, letter: str, default: str) -> str:
        return self.values.get(letter, [default])[-1]


def size_of(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([BKMGT]?)B?", text.upper())
    if not match:
        raise Refusal(f"bad numeric value '{text}'", 2)
    return int(float(match[1]) * _SIZES[match[2]])


def check_dataset(name: str, *, snapshot: bool = False) -> str:
    base, at, tag = name.partition("@")
    for part in (*base.split("/"), *([tag] if at else [])):
        if not part:
            raise Refusal(f"cannot create '{name}': empty component in name")
        if not _COMPONENT.fullmatch(part):
            bad = next(char for char in part if not _COMPONENT.fullmatch(char))
            raise Refusal(f"cannot create '{name}': invalid character '{bad}' in name")
    if len(name) > 255:
        raise Refusal(f"cannot create '{name}': name is too long")
    if bool(at) != snapshot:
        raise Refusal(
            f"cannot create '{name}': "
            + ("missing '@' delimiter in snapshot name" if snapshot else "snapshot delimiter '@' is not expected here")
        )
    return name


class Pool:
    """The state, held locked while one command runs."""

    def __init__(self, root: Path, state: dict[str, Any]) -> None:
        self.root = root
        self.state = state
        self.sets: dict[str, Dataset] = state["datasets"]
        self.received: tuple[dict[str, Any], Path] | None = None

    def find(self, name: str) -> Dataset:
        if name not in self.sets:
            raise Refusal(f"cannot open '{name}': dataset does not exist")
        return self.sets[name]

    def device(self, name: str) -> Path:
        return self.root / "dev" / name

    def content(self, name: str) -> Path:
        """Where the bytes of a dataset are: a volume's device, a filesystem's folder, a snapshot's copy."""
        one = self.sets[name]
        if one["type"] == "volume":
            return self.device(name)
        if one["type"] == "snapshot":
            return self.root / "data" / str(one["guid"])
        return Path(self.mountpoint(name))

    def mountpoint(self, name: str) -> str:
        at = self.sets[name]["props"].get("mountpoint")
        if at is not None:
            return str(at)
        parent, _, last = name.rpartition("/")
        above = self.mountpoint(parent) if parent else "none"
        return above if above in ("none", "legacy") else f"{above}/{last}"

    def add(self, name: str, type_: str, props: dict[str, str], origin: str = "-") -> Dataset:
        self.state["last"] += 1
        number = self.state["last"]
        self.sets[name] = {"type": type_, "props": dict(props), "origin": origin, "guid": number, "txg": number}
        return self.sets[name]

    def check_new(self, verb: str, name: str) -> None:
        check_dataset(name)
        if name in self.sets:
            raise Refusal(f"cannot {verb} '{name}': dataset already exists")
        parent = name.rpartition("/")[0]
        if not parent:
            raise Refusal(f"cannot {verb} '{name}': missing dataset name")
        if parent not in self.sets:
            raise Refusal(f"cannot {verb} '{name}': parent does not exist")
        if self.sets[parent]["type"] != "filesystem":
            raise Refusal(f"cannot {verb} '{name}': parent is not a filesystem")

    def snapshots(self, name: str) -> list[str]:
        found = [one for one in self.sets if one.startswith(f"{name}@")]
        return sorted(found, key=lambda one: int(self.sets[one]["txg"]))

    def children(self, name: str) -> list[str]:
        return sorted(one for one in self.sets if one.startswith(f"{name}/"))

    def clones(self, snapshot: str) -> list[str]:
        return sorted(one for one, facts in self.sets.items() if facts["origin"] == snapshot)

    def used(self) -> int:
        total = 0
        for name, facts in self.sets.items():
            path = self.content(name)
            if facts["type"] != "filesystem" and path.exists():
                total += path.stat().st_blocks * 512 if path.is_file() else 0
        return total

    def check_room(self, verb: str, name: str, wanted: int) -> None:
        if wanted > self.state["size"] - self.used():
            raise Refusal(f"cannot {verb} '{name}': out of space")

    def copy(self, source: Path, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            import shutil  # slow to load, and seldom needed

            shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True)
            return
        with source.open("rb") as old, target.open("wb") as new:
            while chunk := old.read(MIB):
                if chunk.strip(b"\0"):
                    new.write(chunk)
                else:
                    new.seek(len(chunk), os.SEEK_CUR)
            new.truncate(source.stat().st_size)

    def erase(self, name: str) -> None:
        path = self.content(name)
        if self.sets[name]["type"] == "filesystem":
            if self.mountpoint(name) not in ("none", "legacy", "-"):
                import shutil

                shutil.rmtree(path, ignore_errors=True)
        elif path.is_dir():
            import shutil

            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        del self.sets[name]

    def set_size(self, name: str, text: str) -> None:
        wanted = size_of(text)
        if wanted == 0 or wanted % BLOCK:
            raise Refusal(f"cannot set property for '{name}': 'volsize' must be a multiple of volume block size (8K)")
        if _is_open(self.device(name)):
            raise Refusal(f"cannot set property for '{name}': dataset is busy")
        os.truncate(self.device(name), wanted)

    def value(self, name: str, prop: str) -> tuple[str, str]:
        """(value, source) as zfs-get(8) with -p tells them; "-" for what does not apply."""
        one = self.sets[name]
        if prop in ("name", "type", "origin", "guid", "createtxg"):
            return str({"name": name, "createtxg": one["txg"]}.get(prop, one.get(prop))), "-"
        if prop == "volsize":
            return (str(self.content(name).stat().st_size), "local") if one["type"] != "filesystem" else ("-", "-")
        if prop == "clones":
            return (",".join(self.clones(name)), "-") if one["type"] == "snapshot" else ("-", "-")
        if prop in ("used", "available", "referenced"):
            left = max(0, self.state["size"] - self.used())
            return str(left if prop == "available" else self.used()), "-"
        if prop == "mountpoint":
            return (self.mountpoint(name), "local") if one["type"] == "filesystem" else ("-", "-")
        base = name.partition("@")[0]
        while base:
            if prop in self.sets[base]["props"]:
                local = base == name
                return str(self.sets[base]["props"][prop]), "local" if local else f"inherited from {base}"
            base = base.rpartition("/")[0]
        if ":" in prop:
            return "-", "-"
        if prop not in _NATIVE:
            usage(f"bad property list: invalid property '{prop}'")
        return {"volmode": "default", "readonly": "off", "refreservation": "none"}.get(prop, "-"), "default"


def properties(options: Options, kind: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in options.values.get("o", []):
        name, equals, value = text.partition("=")
        if not equals:
            usage(f"missing '=' for property=value argument '{text}'")
        if ":" in name:
            if not _USER_PROPERTY.fullmatch(name):
                usage(f"invalid property '{name}'")
            if len(value) > 8191:
                usage(f"property value too long: '{name}'")
        elif name not in _NATIVE:
            usage(f"cannot create: invalid property '{name}'")
        elif name in _ONLY_FOR and _ONLY_FOR[name] != kind:
            usage(f"'{name}' does not apply to datasets of this type")
        if name in found:
            usage(f"property '{name}' specified multiple times")
        found[name] = value
    return found


def create(pool: Pool, words: list[str]) -> None:
    """zfs create [-p] [-o property=value]... filesystem | zfs create [-ps] [-b blocksize] [-o ...]... -V size volume"""
    options = Options(words, "psu", "oVb")
    if len(options.words) != 1:
        usage("missing dataset argument" if not options.words else "too many arguments")
    name = options.words[0]
    volume = "V" in options.values
    props = properties(options, "volume" if volume else "filesystem")
    if "s" in options.flags and not volume:
        usage("'-s' can only be used when creating a volume")
    if "p" in options.flags:
        if name in pool.sets:
            return
        parts = name.split("/")
        for depth in range(1, len(parts) - 1):
            above = "/".join(parts[: depth + 1])
            if above not in pool.sets:
                pool.check_new("create", above)
                pool.add(above, "filesystem", {})
    pool.check_new("create", name)
    if volume:
        size = size_of(options.one("V", "0"))
        if size == 0 or size % BLOCK:
            raise Refusal(f"cannot create '{name}': volume size must be a multiple of volume block size")
        if "s" not in options.flags or pool.state.get("thick"):
            pool.check_room("create", name, size)
        pool.add(name, "volume", props)
        pool.device(name).parent.mkdir(parents=True, exist_ok=True)
        with pool.device(name).open("wb") as device:
            device.truncate(size)
        return
    pool.add(name, "filesystem", props)
    if pool.mountpoint(name) not in ("none", "legacy"):
        Path(pool.mountpoint(name)).mkdir(parents=True, exist_ok=True)


def snapshot(pool: Pool, words: list[str]) -> None:
    """zfs snapshot [-r] [-o property=value]... filesystem@snapname|volume@snapname..."""
    options = Options(words, "r", "o")
    if not options.words:
        usage("missing snapshot argument")
    for name in options.words:
        check_dataset(name, snapshot=True)
        base = name.partition("@")[0]
        pool.find(base)
        if name in pool.sets:
            raise Refusal(f"cannot create snapshot '{name}': dataset already exists")
        pool.add(name, "snapshot", properties(options, "snapshot"))
        pool.copy(pool.content(base), pool.content(name)) if pool.content(base).exists() else None


def clone(pool: Pool, words: list[str]) -> None:
    """zfs clone [-p] [-o property=value]... snapshot filesystem|volume"""
    options = Options(words, "p", "o")
    if len(options.words) != 2:
        usage("missing source dataset argument" if not options.words else "missing target dataset argument")
    source, name = options.words
    if pool.find(source)["type"] != "snapshot":
        raise Refusal(f"cannot open '{source}': operation not applicable to datasets of this type")
    kind = pool.sets[source.partition("@")[0]]["type"]
    props = properties(options, kind)
    if "volsize" in props:
        raise Refusal(f"cannot create '{name}': 'volsize' is readonly")
    pool.check_new("create", name)
    pool.add(name, kind, props, origin=source)
    target = pool.content(name)
    if str(target) not in ("none", "legacy"):
        pool.copy(pool.content(source), target)


def destroy(pool: Pool, words: list[str]) -> None:
    """zfs destroy [-fnpRrv] filesystem|volume | zfs destroy [-dnpRrv] filesystem|volume@snap"""
    options = Options(words, "fnpRrvd")
    if len(options.words) != 1:
        usage("missing dataset argument" if not options.words else "too many arguments")
    name = options.words[0]
    if "@" in name and name not in pool.sets:
        raise Refusal(
            f"cannot destroy '{name}': could not find any snapshots to destroy; check snapshot names."
            if name.partition("@")[0] in pool.sets
            else f"cannot open '{name.partition('@')[0]}': dataset does not exist"
        )
    kind = pool.find(name)["type"]
    below = [*pool.snapshots(name), *(one for child in pool.children(name) for one in (*pool.snapshots(child), child))]
    snaps = [name] if kind == "snapshot" else [one for one in below if "@" in one]
    dependents = [one for snap in snaps for one in pool.clones(snap) if one not in below and one != name]
    if "R" in options.flags:
        usage("the stand-in has no -R: it would destroy what depends on the dataset")
    if kind == "snapshot" and dependents:
        listed = "\n".join(dependents)
        raise Refusal(
            f"cannot destroy '{name}': snapshot has dependent clones\nuse '-R' to destroy the following datasets:\n{listed}"
        )
    if below and "r" not in options.flags:
        listed = "\n".join(below)
        raise Refusal(f"cannot destroy '{name}': {kind} has children\nuse '-r' to destroy the following datasets:\n{listed}")
    if dependents:
        listed = "\n".join(dependents)
        raise Refusal(
            f"cannot destroy '{name}': {kind} has dependent clones\nuse '-R' to destroy the following datasets:\n{listed}"
        )
    if _is_open(pool.content(name)) and kind == "volume":
        raise Refusal(f"cannot destroy '{name}': dataset is busy")
    for one in (*below, name):
        if one in pool.sets:
            pool.erase(one)


def _is_open(path: Path) -> bool:
    """Whether the process that called has the file open: a volume in use cannot be destroyed."""
    with contextlib.suppress(OSError):
        for link in Path(f"/proc/{os.getppid()}/fd").iterdir():
            if os.readlink(link) == str(path):
                return True
    return False


def rename(pool: Pool, words: list[str]) -> None:
    """zfs rename [-f] [-u] [-p] filesystem|volume filesystem|volume"""
    options = Options(words, "fup")
    if len(options.words) != 2:
        usage("missing source dataset argument" if not options.words else "missing target dataset argument")
    old, new = options.words
    kind = pool.find(old)["type"]
    if kind == "snapshot":
        usage("the stand-in renames no snapshots")
    if new in pool.sets:
        raise Refusal(f"cannot rename '{old}': dataset already exists")
    if new.startswith(f"{old}/"):
        raise Refusal(f"cannot rename '{old}': New dataset name cannot be a descendant of current dataset name")
    pool.check_new("create", new)
    path = pool.content(old)
    moved = {
        name: new + name.removeprefix(old)
        for name in pool.sets
        if name == old or (name[len(old) :][:1] in "/@" and name.startswith(old))
    }
    pool.state["datasets"] = pool.sets = {moved.get(name, name): facts for name, facts in pool.sets.items()}
    for facts in pool.sets.values():
        facts["origin"] = moved.get(facts["origin"], facts["origin"])
    target = pool.content(new)
    if path.exists() and str(path) not in ("none", "legacy") and path != target:
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)


def promote(pool: Pool, words: list[str]) -> None:
    """zfs promote clone"""
    options = Options(words, "")
    if len(options.words) != 1:
        usage("missing clone filesystem argument")
    name = options.words[0]
    origin = pool.find(name)["origin"]
    if origin == "-":
        raise Refusal(f"cannot promote '{name}': not a cloned filesystem")
    base = origin.partition("@")[0]
    limit = pool.sets[origin]["txg"]
    for snap in pool.snapshots(base):
        if pool.sets[snap]["txg"] > limit:
            continue
        new = f"{name}@{snap.partition('@')[2]}"
        if new in pool.sets:
            raise Refusal(f"cannot promote '{name}': snapshot name '{snap}' from origin conflicts with '{new}' from target")
        pool.sets[new] = pool.sets.pop(snap)
        for facts in pool.sets.values():
            if facts["origin"] == snap:
                facts["origin"] = new
    pool.sets[name]["origin"], pool.sets[base]["origin"] = pool.sets[base]["origin"], f"{name}@{origin.partition('@')[2]}"


def _chosen(pool: Pool, options: Options) -> list[str]:
    """The datasets that list and get are about."""
    depth = int(options.one("d", "-1")) if "d" in options.values else (-1 if "r" in options.flags else 0)
    every = not options.words
    names: list[str] = []
    for word in options.words or [name for name in pool.sets if "/" not in name and "@" not in name]:
        name = word
        if word.startswith("/"):
            name = next(
                (one for one in pool.sets if pool.sets[one]["type"] == "filesystem" and pool.mountpoint(one) == word), ""
            )
            if not name:
                raise Refusal(f"cannot open '{word}': not a ZFS filesystem")
        pool.find(name)
        names.append(name)
        if depth or every:
            limit = depth if depth > 0 else 10**6
            below = (one for one in sorted(pool.sets) if one.startswith((f"{name}/", f"{name}@")))
            names += [one for one in below if re.sub("@", "/", one)[len(name) :].count("/") <= limit]
    listed = options.one("t", "")
    if "all" in listed.split(","):
        return names
    snapshots = any("@" in word for word in options.words)
    wanted = {"snap": "snapshot", "fs": "filesystem", "vol": "volume"}
    kinds = (
        {wanted.get(kind, kind) for kind in listed.split(",")}
        if listed
        else {"filesystem", "volume", *(["snapshot"] if snapshots else [])}
    )
    for kind in kinds - {"filesystem", "volume", "snapshot", "bookmark"}:
        usage(f"invalid type '{kind}'")
    chosen = [name for name in names if pool.sets[name]["type"] in kinds]
    if options.words and not depth:
        for name in names:
            if name not in chosen:
                raise Refusal(f"cannot open '{name}': operation not applicable to datasets of this type")
    return chosen


def list_(pool: Pool, words: list[str]) -> None:
    """zfs list [-r|-d depth] [-Hp] [-o property[,property]...] [-t type[,type]...] [filesystem|volume|snapshot|path]..."""
    options = Options(words, "Hrp", "dost")
    if "H" not in options.flags or "o" not in options.values:
        usage("the stand-in lists for programs only: give -H and -o")
    for name in _chosen(pool, options):
        sys.stdout.write("\t".join(pool.value(name, prop)[0] for prop in options.one("o", "").split(",")) + "\n")


def get(pool: Pool, words: list[str]) -> None:
    """zfs get [-r|-d depth] [-Hp] [-o field[,field]...] [-t type] [-s source[,source]...] property[,...] [dataset]..."""
    options = Options(words, "Hrp", "dots")
    if not options.words:
        usage("missing property argument")
    props = options.words.pop(0).split(",")
    fields = options.one("o", "name,property,value,source").split(",")
    for name in _chosen(pool, options):
        for prop in props:
            value, source = pool.value(name, prop)
            facts = {"name": name, "property": prop, "value": value, "source": source}
            sys.stdout.write("\t".join(facts[field] for field in fields) + "\n")


def set_(pool: Pool, words: list[str]) -> None:
    """zfs set property=value [property=value]... filesystem|volume|snapshot..."""
    options = Options(words, "u")
    pairs = [word for word in options.words if "=" in word]
    names = [word for word in options.words if "=" not in word]
    if not pairs or not names:
        usage("missing property=value argument" if not pairs else "missing dataset name(s)")
    for name in names:
        kind = pool.find(name)["type"]
        checked = Options([word for pair in pairs for word in ("-o", pair)], "", "o")
        for prop, value in properties(checked, kind).items():
            if prop == "volsize":
                pool.set_size(name, value)
            else:
                pool.sets[name]["props"][prop] = value


def inherit(pool: Pool, words: list[str]) -> None:
    """zfs inherit [-rS] property filesystem|volume|snapshot..."""
    options = Options(words, "rS")
    if len(options.words) < 2:
        usage("missing property or dataset argument")
    for name in options.words[1:]:
        pool.find(name)["props"].pop(options.words[0], None)


def send(pool: Pool, words: list[str]) -> Callable[[], None]:
    """zfs send [-LPRcehnpsvw] snapshot: here a full stream of a volume. Returns what writes it, without the lock."""
    options = Options(words, "Lcepw")
    if len(options.words) != 1:
        usage("missing snapshot argument" if not options.words else "too many arguments")
    name = options.words[0]
    if pool.find(name)["type"] != "snapshot":
        raise Refusal(f"cannot send '{name}': not a snapshot")
    if sys.stdout.isatty():
        raise Refusal("Error: Stream can not be written to a terminal.\nYou must redirect standard output.")
    path = pool.content(name)
    base = name.partition("@")[0]
    props = dict(pool.sets[base]["props"]) if "p" in options.flags else {}
    head = json.dumps({"snap": name.partition("@")[2], "size": path.stat().st_size, "props": props}).encode()
    file = path.open("rb")
    return lambda: _write_stream(file, head)


def _write_stream(file: BinaryIO, head: bytes) -> None:
    out = sys.stdout.buffer
    out.write(_STREAM + head + b"\n")
    digest = 0
    with file:
        while chunk := file.read(MIB):
            digest = zlib.crc32(chunk, digest)
            out.write(chunk)
    out.write(digest.to_bytes(4, "big"))
    out.flush()


def _read_stream(root: Path) -> tuple[dict[str, Any], Path]:
    """What comes in on standard input, checked and in a file."""
    source = sys.stdin.buffer
    if source.readline() != _STREAM:
        raise Refusal("cannot receive: invalid stream (bad magic number)")
    head = json.loads(source.readline())
    digest = 0
    partial = root / "data" / f"receiving-{os.getpid()}"
    partial.parent.mkdir(exist_ok=True)
    left = head["size"]
    with partial.open("wb") as file:
        while left and (chunk := source.read(min(MIB, left))):
            digest = zlib.crc32(chunk, digest)
            file.write(chunk)
            left -= len(chunk)
    if left or source.read(4) != digest.to_bytes(4, "big"):
        partial.unlink()
        raise Refusal(
            "cannot receive new filesystem stream: incomplete stream" if left else "cannot receive: checksum mismatch"
        )
    return head, partial


def recv(pool: Pool, words: list[str]) -> None:
    """zfs recv [-FhMnsuv] [-o property=value]... [-x property]... filesystem|volume|snapshot"""
    options = Options(words, "uF", "ox")
    if len(options.words) != 1:
        usage("missing snapshot argument" if not options.words else "too many arguments")
    name = options.words[0]
    target, _, tag = name.partition("@")
    if pool.received is None:
        raise RuntimeError("nothing was read")
    head, partial = pool.received
    try:
        if target in pool.sets:
            raise Refusal(
                f"cannot receive new filesystem stream: destination '{target}' exists\nmust specify -F to overwrite it"
            )
        pool.check_new("receive", target)
        props = {**head["props"], **properties(options, "volume")}
        for dropped in options.values.get("x", []):
            props.pop(dropped, None)
        pool.check_room("receive", target, head["size"])
    except Refusal:
        partial.unlink()
        raise
    pool.add(target, "volume", props)
    pool.device(target).parent.mkdir(parents=True, exist_ok=True)
    partial.rename(pool.device(target))
    snap = f"{target}@{tag or head['snap']}"
    pool.add(snap, "snapshot", {})
    pool.copy(pool.device(target), pool.content(snap))


def version(pool: Pool, words: list[str]) -> None:
    """zfs version"""
    Options(words, "j")
    sys.stdout.write("zfs-2.1.11-standin\nzfs-kmod-2.1.11-standin\n")


COMMANDS: dict[str, Callable[[Pool, list[str]], Callable[[], None] | None]] = {
    "create": create, "snapshot": snapshot, "clone": clone, "destroy": destroy, "rename": rename, "promote": promote,
    "list": list_, "get": get, "set": set_, "inherit": inherit, "send": send, "recv": recv, "receive": recv, "version": version,
}  # fmt: skip


@contextlib.contextmanager
def locked(root: Path) -> Iterator[Pool]:
    """The state; kept if the command succeeds."""
    with (root / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        pool = Pool(root, json.loads((root / "state.json").read_text()))
        yield pool
        new = root / "state.json.new"
        new.write_text(json.dumps(pool.state, indent=1))
        new.rename(root / "state.json")


def main(argv: list[str]) -> int:
    """Runs one command line."""
    try:
        root = os.environ.get(ROOT)
        if not root:
            raise Refusal(f"{ROOT} does not name the folder of the state")
        if not argv:
            usage("missing command")
        if argv[0] not in COMMANDS:
            usage(f"unrecognized command '{argv[0]}'")
        received = _read_stream(Path(root)) if argv[0] in ("recv", "receive") else None
        with locked(Path(root)) as pool:
            pool.received = received
            rest = COMMANDS[argv[0]](pool, argv[1:])
        if rest:
            rest()
    except Refusal as refusal:
        sys.stderr.write(f"{refusal}\n")
        return refusal.status
    return 0
