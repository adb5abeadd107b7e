"""The image `tiny`: a bootable disk of Debian's cloud kernel, busybox and dropbear. Needs no root and mounts nothing.

Partition 1 (FAT16, syslinux) holds the kernel and an initramfs with the whole system. At first boot the guest makes
partition 2 of the rest of the disk and copies the system there, so what is written in the guest stays and has all of its room.
"""

from __future__ import annotations

import asyncio
import gzip
import struct
from collections.abc import Sequence
from pathlib import Path

from agent.errors import AgentError
from agent.images.files import replacing, sha256, workspace
from agent.images.kernel import find_kernel, kernel_package
from agent.images.modules import Modules
from agent.images.packages import Progress, fetch, find, tool, unpack, versions, with_dependencies
from agent.images.recipe import BuiltImage, Recipe, check_architecture, current_file, now, write_sidecar
from agent.images.tree import Tree
from agent.images.userland import add_system, add_userland, guest_file
from agent.run import run

VERSION = 1
_USERLAND = ("busybox-static", "dropbear-bin", "e2fsprogs")
_BOOT_TOOLS = ("mtools", "syslinux", "syslinux-common")

_SECTOR = 512
_MIB = 1024 * 1024 // _SECTOR  # sectors
_BOOT_START = 1 * _MIB
_BOOT_SECTORS = 24 * _MIB
_ROOT_START = _BOOT_START + _BOOT_SECTORS
_DISK_SECTORS = 64 * _MIB
_DISK_ID = b"MSTR"  # the table's disk signature: how the guest tells its own disk from others

# Loaded before the root filesystem is looked for; when no seed was found on a virtio disk; after the network is up.
_EARLY = ("virtio_pci", "virtio_blk", "virtio_net", "virtio_rng", "virtio_scsi", "sd_mod", "crc32c_intel", "isofs")
_CDROM = ("ata_piix", "sr_mod")
_LATE = ("button", "evdev", "virtio_balloon")

_SYSLINUX = """DEFAULT tiny
PROMPT 0
LABEL tiny
  LINUX /vmlinuz
  INITRD /initrd
  APPEND console=ttyS0 quiet loglevel=3 panic=1 random.trust_cpu=on net.ifnames=0
"""


async def make(image_dir: Path, cache: Path, docker: Sequence[str], progress: Progress) -> BuiltImage:
    """Builds `<image_dir>/tiny.qcow2`. Raises AgentError, CommandFailed."""
    await check_architecture()
    userland = await with_dependencies(_USERLAND)
    archives = await fetch((await kernel_package(), *userland, *_BOOT_TOOLS), cache, progress)
    async with workspace(cache, "tiny") as work:
        progress("unpacking packages")
        await unpack(archives[:1], work / "kernel")
        await unpack(archives[1:], work / "root")
        progress("making the initramfs")
        await _boot_files(work)
        progress("making the disk")
        await _make_disk(work)
        progress("compressing the disk")
        target = image_dir / "tiny.qcow2"
        with replacing(target) as temporary:
            qemu_img = tool("qemu-img") or "qemu-img"
            await run(qemu_img, "convert", "-c", "-f", "raw", "-O", "qcow2", work / "disk.raw", temporary, limit=300)
            temporary.chmod(0o644)
    built = BuiltImage(
        name="tiny",
        reference="tiny",
        format="qcow2",
        version=VERSION,
        digest=sha256(target),
        size=target.stat().st_size,
        built_at=now(),
        packages=versions(archives),
        path=target,
    )
    write_sidecar(image_dir, built)
    progress(f"tiny is ready: {target}, {built.size / 1024 / 1024:.1f} MiB")
    return built


async def _boot_files(work: Path) -> None:
    """Leaves `vmlinuz`, `initrd` and `syslinux.cfg` in the work folder."""
    kernel, modules = find_kernel(work / "kernel")
    tree = Tree()
    _add_modules(tree, modules)
    await add_userland(tree, work / "root", ("usr/sbin/dropbear", "usr/bin/dropbearkey", "sbin/mke2fs", "sbin/resize2fs"))
    _add_guest(tree)
    packed = await asyncio.to_thread(gzip.compress, tree.cpio(), 9, mtime=0)
    (work / "initrd").write_bytes(packed)
    (work / "vmlinuz").write_bytes(kernel.read_bytes())
    (work / "syslinux.cfg").write_text(_SYSLINUX)


