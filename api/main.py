"""The controller's composition root: settings in, a serving controller out."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
from collections.abc import Callable, Iterator

import structlog

from api.base import explain
from api.history import History
from api.hub import Hub
from api.routes import ROUTES
from api.settings import ControllerSettings, SettingsError
from api.views import Views
from reconciler.fleet import Kind
from reconciler.loop.controller import Controller
from reconciler.loop.watchers import WatchSettings
from reconciler.store.database import Database
from reconciler.store.marker import STORE, check_marker, write_marker
from specs.http import application
from specs.logs import set_up_logs
from specs.serving import Access, Listen, Server

log = structlog.get_logger()


@contextlib.contextmanager
def _alone(settings: ControllerSettings) -> Iterator[None]:
    """One controller per data folder: two would both believe to be the only one that decides."""
    try:
        settings.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = (settings.data_dir / "controller.lock").open("a")
    except OSError as error:
        raise SettingsError(f"the data folder {settings.data_dir} cannot be used: {error}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SettingsError(f"another controller runs on {settings.data_dir}; give --data-dir another folder") from None
        yield


class ControllerApp:
    """A controller with its HTTP face."""

    def __init__(self, settings: ControllerSettings) -> None:
        key = settings.key()
        try:
            self._listen = Listen.parse(settings.listen)
            self._listen.check_access(has_key=key is not None, insecure=settings.insecure_no_auth)
        except ValueError as error:
            raise SettingsError(str(error)) from None
        self._access = Access(key.encode() if key else None, None if key else self._listen.allowed_hosts())
        agent_key = settings.agent_key or key
        watch = WatchSettings(heartbeat=settings.heartbeat)
        check_marker(settings.data_dir)
        self.controller = Controller(
            Database.at(settings.data_dir / STORE),
            agent_key=agent_key,
            watch=watch,
            host_loss_grace=settings.host_loss_grace,
        )
        fleet = self.controller.fleet
        write_marker(settings.data_dir, fleet.cluster)
        views = Views(fleet, self.controller.clock)
        self.hub = Hub(fleet, views, self.controller.term)
        self.history = History(fleet, views, self.controller.clock)
        views.steps = self.history.steps
        parts = {"controller": self.controller, "views": views, "hub": self.hub, "history": self.history}
        app = application(ROUTES, access=self._access, explain=explain, **parts)
        self.server = Server.of(app)
        self._pulse: asyncio.Task[None] | None = None

    async def start(self) -> str:
        """Begins to serve and to reconcile; returns the URL. Raises SettingsError if the address cannot be had."""
        self.controller.fleet.changed = self._changed
        await self.controller.start()
        try:
            self.server.open(self._listen)
        except OSError as error:
            await self.controller.stop()
            raise SettingsError(f"cannot listen on {self._listen.host}:{self._listen.port}: {error.strerror}") from None
        self._pulse = asyncio.create_task(self._beat(), name="pulse")
        return self.server.url

    def _changed(self, kind: Kind, key: str) -> None:
        self.history.changed(kind, key)
        self.hub.changed(kind, key)

    async def _beat(self) -> None:
        while True:
            self.hub.beat(self.history.sample())
            await self.history.pause()

    async def stop(self) -> None:
        """Ends serving and reconciling; what runs on the hosts goes on."""
        self.server.stop()
        if self._pulse is not None:
            self._pulse.cancel()
        self.hub.close()
        await self.controller.stop()
        await self.server.drain()


@contextlib.contextmanager
def _private_files() -> Iterator[None]:
    """What the process makes meanwhile is its user's alone: the database holds user data, which may hold secrets."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


async def serve(settings: ControllerSettings, *, ready: Callable[[str], None] = lambda _: None) -> None:
    """Runs a controller until SIGTERM, SIGINT or cancellation; `ready` gets its URL once it serves.

    Raises SettingsError, StoreCorrupt, StoreUnavailable.
    """
    set_up_logs()
    with _private_files(), _alone(settings):
        app = ControllerApp(settings)
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, ended.set)
        try:
            ready(await app.start())
            await ended.wait()
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)
            await app.stop()
