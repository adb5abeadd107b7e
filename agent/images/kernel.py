"""Debian's cloud kernel as raw material: its package, its modules, and the uncompressed kernel inside. Called by recipes."""

from __future__ import annotations

import struct
from pathlib import Path

import lz4.block

from agent.errors import AgentError
from agent.images.modules import Modules
from agent.images.packages import dependencies

_PACKAGE = "linux-image-cloud-amd64"
_LZ4_LEGACY = b"\x02\x21\x4c\x18"
_LZ4_BLOCK = 8 * 1024 * 1024  # bytes; the size of every block of the legacy format but the last
# Fields of the setup header (the kernel's Documentation/x86/boot.rst, "The Real-Mode Kernel Header").
_MAGIC, _MAGIC_AT = b"HdrS", 0x202
_SETUP_SECTORS_AT, _PAYLOAD_AT = 0x1F1, 0x248


async def kernel_package() -> str:
    """The package that holds the kernel now; what Debian calls the cloud kernel only depends on it. Raises AgentError."""
    return next((name for name in await dependencies(_PACKAGE) if name.startswith("linux-image-")), _PACKAGE)


def find_kernel(root: Path) -> tuple[Path, Modules]:
    """The compressed kernel of an unpacked kernel package, and its modules. Raises AgentError."""
    kernel = next(iter((root / "boot").glob("vmlinuz-*")), None)
    if kernel is None:
        raise AgentError(f"{_PACKAGE} brought no boot/vmlinuz-*: this release packs it differently")
    version = kernel.name.removeprefix("vmlinuz-")
    folders = [root / prefix / "modules" / version for prefix in ("lib", "usr/lib")]
    return kernel, Modules(next((folder for folder in folders if folder.is_dir()), folders[0]))


def uncompressed(vmlinuz: bytes) -> bytes:
    """The ELF executable that a bzImage with an lz4 payload unpacks at boot. Raises AgentError for any other file."""
    if vmlinuz[_MAGIC_AT : _MAGIC_AT + 4] != _MAGIC:
        raise AgentError("the kernel is no bzImage: this release packs it differently")
    offset, length = struct.unpack_from("<II", vmlinuz, _PAYLOAD_AT)
    start = ((vmlinuz[_SETUP_SECTORS_AT] or 4) + 1) * 512 + offset
    payload = vmlinuz[start : start + length]
    if not payload.startswith(_LZ4_LEGACY):
        raise AgentError(f"the kernel is compressed in a way this recipe cannot read (it begins with {payload[:4].hex()})")
    try:
        kernel = _unpack(payload[len(_LZ4_LEGACY) : -4])
    except (lz4.block.LZ4BlockError, struct.error) as error:
        raise AgentError(f"the kernel's payload is damaged: {error}") from error
    (size,) = struct.unpack("<I", payload[-4:])
    if len(kernel) != size or not kernel.startswith(b"\x7fELF"):
        raise AgentError(f"the kernel's payload is damaged: {len(kernel)} bytes where its end says {size}")
    return kernel


def _unpack(stream: bytes) -> bytes:
    """The blocks of the legacy format (lz4_Frame_format.md, "Legacy frame"): a length and its bytes, until nothing is left."""
    out, at = [], 0
    while at < len(stream):
        (length,) = struct.unpack_from("<I", stream, at)
        out.append(lz4.block.decompress(stream[at + 4 : at + 4 + length], uncompressed_size=_LZ4_BLOCK))
        at += 4 + length
    return b"".join(out)
