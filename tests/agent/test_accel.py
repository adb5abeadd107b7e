"""The accelerator is chosen by starting guests."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

import pytest

from agent import accel, process
from agent.errors import AgentError
from agent.run import run
from tests.contract.engine_guest import write_image

pytestmark = pytest.mark.real
QEMU = "qemu-system-x86_64"


@pytest.fixture
async def images(tmp_path: Path) -> Path:
    """An image directory whose `tiny` boots but is never ready."""
    folder = tmp_path / "images"
    folder.mkdir()
    raw = write_image(folder / "guest.img", deaf=True)
    await run("qemu-img", "convert", "-q", "-f", "raw", "-O", "qcow2", raw, folder / "tiny.qcow2")
    return folder


def _wrapper(tmp_path: Path, body: str) -> str:
    """A stand-in for QEMU; `"$@"` hands its words on."""
    program = tmp_path / "qemu-stand-in"
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(0o755)
    return str(program)


async def test_tcg_is_used_when_asked_for_and_really_runs(tmp_path: Path) -> None:
    choice = await accel.choose("tcg", binary=QEMU, image_dir=None, state_dir=tmp_path)
    assert choice.accel == "tcg"
    assert choice.detail.startswith("tcg: as asked; QEMU emulator version")
    assert os.listdir(tmp_path) == []  # noqa: PTH208


async def test_without_a_kvm_device_auto_is_tcg_and_says_so(tmp_path: Path) -> None:
    choice = await accel.choose("auto", binary=QEMU, image_dir=None, state_dir=tmp_path, device=tmp_path / "kvm")
    assert choice.accel == "tcg"
    assert choice.detail.startswith(f"tcg: there is no {tmp_path / 'kvm'}; ")


async def test_without_a_kvm_device_kvm_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AgentError, match="--accel kvm but does not work here: there is no"):
        await accel.choose("kvm", binary=QEMU, image_dir=None, state_dir=tmp_path, device=tmp_path / "kvm")


async def test_a_qemu_that_runs_no_guest_is_an_error_with_its_complaint(tmp_path: Path) -> None:
    binary = _wrapper(tmp_path, f'case "$*" in --version) exec {QEMU} --version;; esac; echo "no such thing" >&2; exit 1')
    with pytest.raises(AgentError, match="cannot run a guest even without KVM: no such thing"):
        await accel.choose("tcg", binary=binary, image_dir=None, state_dir=tmp_path)


async def test_a_guest_that_ends_without_having_run_proves_nothing(tmp_path: Path) -> None:
    binary = _wrapper(tmp_path, f'case "$*" in --version) exec {QEMU} --version;; esac; exit 0')
    with pytest.raises(AgentError, match="without having run"):
        await accel.choose("tcg", binary=binary, image_dir=None, state_dir=tmp_path)


@pytest.fixture
def any_device(tmp_path: Path) -> Path:
    """Stands for /dev/kvm where the stand-in below never opens it."""
    device = tmp_path / "kvm"
    device.touch()
    return device


def _kvm_is_tcg(tmp_path: Path, then: str = "") -> str:
    """QEMU whose KVM is emulation, so that what follows a working boot sector can be seen on any host. Counts its starts."""
    return _wrapper(
        tmp_path,
        f'echo "$*" >> {tmp_path}/starts\n'
        'for word; do shift; case "$word" in kvm) word=tcg;; host) word=max;; esac; set -- "$@" "$word"; done\n'
        f"{then}\n"
        f'exec {QEMU} "$@"',
    )


async def test_kvm_that_runs_a_boot_sector_but_boots_no_system_is_not_used(
    tmp_path: Path, images: Path, any_device: Path
) -> None:
    binary, state = _kvm_is_tcg(tmp_path), tmp_path / "state"
    choice = await accel.choose("auto", binary=binary, image_dir=images, state_dir=state, device=any_device, limit=3)
    assert choice.accel == "tcg"
    assert "does not boot a guest (no ready line of tiny.qcow2 within 3 s)" in choice.detail
    assert sorted(path.name for path in state.iterdir()) == ["accel.json"]


async def test_kvm_that_boots_the_image_to_its_ready_line_is_used_and_not_tried_again(
    tmp_path: Path, images: Path, any_device: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accel, "PROOF_LINE", b"guest: boot 1")
    binary, state = _kvm_is_tcg(tmp_path), tmp_path / "state"
    for _ in range(2):
        choice = await accel.choose("auto", binary=binary, image_dir=images, state_dir=state, device=any_device)
        assert choice.accel == "kvm"
        assert choice.detail.startswith("kvm, QEMU emulator version")
    starts = (tmp_path / "starts").read_text().splitlines()
    assert [line.count("-accel kvm") for line in starts] == [0, 1, 1, 0]


async def test_another_image_or_boot_makes_the_proof_run_again(
    tmp_path: Path, images: Path, any_device: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    binary, state = _kvm_is_tcg(tmp_path), tmp_path / "state"

    async def choose() -> str:
        choice = await accel.choose("auto", binary=binary, image_dir=images, state_dir=state, device=any_device, limit=3)
        return choice.accel

    assert await choose() == "tcg"
    monkeypatch.setattr(accel, "PROOF_LINE", b"guest: boot 1")
    assert await choose() == "tcg", "kept from the first proof"
    os.utime(images / "tiny.qcow2", ns=(1, 1))
    assert await choose() == "kvm"
    (state / "accel.json").write_text("torn")
    assert await choose() == "kvm"


async def test_inside_a_virtual_machine_a_boot_sector_alone_is_no_proof_and_not_kept(
    tmp_path: Path, any_device: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    binary, state = _kvm_is_tcg(tmp_path), tmp_path / "state"
    monkeypatch.setattr(accel, "runs_under_hypervisor", lambda: True)
    choice = await accel.choose("auto", binary=binary, image_dir=tmp_path, state_dir=state, device=any_device)
    assert choice.accel == "tcg"
    assert "muster image build tiny" in choice.detail
    assert not state.exists()


async def test_on_bare_metal_without_the_image_the_boot_sector_is_the_proof(
    tmp_path: Path, any_device: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    binary, state = _kvm_is_tcg(tmp_path), tmp_path / "state"
    monkeypatch.setattr(accel, "runs_under_hypervisor", lambda: False)
    choice = await accel.choose("auto", binary=binary, image_dir=None, state_dir=state, device=any_device)
    assert choice.accel == "kvm"


async def test_a_proof_that_a_killed_agent_left_running_is_ended_by_the_next(tmp_path: Path, images: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    stale = process.spawn(("sleep", "600"), cwd=work, log=work / "log")
    process.write_record(work / "process.json", stale)
    assert not await accel.boots(images / "tiny.qcow2", "tcg", binary=QEMU, work_dir=work, limit=1)
    assert not process.alive(stale)
    assert not work.exists()


async def test_the_image_is_left_untouched_by_the_proof(tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accel, "PROOF_LINE", b"guest: boot 1")
    before = (images / "tiny.qcow2").read_bytes()
    assert await accel.boots(images / "tiny.qcow2", "tcg", binary=QEMU, work_dir=tmp_path / "work", limit=20)
    assert (images / "tiny.qcow2").read_bytes() == before


async def test_an_image_that_opens_other_files_is_not_booted(tmp_path: Path, images: Path, any_device: Path) -> None:
    (images / "tiny.qcow2").unlink()
    await run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", images / "guest.img", images / "tiny.qcow2")
    binary, state = _kvm_is_tcg(tmp_path), tmp_path / "state"
    choice = await accel.choose("auto", binary=binary, image_dir=images, state_dir=state, device=any_device)
    assert choice.accel == "tcg"
    assert "backing file" in choice.detail


async def test_a_cancelled_proof_leaves_no_guest(tmp_path: Path, images: Path) -> None:
    work = tmp_path / "work"
    proving = asyncio.ensure_future(accel.boots(images / "tiny.qcow2", "tcg", binary=QEMU, work_dir=work, limit=60))
    async with asyncio.timeout(20):
        while not (work / "process.json").exists():  # noqa: ASYNC110 a thread writes it
            await asyncio.sleep(0.01)
    record = process.ProcessRecord(**json.loads((work / "process.json").read_text()))
    proving.cancel()
    await asyncio.gather(proving, return_exceptions=True)
    assert not process.alive(record)
    assert not work.exists()
