"""Debian packages as raw material: fetched with apt, unpacked without installing anything and without root.

Called by recipes. What to fetch is asked of the host's own package lists, so versions are the newest of its release.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from agent.errors import AgentError, CommandFailed
from agent.images.files import locked
from agent.run import run

Progress = Callable[[str], None]

# As root, apt would drop to its own user, who cannot write to a private cache directory.
_APT_OPTIONS = ("-o", "APT::Sandbox::User=root")
_FETCH_LIMIT = 600.0  # seconds
_UNPACK_LIMIT = 120.0
_URI = re.compile(r"^'(?P<uri>[^']+)' (?P<file>\S+) (?P<size>\d+) (?P<digest>\S*)$", re.MULTILINE)
_LIBRARY = re.compile(r"^\s*(\S+) => (.+?) \(0x", re.MULTILINE)
_LIBRARY_DIRS = ("lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu", "lib64", "usr/lib64")
LOADER = "ld-linux-x86-64.so.2"


@dataclass(frozen=True, slots=True)
class Archive:
    """A `.deb` file apt knows: its file name and the digest apt's signed lists give for it (`SHA256:…`)."""

    file: str
    digest: str

    @property
    def package(self) -> str:
        """The package's name."""
        return self.file.partition("_")[0]

    @property
    def version(self) -> str:
        """The package's version, as apt writes it into the file's name (`%3a` for a colon)."""
        return self.file.split("_")[1].replace("%3a", ":")


async def dependencies(package: str) -> tuple[str, ...]:
    """What a package directly depends on, by name. Raises AgentError where apt does not know it."""
    out = await _cache("depends", "--important", package)
    return tuple(re.findall(r"^ *\|?(?:Pre)?Depends: ([^<\s]+)", out, re.MULTILINE))


async def with_dependencies(packages: Sequence[str]) -> tuple[str, ...]:
    """The packages and all they need to run, sorted. Raises AgentError where apt does not know one."""
    out = await _cache("depends", "--recurse", "--important", *packages)
    return tuple(sorted({line.strip() for line in out.splitlines() if line and line[0] not in " <|"}))


async def _cache(*words: str) -> str:
    try:
        return await run("apt-cache", *words, env={"LC_ALL": "C"})
    except CommandFailed as error:
        if error.exit_status is None:
            raise
        raise AgentError(
            f"apt knows no package {words[-1]} (this needs Debian's package lists: run `apt-get update` as root): "
            f"{error.stderr.strip()[-300:]}"
        ) from error


async def fetch(packages: Sequence[str], cache: Path, progress: Progress) -> tuple[Path, ...]:
    """Brings packages into `cache`/debs, verified against apt's digests, and returns the `.deb` files in that order.

    What is there already is kept. Raises AgentError, CommandFailed.
    """
    folder = cache / "debs"
    async with locked(cache / ".lock"):
        folder.mkdir(parents=True, exist_ok=True)
        archives = await _offered(packages, cache)
        missing = [archive for archive in archives if not _intact(folder / archive.file, archive.digest)]
        if missing:
            progress(f"fetching {len(missing)} Debian packages")
            for archive in missing:
                (folder / archive.file).unlink(missing_ok=True)
            words = [f"{archive.package}={archive.version}" for archive in missing]
            await run("apt-get", *_APT_OPTIONS, "-q", "download", *words, cwd=folder, limit=_FETCH_LIMIT, env={"LC_ALL": "C"})
        for archive in archives:
            if not _intact(folder / archive.file, archive.digest):
                raise AgentError(
                    f"apt-get download did not bring {archive.file} into {folder}, or not as its lists describe it"
                )
    by_name = {archive.package: folder / archive.file for archive in archives}
    lost = [package for package in packages if package not in by_name]
    if lost:
        raise AgentError(f"apt offers no download for {', '.join(lost)}: run `apt-get update` as root")
    return tuple(by_name[package] for package in packages)


async def _offered(packages: Sequence[str], cache: Path) -> list[Archive]:
    # In a folder that holds a package already, apt leaves it out of the listing.
    with tempfile.TemporaryDirectory(prefix="apt-", dir=cache) as empty:
        words = (*_APT_OPTIONS, "download", "--print-uris", *packages)
        listing = await run("apt-get", *words, cwd=Path(empty), env={"LC_ALL": "C"})
    return [Archive(match["file"], match["digest"]) for match in _URI.finditer(listing)]


def _intact(path: Path, digest: str) -> bool:
    algorithm, _, expected = digest.partition(":")
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return not expected or hashlib.file_digest(file, algorithm.lower()).hexdigest() == expected.lower()


async def unpack(archives: Sequence[Path], into: Path) -> None:
    """Unpacks `.deb` files over each other into a directory, which is made if need be."""
    for archive in archives:
        await run("dpkg-deb", "-x", archive, into, limit=_UNPACK_LIMIT)


def find(root: Path, *candidates: str) -> Path:
    """The first of some paths that is a file below `root`. Raises AgentError naming them all."""
    for candidate in candidates:
        if (root / candidate).is_file():
            return root / candidate
    raise AgentError(f"the Debian packages hold none of {', '.join(candidates)}: this release packs them differently")


async def libraries(program: Path, root: Path) -> dict[str, Path]:
    """The shared libraries a program of an unpacked tree needs, by soname, its loader (LOADER) among them.

    Asks the tree's own loader (ld.so(8), --list), so nothing of the host is taken for a part of the tree.
    """
    loader = find(root, *(f"{folder}/{LOADER}" for folder in _LIBRARY_DIRS))
    listing = await run(
        loader,
        *("--inhibit-cache", "--library-path", ":".join(_LIBRARY_DIRS), "--list"),
        program.relative_to(root),
        cwd=root,
    )
    found = {LOADER: loader}
    for name, where in _LIBRARY.findall(listing):
        if Path(name).name == LOADER:
            continue
        if Path(where).is_absolute():
            raise AgentError(f"{program.name} needs {name}, which none of the fetched packages holds")
        found[name] = root / where
    return found


def versions(archives: Iterable[Path]) -> Mapping[str, str]:
    """Package names to versions, as the names of `.deb` files tell them."""
    facts = (Archive(archive.name, "") for archive in archives)
    return {archive.package: archive.version for archive in facts}


def tool(name: str) -> str | None:
    """Where a command is, also in the system directories an ordinary user's PATH leaves out."""
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin:/usr/bin:/bin")
