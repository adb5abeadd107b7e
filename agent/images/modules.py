"""Which kernel modules to load in which order. Called by the tiny recipe; reads module files, runs nothing.

depmod(8) would tell the same, but needs kmod on the host; the facts are in the modules themselves (their `.modinfo` section).
"""

from __future__ import annotations

import lzma
import re
from collections.abc import Sequence
from pathlib import Path

from agent.errors import AgentError


class Modules:
    """The modules of one kernel, by name with underscores (`virtio_rng` is the file virtio-rng.ko)."""

    def __init__(self, folder: Path) -> None:
        """`folder` is lib/modules/VERSION of an unpacked kernel package. Raises AgentError if it holds no modules."""
        self._files = {_name(path.name): path for path in folder.rglob("*.ko*") if re.search(r"\.ko(\.xz)?$", path.name)}
        if not self._files:
            raise AgentError(f"the kernel package holds no modules this recipe can read in {folder.name} (.ko or .ko.xz)")
        builtin = folder / "modules.builtin"
        self._builtin = {_name(Path(line).name) for line in builtin.read_text().splitlines()} if builtin.is_file() else set()

    def order(self, wanted: Sequence[str]) -> tuple[str, ...]:
        """The wanted modules and what they need, each after its own needs. Built-in ones are left out.

        Raises AgentError for a module this kernel has neither as a file nor built in.
        """
        out: list[str] = []
        for name in wanted:
            self._visit(name, out, ())
        return tuple(out)

    def _visit(self, name: str, out: list[str], above: tuple[str, ...]) -> None:
        if name in out or name in self._builtin or name in above:
            return
        if name not in self._files:
            raise AgentError(f"the kernel has no module {name}" + (f", which {above[-1]} needs" if above else ""))
        for needed in _depends(self.read(name)):
            self._visit(needed, out, (*above, name))
        out.append(name)

    def read(self, name: str) -> bytes:
        """The module's contents, decompressed."""
        path = self._files[name]
        data = path.read_bytes()
        return lzma.decompress(data) if path.suffix == ".xz" else data


def _name(file: str) -> str:
    return file.partition(".ko")[0].replace("-", "_")


def _depends(module: bytes) -> list[str]:
    found = re.search(rb"\0depends=([^\0]*)\0", module)
    return [name.replace("-", "_") for name in found[1].decode().split(",") if name] if found else []
