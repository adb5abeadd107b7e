"""Brings an image from a web server into the image folder: resumed, bounded, verified, whole or not at all.

Called by the command line. Knows nothing of VMs; whether one stands on an image is read from its links.
"""

from __future__ import annotations

import asyncio
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import httpx

from agent.errors import AgentError, Conflict, DoesNotFit, ImageMissing, ImageRefused
from agent.images.catalogue import ImageFile, find_image, inspect
from agent.images.files import locked, sha256, sync
from agent.images.packages import Progress
from specs.names import check_name

MAX_SIZE = 64 * 2**30  # bytes
ATTEMPTS = 5  # in a row that brought nothing new
_PAUSE = 1.0  # seconds before the next attempt, doubled each time
_SILENCE = 60.0  # seconds without a byte
_TELL_EVERY = 64 * 2**20  # bytes
_QCOW2 = b"QFI\xfb"


@dataclass(frozen=True, slots=True)
class Wanted:
    """An image to bring: what it is to be called, where it is, and the SHA-256 of its file in hex."""

    name: str
    url: str
    digest: str

    def check(self) -> None:
        """Raises AgentError naming the field that makes no sense."""
        try:
            check_name(self.name)
        except ValueError as error:
            raise AgentError(f"NAME {error}") from None
        if not re.fullmatch(r"https?://[^/\s]+/\S*", self.url):
            raise AgentError("URL must begin with http:// or https:// and name a file")
        if not re.fullmatch(r"[0-9a-fA-F]{64}", self.digest):
            raise AgentError("--sha256 must be 64 hexadecimal digits, as sha256sum prints them")


class _Broken(Exception):
    """The transfer broke off; what came is kept, and the next attempt goes on from there."""


async def pull(
    wanted: Wanted,
    image_dir: Path,
    progress: Progress,
    *,
    max_size: int = MAX_SIZE,
    pause: float = _PAUSE,
    use_proxies: bool = True,
) -> Path:
    """Leaves `<image_dir>/<name>.qcow2` or `.raw`, as the file itself says, and returns it; one that is there already is kept.

    Only a file with the digest wanted gets its name. What an interrupted pull brought is gone on from. Raises AgentError,
    Conflict (another image has the name), DoesNotFit, ImageRefused (wrong digest, or unsafe as catalogue.inspect tells).
    """
    wanted.check()
    digest = wanted.digest.lower()
    async with locked(image_dir / ".build.lock"):
        there = await asyncio.to_thread(find_image, image_dir, wanted.name)
        if there is not None:
            if there.path.is_file() and await asyncio.to_thread(sha256, there.path) == digest:
                progress(f"{wanted.name} is here already")
                return there.path
            raise Conflict(f"another image {wanted.name} is in {image_dir}; remove it first, or choose another name")
        part = image_dir / f".{wanted.name}.{digest[:16]}.part"
        async with httpx.AsyncClient(timeout=_SILENCE, follow_redirects=True, trust_env=use_proxies) as client:
            await _fetch(client, wanted.url, part, max_size, pause, progress)
        progress("verifying")
        got = await asyncio.to_thread(sha256, part)
        if got != digest:
            _forget(part)
            raise ImageRefused(f"{wanted.url} has SHA-256 {got}, not {digest}; nothing of it was kept")
        return await _accept(part, image_dir / wanted.name)


async def _fetch(client: httpx.AsyncClient, url: str, part: Path, max_size: int, pause: float, progress: Progress) -> None:
    vain = 0
    while True:
        before = _size(part)
        try:
            return await _attempt(client, url, part, max_size, progress)
        except (httpx.TransportError, _Broken) as error:
            vain = 0 if _size(part) > before else vain + 1
            why = str(error) or type(error).__name__
            if vain >= ATTEMPTS:
                raise AgentError(f"{url} could not be fetched, {vain} attempts in a row brought nothing: {why}") from error
            progress(f"broken off at {_size(part) / 2**20:.1f} MiB ({why}); going on")
            await asyncio.sleep(pause * 2**vain)


