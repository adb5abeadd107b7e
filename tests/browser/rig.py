"""A controller that says what a test tells it to, with the product's own static files and their headers; and a watched page."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from typing import Any

from playwright.async_api import Browser, Page, expect
from tornado.httpserver import HTTPServer
from tornado.iostream import StreamClosedError
from tornado.netutil import bind_sockets
from tornado.web import Application, RequestHandler, StaticFileHandler

from api.hub import PART
from api.site import ROUTES
from specs.names import Engine, Storage
from specs.wire import Condition, Env, Host, Resource, Vm

WIDE = {"width": 1440, "height": 900}
NARROW = {"width": 375, "height": 812}
NOW = int(time.time())


def host(host_id: str = "rack-1", **changes: Any) -> Host:
    """A host with room."""
    room = Resource(cpu_total=16, cpu_used=5, mem_total=65536, mem_used=9728, disk_total=921600, disk_used=204800, vm_count=3)
    fields: dict[str, Any] = {"addr": "10.20.0.11:9100", "resource": room, "state": "online", "engines": ("qemu", "docker")}
    fields |= {"storage": Storage.FILE, "registered_at": NOW - 86400}
    return Host(id=host_id, **(fields | changes))


def env(env_id: str = "web", **changes: Any) -> Env:
    """An environment that is ready."""
    fields: dict[str, Any] = {"owner": "alice", "vm_ids": (), "created_at": NOW - 600, "expires_at": 0, "state": "active"}
    return Env(id=env_id, **(fields | {"phase": "ready", "observed_generation": 1} | changes))


def vm(vm_id: str = "vm-1", **changes: Any) -> Vm:
    """A machine that runs as desired on rack-1."""
    fields: dict[str, Any] = {
        "env_id": "web",
        "host_id": "rack-1",
        "image": "tiny",
        "engine": Engine.QEMU,
        "cpu": 2,
        "mem": 1024,
        "disk": 40960,
        "ip": "10.77.0.12",
        "port_map": {"22": 20100, "80": 20101},
        "state": "running",
        "created_at": NOW - 600,
        "name": "web-1",
        "desired": "running",
        "phase": "ready",
        "observed_generation": 1,
        "conditions": (Condition(type="Ready", status=True, reason="Ready", message="", since=NOW - 500),),
    }
    return Vm(id=vm_id, **(fields | changes))


def creating(vm_id: str = "vm-2", **changes: Any) -> Vm:
    """A machine that is on its way."""
    fields = {"name": "web-2", "ip": "", "port_map": {}, "state": "creating", "phase": "progressing"}
    return vm(vm_id, **(fields | {"message": "the host is at step disk"} | changes))


KIND = {Host: "host", Env: "env", Vm: "vm"}


class _Watch(RequestHandler):
    async def get(self) -> None:
        told: ScriptedController = self.settings["told"]
        since = self.get_query_argument("since", None)
        sent = self.request.headers.get("Authorization")
        told.asked.append((None if since is None else int(since), sent))
        self.set_header("Date", formatdate(time.time() + told.clock_ahead, usegmt=True))
        if told.key is not None and sent != f"Bearer {told.key}":
            self.set_status(401)
            self.finish({"ok": False, "error": "a valid API key is needed"})
            return
        if since is not None and int(since) < told.oldest:
            self.set_status(410)
            self.finish({"ok": False, "error": "revision is not kept any more"})
            return
        self.set_header("Content-Type", "text/event-stream")
        said: asyncio.Queue[str | None] = asyncio.Queue()
        told.listeners.add(said)
        try:
            in_parts = self.get_query_argument("parts", "false") == "true"
            self.write(
                told.snapshot(in_parts=in_parts)
                if since is None
                else "".join(frame for at, frame in told.ring if at > int(since))
            )
            await self.flush()
            while (frame := await said.get()) is not None:
                self.write(frame)
                await self.flush()
        except StreamClosedError:
            pass
        finally:
            told.listeners.discard(said)

    def on_connection_close(self) -> None:
        for said in self.settings["told"].listeners:
            said.put_nowait(": anybody there?\n\n")


@dataclass
class ScriptedController:
    """`async with ScriptedController(host(), env(), vm()).serving() as told`; its revision begins at 100."""

    first: tuple[Host | Env | Vm, ...]
    key: str | None = None
    clock_ahead: float = 0  # seconds
    revision: int = 100
    oldest: int = 0  # a lower `since` is answered with 410
    asked: list[tuple[int | None, str | None]] = field(default_factory=list)  # (since, Authorization) of each watch
    ring: list[tuple[int, str]] = field(default_factory=list)
    listeners: set[asyncio.Queue[str | None]] = field(default_factory=set)
    port: int = 0

    def __init__(self, *first: Host | Env | Vm, key: str | None = None, clock_ahead: float = 0) -> None:
        self.objects = {(KIND[type(one)], one.id): one for one in first}
        self.key, self.clock_ahead = key, clock_ahead
        self.asked, self.ring, self.listeners = [], [], set()

    @property
    def url(self) -> str:
        """The address to open."""
        return f"http://127.0.0.1:{self.port}/"

    def snapshot(self, *, in_parts: bool = False) -> str:
        """The events a watch begins with, as api/hub.py tells them."""
        lists = {
            f"{wanted}s": [one.model_dump(mode="json") for (kind, _), one in self.objects.items() if kind == wanted]
            for wanted in KIND.values()
        }
        parts = ""
        if in_parts:
            vms, lists["vms"] = lists["vms"], []
            for at in range(0, len(vms), PART):
                parts += f"event: part\ndata: {json.dumps({'vms': vms[at : at + PART]})}\n\n"
        return f"{parts}event: snapshot\ndata: {json.dumps({'revision': self.revision, **lists})}\n\n"

    def say(self, *changed: Host | Env | Vm) -> None:
        """Changes or adds objects."""
        for one in changed:
            self._change(KIND[type(one)], one.id, one)

    def forget(self, kind: str, key: str) -> None:
        """Says that an object is gone."""
        self._change(kind, key, None)

    def _change(self, kind: str, key: str, one: Host | Env | Vm | None) -> None:
        self.revision += 1
        if one is None:
            self.objects.pop((kind, key), None)
        else:
            self.objects[kind, key] = one
        shown = one.model_dump(mode="json") if one else None
        data = json.dumps({"revision": self.revision, "kind": kind, "id": key, "object": shown})
        self.ring.append((self.revision, f"id: {self.revision}\nevent: change\ndata: {data}\n\n"))
        self.shout(self.ring[-1][1])

    def shout(self, frame: str | None) -> None:
        """Sends raw text to everybody who watches; None ends their streams."""
        for said in self.listeners:
            said.put_nowait(frame)

    async def start(self) -> None:
        """Listens, on the same port as before."""
        static = [route for route in ROUTES if issubclass(route[1], StaticFileHandler)]
        self._server = HTTPServer(Application([(r"/api/watch", _Watch), *static], told=self))
        sockets = bind_sockets(self.port, "127.0.0.1")
        self.port = sockets[0].getsockname()[1]
        self._server.add_sockets(sockets)

    async def stop(self) -> None:
        """Ends every stream and listens no more: the next attempt to connect is refused."""
        self._server.stop()
        self.shout(None)
        await self._server.close_all_connections()

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[ScriptedController]:
        """Started, and stopped at the end."""
        await self.start()
        try:
            yield self
        finally:
            await self.stop()


# Chromium writes these for every answer that is not a success: the tests cause them on purpose.
_EXPECTED = "Failed to load resource"
_COLLECT = """window.broken = [];
addEventListener("securitypolicyviolation", (event) => broken.push(`${event.violatedDirective} ${event.blockedURI}`));"""


@asynccontextmanager
async def opened(browser: Browser, url: str, path: str | None = "", **options: Any) -> AsyncIterator[Page]:
    """A page in a context of its own, not opened yet where path is None.

    At the end: nothing left its origin, no error was written, no policy was violated.
    """
    context = await browser.new_context(**({"viewport": WIDE, "reduced_motion": "reduce"} | options))
    page = await context.new_page()
    elsewhere: list[str] = []
    errors: list[str] = []
    page.on("request", lambda request: None if request.url.startswith(url) else elsewhere.append(request.url))
    page.on("console", lambda said: errors.append(said.text) if said.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    await page.add_init_script(_COLLECT)
    if path is not None:
        await page.goto(url + path)
    try:
        yield page
        violations = await page.evaluate("window.broken")
    finally:
        await context.close()
    assert (elsewhere, violations) == ([], [])
    assert [said for said in errors if not said.startswith(_EXPECTED)] == []


async def shows(page: Page, *texts: str) -> None:
    """Waits until the page's main part shows each text."""
    for text in texts:
        await expect(page.locator("main")).to_contain_text(text)
