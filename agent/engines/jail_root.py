"""Root filesystems of jails: a ZFS clone of the image where both are on one pool, else a copy of it. Called by the jail driver.

An image is a directory with a FreeBSD userland, `NAME/bin/sh`, or an archive of one, `NAME.txz` (as a release's `base.txz`) or
`NAME.tar`. Everything of a VM has a name derived from its id; the marker is written last.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from agent.errors import AgentError, CommandFailed, ImageMissing
from agent.run import run
from specs.names import VmId, check_name

ROOT, MARKER = "root", "root.complete"
_ARCHIVES = (".txz", ".tar")
_LIMIT = 60.0  # seconds
_COPY_LIMIT = 1800.0  # seconds; a userland has tens of thousands of files


def images_in(image_dir: Path) -> dict[str, Path]:
    """The jail images of a directory, by name; none where it does not exist. A directory wins over an archive of its name."""
    found: dict[str, Path] = {}
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for entry in sorted(image_dir.iterdir(), key=lambda path: (path.suffix in _ARCHIVES, path.name)):
            name = entry.name.removesuffix(entry.suffix) if entry.suffix in _ARCHIVES else entry.name
            is_image = entry.is_file() if entry.suffix in _ARCHIVES else (entry / "bin" / "sh").is_file()
            if is_image and _sayable(name):
                found.setdefault(name, entry)
    return found


def _sayable(name: str) -> bool:
    try:
        check_name(name)
    except ValueError:
        return False
    return True


class JailRoots:
    """Makes and removes them. `dataset` is set by `find_pool`: the ZFS dataset that holds the runtime folder, "" for none."""

    def __init__(self, image_dir: Path, runtime_dir: Path) -> None:
        self._image_dir = image_dir.resolve()
        self._runtime_dir = runtime_dir
        self.dataset = ""

    async def find_pool(self) -> None:
        """Learns whether the runtime folder is on ZFS, where a clone takes no time and a size can be enforced."""
        self.dataset = await _dataset_of(self._runtime_dir)

    async def make(self, vm_id: VmId, folder: Path, name: str, image: str, size_mib: int) -> Path:
        """`<folder>/root` with the contents of `image`; what an interrupted call left is made anew. Raises ImageMissing."""
        images = await asyncio.to_thread(images_in, self._image_dir)
        if image not in images:
            have = ", ".join(sorted(images)) or "none at all"
            raise ImageMissing(
                f"image {image} is not in {self._image_dir} (there: {have}); put a FreeBSD userland there, a directory or .txz"
            )
        await self.remove(folder, name)
        root, source = folder / ROOT, images[image]
        if self.dataset:
            await self._make_dataset(vm_id, root, name, source, size_mib)
        else:
            root.mkdir()
            await _fill(root, source)
        return root

    async def _make_dataset(self, vm_id: VmId, root: Path, name: str, source: Path, size_mib: int) -> None:
        base = await _dataset_of(source) if source.suffix not in _ARCHIVES else ""
        options = ("-o", f"mountpoint={root}", "-o", f"refquota={size_mib}M", "-o", f"muster:vm={vm_id}")
        # An image that is only part of a dataset cannot be cloned alone.
        is_whole = base and await _mountpoint(base) == str(source)
        if is_whole and base.split("/")[0] == self.dataset.split("/")[0]:
            await run("zfs", "snapshot", f"{base}@{name}", limit=_LIMIT)
            await run("zfs", "clone", *options, f"{base}@{name}", f"{self.dataset}/{name}", limit=_LIMIT)
        else:
            await run("zfs", "create", *options, f"{self.dataset}/{name}", limit=_LIMIT)
            await _fill(root, source)

    async def remove(self, folder: Path, name: str) -> None:
        """Removes the root, whole or half made, and its snapshot of the image. Nothing may be mounted inside."""
        (folder / MARKER).unlink(missing_ok=True)
        root = folder / ROOT
        if self.dataset:
            await self._remove_dataset(name)
        if not root.exists():
            return
        # A userland holds files that the system flag protects (chflags(1)): without this not even root may remove them.
        await run("chflags", "-R", "noschg", root, limit=_COPY_LIMIT)
        await asyncio.to_thread(shutil.rmtree, root)

    async def _remove_dataset(self, name: str) -> None:
        pool = self.dataset.split("/")[0]
        listed = await run("zfs", "list", "-H", "-r", "-t", "filesystem,snapshot", "-o", "name", pool, limit=_LIMIT)
        names = listed.splitlines()
        if f"{self.dataset}/{name}" in names:
            await run("zfs", "destroy", "-r", f"{self.dataset}/{name}", limit=_LIMIT)
        for snapshot in names:
            if snapshot.endswith(f"@{name}"):
                await run("zfs", "destroy", snapshot, limit=_LIMIT)


async def _fill(root: Path, source: Path) -> None:
    if source.suffix in _ARCHIVES:
        await run("tar", "-xpf", source, "-C", root, limit=_COPY_LIMIT)
    else:
        await run("cp", "-a", f"{source}/.", f"{root}/", limit=_COPY_LIMIT)


async def _dataset_of(path: Path) -> str:
    """The ZFS filesystem that holds a path, "" where it is on none."""
    if shutil.which("zfs") is None:
        return ""
    try:
        return (await run("zfs", "list", "-H", "-o", "name", "-t", "filesystem", path, limit=_LIMIT)).strip()
    except CommandFailed:
        return ""


async def _mountpoint(dataset: str) -> str:
    return (await run("zfs", "get", "-H", "-o", "value", "mountpoint", dataset, limit=_LIMIT)).strip()


def write_inside(root: Path, name: str, data: bytes, mode: int) -> None:
    """Writes `<root>/<name>`, making directories of 0755 on the way.

    No symbolic link is followed: one in an image must not make the agent write somewhere on the host. Raises AgentError.
    """
    try:
        with _directory(root, Path(name).parent) as parent:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(Path(name).name, flags, mode, dir_fd=parent)
            with os.fdopen(descriptor, "wb") as file:
                os.fchmod(descriptor, mode)
                file.write(data)
    except OSError as error:
        raise AgentError(f"{name} cannot be written in the jail's root {root}: {error.strerror}") from error


@contextlib.contextmanager
def _directory(root: Path, inside: Path) -> Iterator[int]:
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(root, flags)
    try:
        for part in inside.parts:
            with contextlib.suppress(FileExistsError):
                os.mkdir(part, 0o755, dir_fd=descriptor)
            deeper = os.open(part, flags, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = deeper
        yield descriptor
    finally:
        os.close(descriptor)
