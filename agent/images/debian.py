"""The image `debian`: a whole Debian 12 with systemd, cloud-init and sshd, for QEMU. Needs root, for a chroot.

Partition 1 (FAT16, syslinux) holds kernel and initramfs, partition 2 the root filesystem, which cloud-init grows into whatever
room the VM's disk has. The guest's own kernel packages renew what partition 1 holds.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

from agent.errors import AgentError
from agent.images.files import replacing, sha256, workspace
from agent.images.packages import Progress, fetch, find, tool, unpack, with_dependencies
from agent.images.recipe import BuiltImage, Recipe, check_architecture, current_file, now, write_sidecar
from agent.images.userland import guest_file
from agent.run import run

VERSION = 1
NAME = "debian"
_RELEASE = "bookworm"
_PACKAGES = (
    *("systemd-sysv", "libpam-systemd", "dbus", "udev", "systemd-resolved", "initramfs-tools", "linux-image-cloud-amd64"),
    *("cloud-init", "cloud-guest-utils", "fdisk", "e2fsprogs", "openssh-server", "sudo", "ca-certificates"),
    *("iproute2", "iputils-ping", "netbase", "curl", "less", "vim-tiny", "zstd"),
)
_BOOT_TOOLS = ("mtools", "syslinux", "syslinux-common")
_SERVICES = ("systemd-networkd", "systemd-resolved", "ssh")
# What a machine that lives for hours does without; each costs boot time where QEMU has to emulate the processor.
_MASKED = (
    *("apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "e2scrub_all.timer", "e2scrub_reap.service"),
    *("fstrim.timer", "systemd-networkd-wait-online.service"),
)
# Of this machine, so that packages come from where its own do; taken out again before the image is made.
_BORROWED = (
    *("etc/apt/sources.list", "etc/apt/sources.list.d", "etc/apt/apt.conf.d", "etc/apt/auth.conf.d", "etc/apt/trusted.gpg.d"),
    *("etc/apt/preferences.d", "etc/apt/keyrings", "usr/local/share/ca-certificates", "etc/hosts", "etc/resolv.conf"),
)
_ENVIRONMENT = re.compile(r"(?i)[a-z]+_proxy|SSL_CERT_FILE")
_RUBBISH = ("var/lib/apt/lists", "var/cache/apt", "var/log", "usr/share/doc", "usr/share/man", "usr/share/locale", "tmp")

_SECTOR = 512
_MIB = 1024 * 1024 // _SECTOR  # sectors
_BOOT_START, _BOOT_SECTORS = 1 * _MIB, 96 * _MIB
_ROOT_START, _ROOT_SECTORS = 97 * _MIB, 1200 * _MIB
_SYSLINUX = """DEFAULT debian
PROMPT 0
LABEL debian
  LINUX /vmlinuz
  INITRD /initrd
  APPEND root=LABEL=debian-root ro console=tty0 console=ttyS0 net.ifnames=0 quiet
"""
_DEBOOTSTRAP_LIMIT, _INSTALL_LIMIT, _DISK_LIMIT = 1800.0, 1800.0, 900.0  # seconds


async def make(image_dir: Path, cache: Path, docker: Sequence[str], progress: Progress) -> BuiltImage:
    """Builds `<image_dir>/debian.qcow2`. Raises AgentError, CommandFailed."""
    await check_architecture()
    if os.geteuid() != 0:
        raise AgentError(
            "cannot build debian: its packages configure themselves in a chroot, which takes root; run it with sudo"
        )
    tools = await fetch(await with_dependencies(_BOOT_TOOLS), cache, progress)
    async with workspace(cache, NAME) as work:
        root = work / "root"
        await _bare_system(cache, root, progress)
        progress("installing packages, which takes some minutes")
        packages = await _install(root)
        await asyncio.to_thread(_settle, root)
        await unpack(tools, work / "tools")
        progress("making the disk")
        await _make_disk(work, root)
        progress("compressing the disk")
        target = image_dir / f"{NAME}.qcow2"
        with replacing(target) as temporary:
            words = ("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", "compression_type=zstd")
            await run(tool("qemu-img") or "qemu-img", *words, work / "disk.raw", temporary, limit=_DISK_LIMIT)
            temporary.chmod(0o644)
    built = BuiltImage(
        name=NAME,
        reference=NAME,
        format="qcow2",
        version=VERSION,
        digest=await asyncio.to_thread(sha256, target),
        size=target.stat().st_size,
        built_at=now(),
        packages=packages,
        path=target,
    )
    write_sidecar(image_dir, built)
    progress(f"{NAME} is ready: {target}, {built.size / 1024 / 1024:.1f} MiB")
    return built


async def _bare_system(cache: Path, root: Path, progress: Progress) -> None:
    """Unpacks a bare system, which is made once and kept. Whoever builds holds the workspace's lock."""
    archive = cache / f"{NAME}-base.tar"
    if not archive.is_file():
        progress("making a bare Debian with debootstrap (once)")
        bare = root.with_name("bare")
        await run("debootstrap", "--variant=minbase", _RELEASE, bare, limit=_DEBOOTSTRAP_LIMIT)
        with replacing(archive) as temporary:
            await run("tar", "-C", bare, "-cf", temporary, ".", limit=_DISK_LIMIT)
        await asyncio.to_thread(shutil.rmtree, bare)
    progress("unpacking a bare Debian")
    await asyncio.to_thread(root.mkdir)
    await run("tar", "-C", root, "-xf", archive, limit=_DISK_LIMIT)