def _add_modules(tree: Tree, modules: Modules) -> None:
    for stage, wanted in (("early", _EARLY), ("cdrom", _CDROM), ("late", _LATE)):
        names = modules.order(wanted)
        for name in names:
            tree.file(f"lib/modules/{name}.ko", modules.read(name))
        tree.file(f"etc/modules.{stage}", "".join(f"/lib/modules/{name}.ko\n" for name in names))


def _add_guest(tree: Tree) -> None:
    """The system's own files, from guest/, and the places the kernel and init expect."""
    init = guest_file("init").replace("@ROOT_START@", str(_ROOT_START)).replace("@DISK_ID@", _DISK_ID.decode())
    tree.file("init", init, 0o755)
    add_system(tree)
    tree.char("dev/console", 0o600, 5, 1)


async def _make_disk(work: Path) -> None:
    """Makes `disk.raw`: boot code and partition table, and the FAT16 partition with the kernel, made bootable."""
    payload = sum((work / name).stat().st_size for name in ("vmlinuz", "initrd"))
    if payload > (_BOOT_SECTORS - 1 * _MIB) * _SECTOR:
        raise AgentError(f"kernel and initramfs take {payload} bytes, more than the image's boot partition has")
    code = find(work / "root", "usr/lib/syslinux/mbr/mbr.bin").read_bytes()
    disk = work / "disk.raw"
    with disk.open("wb") as file:
        file.truncate(_DISK_SECTORS * _SECTOR)
        file.write(master_boot_record(code))
    start = _BOOT_START * _SECTOR
    tools = work / "root" / "usr" / "bin"
    # mtools would else ask the terminal, and stamp the build's time into the filesystem.
    quiet = {
        "PATH": f"{tools}:/usr/bin:/bin",
        "MTOOLS_SKIP_CHECK": "1",
        "SOURCE_DATE_EPOCH": "946684800",
        "MTOOLSRC": "/dev/null",
    }
    image = f"{disk}@@{start}"
    geometry = (
        "-h",
        "16",
        "-s",
        "63",
        "-T",
        str(_BOOT_SECTORS),
        "-H",
        str(_BOOT_START),
        "-c",
        "4",
        "-N",
        "4d535452",
        "-v",
        "MUSTER",
    )
    await run(tools / "mformat", "-i", image, *geometry, "::", env=quiet)
    files = [work / name for name in ("vmlinuz", "initrd", "syslinux.cfg")]
    await run(tools / "mcopy", "-i", image, *files, "::/", env=quiet)
    await run(tools / "syslinux", "--install", "-t", str(start), disk, env=quiet)


def master_boot_record(code: bytes) -> bytes:
    """The first sector: boot code, disk signature, and one active FAT16 partition (type 0x0e, LBA)."""
    if len(code) > 440:
        raise AgentError(f"the boot code has {len(code)} bytes; a master boot record has room for 440")
    beyond = b"\xfe\xff\xff"  # cylinder, head and sector of an address that only LBA can tell
    entry = b"\x80" + beyond + b"\x0e" + beyond + struct.pack("<II", _BOOT_START, _BOOT_SECTORS)
    return code.ljust(440, b"\0") + _DISK_ID + b"\0\0" + entry + bytes(48) + b"\x55\xaa"


async def current(image_dir: Path, docker: Sequence[str]) -> BuiltImage | None:
    """The image if it is there, of this version and unchanged."""
    return await current_file(image_dir, "tiny", "tiny.qcow2", VERSION)


RECIPE = Recipe(
    name="tiny",
    summary="a bootable disk of a few MiB with sshd and a web server, for QEMU; up in seconds even without KVM",
    version=VERSION,
    file="tiny.qcow2",
    commands={"apt-get": "apt", "apt-cache": "apt", "dpkg-deb": "dpkg", "qemu-img": "qemu-utils"},
    uses_docker=False,
    make=make,
    current=current,
)
