"""What base images a directory holds, and whether one is safe to use. Called by storage drivers and engines."""

from __future__ import annotations

import json
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from agent.errors import CommandFailed, ImageRefused
from agent.run import run
from specs.names import check_name

ImageFormat = Literal["qcow2", "raw", "firecracker"]
_FORMATS: dict[str, ImageFormat] = {".qcow2": "qcow2", ".raw": "raw", ".img": "raw"}  # in the order they are preferred
_FIRECRACKER_FILES = ("vmlinux", "rootfs.ext4")


@dataclass(frozen=True, slots=True)
class ImageFile:
    """A base image. `path` is absolute: a file, or for `firecracker` a directory with vmlinux, rootfs.ext4 and perhaps initrd.

    `size` is in bytes: the file's length (of the rootfs for `firecracker`). What the guest sees is `ImageFacts.virtual_size`.
    """

    name: str
    path: Path
    format: ImageFormat
    size: int


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """What qemu-img says of a disk image; sizes in bytes."""

    format: Literal["qcow2", "raw"]
    virtual_size: int
    actual_size: int


def list_images(image_dir: Path) -> tuple[ImageFile, ...]:
    """The images of a directory, by name; none where it does not exist.

    An image is `NAME.qcow2`, `NAME.raw`, `NAME.img` (raw) or a directory `NAME` with vmlinux and rootfs.ext4. One name stands
    for one image: the formats win in this order. Symbolic links out of the directory, temporary names, empty files
    and names that no spec could say are passed over.
    """
    try:
        root = image_dir.resolve(strict=True)
        entries = sorted(root.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return ()
    rank = {suffix: place for place, suffix in enumerate(_FORMATS)}
    found: dict[str, ImageFile] = {}
    for entry in sorted(entries, key=lambda path: rank.get(path.suffix, len(rank))):
        image = _image(entry, root)
        if image and image.name not in found:
            found[image.name] = image
    return tuple(found[name] for name in sorted(found))


def find_image(image_dir: Path, name: str) -> ImageFile | None:
    """The image of that name, or None."""
    return next((image for image in list_images(image_dir) if image.name == name), None)


def image_part(image_dir: Path, image: ImageFile, name: str) -> Path | None:
    """Where a file of a `firecracker` image really lies; None if it is not there or a link leads out of the image directory."""
    part = _inside(image.path / name, image_dir.resolve())
    return part if part is not None and _file_size(part) else None


def _image(entry: Path, root: Path) -> ImageFile | None:
    target = _inside(entry, root)
    if target is None:
        return None
    if target.is_dir():
        return _firecracker(entry, target, root)
    name, format_ = entry.name.removesuffix(entry.suffix), _FORMATS.get(entry.suffix)
    size = _file_size(target)
    if format_ is None or not _sayable(name) or not size:
        return None
    return ImageFile(name, target, format_, size)


def _firecracker(entry: Path, folder: Path, root: Path) -> ImageFile | None:
    files = [_inside(folder / name, root) for name in _FIRECRACKER_FILES]
    sizes = [_file_size(file) if file else 0 for file in files]
    if not _sayable(entry.name) or not all(sizes):
        return None
    return ImageFile(entry.name, folder, "firecracker", sizes[-1])


def _inside(path: Path, root: Path) -> Path | None:
    """Where a path really leads, if that is inside the image directory."""
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError):
        return None
    return target if target.is_relative_to(root) and target != root else None


def _file_size(path: Path) -> int:
    try:
        facts = path.stat()
    except OSError:
        return 0
    return facts.st_size if stat.S_ISREG(facts.st_mode) else 0


def _sayable(name: str) -> bool:
    try:
        check_name(name)
    except ValueError:
        return False
    return True


async def inspect(path: Path, format_: Literal["qcow2", "raw"] | None = None) -> ImageFacts:
    """Reads an image's facts with `qemu-img info`, the format given, never guessed: by default what the file's name says.

    Raises ImageRefused for an image with a backing file or an external data file (it would make QEMU open files of
    the host that its maker chose), for one that is not of its format, and for an encrypted one.
    """
    chosen = format_ or _FORMATS.get(path.suffix)
    if chosen not in ("qcow2", "raw"):
        raise ImageRefused(f"image {path.name} is neither .qcow2 nor .raw nor .img")
    source = json.dumps({"driver": chosen, "file": {"driver": "file", "filename": str(path)}})
    try:
        told = json.loads(await run("qemu-img", "info", "--output=json", f"json:{source}", limit=30))
    except CommandFailed as error:
        if error.exit_status is None:
            raise
        raise ImageRefused(f"image {path.name} cannot be read as {chosen}: {error.stderr.strip()[-300:]}") from error
    data = (told.get("format-specific") or {}).get("data") or {}
    if told.get("backing-filename") or told.get("full-backing-filename"):
        raise ImageRefused(
            f"image {path.name} has a backing file ({told['backing-filename']}); flatten it with qemu-img convert"
        )
    if data.get("data-file") or data.get("data-file-raw"):
        raise ImageRefused(f"image {path.name} keeps its data in another file ({data.get('data-file')}); use qemu-img convert")
    if told.get("encrypted"):
        raise ImageRefused(f"image {path.name} is encrypted; its VMs could not boot")
    if told.get("format") != chosen:
        raise ImageRefused(f"image {path.name} is {told.get('format')}, not {chosen} as its name says")
    return ImageFacts(chosen, int(told["virtual-size"]), int(told.get("actual-size", 0)))
