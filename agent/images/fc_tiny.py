"""The image `fc-tiny` for Firecracker: Debian's cloud kernel, an initramfs with its drivers, and the system of `tiny` on ext4.

A directory of `vmlinux`, `initrd` and `rootfs.ext4`. Needs no root and mounts nothing. The kernel finds its devices by ACPI, so
it needs Firecracker 1.8 or newer.
"""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path

from agent.images.files import sha256, sync, workspace
from agent.images.kernel import find_kernel, kernel_package, uncompressed
from agent.images.modules import Modules
from agent.images.packages import Progress, fetch, tool, unpack, versions, with_dependencies
from agent.images.recipe import BuiltImage, Recipe, check_architecture, now, read_sidecar, write_sidecar
from agent.images.tree import Tree
from agent.images.userland import add_system, add_userland, guest_file
from agent.run import run

VERSION = 1
NAME = "fc-tiny"
_FILES = ("vmlinux", "initrd", "rootfs.ext4")
_USERLAND = ("busybox-static", "dropbear-bin")
# virtio_pci: newer Firecrackers can attach devices to a PCI bus, and QEMU does.
_MODULES = ("virtio_mmio", "virtio_pci", "virtio_blk", "virtio_net", "virtio_rng", "crc32c_intel", "isofs")
_SIZE = "32M"
_POWER = "#!/bin/sh\nexec /etc/muster/restart\n"


async def make(image_dir: Path, cache: Path, docker: Sequence[str], progress: Progress) -> BuiltImage:
    """Builds `<image_dir>/fc-tiny/`. Raises AgentError, CommandFailed."""
    await check_architecture()
    archives = await fetch((await kernel_package(), *await with_dependencies(_USERLAND)), cache, progress)
    new, old, target = image_dir / f".{NAME}.new", image_dir / f".{NAME}.old", image_dir / NAME
    async with workspace(cache, NAME) as work:
        progress("unpacking packages")
        await unpack(archives[:1], work / "kernel")
        await unpack(archives[1:], work / "root")
        for left in (new, old):
            await asyncio.to_thread(shutil.rmtree, left, ignore_errors=True)
        new.mkdir()
        progress("making kernel and initramfs")
        kernel, modules = find_kernel(work / "kernel")
        await asyncio.to_thread(_write_boot_files, kernel, modules, work / "root", new)
        progress("making the root filesystem")
        await _make_rootfs(work, new / "rootfs.ext4")
        await asyncio.to_thread(_settle, new, old, target)
    built = BuiltImage(
        name=NAME,
        reference=NAME,
        format="firecracker",
        version=VERSION,
        digest=await asyncio.to_thread(_digest, target),
        size=sum((target / name).stat().st_size for name in _FILES),
        built_at=now(),
        packages=versions(archives),
        path=target,
    )
    write_sidecar(image_dir, built)
    progress(f"{NAME} is ready: {target}, {built.size / 1024 / 1024:.1f} MiB")
    return built


def _write_boot_files(kernel: Path, modules: Modules, root: Path, into: Path) -> None:
    (into / "vmlinux").write_bytes(uncompressed(kernel.read_bytes()))
    tree = Tree()
    tree.file("init", guest_file("init-rootfs"), 0o755)
    tree.file("bin/busybox", (root / "bin" / "busybox").read_bytes(), 0o755)
    for applet in ("sh", "mount", "insmod", "seq", "usleep", "switch_root", "echo"):
        tree.link(f"bin/{applet}", "busybox")
    names = modules.order(_MODULES)
    for name in names:
        tree.file(f"lib/modules/{name}.ko", modules.read(name))
    tree.file("etc/modules.early", "".join(f"/lib/modules/{name}.ko\n" for name in names))
    tree.char("dev/console", 0o600, 5, 1)
    for place in ("proc", "sys", "run", "newroot"):
        tree.dir(place)
    (into / "initrd").write_bytes(gzip.compress(tree.cpio(), 9, mtime=0))


async def _make_rootfs(work: Path, target: Path) -> None:
    tree = Tree()
    await add_userland(tree, work / "root", ("usr/sbin/dropbear", "usr/bin/dropbearkey"))
    add_system(tree)
    inittab = guest_file("inittab").replace("::ctrlaltdel:/bin/reboot", "::ctrlaltdel:/etc/muster/restart")
    tree.file("etc/inittab", inittab)
    tree.file("etc/muster/restart", guest_file("restart"), 0o755)
    for command in ("poweroff", "halt"):
        tree.file(f"bin/{command}", _POWER, 0o755)
    for stage in ("cdrom", "late"):
        tree.file(f"etc/modules.{stage}", "")
    for place in ("dev", "tmp"):
        tree.dir(place, 0o1777 if place == "tmp" else 0o755)
    content = work / "tree"
    await asyncio.to_thread(tree.unpack, content)
    mke2fs, debugfs = tool("mke2fs") or "mke2fs", tool("debugfs") or "debugfs"
    options = ("-q", "-F", "-t", "ext4", "-L", "root", "-b", "4096", "-i", "16384", "-m", "0", "-J", "size=4")
    await run(mke2fs, *options, "-E", "root_owner=0:0", "-d", content, target, _SIZE)
    # mke2fs takes over who owns the files; made without root they are its caller's.
    paths = [path for path, node in tree.sorted() if node.kind != "link"]
    owners = "".join(f'sif "/{path}" {field} 0\n' for path in paths for field in ("uid", "gid"))
    await run(debugfs, "-w", "-f", "-", target, stdin=owners)


def _settle(new: Path, old: Path, target: Path) -> None:
    """Puts the finished directory in the place of the one before. Between the two moves there is no image of the name."""
    for name in _FILES:
        (new / name).chmod(0o644)
        sync(new / name)
    sync(new)
    if target.exists():
        target.rename(old)
    new.rename(target)
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _digest(folder: Path) -> str:
    return hashlib.sha256("".join(f"{sha256(folder / name)}  {name}\n" for name in _FILES).encode()).hexdigest()


async def current(image_dir: Path, docker: Sequence[str]) -> BuiltImage | None:
    """The image if it is there, of this version and unchanged. `digest` is that of the files' sha256sum(1) listing."""
    folder = image_dir / NAME
    built = read_sidecar(image_dir, NAME, folder)
    if built is None or built.version != VERSION or not all((folder / name).is_file() for name in _FILES):
        return None
    return built if await asyncio.to_thread(_digest, folder) == built.digest else None


RECIPE = Recipe(
    name=NAME,
    summary="the system of tiny for Firecracker: a directory with kernel, initramfs and root filesystem",
    version=VERSION,
    file="",
    commands={
        "apt-get": "apt",
        "apt-cache": "apt",
        "dpkg-deb": "dpkg",
        "mke2fs": "e2fsprogs",
        "debugfs": "e2fsprogs",
    },
    uses_docker=False,
    make=make,
    current=current,
)
