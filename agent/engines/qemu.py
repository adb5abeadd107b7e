"""Virtual machines under QEMU, one process each. Called by the runtime, one call at a time per VM.

The VM's folder and the process table are the whole truth: nothing that matters is kept in memory, so that an agent started
anew answers the same. The end of a process is noticed through its pidfd, how it ended is read from what QEMU itself left.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import Awaitable, Callable
from datetime import timedelta
from pathlib import Path

import structlog

from agent import accel as acceleration
from agent import process
from agent.engines import qemu_qmp
from agent.engines.base import OnExit
from agent.engines.console import last_bytes
from agent.engines.processes import CONSOLE, CONSOLE_OLD, VmProcesses, check_link, finish
from agent.engines.qemu_argv import SEED, STDERR, qemu_argv
from agent.engines.qemu_folder import VmFolder, find_processes
from agent.errors import AgentError, Unsupported
from agent.machine import DiskKind, EngineState, Machine, Probe, Running, Unusable, Usable
from agent.process import ExitWatch, ProcessRecord
from agent.seed import check_user_data, write_seed
from specs.names import Engine as EngineKind
from specs.names import VmId
from specs.wire import CreateVmReq

log = structlog.get_logger(__name__)

MAX_CPUS = 255  # of the q35 machine without an interrupt-remapping unit
START_LIMIT = 30.0  # seconds until QEMU's monitor answers
QUIT_LIMIT = 5.0  # seconds from `quit` to the end of the process, which writes its caches out
# A guest that is still booting loses the button press, so it is pressed again.
POWER_BUTTON_EVERY = 3.0  # seconds
_LOOK_EVERY = 0.02  # seconds; for the monitor of a process that starts


class QemuEngine:
    """The qemu driver (see agent/engines/base.py for what each method promises)."""

    kind = EngineKind.QEMU
    needs_disk = True
    disk_kind: DiskKind = "any"

    def __init__(
        self,
        runtime_dir: Path,
        storage_images: Callable[[], Awaitable[tuple[str, ...]]],
        accel: acceleration.Wanted,
        state_dir: Path,
        binary: str = "qemu-system-x86_64",
        image_dir: Path | None = None,
    ) -> None:
        """`image_dir` is where the image that proves KVM may lie; `storage_images` names what disks can be cloned from."""
        self.on_exit: OnExit = lambda _: None
        self._runtime_dir = runtime_dir.resolve()
        self._storage_images = storage_images
        self._wanted = accel
        self._state_dir = state_dir
        self._binary = binary
        self._image_dir = image_dir
        self._choice: acceleration.Choice | None = None
        self._choosing = asyncio.Lock()
        self._processes = VmProcesses(VmFolder, lambda: find_processes(self._runtime_dir, binary), self._ended)

    async def probe(self) -> Probe:
        """Starts guests to find the accelerator that works. Unusable without QEMU or with a demanded KVM that does not run."""
        if shutil.which(self._binary) is None or shutil.which("qemu-img") is None:
            return Unusable("QEMU is not installed; apt-get install qemu-system-x86 qemu-utils")
        try:
            return Usable(detail=(await self._acceleration()).detail)
        except AgentError as error:
            return Unusable(error.message)

    async def images(self) -> tuple[str, ...]:
        """What the storage driver can clone."""
        return await self._storage_images()

    def check(self, request: CreateVmReq) -> tuple[str, ...]:
        """Everything asked for is honoured, up to the number of processors a machine can have and user data a guest knows."""
        if request.cpu > MAX_CPUS:
            raise Unsupported(f"cpu {request.cpu} is more than the {MAX_CPUS} processors a QEMU machine can have")
        check_user_data(request.user_data)
        return ()

    async def prepare(self, machine: Machine) -> None:
        """Writes the seed image. A running VM keeps the one it was booted with."""
        if await self._processes.live(machine.id, machine.folder) is None:
            await finish(asyncio.to_thread(write_seed, machine.folder / SEED, machine))

    async def start(self, machine: Machine) -> None:
        """Starts QEMU and returns once its monitor says the machine runs. Raises AgentError with QEMU's own complaint."""
        folder = VmFolder(machine.folder)
        if await self._processes.live(machine.id, machine.folder) is not None:
            folder.forget_asked()  # from here on it is meant to run, whatever an interrupted stop began
            return
        if not folder.is_prepared:
            raise AgentError(f"VM {machine.id} has no seed image in {machine.folder}: it was not prepared")
        check_link(machine)
        argv = qemu_argv(machine, (await self._acceleration()).accel, self._binary)

        def spawn() -> ProcessRecord:
            folder.forget_last_run()
            return process.spawn(argv, cwd=folder.path, log=folder.path / STDERR)

        await self._booted(machine, folder, await self._processes.launch(machine.id, folder, spawn))

    async def _booted(self, machine: Machine, folder: VmFolder, watch: ExitWatch) -> None:
        """Returns when QEMU's monitor answers: by then the machine is complete and its processors run."""
        said = ""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(START_LIMIT):
                while not await watch.wait(_LOOK_EVERY):
                    try:
                        await qemu_qmp.execute(folder.path, "query-status", limit=START_LIMIT)
                        return
                    except AgentError as error:  # its socket is not there yet, or does not listen yet, or it is about to end
                        said = error.message
        if not watch.gone.is_set():
            await watch.kill()
            raise AgentError(f"QEMU of VM {machine.id} was started but did not answer within {START_LIMIT:g} s: {said}")
        # A guest may power itself off before the monitor is asked; a QEMU that ended for another reason has not booted it.
        if folder.ending().reason == "crashed":
            raise AgentError(f"QEMU did not start VM {machine.id}: {folder.complaint() or folder.ending().message}")

    async def stop(self, machine: Machine, grace: timedelta) -> None:
        """Presses the power button, after `grace` makes QEMU quit, at last kills it. Raises AgentError if even that fails."""
        folder = VmFolder(machine.folder)
        watch = await self._processes.live(machine.id, machine.folder)
        folder.note_asked()
        if watch is None or await self._powers_down(folder, watch, grace.total_seconds()):
            return
        with contextlib.suppress(AgentError):
            await qemu_qmp.execute(folder.path, "quit", limit=QUIT_LIMIT)
            if await watch.wait(QUIT_LIMIT):
                return
        await watch.kill()

    async def _powers_down(self, folder: VmFolder, watch: ExitWatch, grace: float) -> bool:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + grace
        while (left := deadline - loop.time()) > 0:
            try:
                await qemu_qmp.execute(folder.path, "system_powerdown", limit=min(left, qemu_qmp.LIMIT))
            except AgentError:  # its monitor closes just before the process ends; or it hangs, and waiting is no use
                return await watch.wait(min(left, 1.0))
            if await watch.wait(min(POWER_BUTTON_EVERY, deadline - loop.time())):
                return True
        return watch.gone.is_set()

    async def destroy(self, vm_id: VmId, folder: Path) -> None:
        """Kills QEMU, also one whose record or folder is gone, and removes the driver's files."""
        watch = await self._processes.live(vm_id, folder)
        VmFolder(folder).note_asked()
        if watch is not None:
            await watch.kill()
        stray = (await self._processes.find()).get(vm_id)
        if stray is not None:
            await process.kill(stray)
        self._processes.forget(vm_id)
        VmFolder(folder).remove_files()

    async def state(self, vm_id: VmId, folder: Path) -> EngineState | None:
        """Asks the process table; a stopped VM's reason comes from what QEMU left in the folder."""
        watch = await self._processes.live(vm_id, folder)
        files = VmFolder(folder)
        if watch is not None:
            files.bound_console()
            return Running(watch.record.pid)
        return files.ending() if files.is_prepared else None

    async def console(self, vm_id: VmId, folder: Path, limit: int) -> bytes:
        """The end of the log in the folder, and before it that of the log moved aside."""
        return await asyncio.to_thread(last_bytes, limit, folder / CONSOLE, folder / CONSOLE_OLD)

    async def leftovers(self, known: frozenset[VmId]) -> tuple[str, ...]:
        """Kills QEMU processes of this runtime folder whose VM is not in `known`."""
        removed = []
        for vm_id, record in sorted((await self._processes.find()).items()):
            if vm_id not in known:
                await self.destroy(vm_id, self._runtime_dir / vm_id)
                removed.append(f"QEMU process {record.pid} of unknown VM {vm_id}")
        return tuple(removed)

    async def close(self) -> None:
        """Stops watching; the processes have sessions of their own and go on."""
        self._processes.close()

    def _ended(self, vm_id: VmId) -> None:
        self.on_exit(vm_id)  # asked for late: the runtime sets it after the driver was made

    async def _acceleration(self) -> acceleration.Choice:
        async with self._choosing:
            if self._choice is None:
                self._choice = await acceleration.choose(
                    self._wanted, binary=self._binary, image_dir=self._image_dir, state_dir=self._state_dir
                )
            return self._choice
