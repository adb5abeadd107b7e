"""GET and PUT /api/vms/{id}/disk: a stopped VM's disk as one file. Reads requests, moves bytes; decides nothing about VMs."""

from __future__ import annotations

import asyncio
from typing import cast

from tornado.http1connection import HTTP1Connection
from tornado.iostream import StreamClosedError

from agent.errors import AgentError
from agent.handlers import CLUSTER, POSITION, AgentHandler, explain
from agent.machine import StreamFormat
from agent.transfers import CHUNK, Exported, Upload, digest_header, parse_digest
from specs.failures import Failure
from specs.operations import operation
from specs.wire import DISK_FORMAT_HEADER, DISK_TYPE

_PATIENCE = 6 * 3600.0  # seconds for the whole of a disk to arrive


class DiskHandler(AgentHandler):
    """/api/vms/{id}/disk"""

    _upload: Upload | None = None
    _failure: AgentError | None = None

    @operation(media=DISK_TYPE, fails=(404, 409, 422, 503, 507))
    async def on_get(self, vm_id: str) -> None:
        """The disk's contents, with its digest in Repr-Digest (RFC 9530) and its format in X-Muster-Disk-Format."""
        async with self.services.transfers.exported(vm_id) as disk:
            self.set_header("Content-Type", DISK_TYPE)
            self.set_header("Content-Length", str(disk.size))
            self.set_header("Repr-Digest", digest_header(disk.sha256))
            self.set_header(DISK_FORMAT_HEADER, disk.format)
            if self.request.method != "HEAD":
                await self._send(disk)
        self.finish()

    async def _send(self, disk: Exported) -> None:
        with disk.path.open("rb") as file:
            try:
                while chunk := await asyncio.to_thread(file.read, CHUNK):
                    self.write(chunk)
                    await self.flush()  # returns once the socket has taken it: no more than one chunk is ever in memory
            except StreamClosedError:
                return  # the reader left

    async def prepare(self) -> None:  # type: ignore[override]  # tornado awaits it before it reads the body
        """Opens the file for the disk if the headers alone give no reason to refuse it."""
        is_upload = self.request.method == "PUT"
        if is_upload:
            self.max_body = 2**62
        super().prepare()
        if not is_upload or self._refusal is not None:
            return
        cast(HTTP1Connection, self.request.connection).set_body_timeout(_PATIENCE)
        try:
            self._told()
            self._upload = await self.services.transfers.begin(self.path_kwargs["vm_id"])
        except Failure as failure:
            self._refusal = failure
        except AgentError as error:
            self._refusal = explain(error)

    async def data_received(self, chunk: bytes) -> None:  # type: ignore[override]  # tornado awaits it before it reads on
        """Writes the disk down as it comes."""
        if self._upload is None or self._refusal is not None:
            super().data_received(chunk)
            return
        try:
            await self._upload.write(chunk)
        except AgentError as error:
            self._refusal = explain(error)

    @operation(
        takes_media=DISK_TYPE,
        fails=(404, 409, 422, 503, 507),
        headers=CLUSTER
        | {DISK_FORMAT_HEADER: "`qcow2` or `zfs`.", "Repr-Digest": "`sha-256=:BASE64:` of the body (RFC 9530)."},
        also=POSITION,
    )
    async def on_put(self, vm_id: str) -> None:
        """Replaces the disk of a stopped VM; needs Repr-Digest and X-Muster-Disk-Format as GET told them."""
        if self._upload is None:
            raise Failure(400, "bad_transfer", "no disk was sent")
        await self._upload.finish(*self._told())
        self.reply_done()

    def on_finish(self) -> None:
        """Removes the file, whatever has happened."""
        super().on_finish()
        self._discard()

    def on_connection_close(self) -> None:
        """The same when the sender left."""
        super().on_connection_close()
        self._discard()

    def _discard(self) -> None:
        if self._upload is not None:
            self._upload.discard()
            self._upload = None

    def _told(self) -> tuple[StreamFormat, bytes]:
        headers = self.request.headers
        if headers.get("Content-Type", "").partition(";")[0].strip().lower() != DISK_TYPE:
            raise Failure(415, "unsupported_media_type", f"a disk must be sent with Content-Type: {DISK_TYPE}")
        format_ = headers.get(DISK_FORMAT_HEADER, "")
        if format_ not in ("qcow2", "zfs"):
            raise Failure(400, "bad_header", f"{DISK_FORMAT_HEADER} must be qcow2 or zfs")
        digest = parse_digest(headers.get("Repr-Digest", ""))
        if digest is None:
            raise Failure(400, "bad_header", "Repr-Digest must hold the SHA-256 of the disk: sha-256=:BASE64:")
        return ("zfs" if format_ == "zfs" else "qcow2"), digest
