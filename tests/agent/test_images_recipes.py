"""Recipes: what they say they need, when they build, and what an interrupted or failed build leaves."""

from __future__ import annotations

import asyncio
import io
import json
import lzma
import subprocess
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from agent.errors import AgentError, CommandFailed
from agent.images import RECIPES, BuiltImage, Recipe, build
from agent.images import recipe as recipe_module
from agent.images.files import locked, replacing, sha256, workspace
from agent.images.modules import Modules
from agent.images.packages import Progress
from agent.images.recipe import current_file, write_sidecar
from agent.images.tiny import master_boot_record
from agent.images.tree import Tree


def quiet(_: str) -> None:
    """A progress that nobody reads."""


async def make_toy(image_dir: Path, cache: Path, docker: Sequence[str], progress: Progress) -> BuiltImage:
    """Writes down what it was called with; takes two turns of the loop."""
    progress("making toy")
    target = image_dir / "toy.raw"
    with replacing(target) as temporary:
        temporary.write_bytes(b"toy")
        await asyncio.sleep(0)
    built = BuiltImage("toy", "toy", "raw", 3, sha256(target), 3, 1, path=target)
    write_sidecar(image_dir, built)
    return built


async def current_toy(image_dir: Path, docker: Sequence[str]) -> BuiltImage | None:
    return await current_file(image_dir, "toy", "toy.raw", 3)


TOY = Recipe("toy", "a toy", 3, "toy.raw", {"sh": "dash"}, False, make_toy, current_toy)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RECIPES, "toy", TOY)


async def lines_of(image_dir: Path) -> list[str]:
    said: list[str] = []
    await build("toy", image_dir, progress=said.append)
    return said


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_every_recipe_says_what_it_makes() -> None:
    assert list(RECIPES) == ["tiny", "busybox", "fc-tiny", "debian"]
    assert all(recipe.name == name and recipe.summary for name, recipe in RECIPES.items())


def test_what_is_missing_is_said_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe_module, "tool", lambda name: None if name in ("qemu-img", "docker") else f"/bin/{name}")
    assert RECIPES["tiny"].missing() == "qemu-img not found; run as root: apt-get install qemu-utils"
    assert RECIPES["busybox"].missing() == "docker not found; run as root: apt-get install docker.io"
    assert RECIPES["busybox"].missing(("podman",)) == ""
    monkeypatch.setattr(recipe_module, "tool", lambda _: None)
    assert RECIPES["busybox"].missing(("/opt/podman",)) == (
        "apt-get, apt-cache, dpkg-deb, /opt/podman not found; run as root: apt-get install apt dpkg podman"
    )


async def test_a_build_without_its_tools_says_so_and_makes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RECIPES, "toy", replace(TOY, commands={"no-such-tool": "its-package"}))
    with pytest.raises(AgentError, match="cannot build toy: no-such-tool not found; run as root: apt-get install its-package"):
        await build("toy", tmp_path, progress=quiet)
    assert listing(tmp_path) == [".build.lock"]


async def test_an_unknown_recipe_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(AgentError, match="there is no recipe huge; there are tiny, busybox, fc-tiny, debian"):
        await build("huge", tmp_path / "images", progress=quiet)
    assert listing(tmp_path) == []


@pytest.mark.usefixtures("toy")
async def test_an_image_is_built_once_and_again_when_it_is_not_what_was_built(tmp_path: Path) -> None:
    images = tmp_path / "images"
    assert await lines_of(images) == ["making toy"]
    assert await lines_of(images) == ["toy is up to date"]
    sidecar = json.loads((images / "toy.json").read_text())
    assert (sidecar["version"], sidecar["format"], sidecar["digest"]) == (3, "raw", sha256(images / "toy.raw"))
    (images / "toy.raw").write_bytes(b"tox")
    assert await lines_of(images) == ["making toy"]
    (images / "toy.json").write_text(json.dumps({**sidecar, "version": 2}))
    assert await lines_of(images) == ["making toy"]
    for broken in ("", "[]", "null", '{"name": "toy"}', "\u0000"):
        (images / "toy.json").write_text(broken)
        assert await lines_of(images) == ["making toy"]
    (images / "toy.json").unlink()
    assert await lines_of(images) == ["making toy"]
    said: list[str] = []
    await build("toy", images, progress=said.append, force=True)
    assert said == ["making toy"]
    assert listing(images) == [".build.lock", "toy.json", "toy.raw"]


