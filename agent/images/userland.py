"""busybox and programs with their libraries, as both images have them. Called by recipes; knows nothing of disks or daemons."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from agent.images.packages import LOADER, find, libraries
from agent.images.tree import Tree
from agent.run import run

_GUEST = Path(__file__).parent / "guest"
_ACCOUNTS = "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n"
_SHADOW = "root:*:19000:0:99999:7:::\nnobody:*:19000:0:99999:7:::\n"  # no password opens these; keys do
_GROUP = "root:x:0:\ntty:x:5:\nnogroup:x:65534:\n"


def guest_file(name: str) -> str:
    """The text of a file the guest gets as its own."""
    return (_GUEST / name).read_text()


async def add_userland(tree: Tree, root: Path, programs: Sequence[str]) -> None:
    """Adds busybox with all its applets, some programs of an unpacked package tree, and accounts (root alone may log in).

    `programs` are paths in the tree, with or without `usr/`. All commands end up in /bin. Raises AgentError, CommandFailed.
    """
    busybox = find(root, "bin/busybox", "usr/bin/busybox")
    tree.file("bin/busybox", busybox.read_bytes(), 0o755)
    for alias in ("sbin", "usr/bin", "usr/sbin"):
        tree.link(alias, "bin" if "/" not in alias else "../bin")
    for applet in (await run(busybox, "--list")).split():
        if applet != "busybox":
            tree.link(f"bin/{applet}", "busybox")
    tree.link("bin/init", "busybox")
    for program in programs:
        path = find(root, program, f"usr/{program}", program.removeprefix("usr/"))
        tree.file(f"bin/{path.name}", path.read_bytes(), 0o755)
        for name, library in (await libraries(path, root)).items():
            tree.file(f"lib64/{name}" if name == LOADER else f"lib/x86_64-linux-gnu/{name}", library.read_bytes(), 0o755)
    tree.dir("root", 0o700)
    tree.dir("root/.ssh", 0o700)
    tree.dir("tmp", 0o1777)
    tree.dir("var/www")
    tree.dir("persist")
    tree.file("etc/passwd", _ACCOUNTS)
    tree.file("etc/shadow", _SHADOW, 0o600)
    tree.file("etc/group", _GROUP)
    tree.file("etc/shells", "/bin/sh\n")
    tree.file("etc/profile", "export PATH=/bin\n")


def add_system(tree: Tree) -> None:
    """Adds init's table, the guest's own scripts, and the places kernel and init expect."""
    tree.file("etc/inittab", guest_file("inittab"))
    for script in ("boot", "ready", "quiesce", "power", "dhcp"):
        tree.file(f"etc/muster/{script}", guest_file(script), 0o755)
    tree.link("etc/acpi/PWRF/00000080", "/etc/muster/power")  # where busybox's acpid looks for the power button's action
    tree.link("etc/mtab", "/proc/mounts")
    for place in ("proc", "sys", "run", "var/log", "var/lib", "mnt"):
        tree.dir(place)
