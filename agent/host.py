"""What this host has to offer: capacity, engines, images. Called by the handlers; never waits long for a slow driver."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

import structlog

from agent.engines.base import Engine
from agent.runtime import Runtime
from specs.names import Engine as EngineKind
from specs.names import Storage as StorageKind
from specs.wire import AgentInfo

log = structlog.get_logger(__name__)

_FRESH = 2.0  # seconds a list of images is taken as it is
_PATIENCE = 2.0  # seconds an answer waits for a fresh list; then the last one is told


def product_version() -> str:
    """The installed version, "" when run from a tree that is not installed."""
    try:
        return version("muster")
    except PackageNotFoundError:
        return ""


class _Images:
    """The images of one engine, asked for again when they are no longer fresh and somebody wants to know."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._known: tuple[str, ...] = ()
        self._at = -_FRESH
        self._asking: asyncio.Task[None] | None = None

    async def get(self) -> tuple[str, ...]:
        """The images, the last known ones if the engine is slow or fails."""
        if time.monotonic() - self._at >= _FRESH:
            if self._asking is None or self._asking.done():
                self._asking = asyncio.create_task(self._ask(), name=f"images {self._engine.kind}")
            await asyncio.wait([self._asking], timeout=_PATIENCE)
        return self._known

    async def close(self) -> None:
        """Ends a question under way."""
        if self._asking is not None and not self._asking.done():
            self._asking.cancel()
            await asyncio.wait([self._asking])

    async def _ask(self) -> None:
        try:
            self._known = await self._engine.images()
        except Exception as error:
            log.warning("images_unknown", engine=self._engine.kind, why=str(error))
        self._at = time.monotonic()


class HostFacts:
    """Answers GET /api/info."""

    def __init__(
        self,
        *,
        runtime: Runtime,
        engines: Mapping[EngineKind, Engine],
        storage: StorageKind,
        network: str,
        labels: Mapping[str, str],
    ) -> None:
        self._runtime = runtime
        self._images = {kind: _Images(engine) for kind, engine in engines.items()}
        self._storage = storage
        self._network = network
        self._labels = dict(labels)
        self._version = product_version()

    async def info(self) -> AgentInfo:
        """The host now."""
        usable = self._runtime.usable
        lists = await asyncio.gather(*(self._images[kind].get() for kind in usable))
        by_engine = {str(kind): images for kind, images in zip(usable, lists, strict=True)}
        return AgentInfo(
            host_id=self._runtime.host_id,
            resource=self._runtime.resource(),
            engines=usable,
            storage=self._storage,
            images=tuple(sorted({image for images in lists for image in images})),
            version=self._version,
            boot_id=self._runtime.watch.boot_id,
            network=self._network,
            labels=self._labels,
            images_by_engine=by_engine,
        )

    async def close(self) -> None:
        """Ends what is under way."""
        for images in self._images.values():
            await images.close()
