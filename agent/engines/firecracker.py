"""Micro virtual machines under Firecracker, one jailed process each. Called by the runtime, one call at a time per VM.

A VM is started with its whole configuration in one file, so there is no half-configured Firecracker to find after a crash; the
API tells whether it runs and carries Ctrl-Alt-Del. The VM's folder and the process table are the whole truth.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from datetime import timedelta
from pathlib import Path

from agent import process
from agent.engines import firecracker_api as api
from agent.engines import firecracker_jail as jails
from agent.engines import firecracker_probe
from agent.engines.base import OnExit
from agent.engines.console import last_bytes
from agent.engines.firecracker_config import API, DISK, INITRD, KERNEL, SEED, vm_config
from agent.engines.firecracker_folder import VmFolder, find_processes
from agent.engines.firecracker_jail import Jail
from agent.engines.processes import CONSOLE, CONSOLE_OLD, VmProcesses, check_link, finish
from agent.errors import AgentError, ImageMissing, Unsupported
from agent.images.catalogue import find_image, image_part
from agent.machine import DiskKind, EngineState, Machine, Probe, Running
from agent.process import ExitWatch, ProcessRecord
from agent.seed import check_user_data, write_seed
from specs.names import Engine as EngineKind
from specs.names import VmId
from specs.wire import CreateVmReq

MAX_CPUS = 32  # of a microVM (Firecracker's API, machine-config)
START_LIMIT = 30.0  # seconds until the API says that the microVM runs
# A Firecracker asked while it still reads its configuration dies of the question, should that be wrong, and names no cause.
API_PATIENCE = 3.0  # seconds without its word that it has started, after which it is asked all the same
# A guest that is still booting loses the keys, so they are pressed again.
KEYS_EVERY = 3.0  # seconds
_LOOK_EVERY = 0.02  # seconds; for the API of a process that starts


class FirecrackerEngine:
    """The firecracker driver (see agent/engines/base.py for what each method promises)."""

    kind = EngineKind.FIRECRACKER
    needs_disk = True
    disk_kind: DiskKind = "rootfs"

    def __init__(
        self,
        runtime_dir: Path,
        image_dir: Path,
        storage_images: Callable[[DiskKind], Awaitable[tuple[str, ...]]],
        *,
        binary: str = "firecracker",
        network: str = "bridge",
    ) -> None:
        """`storage_images` names what root filesystems can be cloned from; kernels are taken from `image_dir`."""
        self.on_exit: OnExit = lambda _: None
        self._runtime_dir = runtime_dir.resolve()
        self._image_dir = image_dir
        self._storage_images = storage_images
        self._binary = binary
        self._network = network
        self._processes = VmProcesses(VmFolder, lambda: find_processes(self._runtime_dir), self._ended)

    async def probe(self) -> Probe:
        """Starts a guest of seven bytes in a jail."""
        return await firecracker_probe.probe(self._binary, self._runtime_dir, self._network)

    async def images(self) -> tuple[str, ...]:
        """The images with a kernel and a root filesystem."""
        return await self._storage_images(self.disk_kind)

    def check(self, request: CreateVmReq) -> tuple[str, ...]:
        """Everything asked for is honoured, up to the number of processors a microVM has and user data a guest knows."""
        if request.cpu > MAX_CPUS:
            raise Unsupported(f"cpu {request.cpu} is more than the {MAX_CPUS} processors a Firecracker microVM can have")
        check_user_data(request.user_data)
        return ()

    async def prepare(self, machine: Machine) -> None:
        """Keeps the image's kernel, writes the seed image. A running VM keeps what it was booted with."""
        if await self._processes.live(machine.id, machine.folder) is None:
            await finish(asyncio.to_thread(self._prepare, machine))

    def _prepare(self, machine: Machine) -> None:
        if not (machine.folder / KERNEL).exists():
            self._keep_kernel(machine)
        write_seed(machine.folder / SEED, machine)

    def _keep_kernel(self, machine: Machine) -> None:
        """Links the kernel into the VM's folder: built anew, it must not change under a disk made from the old image."""
        name = machine.request.image
        image = find_image(self._image_dir, name)
        kernel = image_part(self._image_dir, image, KERNEL) if image is not None and image.format == "firecracker" else None
        if image is None or kernel is None:
            raise ImageMissing(
                f"image {name} is not in {self._image_dir} with vmlinux and rootfs.ext4; put it there or build it"
            )
        try:
            initrd = image_part(self._image_dir, image, INITRD)
            if initrd is not None:
                jails.keep(initrd, machine.folder / INITRD)
            jails.keep(kernel, machine.folder / KERNEL)
        except OSError as error:
            raise AgentError(f"the kernel of image {name} cannot be kept in {machine.folder}: {error}") from error

    async def start(self, machine: Machine) -> None:
        """Starts Firecracker and returns once it says the microVM runs. Raises AgentError with its own complaint."""
        folder = VmFolder(machine.folder)
        if await self._processes.live(machine.id, machine.folder) is not None:
            folder.forget_asked()  # from here on it is meant to run, whatever an interrupted stop began
            return
        if not folder.is_prepared:
            raise AgentError(f"VM {machine.id} has no seed image in {machine.folder}: it was not prepared")
        if machine.disk is None or machine.disk.format != "raw":
            raise AgentError(f"VM {machine.id} has no raw disk, so Firecracker cannot boot it")
        if machine.nic.kind != "tap":
            raise AgentError(f"Firecracker cannot join the network of VM {machine.id}: it needs a tap, on --network bridge")
        check_link(machine)
        binaries = await asyncio.to_thread(jails.find_binaries, self._binary)
        watch = await self._processes.launch(machine.id, folder, lambda: self._spawn(machine, folder, binaries))
        await self._booted(machine, folder, watch)

    def _spawn(self, machine: Machine, folder: VmFolder, binaries: jails.Binaries) -> ProcessRecord:
        uid = jails.uid_of(machine, self._runtime_dir)
        jail = self._jail(machine.id, machine.folder)
        files = {KERNEL: machine.folder / KERNEL, SEED: machine.folder / SEED}
        has_initrd = (machine.folder / INITRD).exists()
        if has_initrd:
            files[INITRD] = machine.folder / INITRD
        if machine.disk is not None:
            files[DISK] = machine.disk.path
        folder.forget_last_run()
        name = jails.config_name(machine.id)
        jail.build(binaries, uid, files, (name, vm_config(machine, has_initrd=has_initrd)))
        jails.own_tap(machine.nic.link, uid)
        words = ("--api-sock", f"/{API}", "--config-file", f"/{name}", "--level", "Info")
        argv = jail.argv(binaries, uid, memory=machine.request.mem, arguments=words)
        return process.spawn(argv, cwd=machine.folder, log=machine.folder / CONSOLE)

    async def _booted(self, machine: Machine, folder: VmFolder, watch: ExitWatch) -> None:
        """Returns when the API says that the microVM runs."""
        said = ""
        jail = self._jail(machine.id, machine.folder)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(START_LIMIT):
                asked_after = asyncio.get_running_loop().time() + API_PATIENCE
                while not await watch.wait(_LOOK_EVERY):
                    if not folder.says_started() and asyncio.get_running_loop().time() < asked_after:
                        continue
                    try:
                        said = str((await api.get(jail.root(), "/")).get("state"))
                        if said in ("Running", "Paused"):
                            return
                    except AgentError as error:  # its socket is not there yet, or does not listen yet, or it is about to end
                        said = error.message
        if not watch.gone.is_set():
            await watch.kill()
            raise AgentError(f"Firecracker of VM {machine.id} did not say within {START_LIMIT:g} s that it runs: {said}")
        # A guest may end as soon as it is up; a Firecracker that ended for another reason has not booted it.
        if folder.ending().reason == "crashed":
            raise AgentError(f"Firecracker did not start VM {machine.id}: {folder.complaint() or folder.ending().message}")

    async def stop(self, machine: Machine, grace: timedelta) -> None:
        """Presses Ctrl-Alt-Del, after `grace` kills Firecracker. Raises AgentError if even that fails."""
        folder = VmFolder(machine.folder)
        watch = await self._processes.live(machine.id, machine.folder)
        folder.note_asked()
        if watch is not None and not await self._powers_down(machine, watch, grace.total_seconds()):
            # Nothing is lost by it that the guest had synced: the files' cache is the host's.
            await watch.kill()
        await jails.remove_cgroup(self._jail(machine.id, machine.folder).cgroup())

    async def _powers_down(self, machine: Machine, watch: ExitWatch, grace: float) -> bool:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + grace
        root = self._jail(machine.id, machine.folder).root()
        while (left := deadline - loop.time()) > 0:
            try:
                await api.act(root, "SendCtrlAltDel", limit=min(left, api.LIMIT))
            except AgentError:  # its socket closes just before the process ends; or it hangs, and waiting is no use
                return await watch.wait(min(left, 1.0))
            if await watch.wait(min(KEYS_EVERY, deadline - loop.time())):
                return True
        return watch.gone.is_set()

    async def destroy(self, vm_id: VmId, folder: Path) -> None:
        """Kills Firecracker, also one whose record or folder is gone, and removes the jail and the driver's files."""
        watch = await self._processes.live(vm_id, folder)
        files = VmFolder(folder)
        files.note_asked()
        if watch is not None:
            await watch.kill()
        stray = (await self._processes.find()).get(vm_id)
        if stray is not None:
            await process.kill(stray)
        self._processes.forget(vm_id)
        jail = self._jail(vm_id, folder)
        await jails.remove_cgroup(jail.cgroup())
        await asyncio.to_thread(jail.remove)
        files.remove_files()

    async def state(self, vm_id: VmId, folder: Path) -> EngineState | None:
        """Asks the process table: what lives was started with its whole configuration, so it runs or is about to end."""
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
        """Kills Firecrackers of this runtime folder whose VM is not in `known`, and removes control groups of such VMs."""
        removed = []
        for vm_id, record in sorted((await self._processes.find()).items()):
            if vm_id not in known:
                await self.destroy(vm_id, self._runtime_dir / vm_id)
                removed.append(f"Firecracker process {record.pid} of unknown VM {vm_id}")
        for group in await asyncio.to_thread(jails.stray_cgroups, self._runtime_dir, known):
            await jails.remove_cgroup(group)
            removed.append(f"control group {group}")
        return tuple(removed)

    async def close(self) -> None:
        """Stops watching; the processes have sessions of their own and go on."""
        self._processes.close()
        await asyncio.to_thread(jails.remove_parent_cgroup)

    def _jail(self, vm_id: VmId, folder: Path) -> Jail:
        return Jail(folder, jails.jail_id(self._runtime_dir, vm_id))

    def _ended(self, vm_id: VmId) -> None:
        self.on_exit(vm_id)  # asked for late: the runtime sets it after the driver was made
