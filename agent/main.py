"""Puts the agent together from its settings and runs it: the one place that knows which drivers there are."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import structlog

from agent import detect, zfs
from agent.app import make_app
from agent.engines.base import Engine
from agent.engines.bhyve import BhyveEngine
from agent.engines.docker import DockerEngine
from agent.engines.firecracker import FirecrackerEngine
from agent.engines.jail import JailEngine
from agent.engines.qemu import QemuEngine
from agent.errors import AgentError
from agent.handlers import Services
from agent.host import HostFacts
from agent.machine import Unusable
from agent.network import pick
from agent.network.base import NamesServed, Network
from agent.records import Records, RecordStore, io_error
from agent.runtime import Drivers, Runtime
from agent.settings import AgentSettings
from agent.storage.base import Storage
from agent.storage.file import FileStorage
from agent.storage.zvol import ZvolStorage
from agent.transfers import Transfers
from specs.logs import set_up_logs
from specs.names import Engine as EngineKind
from specs.names import Storage as StorageKind
from specs.serving import Access, Listen, Server

log = structlog.get_logger(__name__)


async def serve(settings: AgentSettings, *, ready: Callable[[str], None] = lambda _url: None) -> None:
    """Runs an agent until cancelled or told to end by SIGTERM or SIGINT; VMs keep running.

    `ready` is called with the base URL once requests are answered. Raises AgentError if it cannot start.
    """
    set_up_logs()
    agent = Agent(settings)
    await agent.start()
    try:
        ready(agent.url)
        await until_signalled()
    finally:
        await agent.stop()


class Agent:
    """One agent: `start`, then `url` answers, then `stop`.

    `drivers` replaces what the settings would choose, `records` the runtime folder; nothing is written to disk then.
    """

    def __init__(self, settings: AgentSettings, *, drivers: Drivers | None = None, records: Records | None = None) -> None:
        self._settings = settings
        self._drivers = drivers
        self._records = records
        self._open = contextlib.AsyncExitStack()
        self.url = ""

    @property
    def runtime(self) -> Runtime:
        """The VMs, once started."""
        return self._runtime

    async def start(self) -> None:
        """Checks everything, takes the runtime folder, begins to answer, re-adopts in the background. Raises AgentError."""
        try:
            await self._start()
        except BaseException:
            await self._open.aclose()
            raise

    async def stop(self) -> None:
        """Ends in the reverse order of `start`. With no VM left, nothing of the agent stays on the host's network."""
        await self._open.aclose()
        log.info("agent_stopped", url=self.url)

    async def _start(self) -> None:
        settings = self._settings
        key = settings.key()
        listen = Listen.parse(settings.listen)
        try:
            listen.check_access(has_key=key is not None, insecure=settings.insecure_no_auth)
        except ValueError as error:
            raise AgentError(str(error)) from None
        if self._records is None:
            for folder in (settings.data_dir, settings.images_at, settings.runtime_at):
                _make_folder(folder)
            self._open.enter_context(_alone(settings.runtime_at))
        host_id = settings.host_id or detect.host_id(settings.data_dir / "host-id")
        drivers = self._drivers or await _choose(settings)
        self._open.push_async_callback(_close, drivers)
        if isinstance(drivers.network, NamesServed):
            self._open.push_async_callback(drivers.network.close_names)
            await drivers.network.open_names()
        self._runtime = Runtime(
            host_id=host_id,
            store=self._records or RecordStore(settings.runtime_at),
            drivers=drivers,
            capacity=detect.capacity(
                cpu=settings.cpu_total,
                mem=settings.mem_total,
                disk=settings.disk_total,
                disk_found=(await drivers.storage.capacity_mib())[0],
            ),
            port_range=settings.ports,
            stop_grace=settings.stop_grace,
            resync=settings.resync,
        )
        facts = HostFacts(
            runtime=self._runtime,
            engines=drivers.engines,
            storage=drivers.storage.kind,
            network=drivers.network.name,
            labels=settings.labels,
        )
        self._open.push_async_callback(self._leave_network, drivers)
        transfers = Transfers(self._runtime, settings.runtime_at if self._records is None else None)
        server = Server.of(make_app(Services(self._runtime, facts, transfers), Access(key, listen.allowed_hosts())))
        self._open.push_async_callback(server.drain)
        self._open.push_async_callback(facts.close)
        self._open.push_async_callback(self._runtime.close)
        await self._runtime.start()
        await transfers.clear()
        try:
            server.open(listen)
        except OSError as error:
            raise AgentError(f"cannot listen on {settings.listen}: {error.strerror or error}") from error
        self._open.callback(server.stop)
        self.url = server.url
        log.info("agent_started", url=self.url, host_id=host_id, engines=self._runtime.usable, network=drivers.network.name)

    async def _leave_network(self, drivers: Drivers) -> None:
        if not self._runtime.is_empty:
            return
        try:
            await drivers.network.teardown()
        except Exception as error:
            log.warning("teardown_failed", network=drivers.network.name, why=str(error))


