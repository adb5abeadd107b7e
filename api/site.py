"""What is served beside the API: the stream of changes, the probes of whoever runs the process, the dashboard's files."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any, cast

from tornado.iostream import StreamClosedError
from tornado.web import StaticFileHandler

from api.base import ApiHandler
from api.history import History
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
        query=(
            Param("since", "Only changes after this revision.", kind="integer", says="a revision"),
            Param("parts", "Tell the VMs of a snapshot in several events before it.", values=("true", "false")),
            Param("pulse", "Also tell counts and heartbeats every few seconds.", values=("true", "false")),
        ),
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
        with self.hub.watching():
            if at is not None:
                self.hub.since(at)  # answers 410 while it still can
            self._auto_finish = False  # there is nobody left to finish for once the client has gone
            self.set_header("Content-Type", "text/event-stream")
            self.set_header("X-Accel-Buffering", "no")
            with contextlib.suppress(StreamClosedError):
                with contextlib.suppress(TooOld):  # too slow to keep up: it resumes, is told 410, and begins anew
                    await self._stream(at, has_pulses=self.asked.get("pulse") == "true")
                await self.finish()

    async def _stream(self, at: int | None, *, has_pulses: bool) -> None:
        """Tells changes until the controller stops. Raises StreamClosedError, TooOld."""
        hub = self.hub
        pulses = hub.pulses
        if has_pulses:
            self.write(hub.history(cast(History, self.settings["history"]).shown()))
        if at is None:
            self.write(hub.snapshot(in_parts=self.asked.get("parts") == "true"))
            at = hub.revision
        await self.flush()
        while not hub.closed:
            frames = hub.since(at)
            news = b"".join(frame for _, frame in frames)
            if frames:
                at = frames[-1][0]
            if has_pulses and pulses != hub.pulses:
                pulses, news = hub.pulses, news + hub.pulse
            if not news:
                if await hub.wait(KEEP_ALIVE):
                    continue
                news = b": keep-alive\n\n"
            self.write(news)
            await self.flush()


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
