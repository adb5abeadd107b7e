"""What the engines with a keeper process (bhyve, jail) have in common: start, stop, adopt, and how the end of a VM is read.

The VM's folder and the process table are the whole truth. A VM lives as long as its keeper (keeper.py) or its main command
does: a keeper killed from outside leaves the guest running, and a second start would write to the same disk.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Coroutine
from dataclasses import replace
from datetime import timedelta
from hashlib import sha256
from pathlib import Path
from typing import TypeVar

import psutil
import structlog

from agent import process
from agent.engines.base import OnExit
from agent.engines.console import last_bytes
from agent.engines.keeper import ASKED, CONSOLE, CONSOLE_OLD, EXIT, MAIN, NOT_STARTED, PLAN, Plan
from agent.errors import AgentError
from agent.machine import EngineState, Machine, Running, Stopped, short_hash
from agent.process import ExitWatch, ProcessRecord, boot_id, identify
from specs.names import VmId

_T = TypeVar("_T")
log = structlog.get_logger(__name__)

PROCESS, KEEPER_LOG = "process.json", "keeper.log"
_MODULE = "agent.engines.keeper"
START_LIMIT = 60.0  # seconds until the main command runs; a loader reads a kernel first
SETTLE_LIMIT = 20.0  # seconds from the end of the main command to the end of its keeper, which cleans up
FORCE_LIMIT = 5.0  # seconds from a forced end to that of the processes
# A guest that is still booting loses the request, so it is repeated.
ASK_EVERY = 3.0  # seconds
_LOOK_EVERY = 0.02  # seconds; for what another process will bring about
_TAIL = 500  # characters of the console shown to people


class KeptFolder:
    """One VM's folder as engines and keepers use it. All methods block for the time of small file operations."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def main(self) -> ProcessRecord | None:
        """The main command if it runs."""
        record = process.read_record(self.path / MAIN)
        return record if record is not None and process.alive(record) else None

    def forget_last_run(self) -> None:
        """Clears what is known of the last end, before a new start: an old note must never explain a new end."""
        for name in (PROCESS, MAIN, ASKED, EXIT, KEEPER_LOG):
            (self.path / name).unlink(missing_ok=True)

    def note_asked(self) -> None:
        """Keeps that the agent ends this VM on request."""
        with contextlib.suppress(FileNotFoundError):
            (self.path / ASKED).touch()

    def remove_files(self) -> None:
        """Removes everything that is kept here for the keeper, and what it keeps."""
        for name in (PLAN, PROCESS, MAIN, ASKED, EXIT, KEEPER_LOG, CONSOLE, CONSOLE_OLD):
            (self.path / name).unlink(missing_ok=True)
            (self.path / f".{name}.new").unlink(missing_ok=True)

    def exit(self) -> tuple[int, str] | None:
        """How the main command ended: its status and "", or those of the command that failed before it and its name.

        None where no keeper was left to tell.
        """
        try:
            value = json.loads((self.path / EXIT).read_text())
            return int(value["status"]), str(value["failed"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def complaint(self) -> str:
        """The last words on the console, or of a keeper that failed itself."""
        for name in (KEEPER_LOG, CONSOLE):
            with contextlib.suppress(OSError):
                text = (self.path / name).read_text(errors="replace").strip()
                if text:
                    return text[-_TAIL:]
        return ""


def host_name(runtime_dir: Path, vm_id: VmId) -> str:
    """The VM's name in the kernel: letters and digits alone, different for every agent on the host."""
    return f"{host_prefix(runtime_dir)}{short_hash(vm_id)}"


def host_prefix(runtime_dir: Path) -> str:
    """How the names of all VMs of one runtime folder begin."""
    return "m" + sha256(str(runtime_dir).encode()).hexdigest()[:8] + "x"


class KeptEngine(abc.ABC):
    """The common part of the drivers; see agent/engines/base.py for what each method promises."""

    def __init__(self, runtime_dir: Path) -> None:
        self.on_exit: OnExit = lambda _: None
        self._runtime_dir = runtime_dir.resolve()
        self._watches: dict[VmId, ExitWatch] = {}
        self._found: dict[VmId, ProcessRecord] | None = None
        self._finding = asyncio.Lock()

    @abc.abstractmethod
    def _is_prepared(self, folder: Path) -> bool:
        """Whether `prepare` has finished."""

    @abc.abstractmethod
    def _is_up(self, machine: Machine) -> bool:
        """Whether the main command, which runs, has got as far as to run the guest."""

    @abc.abstractmethod
    def _plan(self, machine: Machine) -> Plan:
        """What the keeper is to do. Raises AgentError."""

    @abc.abstractmethod
    async def _force_off(self, vm_id: VmId, folder: Path) -> None:
        """Ends the guest at once, by the engine's own means."""

    @abc.abstractmethod
    async def _free(self, vm_id: VmId, folder: Path) -> None:
        """Removes what a VM without any process may still hold on the host; nothing there is fine."""

    @abc.abstractmethod
    def _ending(self, status: int, said: str) -> Stopped:
        """What an exit status of the main command means; `said` is ": " and the last words on the console, or ""."""

    @abc.abstractmethod
    async def _strays(self) -> dict[str, VmId | None]:
        """What is on the host under names of this runtime folder: the name, and the VM if the name tells it."""

    @abc.abstractmethod
    async def _remove_stray(self, name: str) -> None:
        """Removes one of `_strays`."""

    def name_of(self, vm_id: VmId) -> str:
        """The VM's name in the kernel."""
        return host_name(self._runtime_dir, vm_id)

    async def start(self, machine: Machine) -> None:
        """Starts a keeper and returns once the main command runs. Raises AgentError with the last words on the console."""
        folder = KeptFolder(machine.folder)
        if await self._live(machine.id, machine.folder) is not None:
            (machine.folder / ASKED).unlink(missing_ok=True)  # from here on it is meant to run
            return
        if not self._is_prepared(machine.folder):
            raise AgentError(f"VM {machine.id} was not prepared in {machine.folder}")
        plan = replace(self._plan(machine), is_first=not (machine.folder / PLAN).exists())
        # Not to be cut off between the process and its record: a running VM nobody knows would hold the disk.
        await uncut(self._launch(machine.id, folder, plan))
        await self._booted(machine, folder, self._watches[machine.id])

    async def _launch(self, vm_id: VmId, folder: KeptFolder, plan: Plan) -> None:
        def blocking() -> ProcessRecord:
            folder.forget_last_run()
            (folder.path / PLAN).write_text(plan.to_json())
            argv = [sys.executable, "-P", "-m", _MODULE, str(folder.path)]
            record = process.spawn(argv, cwd=folder.path, log=folder.path / KEEPER_LOG)
            process.write_record(folder.path / PROCESS, record)
            return record

        self._watch(vm_id, await asyncio.to_thread(blocking))

    async def _booted(self, machine: Machine, folder: KeptFolder, watch: ExitWatch) -> None:
        deadline = asyncio.get_running_loop().time() + START_LIMIT
        while not await watch.wait(_LOOK_EVERY):
            if folder.main() is not None and self._is_up(machine):
                return
            if asyncio.get_running_loop().time() > deadline:
                break
        if not watch.gone.is_set():
            await self._kill(machine.id, machine.folder, watch)
            await self._free(machine.id, machine.folder)
            raise AgentError(f"VM {machine.id} was started but its main command did not run within {START_LIMIT:g} s")
        # A guest may power itself off before anybody looks; one that ended for another reason has not booted.
        ending = self._how_it_ended(folder)
        if ending.reason == "crashed":
            raise AgentError(f"VM {machine.id} did not start: {ending.message}")

    async def stop(self, machine: Machine, grace: timedelta) -> None:
        """SIGTERM to the main command, again and again until `grace` is over, then by force."""
        folder = KeptFolder(machine.folder)
        watch = await self._live(machine.id, machine.folder)
        folder.note_asked()
        if watch is None:
            return
        deadline = asyncio.get_running_loop().time() + grace.total_seconds()
        while (left := deadline - asyncio.get_running_loop().time()) > 0:
            main = folder.main()
            if main is not None:
                process.send_signal(main, signal.SIGTERM)
            if await watch.wait(min(ASK_EVERY, left)):
                break
        if not watch.gone.is_set():
            await self._force_off(machine.id, machine.folder)
            if not await watch.wait(FORCE_LIMIT):
                await self._kill(machine.id, machine.folder, watch)
        if folder.exit() is None:
            await self._free(machine.id, machine.folder)

    async def destroy(self, vm_id: VmId, folder: Path) -> None:
        """Kills whatever runs of the VM, also where its record or folder is gone, and removes the driver's files."""
        KeptFolder(folder).note_asked()
        watch = await self._live(vm_id, folder)
        if watch is not None:
            await self._kill(vm_id, folder, watch)
        stray = (await self._find()).get(vm_id)
        if stray is not None:
            await self._kill(vm_id, folder, self._watch(vm_id, stray))
        self._forget(vm_id)
        await self._free(vm_id, folder)
        KeptFolder(folder).remove_files()

    async def _kill(self, vm_id: VmId, folder: Path, watch: ExitWatch) -> None:
        """Ends main command and keeper; the keeper gets the time to clean up after it."""
        main = KeptFolder(folder).main()
        if main is not None:
            process.send_signal(main, signal.SIGKILL)
            await watch.wait(SETTLE_LIMIT)
        if not watch.gone.is_set():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if process.alive(watch.record):
                    os.killpg(watch.record.pid, signal.SIGKILL)  # with a loader or a cleaning command it waits for
            await watch.kill()
        main = KeptFolder(folder).main()
        if main is not None:
            await process.kill(main)

    async def state(self, vm_id: VmId, folder: Path) -> EngineState | None:
        """Asks the process table; how a stopped VM ended comes from its keeper."""
        watch = await self._live(vm_id, folder)
        files = KeptFolder(folder)
        if watch is not None and not await self._settles(files, watch):
            main = files.main()
            return Running(main.pid if main is not None else watch.record.pid)
        if not self._is_prepared(folder):
            return None
        if (folder / PROCESS).exists() and files.exit() is None and not (folder / ASKED).exists():
            await self._free(vm_id, folder)  # its keeper did not live to do it: the guest's memory would stay taken
        return self._how_it_ended(files)

    async def _settles(self, folder: KeptFolder, watch: ExitWatch) -> bool:
        """Whether the VM has ended; a keeper without a main command is about to end, or to start it again after a reboot."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FORCE_LIMIT):
                while folder.main() is None:
                    if await watch.wait(_LOOK_EVERY):
                        return True
        return watch.gone.is_set()

    def _how_it_ended(self, folder: KeptFolder) -> Stopped:
        record = process.read_record(folder.path / PROCESS)
        if record is None or (folder.path / ASKED).exists():
            return Stopped()
        said = f": {complaint}" if (complaint := folder.complaint()) else ""
        ended = folder.exit()
        if ended is not None:
            status, failed = ended
            return Stopped("crashed", f"{failed} {ended_with(status)}{said}") if failed else self._ending(status, said)
        if record.boot != boot_id():
            return Stopped("crashed", "the host was restarted while the VM ran")
        return Stopped("crashed", f"its keeper process was killed{said}")

    async def console(self, vm_id: VmId, folder: Path, limit: int) -> bytes:
        """The end of the log in the folder, and before it that of the log moved aside."""
        return await asyncio.to_thread(last_bytes, limit, folder / CONSOLE, folder / CONSOLE_OLD)

    async def leftovers(self, known: frozenset[VmId]) -> tuple[str, ...]:
        """Ends VMs of this runtime folder that are not in `known`: by their processes, then by what else the kernel holds."""
        removed = []
        for vm_id in sorted(set(await self._find()) - known):
            await self.destroy(vm_id, self._runtime_dir / vm_id)
            removed.append(f"process of unknown VM {vm_id}")
        names = {self.name_of(vm_id) for vm_id in known}
        for name, owner in sorted((await self._strays()).items()):
            if name not in names:
                await self._remove_stray(name)
                removed.append(f"{name} of unknown VM {owner or '(its folder is gone)'}")
        return tuple(removed)

    async def close(self) -> None:
        """Stops watching; the keepers have sessions of their own and go on."""
        for vm_id in list(self._watches):
            self._forget(vm_id)

    async def _live(self, vm_id: VmId, folder: Path) -> ExitWatch | None:
        """The watch on the VM's living keeper, or on its main command where that alone lives; None if neither does."""
        watch = self._watches.get(vm_id)
        if watch is not None:
            if process.alive(watch.record):
                return watch
            await watch.gone.wait()  # dead already: the kernel has told, the loop has yet to hear it
        try:
            record = process.read_record(folder / PROCESS)
        except AgentError as error:
            # Every keeper names its folder in its arguments, so the process table tells what the file cannot.
            log.warning("process_record_unreadable", vm_id=vm_id, why=error.message)
            record = (await self._find()).get(vm_id)
        if record is None or not process.alive(record):
            record = await self._orphan(vm_id) or await asyncio.to_thread(KeptFolder(folder).main)
            if record is None:
                return None
            if record != process.read_record(folder / MAIN):
                with contextlib.suppress(FileNotFoundError):
                    process.write_record(folder / PROCESS, record)
        return self._watch(vm_id, record)

    async def _orphan(self, vm_id: VmId) -> ProcessRecord | None:
        """A keeper whose record was never written because its agent was killed right then. Looked for once per agent."""
        async with self._finding:
            if self._found is None:
                self._found = await self._find()
        record = self._found.pop(vm_id, None)
        return record if record is not None and process.alive(record) else None

    async def _find(self) -> dict[VmId, ProcessRecord]:
        return await asyncio.to_thread(_find_keepers, self._runtime_dir)

    def _watch(self, vm_id: VmId, record: ProcessRecord) -> ExitWatch:
        self._forget(vm_id)
        watch = self._watches[vm_id] = ExitWatch(record, lambda _: self.on_exit(vm_id))
        return watch

    def _forget(self, vm_id: VmId) -> None:
        watch = self._watches.pop(vm_id, None)
        if watch is not None:
            watch.close()


def _find_keepers(runtime_dir: Path) -> dict[VmId, ProcessRecord]:
    """Every keeper of this runtime folder, known by the folder in its command line, also where that folder is gone."""
    found: dict[VmId, ProcessRecord] = {}
    for running in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = running.cmdline()
            if words[-2:-1] == [_MODULE] and Path(words[-1]).parent == runtime_dir:
                record = identify(running.pid)
                if record is not None:
                    found[VmId(Path(words[-1]).name)] = record
    return found


def ended_with(status: int) -> str:
    """An exit status in words: `ended with status 4`, `was killed by SIGKILL`, `could not be started`."""
    if status == NOT_STARTED:
        return "could not be started"
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"


def installed(*commands: str) -> str:
    """Which of these commands are missing on PATH, as text for people; "" if none is."""
    return ", ".join(name for name in commands if shutil.which(name) is None)


async def uncut(work: Coroutine[object, object, _T]) -> _T:
    """Carries a step through even if the caller is cancelled meanwhile, and only then lets the cancellation go on."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise
