"""Disks move between two agents that keep them as files, or as volumes of a stand-in of ZFS."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agent.run import run
from agent.storage.file import FileStorage
from tests.contract.storage_zvol_rig import ZvolRig
from tests.contract.transfer_promises import MIB, Host, TransferPromises, start_host
from tests.standins import zfs as standin

pytestmark = pytest.mark.real  # qemu-img


class TestFiles(TransferPromises):
    native = "qcow2"

    @pytest.fixture
    async def hosts(self, tmp_path: Path) -> AsyncIterator[tuple[Host, Host]]:
        images = tmp_path / "images"
        images.mkdir()
        for name in ("base", "other"):
            (images / f"{name}.raw").write_bytes(name.encode().ljust(4 * MIB, b"\0"))
        folders = [tmp_path / name for name in ("here", "there")]
        here, there = [await start_host(folder, FileStorage(images, folder / "vms")) for folder in folders]
        yield here, there
        for host in (here, there):
            await host.agent.stop()

    async def test_a_disk_that_opens_other_files_is_refused(self, hosts: tuple[Host, Host], tmp_path: Path) -> None:
        here, _ = hosts
        await here.make("vm-a", "base", 16)
        evil = tmp_path / "evil.qcow2"
        await run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", tmp_path / "images" / "other.raw", evil)
        with pytest.raises(Exception, match="backing file"):
            await here.import_("vm-a", evil.read_bytes())
        assert await here.begins_with("vm-a") == b"base"

    async def test_a_stream_of_zfs_is_refused_with_what_to_do(self, hosts: tuple[Host, Host]) -> None:
        here, _ = hosts
        await here.make("vm-a", "base", 16)
        with pytest.raises(Exception, match="keeps disks as files and cannot read a ZFS stream"):
            await here.import_("vm-a", b"not a qcow2 file")


class TestVolumes(TransferPromises):
    native = "zfs"

    @pytest.fixture
    async def hosts(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[Host, Host]]:
        state = tmp_path / "zfs"
        program = standin.install(tmp_path / "bin")
        standin.make_pool(state, "tank")
        monkeypatch.setenv(standin.ROOT, str(state))
        monkeypatch.setenv("PATH", f"{program.parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        here, there = [await start_zvol_host(tmp_path / name, f"tank/{name}", state / "dev") for name in ("here", "there")]
        yield here, there
        for host in (here, there):
            await host.agent.stop()

    async def test_a_qcow2_file_becomes_a_volume(self, hosts: tuple[Host, Host], tmp_path: Path) -> None:
        here, _ = hosts
        await here.make("vm-a", "base", 16)
        raw, disk = tmp_path / "raw", tmp_path / "disk.qcow2"
        raw.write_bytes(b"from a file".ljust(MIB, b"\0"))
        await run("qemu-img", "convert", "-q", "-f", "raw", "-O", "qcow2", raw, disk)
        await here.import_("vm-a", disk.read_bytes())
        assert await here.begins_with("vm-a") == b"from a file"


async def start_zvol_host(folder: Path, parent: str, devices: Path) -> Host:
    await asyncio.to_thread(folder.mkdir)
    rig = ZvolRig(folder, parent, devices)
    await rig.set_up()
    return await start_host(folder, rig.new_storage())