@pytest.mark.usefixtures("toy")
async def test_two_builds_at_once_make_one_image(tmp_path: Path) -> None:
    said = await asyncio.gather(lines_of(tmp_path), lines_of(tmp_path))
    assert sorted(said) == [["making toy"], ["toy is up to date"]]


@pytest.mark.usefixtures("toy")
async def test_what_a_killed_build_left_is_swept_by_the_next(tmp_path: Path) -> None:
    (tmp_path / ".toy.raw.0011aabb.tmp").write_bytes(b"half")
    (tmp_path / ".other.raw.0011aabb.tmp").write_bytes(b"another's")
    await lines_of(tmp_path)
    assert listing(tmp_path) == [".build.lock", ".other.raw.0011aabb.tmp", "toy.json", "toy.raw"]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "image.raw"
    target.write_bytes(b"old")
    with pytest.raises(RuntimeError), replacing(target) as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError
    assert (target.read_bytes(), listing(tmp_path)) == (b"old", ["image.raw"])
    with replacing(target) as temporary:
        temporary.write_bytes(b"new")
    assert (target.read_bytes(), listing(tmp_path)) == (b"new", ["image.raw"])


async def test_a_lock_is_free_again_after_a_failure(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        async with locked(tmp_path / "lock"):
            raise RuntimeError
    async with asyncio.timeout(10), locked(tmp_path / "lock"):
        pass


async def test_a_workspace_is_empty_at_first_and_gone_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "work" / "toy" / "of-a-killed-build").mkdir(parents=True)
    with pytest.raises(RuntimeError):
        async with workspace(tmp_path, "toy") as folder:
            assert listing(folder) == []
            (folder / "half").touch()
            raise RuntimeError
    assert listing(tmp_path / "work") == []


def module(folder: Path, name: str, depends: str, *, packed: bool = False) -> None:
    data = b"\x7fELF..." + b"\0license=GPL\0depends=" + depends.encode() + b"\0name=x\0"
    path = folder / "kernel" / f"{name}.ko"
    path.parent.mkdir(exist_ok=True)
    if packed:
        path = path.with_name(f"{name}.ko.xz")
        data = lzma.compress(data)
    path.write_bytes(data)


def test_modules_come_after_what_they_need_and_built_in_ones_not_at_all(tmp_path: Path) -> None:
    module(tmp_path, "virtio", "virtio-ring")
    module(tmp_path, "virtio_ring", "")
    module(tmp_path, "virtio-blk", "virtio,crc,virtio_ring", packed=True)
    (tmp_path / "modules.builtin").write_text("kernel/lib/crc.ko\nkernel/fs/ext4/ext4.ko\n")
    modules = Modules(tmp_path)
    assert modules.order(("virtio_blk", "ext4", "virtio")) == ("virtio_ring", "virtio", "virtio_blk")
    assert modules.read("virtio_blk").startswith(b"\x7fELF")
    with pytest.raises(AgentError, match=r"the kernel has no module nvme$"):
        modules.order(("nvme",))
    module(tmp_path, "odd", "missing")
    with pytest.raises(AgentError, match="no module missing, which odd needs"):
        Modules(tmp_path).order(("odd",))


def test_a_kernel_without_readable_modules_is_refused(tmp_path: Path) -> None:
    (tmp_path / "virtio.ko.zst").write_bytes(b"x")
    with pytest.raises(AgentError, match="holds no modules this recipe can read"):
        Modules(tmp_path)