async def _attempt(client: httpx.AsyncClient, url: str, part: Path, max_size: int, progress: Progress) -> None:
    have = _size(part)
    # A server that compresses would count in other bytes than the file's.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    async with client.stream("GET", url, headers=headers) as answer:
        if answer.status_code == 416 and (total := _total(answer)) == have:  # RFC 9110, 15.5.17: all of it came before
            return
        if answer.status_code >= 500 or answer.status_code in (408, 416, 429):
            if answer.status_code == 416:
                _forget(part)
            raise _Broken(f"HTTP status {answer.status_code}")
        if answer.status_code not in (200, 206):
            raise AgentError(f"{url} answers with HTTP status {answer.status_code}")
        if answer.status_code == 206 and not answer.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            raise AgentError(f"{url} answers with another part of the file than the one asked for")
        if answer.status_code == 200:
            have = 0  # a server that knows no ranges begins again
        length = answer.headers.get("Content-Length", "")
        total = have + int(length) if length.isdigit() else None
        _check_size(url, part, have, total, max_size)
        await _write(answer, url, part, have, total, max_size, progress)


def _check_size(url: str, part: Path, have: int, total: int | None, max_size: int) -> None:
    if total is None:
        return
    if total > max_size:
        raise AgentError(f"{url} has {total} bytes, more than the {max_size} allowed (--max-size)")
    free = shutil.disk_usage(part.parent).free
    if total - have > free:
        raise DoesNotFit(f"{url} has {total - have} more bytes; {part.parent} has room for {free}")


async def _write(
    answer: httpx.Response, url: str, part: Path, have: int, total: int | None, max_size: int, progress: Progress
) -> None:
    told = have
    with part.open("r+b" if have else "wb") as file:
        file.seek(have)
        async for chunk in answer.aiter_raw():
            if have + len(chunk) > max_size:
                raise AgentError(f"{url} has more than the {max_size} bytes allowed (--max-size)")
            try:
                await asyncio.to_thread(file.write, chunk)
            except OSError as error:
                raise DoesNotFit(f"{part} could not be written: {error.strerror}") from error
            have += len(chunk)
            if have - told >= _TELL_EVERY:
                told = have
                progress(f"{have / 2**20:.0f} MiB" + (f" of {total / 2**20:.0f}" if total else ""))
    if total is not None and have < total:
        raise _Broken("the connection ended early")


async def _accept(part: Path, target: Path) -> Path:
    with part.open("rb") as file:
        is_qcow2 = file.read(4) == _QCOW2
    try:
        await inspect(part, "qcow2" if is_qcow2 else "raw")
    except ImageRefused:
        _forget(part)
        raise
    final = target.with_name(f"{target.name}.{'qcow2' if is_qcow2 else 'raw'}")
    await asyncio.to_thread(_settle, part, final)
    return final


def _settle(part: Path, final: Path) -> None:
    part.chmod(0o644)
    sync(part)
    part.replace(final)
    sync(final.parent)


def _forget(part: Path) -> None:
    part.unlink(missing_ok=True)


def _total(answer: httpx.Response) -> int | None:
    found = re.fullmatch(r"bytes \*/([0-9]{1,18})", answer.headers.get("Content-Range", ""))
    return int(found[1]) if found else None


def _size(part: Path) -> int:
    try:
        return part.stat().st_size
    except FileNotFoundError:
        return 0


async def remove(name: str, image_dir: Path) -> ImageFile:
    """Removes an image with its record. Raises ImageMissing, Conflict while disks of VMs stand on it."""
    async with locked(image_dir / ".build.lock"):
        image = await asyncio.to_thread(find_image, image_dir, name)
        if image is None:
            raise ImageMissing(f"there is no image {name} in {image_dir}")
        # Every overlay holds a hard link to its base (see agent/storage/file.py).
        links = image.path.stat().st_nlink - 1 if image.path.is_file() else 0
        if links:
            raise Conflict(f"{links} disks of VMs stand on image {name}; delete those VMs first")
        if image.path.is_file():
            image.path.unlink()
        else:
            await asyncio.to_thread(shutil.rmtree, image.path)
        (image_dir / f"{name}.json").unlink(missing_ok=True)
        return image
