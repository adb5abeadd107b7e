"""Engines that run one process a VM: the files its identity is kept in, and the watches on those that live.

Called by the drivers of QEMU and Firecracker. The VM's folder and the process table are the whole truth, so that an agent
started anew answers the same. Knows nothing of any engine's arguments: how to find its processes is told by the driver.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TypeVar

import structlog

from agent import process
from agent.errors import AgentError
from agent.machine import Machine
from agent.process import ExitWatch, ProcessRecord, read_record, write_record
from specs.names import VmId

T = TypeVar("T")

log = structlog.get_logger(__name__)

PROCESS = "process.json"
ASKED = "asked-stop"
EXIT = "exit.json"
CONSOLE = "console.log"
CONSOLE_OLD = "console.log.1"
CONSOLE_MAX = 4 * 1024 * 1024  # bytes; the file before it is kept too


class ProcessFolder:
    """What is kept of a VM's process in the VM's folder. All methods block for the time of small file operations.

    process.json  the identity of the process that was started last
    asked-stop    the agent was told to end this VM; removed by the next start
    exit.json     {"status": int | null} of the last process, where an agent saw it end
    console.log   what the guest says, bounded; console.log.1 what it said before
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def record(self) -> ProcessRecord | None:
        """The process started last, if any. Raises AgentError on an unreadable record."""
        return read_record(self.path / PROCESS)

    def adopt(self, record: ProcessRecord) -> None:
        """Records a process that was found running."""
        with contextlib.suppress(FileNotFoundError):  # the folder was removed under a running VM
            write_record(self.path / PROCESS, record)

    @property
    def is_asked(self) -> bool:
        """Whether the agent was told to end this VM."""
        return (self.path / ASKED).exists()

    def note_asked(self) -> None:
        """Keeps that the agent ends this VM on request."""
        with contextlib.suppress(FileNotFoundError):
            (self.path / ASKED).touch()

    def forget_asked(self) -> None:
        """Takes back that the VM is to end."""
        (self.path / ASKED).unlink(missing_ok=True)

    def note_exit(self, status: int | None) -> None:
        """Keeps the exit status that only the first watcher is told."""
        if status is not None:
            with contextlib.suppress(OSError):  # a full disk must not keep anybody from hearing of the exit
                # Not synced to disk: this runs on the event loop, and a torn file only costs the message its signal name.
                (self.path / EXIT).write_text(json.dumps({"status": status}))

    def exit_status(self) -> int | None:
        """The exit status of the last process (negative: the signal that killed it), None if no agent saw it end."""
        try:
            return int(json.loads(self.read(EXIT))["status"])
        except (ValueError, KeyError, TypeError):
            return None

    def how_it_died(self, program: str) -> str:
        """The exit status in words."""
        status = self.exit_status()
        if status is None:
            return f"{program} ended while no agent watched"
        if status >= 0:
            return f"{program} ended with status {status}"
        try:
            return f"{program} was killed by {signal.Signals(-status).name}"
        except ValueError:
            return f"{program} was killed by signal {-status}"

    def bound_console(self) -> None:
        """Moves a console log that has grown too long aside: a chattering guest must not fill the host's disk."""
        console = self.path / CONSOLE
        with contextlib.suppress(FileNotFoundError):
            if console.stat().st_size > CONSOLE_MAX:
                shutil.copyfile(console, self.path / CONSOLE_OLD)
                os.truncate(console, 0)

    def read(self, name: str) -> str:
        """The text of one of the files, "" if it is not there."""
        try:
            return (self.path / name).read_text(errors="replace")
        except FileNotFoundError:
            return ""

    def remove(self, *names: str) -> None:
        """Removes files; those that are not there are fine."""
        for name in names:
            (self.path / name).unlink(missing_ok=True)


class VmProcesses:
    """The watches on the living processes of one engine, by VM id. Made on no particular loop, used on one."""

    def __init__(
        self,
        files: Callable[[Path], ProcessFolder],
        search: Callable[[], dict[VmId, ProcessRecord]],
        on_exit: Callable[[VmId], None],
    ) -> None:
        """`search` finds every process of this engine and runtime folder in the process table; it blocks for milliseconds."""
        self._files = files
        self._search = search
        self._on_exit = on_exit
        self._watches: dict[VmId, ExitWatch] = {}
        self._orphans: dict[VmId, ProcessRecord] | None = None
        self._searching = asyncio.Lock()

    async def live(self, vm_id: VmId, folder: Path) -> ExitWatch | None:
        """The watch on the VM's living process, adopting one that an earlier agent started; None if none lives."""
        watch = self._watches.get(vm_id)
        if watch is not None:
            if process.alive(watch.record):
                return watch
            await watch.gone.wait()  # dead already: the kernel has told, the loop has yet to hear it
        files = self._files(folder)
        try:
            record = files.record()
        except AgentError as error:
            # Every process of ours names its VM in its arguments, so the process table tells what the file cannot.
            log.warning("process_record_unreadable", vm_id=vm_id, why=error.message)
            record = (await self.find()).get(vm_id)
        if record is None or not process.alive(record):
            record = await self._orphan(vm_id)
            if record is None:
                return None
            files.adopt(record)
        return self.watch(vm_id, files, record)

    async def find(self) -> dict[VmId, ProcessRecord]:
        """Every process of this engine and runtime folder that runs now."""
        return await asyncio.to_thread(self._search)

    def watch(self, vm_id: VmId, files: ProcessFolder, record: ProcessRecord) -> ExitWatch:
        """Watches a process: its exit is noted in its folder, then told."""

        def ended(status: int | None) -> None:
            files.note_exit(status)
            self._on_exit(vm_id)

        self.forget(vm_id)
        watch = self._watches[vm_id] = ExitWatch(record, ended)
        return watch

    async def launch(self, vm_id: VmId, files: ProcessFolder, spawn: Callable[[], ProcessRecord]) -> ExitWatch:
        """Starts a process in a thread, records and watches it.

        Not to be cut off between the process and its record: a running VM nobody knows would hold the disk.
        """

        def blocking() -> ProcessRecord:
            record = spawn()
            files.adopt(record)
            return record

        async def launched() -> ExitWatch:
            return self.watch(vm_id, files, await asyncio.to_thread(blocking))

        return await finish(launched())

    def forget(self, vm_id: VmId) -> None:
        """Stops watching a VM."""
        watch = self._watches.pop(vm_id, None)
        if watch is not None:
            watch.close()

    def close(self) -> None:
        """Stops watching all; the processes have sessions of their own and go on."""
        for vm_id in list(self._watches):
            self.forget(vm_id)

    async def _orphan(self, vm_id: VmId) -> ProcessRecord | None:
        """A process whose record was never written because its agent was killed right then. Looked for once per agent."""
        async with self._searching:
            if self._orphans is None:
                self._orphans = await self.find()
        record = self._orphans.pop(vm_id, None)
        return record if record is not None and process.alive(record) else None


def check_link(machine: Machine) -> None:
    """Raises AgentError where the tap is missing: a VMM as root would make one, on no bridge and behind no rule."""
    if machine.nic.kind == "tap":
        try:
            socket.if_nametoindex(machine.nic.link)
        except OSError:
            raise AgentError(f"there is no network device {machine.nic.link} for VM {machine.id}") from None


async def finish(work: Coroutine[object, object, T]) -> T:
    """Carries a step through even if the caller is cancelled meanwhile, and only then lets the cancellation go on."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise
