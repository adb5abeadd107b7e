"""The `zfs` command with typed failures (zfs(8) and its subcommands' pages; the same on Linux and FreeBSD).

Called by the drivers that keep something on ZFS. Knows nothing of images or VMs.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import re
import shutil
import stat
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from agent.errors import AgentError, CommandFailed, DoesNotFit
from agent.run import run

DEVICES = Path("/dev/zvol")
_PATIENCE = 15.0  # seconds for something else, mostly udev's look at a new device, to let go of a volume
_LOOK_EVERY = 0.05
_SETTLE_LIMIT = 10  # seconds
# _IOR(0x12, 125, char[256]): which volume a Linux block device is (include/sys/fs/zfs.h).
_BLKZNAME = 0x8100127D
_NAME_LENGTH = 256


class ZfsFailed(AgentError):
    """A zfs command failed; the message holds the command and what it said."""

    code = "command_failed"


class DatasetMissing(ZfsFailed):
    """The dataset, or the one above it, does not exist."""


class DatasetExists(ZfsFailed):
    """A dataset of that name is there already."""


class DatasetBusy(ZfsFailed):
    """Something has the volume open."""


class HasClones(ZfsFailed):
    """Other datasets are clones of a snapshot of this one."""


_MEANINGS: tuple[tuple[str, type[AgentError]], ...] = (
    (r"dataset does not exist|parent does not exist|could not find any snapshots", DatasetMissing),
    (r"already exists|destination '.*' exists", DatasetExists),
    (r"dataset is busy|target is busy|pool or dataset is busy", DatasetBusy),
    (r"has dependent clones", HasClones),
    (r"out of space|no space left|quota exceeded", DoesNotFit),
)


def meaning(error: CommandFailed) -> AgentError:
    """The typed failure for what the command said; one that never ran stays as it is."""
    if error.exit_status is None:
        return error
    for pattern, kind in _MEANINGS:
        if re.search(pattern, error.stderr, re.IGNORECASE):
            return kind(error.message)
    return ZfsFailed(error.message)


async def zfs(*words: str, limit: float = 60) -> str:
    """Runs `zfs WORDS…` and returns its output. Raises ZfsFailed and its kinds, DoesNotFit, CommandFailed."""
    try:
        # The patterns above are the C locale's words.
        return await run("zfs", *words, limit=limit, env={"LC_ALL": "C"})
    except CommandFailed as error:
        raise meaning(error) from error


async def send(snapshot: str, target: BinaryIO, limit: float) -> None:
    """Writes the whole contents of a snapshot as a stream: blocks as they are on disk, compressed ones included (-c)."""
    await _with_file("send", "-Lec", snapshot, stdout=target, limit=limit)


async def receive(source: BinaryIO, dataset: str, properties: Mapping[str, str], limit: float) -> None:
    """Makes a dataset of a stream. One that is cut short or damaged leaves nothing (zfs-receive(8))."""
    await _with_file("recv", "-u", *_options(properties), dataset, stdin=source, limit=limit)


async def _with_file(*words: str, stdin: BinaryIO | None = None, stdout: BinaryIO | None = None, limit: float) -> None:
    try:
        await run("zfs", *words, stdin=stdin, stdout=stdout, limit=limit, env={"LC_ALL": "C"})
    except CommandFailed as error:
        raise meaning(error) from error


async def patiently(*words: str) -> None:
    """`zfs WORDS…`, again and again while the volume is busy, for some seconds. Raises as `zfs`."""
    deadline = asyncio.get_running_loop().time() + _PATIENCE
    while True:
        try:
            await zfs(*words)
            return
        except DatasetBusy:
            if asyncio.get_running_loop().time() >= deadline:
                raise
        await asyncio.sleep(_LOOK_EVERY)


async def facts(dataset: str, *properties: str) -> dict[str, str] | None:
    """The exact values of properties ("-" where there is none), or None if there is no such dataset."""
    try:
        told = await zfs("get", "-Hp", "-o", "property,value", ",".join(properties), dataset)
    except DatasetMissing:
        return None
    return dict(line.split("\t", 1) for line in told.splitlines())


async def table(kind: str, below: str, *properties: str, depth: int = 1) -> list[tuple[str, ...]]:
    """One row for each dataset of a kind (`volume`, `snapshot`, …) at most `depth` below another, itself included."""
    told = await zfs("list", "-Hp", "-t", kind, "-d", str(depth), "-o", ",".join(properties), below)
    return [tuple(line.split("\t")) for line in told.splitlines()]


async def clones_of(dataset: str) -> list[str]:
    """The datasets that are clones of any snapshot of this one. Raises DatasetMissing."""
    rows = await table("snapshot", dataset, "clones")
    return sorted({name for (names,) in rows for name in names.split(",") if name not in ("", "-")})


async def create_volume(dataset: str, size: int, properties: Mapping[str, str]) -> None:
    """A sparse volume of `size` bytes."""
    await zfs("create", "-s", *_options(properties), "-V", str(size), dataset)


async def clone(snapshot: str, dataset: str, properties: Mapping[str, str]) -> None:
    """A writable clone of a snapshot."""
    await zfs("clone", *_options(properties), snapshot, dataset)


async def destroy(dataset: str) -> bool:
    """Destroys a dataset with its snapshots; False if there was none. Raises HasClones: what depends on it stays as it is."""
    try:
        await patiently("destroy", "-r", dataset)
    except DatasetMissing:
        return False
    return True


async def mounted_at(folder: Path) -> str | None:
    """The filesystem whose mountpoint is this very folder, if there is one. Raises CommandFailed where there is no zfs."""
    try:
        told = await zfs("list", "-H", "-t", "filesystem", "-o", "name,mountpoint", str(folder))
    except ZfsFailed:
        return None
    name, _, mountpoint = told.strip().partition("\t")
    return name if mountpoint == str(folder) else None


async def device_of(dataset: str, devices: Path = DEVICES, limit: float = 30.0) -> Path:
    """The volume's device node, once it is there to stay and leads to this volume. Raises AgentError if it does not come.

    On Linux udev makes the link some time after the volume; until then an old one may lead to another volume's device. It may
    also make it early, at an event of the volume that had the device's number before, and take it away with that one's end:
    so it counts once udev has caught up with everything.
    """
    path = devices / dataset
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(limit):
            while True:
                if await asyncio.to_thread(_is_of, path, dataset):
                    await _udev_settled()
                    if await asyncio.to_thread(_is_of, path, dataset):
                        return path
                await asyncio.sleep(_LOOK_EVERY)
    raise AgentError(f"the volume {dataset} is there, its device {path} is not (waited {limit:g} s); is udev running?")


async def _udev_settled() -> None:
    """Returns once udev has handled every event so far, or after some seconds: others' devices may keep it busy for long."""
    if sys.platform == "linux" and shutil.which("udevadm"):
        with contextlib.suppress(CommandFailed):
            await run("udevadm", "settle", f"--timeout={_SETTLE_LIMIT}", limit=_SETTLE_LIMIT + 5)


def _is_of(path: Path, dataset: str) -> bool:
    try:
        if not stat.S_ISBLK(path.stat().st_mode) or sys.platform != "linux":
            return True
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        name = fcntl.ioctl(descriptor, _BLKZNAME, bytes(_NAME_LENGTH))
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return name.rstrip(b"\0") == dataset.encode()


def _options(properties: Mapping[str, str]) -> list[str]:
    return [word for name, value in properties.items() for word in ("-o", f"{name}={value}")]