async def _install(root: Path) -> Mapping[str, str]:
    """Installs the packages as this machine would get them; returns names and versions of all there are."""
    lent = root / "usr" / "sbin" / "policy-rc.d"
    lent.write_text("#!/bin/sh\nexit 101\n")  # no service starts in the chroot (invoke-rc.d(8))
    lent.chmod(0o755)
    await asyncio.to_thread(_borrow, root)
    await _inside(root, "apt-get", "update", "-qq")
    await _inside(root, "apt-get", "upgrade", "-y", "-qq")  # the bare system may have been kept for long
    await _inside(root, "apt-get", "install", "-y", "-qq", "--no-install-recommends", *_PACKAGES)
    for service in _SERVICES:
        await _inside(root, "systemctl", "enable", service)
    listing = await _inside(root, "dpkg-query", "-W", "-f", "${Package} ${Version}\\n")
    lent.unlink()
    return dict(line.split(" ", 1) for line in listing.splitlines())


async def _inside(root: Path, *words: str) -> str:
    """Runs a command in the system, in process and mount namespaces that take all it started and mounted with them."""
    passed = [f"{name}={value}" for name, value in os.environ.items() if _ENVIRONMENT.fullmatch(name)]
    clean = ("PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C.UTF-8", "HOME=/root", "DEBIAN_FRONTEND=noninteractive")
    apart = ("--mount", "--pid", "--fork", "--kill-child", f"--root={root}", "--mount-proc")
    return await run("unshare", *apart, "/usr/bin/env", "-i", *clean, *passed, *words, limit=_INSTALL_LIMIT)


def _borrow(root: Path) -> None:
    _return(root)
    for name in (*_BORROWED, "etc/ssl/certs"):
        own, lent = Path("/", name), root / name
        if own.is_dir():
            shutil.copytree(own, lent, dirs_exist_ok=True, ignore_dangling_symlinks=True)
        elif own.is_file():
            lent.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(own, lent)


def _return(root: Path) -> None:
    for name in _BORROWED:
        path = root / name
        if path.is_symlink() or path.is_file():
            path.unlink()
        elif path.is_dir():
            shutil.rmtree(path)
            path.mkdir()


def _settle(root: Path) -> None:
    """Makes the installed system an image: nothing of this machine or of one guest is in it."""
    _return(root)
    shutil.rmtree(root / "etc/ssl/certs")
    for rubbish in _RUBBISH:
        for left in (root / rubbish).iterdir() if (root / rubbish).is_dir() else ():
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
    for key in (root / "etc/ssh").glob("ssh_host_*"):
        key.unlink()
    (root / "etc/machine-id").write_text("uninitialized\n")  # machine-id(5): made at the first boot
    (root / "etc/hostname").unlink(missing_ok=True)
    (root / "etc/resolv.conf").symlink_to("../run/systemd/resolve/stub-resolv.conf")
    (root / "etc/hosts").write_text("127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n")
    _put(root / "etc/fstab", "fstab")
    _put(root / "etc/apt/sources.list", "sources.list")
    _put(root / "etc/cloud/cloud.cfg.d/90_muster.cfg", "cloud.cfg")
    for hook in ("kernel/postinst.d/zz-muster", "initramfs/post-update.d/muster"):
        _put(root / "etc" / hook, "update-boot", 0o755)
    (root / "boot/muster").mkdir()
    for unit in _MASKED:
        masked = root / "etc/systemd/system" / unit
        masked.unlink(missing_ok=True)
        masked.symlink_to("/dev/null")