def small_tree() -> Tree:
    tree = Tree()
    tree.file("etc/app/conf", "hello", 0o600)
    tree.link("bin/sh", "busybox")
    tree.file("bin/busybox", b"\x7fELF", 0o755)
    tree.dir("root", 0o700)
    tree.char("dev/console", 0o600, 5, 1)
    return tree


def test_a_tree_becomes_an_archive_the_kernels_format_has(tmp_path: Path) -> None:
    archive = small_tree().cpio()
    listed = subprocess.run(
        ["cpio", "-tv", "--numeric-uid-gid"], input=archive, capture_output=True, check=True, env={"TZ": "UTC"}
    )
    rows = [(line.split()[0], line.split()[2:4], line.split()[-1]) for line in listed.stdout.decode().splitlines()]
    assert rows == [
        ("drwxr-xr-x", ["0", "0"], "bin"),
        ("-rwxr-xr-x", ["0", "0"], "bin/busybox"),
        ("lrwxrwxrwx", ["0", "0"], "busybox"),
        ("drwxr-xr-x", ["0", "0"], "dev"),
        ("crw-------", ["0", "0"], "dev/console"),
        ("drwxr-xr-x", ["0", "0"], "etc"),
        ("drwxr-xr-x", ["0", "0"], "etc/app"),
        ("-rw-------", ["0", "0"], "etc/app/conf"),
        ("drwx------", ["0", "0"], "root"),
    ]
    assert archive == small_tree().cpio()


def test_a_tree_becomes_a_tar_without_devices() -> None:
    archive = small_tree().tar()
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        members = {member.name: (member.type, member.mode, member.uid, member.mtime) for member in tar}
        conf = tar.extractfile("etc/app/conf")
        assert conf and conf.read() == b"hello"
        assert tar.getmember("bin/sh").linkname == "busybox"
    assert members["root"] == (tarfile.DIRTYPE, 0o700, 0, 0)
    assert members["bin/busybox"] == (tarfile.REGTYPE, 0o755, 0, 0)
    assert "dev/console" not in members
    assert archive == small_tree().tar()


@pytest.mark.parametrize("path", ["/etc/passwd", "a/../../b", ".."])
def test_a_tree_holds_nothing_outside_itself(path: str) -> None:
    with pytest.raises(ValueError, match="is not a path inside the tree"):
        Tree().file(path, b"")


def test_the_boot_record_has_one_active_partition_and_a_signature() -> None:
    record = master_boot_record(b"\xfa" * 440)
    assert len(record) == 512
    assert (record[440:444], record[510:]) == (b"MSTR", b"\x55\xaa")
    assert record[446:462] == bytes.fromhex("80feffff0efeffff0008000000c00000")
    assert record[462:510] == bytes(48)
    with pytest.raises(AgentError, match="room for 440"):
        master_boot_record(b"\xfa" * 441)


@pytest.mark.real
async def test_a_package_apt_does_not_know_is_named(tmp_path: Path) -> None:
    from agent.images.packages import with_dependencies

    with pytest.raises((AgentError, CommandFailed), match="no-such-package-here"):
        await with_dependencies(("no-such-package-here",))


@pytest.mark.real
async def test_a_damaged_package_is_fetched_again(tmp_path: Path) -> None:
    from agent.images.packages import fetch

    said: list[str] = []
    (archive,) = await fetch(("busybox-static",), tmp_path, said.append)
    good = sha256(archive)
    assert said == ["fetching 1 Debian packages"]
    archive.write_bytes(b"damaged")
    assert await fetch(("busybox-static",), tmp_path, said.append) == (archive,)
    assert (sha256(archive), len(said)) == (good, 2)
    await fetch(("busybox-static",), tmp_path, said.append)
    assert len(said) == 2
    assert listing(tmp_path) == [".lock", "debs"]
