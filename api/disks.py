"""A VM's disk to and from the agent that has it. Called by `muster vm export|import`; holds no more than a piece in memory."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import httpx

from api.client import ApiError, check_api_key, check_url
from specs.wire import DISK_FORMAT_HEADER, DISK_TYPE

CHUNK = 256 * 1024  # bytes
_CONNECT = 10.0  # seconds
_PATIENCE = 3600.0  # seconds without a byte: a large disk is written whole before the first byte is sent
_QCOW2 = b"QFI\xfb"


@dataclass(frozen=True, slots=True)
class Moved:
    """What was transferred: bytes, SHA-256 in hex, `qcow2` or `zfs`."""

    size: int
    sha256: str
    format: str


class AgentDisks:
    """Calls one agent, at `HOST:PORT`. Use as a context manager."""

    def __init__(self, addr: str, key: str | None) -> None:
        self._addr = addr
        self._http = httpx.Client(
            base_url=check_url(addr),
            headers={"Authorization": f"Bearer {check_api_key(key)}"} if key else {},
            timeout=httpx.Timeout(_PATIENCE, connect=_CONNECT),
            follow_redirects=False,
            trust_env=False,
        )

    def __enter__(self) -> AgentDisks:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def export(self, vm_id: str, target: BinaryIO) -> Moved:
        """Writes the disk of a stopped VM. Raises ApiError, also if what arrived is not what was sent."""
        digest, size = hashlib.sha256(), 0
        try:
            with self._http.stream("GET", f"/api/vms/{vm_id}/disk", headers={"Accept-Encoding": "identity"}) as answer:
                if answer.status_code != 200:
                    raise self._refusal(answer)
                for chunk in answer.iter_raw(CHUNK):
                    digest.update(chunk)
                    size += len(chunk)
                    target.write(chunk)
        except httpx.HTTPError as error:
            raise ApiError(f"the disk did not come from the agent {self._addr}: {error}") from error
        if answer.headers.get("Repr-Digest") != _header(digest.digest()):
            raise ApiError("what arrived is not what was sent (its SHA-256 differs); export it again", code="bad_transfer")
        return Moved(size, digest.hexdigest(), answer.headers.get(DISK_FORMAT_HEADER, ""))

    def import_(self, vm_id: str, source: BinaryIO) -> Moved:
        """Sends a disk, read twice from a seekable file, for a stopped VM. Raises ApiError; the old disk is kept then."""
        start = source.tell()
        digest = hashlib.sha256()
        first = source.read(CHUNK)
        format_ = "qcow2" if first.startswith(_QCOW2) else "zfs"
        while first:
            digest.update(first)
            first = source.read(CHUNK)
        size = source.tell() - start
        source.seek(start)
        headers = {
            "Content-Type": DISK_TYPE,
            "Content-Length": str(size),
            "Repr-Digest": _header(digest.digest()),
            DISK_FORMAT_HEADER: format_,
        }
        try:
            answer = self._http.put(f"/api/vms/{vm_id}/disk", content=_pieces(source), headers=headers)
        except httpx.HTTPError as error:
            raise ApiError(f"the disk did not get to the agent {self._addr}: {error}") from error
        if answer.status_code != 200:
            raise self._refusal(answer)
        return Moved(size, digest.hexdigest(), format_)

    def _refusal(self, answer: httpx.Response) -> ApiError:
        try:
            told = json.loads(answer.read())
            return ApiError(str(told["error"]), status=answer.status_code, code=str(told.get("code", "")))
        except (ValueError, KeyError, AttributeError):
            return ApiError(f"the agent {self._addr} answered {answer.status_code}", status=answer.status_code)


def _header(sha256: bytes) -> str:
    return f"sha-256=:{base64.b64encode(sha256).decode()}:"


def _pieces(source: BinaryIO) -> Iterator[bytes]:
    while chunk := source.read(CHUNK):
        yield chunk