def _put(path: Path, name: str, mode: int = 0o644) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(guest_file(f"debian/{name}"))
    path.chmod(mode)


async def _make_disk(work: Path, root: Path) -> None:
    """Makes `disk.raw`: boot code and partition table, the FAT16 partition with the kernel, the root filesystem."""
    tools = work / "tools" / "usr" / "bin"
    code = find(work / "tools", "usr/lib/syslinux/mbr/mbr.bin").read_bytes()
    disk, start = work / "disk.raw", _BOOT_START * _SECTOR
    with disk.open("wb") as file:
        file.truncate((_ROOT_START + _ROOT_SECTORS + _MIB) * _SECTOR)
        file.write(master_boot_record(code))
    for name, pattern in (("vmlinuz", "vmlinuz-*"), ("initrd", "initrd.img-*")):
        found = sorted((root / "boot").glob(pattern))
        if not found:
            raise AgentError(f"the Debian packages brought no boot/{pattern}: this release packs them differently")
        shutil.copyfile(found[-1], work / name)
    (work / "syslinux.cfg").write_text(_SYSLINUX)
    quiet = {"PATH": f"{tools}:/usr/bin:/bin", "MTOOLS_SKIP_CHECK": "1", "MTOOLSRC": "/dev/null"}
    image = f"{disk}@@{start}"
    shape = ("-h", "16", "-s", "63", "-T", str(_BOOT_SECTORS), "-H", str(_BOOT_START), "-c", "8", "-v", "MUSTER")
    await run(tools / "mformat", "-i", image, *shape, "::", env=quiet)
    files = [work / name for name in ("vmlinuz", "initrd", "syslinux.cfg")]
    await run(tools / "mcopy", "-i", image, *files, "::/", env=quiet)
    await run(tools / "syslinux", "--install", "-t", str(start), disk, env=quiet)
    options = ("-q", "-F", "-t", "ext4", "-L", "debian-root", "-b", "4096", "-m", "1")
    offset = f"offset={_ROOT_START * _SECTOR},lazy_itable_init=1,lazy_journal_init=1"
    size = str(_ROOT_SECTORS * _SECTOR // 4096)
    await run(tool("mke2fs") or "mke2fs", *options, "-E", offset, "-d", root, disk, size, limit=_DISK_LIMIT)


def master_boot_record(code: bytes) -> bytes:
    """The first sector: boot code, disk signature, an active FAT16 partition (type 0x0e, LBA) and a Linux one (0x83)."""
    if len(code) > 440:
        raise AgentError(f"the boot code has {len(code)} bytes; a master boot record has room for 440")
    beyond = b"\xfe\xff\xff"  # cylinder, head and sector of an address that only LBA can tell
    boot = b"\x80" + beyond + b"\x0e" + beyond + struct.pack("<II", _BOOT_START, _BOOT_SECTORS)
    rest = b"\x00" + beyond + b"\x83" + beyond + struct.pack("<II", _ROOT_START, _ROOT_SECTORS)
    return code.ljust(440, b"\0") + b"MSTD\0\0" + boot + rest + bytes(32) + b"\x55\xaa"


async def current(image_dir: Path, docker: Sequence[str]) -> BuiltImage | None:
    """The image if it is there, of this version and unchanged."""
    return await current_file(image_dir, NAME, f"{NAME}.qcow2", VERSION)


RECIPE = Recipe(
    name=NAME,
    summary="a whole Debian 12 with systemd, cloud-init and sshd, for QEMU; made as root in a few minutes",
    version=VERSION,
    file=f"{NAME}.qcow2",
    commands={
        "apt-get": "apt",
        "apt-cache": "apt",
        "dpkg-deb": "dpkg",
        "debootstrap": "debootstrap",
        "mke2fs": "e2fsprogs",
        "qemu-img": "qemu-utils",
        "unshare": "util-linux",
    },
    uses_docker=False,
    make=make,
    current=current,
)
