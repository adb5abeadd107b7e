"""What lies in the runtime folder and is no VM's, and a disk without room: neither shows as a VM nor keeps one running."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.errors import DoesNotFit
from agent.settings import default_data_dir
from tests.agent.runtime_rig import NOBODY, Rig, request


async def test_files_links_and_odd_folders_among_the_vms_are_nobodys_and_stay(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "lost+found").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "lost+found")
    runtime = await rig.boot()
    assert runtime.list() == []
    await runtime.delete("notes.txt", NOBODY)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (await runtime.create(request("vm-a"), NOBODY, wait=True))[1] == "created"
    await rig.kill(runtime)
    assert [vm.id for vm in (await rig.boot()).list()] == ["vm-a"]
    assert (tmp_path / "lost+found").is_dir() and (tmp_path / "link").is_symlink()


async def test_a_vm_is_stopped_even_if_the_disk_has_no_room_to_record_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(tmp_path)
    runtime = await rig.boot()
    await runtime.create(request("vm-a"), NOBODY, wait=True)

    def full(*_: object) -> None:
        raise DoesNotFit("writing vm.json failed: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("agent.records.write_durably", full)
        vm, _ = await runtime.set_power("vm-a", "stopped", NOBODY, wait=True)
        assert (vm.state, vm.reason, rig.machines.running()) == ("stopped", "", {})
        with pytest.raises(DoesNotFit):
            await runtime.set_power("vm-a", "running", NOBODY, wait=True)
        assert rig.machines.running() == {}, "what cannot be recorded is not started"
    await runtime.set_power("vm-a", "running", NOBODY, wait=True)
    assert set(rig.machines.running()) == {"vm-a"}


def test_the_default_data_folder_follows_the_xdg_variable_for_ordinary_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_DATA_HOME", "/data/of/me")
    assert default_data_dir() == Path("/data/of/me/muster")
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert default_data_dir() == Path("/home/me/.local/share/muster")
