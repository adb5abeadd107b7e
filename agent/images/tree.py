"""A file tree in memory, owned by root, that becomes an initramfs or a container's root. Needs no privilege and no mount."""

from __future__ import annotations

import io
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

_DIR, _FILE, _LINK, _CHAR = 0o040000, 0o100000, 0o120000, 0o020000


@dataclass(frozen=True, slots=True)
class Node:
    """One file, directory, symbolic link (its target in `data`) or character device."""

    kind: Literal["dir", "file", "link", "char"]
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


class Tree:
    """Paths without a leading slash to nodes. Parents are made as they are needed, mode 0755."""

    def __init__(self) -> None:
        self.nodes: dict[str, Node] = {}

    def dir(self, path: str, mode: int = 0o755) -> None:
        """Makes a directory; its mode is set even where it was made before as a parent."""
        self._parents(path)
        self.nodes[path] = Node("dir", mode)

    def file(self, path: str, data: bytes | str, mode: int = 0o644) -> None:
        """Makes or replaces a file."""
        self._parents(path)
        self.nodes[path] = Node("file", mode, data.encode() if isinstance(data, str) else data)

    def link(self, path: str, target: str) -> None:
        """Makes a symbolic link."""
        self._parents(path)
        self.nodes[path] = Node("link", 0o777, target.encode())

    def char(self, path: str, mode: int, major: int, minor: int) -> None:
        """Makes a character device."""
        self._parents(path)
        self.nodes[path] = Node("char", mode, device=(major, minor))

    def unpack(self, into: Path) -> None:
        """Writes the tree below a new directory, as the user this runs as. Devices are left out. Raises OSError."""
        into.mkdir(parents=True)
        for path, node in self.sorted():
            target = into / path
            if node.kind == "dir":
                target.mkdir(exist_ok=True)
            elif node.kind == "link":
                target.symlink_to(node.data.decode())
            elif node.kind == "file":
                target.write_bytes(node.data)
            if node.kind in ("dir", "file"):
                target.chmod(node.mode)

    def _parents(self, path: str) -> None:
        if path.startswith("/") or ".." in path.split("/"):
            raise ValueError(f"{path!r} is not a path inside the tree")
        parent = path.rpartition("/")[0]
        if parent and parent not in self.nodes:
            self.dir(parent)

    def sorted(self) -> list[tuple[str, Node]]:
        """Every node, parents before children."""
        return sorted(self.nodes.items())

    def cpio(self) -> bytes:
        """The tree as a `newc` archive, as the kernel unpacks it (its early-userspace/buffer-format.rst)."""
        out = io.BytesIO()
        for number, (path, node) in enumerate(self.sorted(), start=1):
            kind = {"dir": _DIR, "file": _FILE, "link": _LINK, "char": _CHAR}[node.kind]
            _cpio_record(out, number, path, kind | node.mode, node)
        _cpio_record(out, 0, "TRAILER!!!", 0, Node("file", 0))
        return out.getvalue()

    def tar(self) -> bytes:
        """The tree as an uncompressed tar archive. Devices are left out: a container gets its own."""
        out = io.BytesIO()
        types = {"dir": tarfile.DIRTYPE, "file": tarfile.REGTYPE, "link": tarfile.SYMTYPE}
        with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
            for path, node in self.sorted():
                if node.kind not in types:
                    continue
                info = tarfile.TarInfo(path)
                info.type, info.mode, info.uname, info.gname = types[node.kind], node.mode, "root", "root"
                if node.kind == "link":
                    info.linkname = node.data.decode()
                    archive.addfile(info)
                else:
                    info.size = len(node.data)
                    archive.addfile(info, io.BytesIO(node.data))
        return out.getvalue()


def _cpio_record(out: io.BytesIO, inode: int, path: str, mode: int, node: Node) -> None:
    name = path.encode() + b"\0"
    links = 2 if node.kind == "dir" else 1
    fields = (inode, mode, 0, 0, links, 0, len(node.data), 0, 0, *node.device, len(name), 0)
    out.write(b"070701" + b"".join(b"%08X" % field for field in fields) + name)
    out.write(b"\0" * (-out.tell() % 4))
    out.write(node.data)
    out.write(b"\0" * (-out.tell() % 4))