async def _choose(settings: AgentSettings) -> Drivers:
    """The drivers the settings ask for, each tried out. Raises AgentError with the reason if one that was named fails."""
    storage = await _choose_storage(settings)
    network = await pick(
        settings.network,
        bridge=settings.bridge,
        subnet=settings.subnet,
        forward_addrs=settings.forward_addrs,
    )
    every = _engines(settings, storage, network)
    wanted = settings.engines or tuple(every)
    missing = [kind for kind in wanted if kind not in every]
    if missing:
        raise AgentError(f"this agent has no driver for {', '.join(missing)}; it has {', '.join(every)}")
    engines = {kind: every[kind] for kind in wanted}
    refused: dict[EngineKind, str] = {}
    for kind, probe in zip(engines, await asyncio.gather(*(engine.probe() for engine in engines.values())), strict=True):
        if isinstance(probe, Unusable):
            refused[kind] = probe.why
            log.info("engine_unusable", engine=kind, why=probe.why)
        else:
            log.info("engine_usable", engine=kind, detail=probe.detail, warnings=probe.warnings)
    if refused and settings.engines:
        raise AgentError("; ".join(f"engine {kind} does not work here: {why}" for kind, why in refused.items()))
    return Drivers(engines, storage, network, refused)


async def _choose_storage(settings: AgentSettings) -> Storage:
    storage: Storage
    if settings.storage is StorageKind.ZVOL:
        storage = ZvolStorage(
            settings.images_at,
            await _dataset("--zfs-images", settings.zfs_images, settings.images_at),
            await _dataset("--zfs-runtime", settings.zfs_runtime, settings.runtime_at),
        )
    else:
        storage = FileStorage(settings.images_at, settings.runtime_at)
    probe = await storage.probe()
    if isinstance(probe, Unusable):
        raise AgentError(f"storage {settings.storage} does not work here: {probe.why}")
    return storage


async def _dataset(flag: str, given: str | None, folder: Path) -> str:
    """The dataset given, else the one mounted at the folder. Raises AgentError if there is neither."""
    dataset = given or await zfs.mounted_at(folder)
    if dataset is None:
        raise AgentError(f"storage zvol needs {flag} POOL/DATASET: no ZFS filesystem is mounted at {folder}")
    return dataset


def _engines(settings: AgentSettings, storage: Storage, network: Network) -> dict[EngineKind, Engine]:
    return {
        EngineKind.QEMU: QemuEngine(
            settings.runtime_at,
            storage.images,
            settings.accel,
            settings.data_dir.absolute() / "state",
            image_dir=settings.images_at,
        ),
        EngineKind.FIRECRACKER: FirecrackerEngine(
            settings.runtime_at,
            settings.images_at,
            storage.images,
            binary=settings.firecracker_bin,
            network=network.name,
        ),
        EngineKind.DOCKER: DockerEngine(settings.runtime_at, settings.docker),
        **_freebsd_engines(settings, storage),
    }


def _freebsd_engines(settings: AgentSettings, storage: Storage) -> dict[EngineKind, Engine]:
    if not sys.platform.startswith("freebsd"):
        return {}
    return {
        EngineKind.BHYVE: BhyveEngine(settings.runtime_at, storage.images),
        EngineKind.JAIL: JailEngine(settings.runtime_at, settings.images_at),
    }


async def _close(drivers: Drivers) -> None:
    for engine in drivers.engines.values():
        await engine.close()


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise io_error(f"making the folder {folder}", error) from error


@contextlib.contextmanager
def _alone(runtime_dir: Path) -> Iterator[None]:
    """Holds the runtime folder: two agents on one folder would start every VM twice. Raises AgentError if another has it."""
    path = runtime_dir / ".lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 20).decode(errors="replace").strip() or "unknown"
            raise AgentError(
                f"another agent (pid {holder}) runs on {runtime_dir}; give this one its own --runtime-dir"
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


async def until_signalled() -> None:
    """Returns on SIGTERM or SIGINT."""
    told = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told.set)
    try:
        await told.wait()
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
