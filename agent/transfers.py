"""Disks on their way out of and into this host, as files `<runtime>/.transfer-*`. Called by the handlers.

A disk is first written whole and then sent, or received whole, checked against its digest and then taken: memory stays small
whatever the size, and a transfer that breaks off leaves nothing. Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import re
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from agent.errors import AgentError, Unsupported
from agent.machine import StreamFormat
from agent.records import io_error
from agent.runtime import Runtime

PREFIX = ".transfer-"
"""Of the names of files in the runtime folder that hold a disk under way."""
CHUNK = 256 * 1024  # bytes


class BadTransfer(AgentError):
    """What arrived is not what was sent."""

    status, code = 400, "bad_transfer"


@dataclass(frozen=True, slots=True)
class Exported:
    """A disk ready to be sent; `sha256` is of the file."""

    path: Path
    format: StreamFormat
    size: int
    sha256: bytes


class Transfers:
    """The transfers of one agent."""

    def __init__(self, runtime: Runtime, runtime_dir: Path | None) -> None:
        """`runtime_dir` is None on a simulated host, which has no files."""
        self._runtime = runtime
        self._folder = runtime_dir

    async def clear(self) -> None:
        """Removes what an agent that was killed left. Called once, before requests are answered."""
        if self._folder is not None:
            await asyncio.to_thread(_clear, self._folder)

    @contextlib.asynccontextmanager
    async def exported(self, vm_id: str) -> AsyncIterator[Exported]:
        """Writes the disk of a stopped VM to a file that is there until the context ends. Raises AgentError."""
        self._runtime.check_disk_can_change(vm_id)
        path = await self._new_file()
        try:
            format_ = await self._runtime.export_disk(vm_id, path)
            size, digest = await asyncio.to_thread(_measure, path)
            yield Exported(path, format_, size, digest)
        finally:
            await asyncio.to_thread(path.unlink, missing_ok=True)

    async def begin(self, vm_id: str) -> Upload:
        """Prepares to receive a disk for a stopped VM. Raises AgentError if it could not be taken now."""
        self._runtime.check_disk_can_change(vm_id)
        return Upload(self._runtime, vm_id, await self._new_file())

    async def _new_file(self) -> Path:
        if self._folder is None:
            raise Unsupported("a simulated host has no disks")
        path = self._folder / f"{PREFIX}{secrets.token_hex(8)}"
        try:
            await asyncio.to_thread(path.touch, 0o600)
        except OSError as error:
            raise io_error(f"making {path}", error) from error
        return path


class Upload:
    """One disk being received: `write` as often as there is something, then `finish` or `discard`."""

    def __init__(self, runtime: Runtime, vm_id: str, path: Path) -> None:
        self._runtime = runtime
        self._vm_id = vm_id
        self._path = path
        self._file = path.open("wb")
        self._digest = hashlib.sha256()

    async def write(self, chunk: bytes) -> None:
        """Appends. Raises DoesNotFit when the filesystem is full."""
        try:
            await asyncio.to_thread(self._append, chunk)
        except OSError as error:
            raise io_error(f"receiving the disk of VM {self._vm_id}", error) from error

    async def finish(self, format_: StreamFormat, sha256: bytes) -> None:
        """Makes what was received the VM's disk. Raises BadTransfer on another digest, and what the storage raises."""
        self._file.close()
        if self._digest.digest() != sha256:
            raise BadTransfer(f"what arrived for VM {self._vm_id} is not what was sent (its SHA-256 differs); send it again")
        await self._runtime.import_disk(self._vm_id, self._path, format_)

    def discard(self) -> None:
        """Removes the file; needed in every case."""
        self._file.close()
        self._path.unlink(missing_ok=True)

    def _append(self, chunk: bytes) -> None:
        self._digest.update(chunk)
        self._file.write(chunk)


def digest_header(sha256: bytes) -> str:
    """The value of Repr-Digest (RFC 9530)."""
    return f"sha-256=:{base64.b64encode(sha256).decode()}:"


def parse_digest(value: str) -> bytes | None:
    """The SHA-256 of a Repr-Digest header, None if it holds none."""
    match = re.search(r"(?:^|[,\s])sha-256=:([A-Za-z0-9+/]{43}=):", value)
    return base64.b64decode(match[1]) if match else None


def _measure(path: Path) -> tuple[int, bytes]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").digest()
        return file.tell(), digest


def _clear(folder: Path) -> None:
    for file in folder.glob(f"{PREFIX}*"):
        file.unlink()
