"""What a recipe is, and the record it leaves beside its image. Called by recipes and their list."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from agent.errors import AgentError
from agent.images.files import replacing, sha256
from agent.images.packages import Progress, tool
from agent.run import run


@dataclass(frozen=True, slots=True)
class BuiltImage:
    """An image that was made, as its sidecar `<name>.json` records it.

    `reference` is what a spec's `image` field says to get it. `format` is `qcow2` or `docker`. `digest` is the file's
    SHA-256; for `docker` there is no file, `path` is None and `digest` the image id. `built_at` in Unix seconds, `size`
    in bytes.
    """

    name: str
    reference: str
    format: str
    version: int
    digest: str
    size: int
    built_at: int
    packages: Mapping[str, str] = field(default_factory=dict)
    path: Path | None = None


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one image is made.

    `file` is what it leaves in the image directory ("" if nothing), `commands` maps each command it runs to its package.
    """

    name: str
    summary: str
    version: int
    file: str
    commands: Mapping[str, str]
    uses_docker: bool
    make: Callable[[Path, Path, Sequence[str], Progress], Awaitable[BuiltImage]]
    """(image_dir, cache_dir, docker, progress) -> what was made."""
    current: Callable[[Path, Sequence[str]], Awaitable[BuiltImage | None]]
    """(image_dir, docker) -> the image if it is there and of this version, unchanged since it was built."""

    def missing(self, docker: Sequence[str] = ("docker",)) -> str:
        """What to install before this can be built, as one sentence; "" if nothing."""
        lacking = {command: package for command, package in self.commands.items() if tool(command) is None}
        if self.uses_docker and tool(docker[0]) is None:
            lacking[docker[0]] = "podman" if "podman" in docker[0] else "docker.io"
        if not lacking:
            return ""
        packages = " ".join(sorted(set(lacking.values())))
        if packages == "apt":
            return "this needs a Debian system with apt"
        return f"{', '.join(lacking)} not found; run as root: apt-get install {packages}"


def default_cache() -> Path:
    """$MUSTER_CACHE, else $XDG_CACHE_HOME/muster, else ~/.cache/muster."""
    if own := os.environ.get("MUSTER_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "muster"


async def check_architecture() -> None:
    """Raises AgentError where Debian packages of this host are not amd64."""
    architecture = (await run("dpkg", "--print-architecture")).strip()
    if architecture != "amd64":
        raise AgentError(f"this image is made of amd64 packages alone; this host is {architecture}")


def write_sidecar(image_dir: Path, built: BuiltImage) -> None:
    """Records what was built. Written after the image: if it is missing or disagrees, the image is built again."""
    facts = {key: value for key, value in asdict(built).items() if key != "path"}
    with replacing(image_dir / f"{built.name}.json") as temporary:
        temporary.write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")


def read_sidecar(image_dir: Path, name: str, path: Path | None) -> BuiltImage | None:
    """What the sidecar says, or None if there is none that can be read."""
    try:
        return BuiltImage(**json.loads((image_dir / f"{name}.json").read_text()), path=path)
    except (OSError, ValueError, TypeError):
        return None


async def current_file(image_dir: Path, name: str, file: str, version: int) -> BuiltImage | None:
    """The built image if its file is there, of this version, and still what was built."""
    path = image_dir / file
    built = read_sidecar(image_dir, name, path)
    if built is None or built.version != version or not path.is_file() or path.is_symlink():
        return None
    return built if path.stat().st_size == built.size and sha256(path) == built.digest else None


def now() -> int:
    """Unix seconds."""
    return int(time.time())
