"""The file driver keeps its promises with real qcow2 files."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from agent.errors import AgentError, DoesNotFit, ImageMissing, ImageRefused
from agent.machine import Disk, Unusable
from agent.run import run
from agent.storage.base import Storage
from agent.storage.file import FileStorage
from specs.names import VmId
from tests.contract.storage_contract import VM, StorageContract, StorageRig

pytestmark = pytest.mark.real
MIB = 1024 * 1024


class FileRig(StorageRig):
    """`base` is a qcow2 file, `other` a raw one; each begins with its name."""

    base_mib = 4

    def __init__(self, runtime_dir: Path, image_dir: Path) -> None:
        super().__init__(runtime_dir)
        self.image_dir = image_dir

    async def make_images(self) -> None:
        self.image_dir.mkdir()
        for name in ("base", "other"):
            (self.image_dir / f"{name}.raw").write_bytes(name.encode().ljust(self.base_mib * MIB, b"\0"))
        raw = self.image_dir / "base.raw"
        await run("qemu-img", "convert", "-q", "-f", "raw", "-O", "qcow2", raw, self.image_dir / "base.qcow2")
        raw.unlink()

    async def make_rootfs_image(self, name: str) -> Path:
        image, tree = self.image_dir / name, self.image_dir.parent / "tree"
        image.mkdir()
        tree.mkdir()
        (tree / "hello").write_text("from the image")
        (image / "vmlinux").write_bytes(b"kernel")
        await run("mke2fs", "-q", "-F", "-t", "ext4", "-d", tree, image / "rootfs.ext4", "8M")
        return image

    def new_storage(self) -> Storage:
        return FileStorage(self.image_dir, self.runtime_dir)

    async def contents(self, disk: Disk) -> tuple[str, int]:
        facts = json.loads(await run("qemu-img", "info", "--output=json", "-f", disk.format, disk.path))
        flat = disk.path.with_name("flat.raw")
        await run("qemu-img", "convert", "-q", "-f", disk.format, "-O", "raw", disk.path, flat)
        name = flat.read_bytes()[:16].rstrip(b"\0").decode()
        flat.unlink()
        return name, facts["virtual-size"] // MIB

    async def leave_half_made(self, vm_id: VmId) -> None:
        (self.folder(vm_id) / ".disk.qcow2.new").write_bytes(b"QFI\xfb half")
        (self.folder(vm_id) / ".disk.raw.new").write_bytes(b"half")

    async def remains(self, vm_id: VmId) -> list[str]:
        return [path.name for path in self.folder(vm_id).iterdir()]


@pytest.fixture
async def storage_rig(tmp_path: Path) -> FileRig:
    rig = FileRig(tmp_path / "runtime", tmp_path / "images")
    await rig.make_images()
    return rig


class TestFileStorage(StorageContract):
    """All of the contract."""

    async def test_an_overlay_names_its_own_link_to_the_base_and_the_bases_format(self, storage_rig: FileRig) -> None:
        disk = await storage_rig.new_storage().ensure_disk(VM, storage_rig.folder(), "other", 64)
        facts = json.loads(await run("qemu-img", "info", "--output=json", "-f", "qcow2", disk.path))
        assert facts["backing-filename"] == "base.raw" and facts["backing-filename-format"] == "raw"
        assert (storage_rig.image_dir / "other.raw").samefile(disk.path.with_name("base.raw"))

    async def test_an_image_built_anew_does_not_change_the_disks_made_before(self, storage_rig: FileRig) -> None:
        disk = await storage_rig.new_storage().ensure_disk(VM, storage_rig.folder(), "other", 64)
        anew = storage_rig.image_dir / ".other.new"
        anew.write_bytes(b"changed".ljust(MIB, b"\0"))
        anew.rename(storage_rig.image_dir / "other.raw")
        assert await storage_rig.contents(disk) == ("other", 64)

    async def test_an_image_on_another_filesystem_is_named_itself(
        self, storage_rig: FileRig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def across(*_: object) -> None:
            raise OSError(errno.EXDEV, "Invalid cross-device link")

        monkeypatch.setattr(os, "link", across)
        disk = await storage_rig.new_storage().ensure_disk(VM, storage_rig.folder(), "other", 64)
        facts = json.loads(await run("qemu-img", "info", "--output=json", "-f", "qcow2", disk.path))
        assert facts["backing-filename"] == str((storage_rig.image_dir / "other.raw").resolve())

    async def test_a_disk_takes_next_to_no_room(self, storage_rig: FileRig) -> None:
        disk = await storage_rig.new_storage().ensure_disk(VM, storage_rig.folder(), "base", 1024 * 1024)
        assert disk.path.stat().st_blocks * 512 < MIB

    async def test_an_image_that_opens_other_files_is_refused(self, storage_rig: FileRig) -> None:
        evil = storage_rig.image_dir / "evil.qcow2"
        await run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", storage_rig.image_dir / "other.raw", evil)
        with pytest.raises(ImageRefused, match="backing file"):
            await storage_rig.new_storage().ensure_disk(VM, storage_rig.folder(), "evil", 64)
        assert await storage_rig.remains(VM) == []

    async def test_a_root_filesystem_fills_its_disk_and_its_image_stays_as_it_was(self, storage_rig: FileRig) -> None:
        image = await storage_rig.make_rootfs_image("micro")
        before = (image / "rootfs.ext4").read_bytes()
        storage = storage_rig.new_storage()
        assert await storage.images("rootfs") == ("micro",)
        disk = await storage.ensure_disk(VM, storage_rig.folder(), "micro", 256, "rootfs")
        assert disk == Disk(storage_rig.folder() / "disk.raw", "raw")
        superblock = await run("dumpe2fs", "-h", disk.path)
        facts = dict(line.split(":", 1) for line in superblock.splitlines() if ":" in line)
        assert int(facts["Block count"]) * int(facts["Block size"]) == 256 * MIB == disk.path.stat().st_size
        assert await run("debugfs", "-R", "cat /hello", disk.path) == "from the image"
        assert disk.path.stat().st_blocks * 512 < 64 * MIB, "what the image does not fill takes no room"
        assert (image / "rootfs.ext4").read_bytes() == before

    async def test_a_root_filesystem_larger_than_the_disk_is_refused(self, storage_rig: FileRig) -> None:
        await storage_rig.make_rootfs_image("micro")
        with pytest.raises(ImageRefused, match=r"8 MiB large.*7 MiB"):
            await storage_rig.new_storage().ensure_disk(VM, storage_rig.folder(), "micro", 7, "rootfs")
        assert await storage_rig.remains(VM) == []

    async def test_a_root_filesystem_that_is_none_is_refused_and_leaves_nothing(self, storage_rig: FileRig) -> None:
        image = await storage_rig.make_rootfs_image("micro")
        (image / "rootfs.ext4").write_bytes(b"no filesystem" * 1000)
        with pytest.raises(ImageRefused, match="image micro is no sound ext4 filesystem"):
            await storage_rig.new_storage().ensure_disk(VM, storage_rig.folder(), "micro", 64, "rootfs")
        assert await storage_rig.remains(VM) == []

    async def test_a_full_filesystem_is_no_room_for_a_raw_disk_either(self, storage_rig: FileRig, tmp_path: Path) -> None:
        full = tmp_path / "full"
        full.mkdir()
        (storage_rig.image_dir / "other.raw").write_bytes(b"x" * MIB * 4)
        await run("mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", full)
        try:
            (folder := full / VM).mkdir()
            with pytest.raises(DoesNotFit, match="no room"):
                await FileStorage(storage_rig.image_dir, full).ensure_disk(VM, folder, "other", 64, "raw")
            assert list(folder.iterdir()) == []
        finally:
            await run("umount", full)

    async def test_paths_with_special_characters_reach_qemu_img_whole(self, tmp_path: Path) -> None:
        rig = FileRig(tmp_path / "run,time dir=1", tmp_path / 'ima"ges, dir=ü')
        await rig.make_images()
        disk = await rig.new_storage().ensure_disk(VM, rig.folder(), "base", 64)
        assert await rig.contents(disk) == ("base", 64)

    async def test_a_full_filesystem_is_no_room_and_leaves_nothing(self, storage_rig: FileRig, tmp_path: Path) -> None:
        full = tmp_path / "full"
        full.mkdir()
        await run("mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", full)
        try:
            folder = full / VM
            folder.mkdir()
            with pytest.raises(DoesNotFit, match="no room"):
                await FileStorage(storage_rig.image_dir, full).ensure_disk(VM, folder, "base", 64)
            assert list(folder.iterdir()) == []
        finally:
            await run("umount", full)

    async def test_a_folder_that_is_gone_is_a_failure_that_names_it(self, storage_rig: FileRig, tmp_path: Path) -> None:
        with pytest.raises(AgentError, match=r"image base cannot be linked into .*/gone"):
            await storage_rig.new_storage().ensure_disk(VM, tmp_path / "gone", "base", 64)

    async def test_no_image_directory_is_no_images(self, storage_rig: FileRig, tmp_path: Path) -> None:
        storage = FileStorage(tmp_path / "absent", storage_rig.runtime_dir)
        assert await storage.images() == ()
        with pytest.raises(ImageMissing, match="none at all"):
            await storage.ensure_disk(VM, storage_rig.folder(), "base", 64)

    async def test_without_qemu_img_the_storage_says_what_to_install(
        self, storage_rig: FileRig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PATH", "/nonexistent")
        probe = await storage_rig.new_storage().probe()
        assert isinstance(probe, Unusable)
        assert "apt-get install qemu-utils" in probe.why
