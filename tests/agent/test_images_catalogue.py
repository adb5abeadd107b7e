"""What counts as an image, and which images are refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from agent.errors import ImageRefused
from agent.images.catalogue import ImageFile, find_image, inspect, list_images
from agent.run import run

MIB = 1024 * 1024


def names(folder: Path) -> list[str]:
    return [image.name for image in list_images(folder)]


def test_a_directory_that_does_not_exist_has_no_images(tmp_path: Path) -> None:
    assert list_images(tmp_path / "none") == ()


def test_complete_images_are_listed_by_name_with_format_and_size(tmp_path: Path) -> None:
    (tmp_path / "b.qcow2").write_bytes(b"x" * 3)
    (tmp_path / "a.img").write_bytes(b"x" * 2)
    (tmp_path / "debian-12.5.raw").write_bytes(b"x")
    micro = tmp_path / "micro"
    micro.mkdir()
    (micro / "vmlinux").write_bytes(b"x")
    (micro / "rootfs.ext4").write_bytes(b"x" * 4)
    assert list_images(tmp_path) == (
        ImageFile("a", tmp_path / "a.img", "raw", 2),
        ImageFile("b", tmp_path / "b.qcow2", "qcow2", 3),
        ImageFile("debian-12.5", tmp_path / "debian-12.5.raw", "raw", 1),
        ImageFile("micro", micro, "firecracker", 4),
    )
    assert find_image(tmp_path, "b") == ImageFile("b", tmp_path / "b.qcow2", "qcow2", 3)
    assert find_image(tmp_path, "c") is None


def test_what_is_not_a_complete_image_is_passed_over(tmp_path: Path) -> None:
    for name in (
        ".tiny.qcow2.ab12.tmp",
        "tiny.json",
        "tiny.qcow2.part",
        "notes",
        ".qcow2",
        "a b.qcow2",
        "..x.qcow2",
        "a..b.raw",
    ):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "empty.qcow2").touch()
    (tmp_path / "folder.qcow2").mkdir()
    os.mkfifo(tmp_path / "pipe.raw")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "vmlinux").write_bytes(b"x")
    assert names(tmp_path) == []


def test_links_are_followed_inside_the_directory_alone(tmp_path: Path) -> None:
    images, outside = tmp_path / "images", tmp_path / "outside"
    images.mkdir()
    outside.mkdir()
    (outside / "secret.raw").write_bytes(b"x")
    (outside / "vmlinux").write_bytes(b"x")
    (outside / "rootfs.ext4").write_bytes(b"x")
    (images / "real.raw").write_bytes(b"x")
    (images / "alias.raw").symlink_to("real.raw")
    (images / "secret.raw").symlink_to(outside / "secret.raw")
    (images / "micro").symlink_to(outside)
    (images / "loop.raw").symlink_to("loop.raw")
    (images / "gone.raw").symlink_to("gone-for-good")
    (images / "self").symlink_to(".")
    half = images / "half"
    half.mkdir()
    (half / "vmlinux").symlink_to(outside / "vmlinux")
    (half / "rootfs.ext4").write_bytes(b"x")
    assert names(images) == ["alias", "real"]


def test_one_name_in_two_formats_is_one_image(tmp_path: Path) -> None:
    for suffix in ("img", "raw", "qcow2"):
        (tmp_path / f"os.{suffix}").write_bytes(b"x")
    assert [(image.name, image.format) for image in list_images(tmp_path)] == [("os", "qcow2")]


@pytest.mark.real
async def test_sizes_are_those_the_guest_sees(tmp_path: Path) -> None:
    await run("qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "a,b.qcow2", "64M")
    (tmp_path / "c.raw").write_bytes(bytes(MIB))
    facts = await inspect(tmp_path / "a,b.qcow2")
    assert (facts.format, facts.virtual_size) == ("qcow2", 64 * MIB)
    facts = await inspect(tmp_path / "c.raw")
    assert (facts.format, facts.virtual_size) == ("raw", MIB)


@pytest.mark.real
async def test_an_image_that_would_open_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(bytes(MIB))
    await run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", tmp_path / "base.raw", tmp_path / "over.qcow2")
    with pytest.raises(ImageRefused, match=r"over.qcow2 has a backing file \(.*base.raw\)"):
        await inspect(tmp_path / "over.qcow2")
    # The base being gone changes nothing: the header is what counts, not whether the file can be opened.
    (tmp_path / "base.raw").unlink()
    with pytest.raises(ImageRefused, match=r"backing file|cannot be read"):
        await inspect(tmp_path / "over.qcow2")
    data = f"data_file={tmp_path}/data.raw"
    await run("qemu-img", "create", "-q", "-f", "qcow2", "-o", data, tmp_path / "split.qcow2", "1M")
    with pytest.raises(ImageRefused, match=r"split\.qcow2 keeps its data in another file"):
        await inspect(tmp_path / "split.qcow2")


@pytest.mark.real
async def test_the_format_is_taken_from_the_name_and_never_guessed(tmp_path: Path) -> None:
    await run("qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "a.qcow2", "64M")
    (tmp_path / "a.qcow2").rename(tmp_path / "a.raw")
    facts = await inspect(tmp_path / "a.raw")
    assert (facts.format, facts.virtual_size) == ("raw", -(-(tmp_path / "a.raw").stat().st_size // 512) * 512)
    (tmp_path / "b.qcow2").write_bytes(b"not an image" * 100)
    with pytest.raises(ImageRefused, match=r"b\.qcow2 cannot be read as qcow2"):
        await inspect(tmp_path / "b.qcow2")
    with pytest.raises(ImageRefused, match="is neither"):
        await inspect(tmp_path / "c.iso")
