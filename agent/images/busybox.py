"""The container image `muster/busybox`: busybox as web server on port 80, dropbear on 22. Made with `docker import`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from agent.errors import AgentError, CommandFailed
from agent.images.files import workspace
from agent.images.packages import Progress, fetch, unpack, versions, with_dependencies
from agent.images.recipe import BuiltImage, Recipe, check_architecture, now, read_sidecar, write_sidecar
from agent.images.tree import Tree
from agent.images.userland import add_userland, guest_file
from agent.run import run

VERSION = 1
NAME = "busybox"
REFERENCE = "muster/busybox"  # not `busybox`: that name is Docker's own image
_TAGGED = f"{REFERENCE}:latest"
_LABEL = "muster.recipe.version"
_USERLAND = ("busybox-static", "dropbear-bin")
_CHANGES = (
    'CMD ["/etc/muster/container"]',
    "EXPOSE 22 80",
    "ENV PATH=/bin",
    f"LABEL {_LABEL}={VERSION}",
)


async def make(image_dir: Path, cache: Path, docker: Sequence[str], progress: Progress) -> BuiltImage:
    """Imports the image into the daemon (or podman's store) that `docker` talks to. Raises AgentError, CommandFailed."""
    await check_architecture()
    archives = await fetch(await with_dependencies(_USERLAND), cache, progress)
    async with workspace(cache, NAME) as work:
        progress("unpacking packages")
        await unpack(archives, work / "root")
        tree = Tree()
        await add_userland(tree, work / "root", ("usr/sbin/dropbear", "usr/bin/dropbearkey"))
        tree.file("etc/muster/container", guest_file("container"), 0o755)
        archive = work / "busybox.tar"
        archive.write_bytes(tree.tar())
        progress(f"importing {_TAGGED}")
        changes = [word for change in _CHANGES for word in ("--change", change)]
        await run(*docker, "import", *changes, archive, _TAGGED, limit=120)
    facts = await _inspect(docker)
    if facts is None:
        raise AgentError(f"`{' '.join(docker)} import` succeeded, but {_TAGGED} is not there")
    identity, size, _ = facts
    built = BuiltImage(NAME, REFERENCE, "docker", VERSION, identity, size, now(), versions(archives))
    write_sidecar(image_dir, built)
    progress(f"{_TAGGED} is ready: {size / 1024 / 1024:.1f} MiB")
    return built


async def current(image_dir: Path, docker: Sequence[str]) -> BuiltImage | None:
    """The image if the daemon has it in this version. The daemon is believed, the sidecar only adds when it was built."""
    facts = await _inspect(docker)
    if facts is None or facts[2] != str(VERSION):
        return None
    identity, size, _ = facts
    noted = read_sidecar(image_dir, NAME, None)
    if noted is not None and noted.digest == identity:
        return noted
    built = BuiltImage(NAME, REFERENCE, "docker", VERSION, identity, size, now())
    write_sidecar(image_dir, built)
    return built


async def _inspect(docker: Sequence[str]) -> tuple[str, int, str] | None:
    """(image id, size in bytes, recipe version) of the image in the daemon; None if it is not there or no daemon answers."""
    try:
        found = json.loads(await run(*docker, "image", "inspect", _TAGGED))
    except CommandFailed:
        return None
    config = found[0].get("Config") or {}
    return found[0]["Id"], int(found[0]["Size"]), (config.get("Labels") or {}).get(_LABEL, "")


RECIPE = Recipe(
    name=NAME,
    summary=f"a small container image, `image: {REFERENCE}`, with a web server and sshd, for Docker and Podman",
    version=VERSION,
    file="",
    commands={"apt-get": "apt", "apt-cache": "apt", "dpkg-deb": "dpkg"},
    uses_docker=True,
    make=make,
    current=current,
)
