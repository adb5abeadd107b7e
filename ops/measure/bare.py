"""A bare tornado server, the floor of reads and writes: `… ops.measure.bare PORT FILE` answers the file's bytes to all."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from tornado.web import Application, RequestHandler


class _Ready(RequestHandler):
    def initialize(self, content: bytes) -> None:
        self._content = content

    def compute_etag(self) -> str | None:
        return None

    def get(self) -> None:
        self.set_header("Content-Type", "application/json")
        self.finish(self._content)

    def post(self) -> None:
        self.set_status(201)
        self.get()


async def _serve(port: int, content: bytes) -> None:
    Application([(r"/.*", _Ready, {"content": content})], log_function=lambda _: None).listen(port, "127.0.0.1")
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1]), Path(sys.argv[2]).read_bytes()))
