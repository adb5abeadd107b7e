"""What is served beside the API: the stream of changes, the probes of whoever runs the process, the dashboard's files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tornado.iostream import StreamClosedError
from tornado.web import StaticFileHandler

from api.base import ApiHandler
from api.hub import KEEP_ALIVE, TooOld
from reconciler.core.model import Change
from specs.failures import Failure
from specs.operations import Param, operation

STATIC = Path(__file__).parent / "static"
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "font-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Watch(ApiHandler):
    """/api/watch: server-sent events, a snapshot and then every change; `since` resumes after a revision."""

    tagged = False  # what is told is not the fleet's state

    @operation(
        query=(Param("since", "Only changes after this revision.", kind="integer", says="a revision"),),
        fails=(410,),
        media="text/event-stream",
        headers={"Last-Event-ID": "As `since`, sent by browsers that connect again."},
    )
    async def on_get(self) -> None:
        """Streams until the client goes."""
        at: int | None = self.asked.get("since")
        last_seen = self.request.headers.get("Last-Event-ID")
        if at is None and last_seen is not None:
            if not re.fullmatch(r"[0-9]{1,18}", last_seen):
                raise Failure(400, "invalid", "Last-Event-ID must be a revision")
            at = int(last_seen)
        if at is not None:
            self.hub.since(at)  # answers 410 while it still can
        self._auto_finish = False  # there is nobody left to finish for once the client has gone
        self.set_header("Content-Type", "text/event-stream")
        self.set_header("X-Accel-Buffering", "no")
        try:
            if at is None:
                self.write(self.hub.snapshot())
                at = self.hub.revision
            await self.flush()
            while True:
                frames = self.hub.since(at)
                if frames:
                    at = frames[-1][0]
                    self.write(b"".join(frame for _, frame in frames))
                elif not await self.hub.wait(KEEP_ALIVE):
                    self.write(b": keep-alive\n\n")
                await self.flush()
        except StreamClosedError:
            return
        except TooOld:
            await self.finish()  # too slow to keep up: it resumes, is told 410, and begins anew


class Health(ApiHandler):
    """/healthz: the process serves."""

    needs_key = False
    tagged = False

    @operation(gives=dict[str, str])
    async def on_get(self) -> None:
        """Always fine."""
        self.reply({"status": "ok"})


class Ready(ApiHandler):
    """/readyz: the desired state is loaded, and can be written."""

    needs_key = False
    tagged = False

    @operation(gives=dict[str, str], fails=(503,))
    async def on_get(self) -> None:
        """Fine once the controller has started, and while its store takes changes."""
        if not self.settings.get("is_ready", lambda: True)():
            raise Failure(503, "not_ready", "the controller is still loading")
        await self.controller.store.commit(Change())
        self.reply({"status": "ready"})


class _Hardened(StaticFileHandler):
    """Static files under a policy that lets no script of anybody else run."""

    def set_extra_headers(self, path: str) -> None:
        """Called by tornado for every file."""
        self.set_header("Content-Security-Policy", CONTENT_SECURITY_POLICY)
        self.set_header("X-Content-Type-Options", "nosniff")
        self.set_header("Referrer-Policy", "no-referrer")
        self.set_header("Cross-Origin-Opener-Policy", "same-origin")
        self.set_header("Cache-Control", "no-cache")
        self.clear_header("Server")


ROUTES: list[Any] = [
    (r"/api/watch", Watch),
    (r"/healthz", Health),
    (r"/readyz", Ready),
    (r"/(?P<path>)", _Hardened, {"path": str(STATIC), "default_filename": "index.html"}),
    (r"/static/(?P<path>.*)", _Hardened, {"path": str(STATIC)}),
]
