"""The least HTTP client there is, for floors and for load: a bare stream, one request at a time, next to no parsing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import orjson

LIMIT = 256 * 1024 * 1024  # bytes of one line or body


class Wire:
    """One connection that is kept alive."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, address: str) -> None:
        self._reader, self._writer, self._address = reader, writer, address

    @classmethod
    async def to(cls, address: str) -> Wire:
        """Connects to `host:port`."""
        host, _, port = address.removeprefix("http://").rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port), limit=LIMIT)
        return cls(reader, writer, f"{host}:{port}")

    async def call(self, method: str, path: str, body: bytes | None = None, headers: str = "") -> tuple[int, bytes]:
        """(status, body). `headers` are whole lines. Answers must carry Content-Length, as ours do."""
        content = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n" if body is not None else ""
        head = f"{method} {path} HTTP/1.1\r\nHost: {self._address}\r\n{headers}{content}\r\n"
        self._writer.write(head.encode() + (body or b""))
        raw = await self._reader.readuntil(b"\r\n\r\n")
        lower = raw.lower()
        at = lower.find(b"content-length:")
        length = int(lower[at + 15 : lower.index(b"\r\n", at)]) if at >= 0 else 0
        return int(raw[9:12]), await self._reader.readexactly(length) if length else b""

    async def json(self, method: str, path: str, body: object = None, headers: str = "") -> Any:
        """The answer's whole envelope. Raises RuntimeError on a status that is no success."""
        status, raw = await self.call(method, path, None if body is None else orjson.dumps(body), headers)
        if status >= 300:
            raise RuntimeError(f"{method} http://{self._address}{path} answered {status}: {raw[:500]!r}")
        return orjson.loads(raw)

    async def lines(self, path: str) -> AsyncIterator[bytes]:
        """The lines of an endless answer."""
        self._writer.write(f"GET {path} HTTP/1.1\r\nHost: {self._address}\r\n\r\n".encode())
        while line := await self._reader.readline():
            yield line

    def close(self) -> None:
        """Drops the connection."""
        self._writer.close()


async def spread(address: str, connections: int, work: Sequence[Callable[[Wire], Awaitable[object]]]) -> None:
    """Does all work over so many connections, each taking the next piece as soon as it is free."""
    todo = iter(work)

    async def one() -> None:
        wire = await Wire.to(address)
        try:
            for piece in todo:
                await piece(wire)
        finally:
            wire.close()

    await asyncio.gather(*(one() for _ in range(min(connections, len(work)))))


class Watch:
    """What `/api/watch` shows: the phase of every environment and the state of every VM."""

    def __init__(self) -> None:
        self.envs: dict[str, str] = {}
        self.vms: dict[str, str] = {}
        self.changes = 0
        self._moved = asyncio.Event()

    async def follow(self, wire: Wire) -> None:
        """Reads until cancelled."""
        async for line in wire.lines("/api/watch"):
            if line.startswith(b"data:"):
                self._take(orjson.loads(line[5:]))

    def _take(self, told: Any) -> None:
        if "object" not in told:
            self.envs = {env["id"]: env["phase"] for env in told["envs"]}
            self.vms = {vm["id"]: vm["state"] for vm in told["vms"]}
        elif told["kind"] in ("env", "vm"):
            self.changes += 1
            shown, field = (self.envs, "phase") if told["kind"] == "env" else (self.vms, "state")
            if told["object"] is None:
                shown.pop(told["id"], None)
            else:
                shown[told["id"]] = told["object"][field]
        self._moved.set()
        self._moved = asyncio.Event()

    async def until(self, reached: Callable[[], bool], what: str, limit: float = 300.0) -> None:
        """Waits for the stream to show something. Raises TimeoutError that says what was waited for."""
        try:
            async with asyncio.timeout(limit):
                while not reached():
                    await self._moved.wait()
        except TimeoutError:
            raise TimeoutError(f"not seen on /api/watch within {limit:g} s: {what}") from None


@asynccontextmanager
async def watching(url: str) -> AsyncIterator[Watch]:
    """A watch that has its snapshot."""
    watch = Watch()
    first = asyncio.Event()
    watch._moved = first
    wire = await Wire.to(url)
    task = asyncio.create_task(watch.follow(wire))
    try:
        async with asyncio.timeout(60):
            await first.wait()
        yield watch
    finally:
        task.cancel()
        await asyncio.wait([task])
        wire.close()
