"""What the firecracker driver does beyond the contract: its jail, what the guest is given, hostile circumstances."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
from pycdlib import PyCdlib

from agent.engines import firecracker, firecracker_api, firecracker_probe, processes
from agent.engines.firecracker import FirecrackerEngine
from agent.engines.firecracker_config import kernel_arguments
from agent.engines.firecracker_folder import find_processes
from agent.engines.firecracker_jail import find_binaries, find_cgroups, stray_cgroups, uid_of
from agent.errors import AgentError, ImageMissing, Unsupported
from agent.machine import Disk, Machine, Stopped, Unusable, Usable
from agent.seed import seed_files
from tests.contract.engine_contract import until
from tests.contract.engine_firecracker_rig import FirecrackerRig, own_namespace, write_image
from tests.firecracker_fixture import firecracker_binary
from tests.netns import command

pytestmark = pytest.mark.real


@pytest.fixture
def namespace() -> Iterator[None]:
    with own_namespace():
        yield


@pytest.fixture
async def rig(tmp_path: Path, namespace: None) -> AsyncIterator[FirecrackerRig]:
    rig = FirecrackerRig(tmp_path / "runtime")
    yield rig
    await rig.close()
    assert find_processes(rig.runtime_dir) == {}
    assert stray_cgroups(rig.runtime_dir, frozenset()) == []


async def started(rig: FirecrackerRig, image: str = "guest") -> tuple[Machine, int]:
    machine = await rig.make_machine("vm-a", image)
    await rig.engine.prepare(machine)
    await rig.engine.start(machine)
    return machine, await rig.pid(machine)


def of_process(pid: int) -> tuple[str, set[str]]:
    """The kernel's account of a process, and the names of what it sees in `/`."""
    return Path(f"/proc/{pid}/status").read_text(), {path.name for path in Path(f"/proc/{pid}/root").iterdir()}


async def test_the_guest_is_given_its_arguments_disks_and_network_and_the_seed_says_the_same(rig: FirecrackerRig) -> None:
    plain = await rig.make_machine("vm-a")
    request = plain.request.model_copy(update={"name": "Web.1", "user_data": "#!/bin/sh\necho hi\n", "mem": 96, "cpu": 2})
    machine = replace(plain, request=request, nic=replace(plain.nic, dns=("10.0.0.53", "fd00::53", "10.0.0.54", "10.0.0.55")))
    await rig.engine.prepare(machine)
    await rig.engine.start(machine)
    told = await firecracker_api.get(rig.root(machine), "/vm/config")
    static = "ip=10.77.0.2::10.77.0.1:255.255.0.0:web-1:eth0:off:10.0.0.53:10.0.0.54"
    assert told["boot-source"]["boot_args"].endswith(static)
    assert (told["machine-config"]["vcpu_count"], told["machine-config"]["mem_size_mib"]) == (2, 96)
    assert [(drive["drive_id"], drive["is_read_only"], drive["cache_type"]) for drive in told["drives"]] == [
        ("root", False, "Writeback"),
        ("seed", True, "Unsafe"),
    ]
    (interface,) = told["network-interfaces"]
    assert (interface["host_dev_name"], interface["guest_mac"]) == (machine.nic.link, machine.nic.lease.mac)
    # Not only the VMM: the guest itself says what it was started with.
    await until(lambda: static in rig.console(machine).split("guest: arguments ")[-1])
    disc = PyCdlib()
    disc.open(str(rig.root(machine) / "seed.iso"))
    for name, content in seed_files(machine).items():
        with disc.open_file_from_iso(joliet_path=f"/{name}") as file:
            assert file.read() == content, name
    disc.close()
    assert (rig.root(machine) / "disk").samefile(machine.folder / "disk.raw")


async def test_each_vm_is_jailed_as_a_user_of_its_own_without_privileges(rig: FirecrackerRig) -> None:
    one, first = await started(rig)
    other = await rig.make_machine("vm-b")
    lease = replace(other.nic.lease, ip=other.nic.lease.ip + 1)
    other = replace(other, nic=replace(other.nic, lease=lease))
    await rig.engine.prepare(other)
    await rig.engine.start(other)
    second = await rig.pid(other)
    uids = {psutil.Process(pid).uids().effective for pid in (first, second)}
    assert uids == {uid_of(one, rig.runtime_dir), uid_of(other, rig.runtime_dir)}
    assert len(uids) == 2 and 0 not in uids
    status, seen = of_process(first)
    assert "CapEff:\t0000000000000000" in status and "NoNewPrivs:\t1" in status and "Seccomp:\t2" in status
    assert {"disk", "seed.iso", "vmlinux"} <= seen and not seen & {"etc", "proc", "usr", "disk.raw"}
    assert f"user {uid_of(one, rig.runtime_dir)}" in command("ip", "-d", "link", "show", one.nic.link)
    assert (rig.image_dir / "guest" / "vmlinux").stat().st_uid == 0


async def test_memory_is_limited_where_the_host_can_and_the_group_goes_with_the_vm(rig: FirecrackerRig) -> None:
    machine, _ = await started(rig)
    cgroups = find_cgroups()
    assert cgroups is not None
    (group,) = stray_cgroups(rig.runtime_dir, frozenset())
    assert int((group / cgroups.file).read_text()) == (machine.request.mem + 256) * 1024 * 1024
    await rig.engine.stop(machine, timedelta(0))
    assert stray_cgroups(rig.runtime_dir, frozenset()) == []


async def test_a_group_of_a_vm_nobody_knows_is_a_leftover(rig: FirecrackerRig) -> None:
    machine, pid = await started(rig)
    await rig.crash(machine, pid)
    (group,) = stray_cgroups(rig.runtime_dir, frozenset())
    assert await rig.engine.leftovers(frozenset({machine.id})) == ()
    assert await rig.engine.leftovers(frozenset()) == (f"control group {group}",)
    assert not group.exists()


async def test_a_guest_deaf_to_ctrl_alt_del_is_killed_after_the_grace(rig: FirecrackerRig) -> None:
    machine, pid = await started(rig, "deaf")
    await rig.boots(machine)
    await rig.engine.stop(machine, timedelta(seconds=0.5))
    assert not rig.is_alive(pid)
    assert await rig.state(machine) == Stopped()
    assert (machine.folder / "exit.json").read_text() == '{"status": -9}'


async def test_a_firecracker_that_hangs_is_killed(rig: FirecrackerRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(firecracker_api, "LIMIT", 0.3)
    machine, pid = await started(rig)
    os.kill(pid, signal.SIGSTOP)
    await rig.engine.stop(machine, timedelta(seconds=20))
    assert not rig.is_alive(pid)


async def test_a_firecracker_that_never_says_it_runs_is_not_left_running(
    rig: FirecrackerRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = await rig.make_machine("vm-a")
    await rig.engine.prepare(machine)
    monkeypatch.setattr(firecracker, "START_LIMIT", 0.3)
    monkeypatch.setattr(firecracker_api, "API", "another.sock")
    with pytest.raises(AgentError, match=r"VM vm-a did not say within 0.3 s that it runs: .*another.sock"):
        await rig.engine.start(machine)
    assert find_processes(rig.runtime_dir) == {}


async def test_a_guest_that_ends_as_soon_as_it_is_up_has_started_and_exited(rig: FirecrackerRig) -> None:
    machine = await rig.make_machine("vm-a", "brief")
    await rig.engine.prepare(machine)
    await rig.engine.start(machine)
    assert await rig.next_exit() == machine.id
    state = await rig.state(machine)
    assert isinstance(state, Stopped) and state.reason == "exited"


async def test_a_kernel_that_is_none_is_told_with_firecrackers_own_words(rig: FirecrackerRig) -> None:
    (rig.image_dir / "guest" / "vmlinux").write_bytes(b"no kernel")
    machine = await rig.make_machine("vm-a")
    await rig.engine.prepare(machine)
    with pytest.raises(AgentError, match=r"(?s)Firecracker did not start VM vm-a: .*[Kk]ernel"):
        await rig.engine.start(machine)
    state = await rig.state(machine)
    assert isinstance(state, Stopped) and state.reason == "crashed"


async def test_without_its_tap_a_vm_is_not_started_and_a_tap_in_use_is_named(rig: FirecrackerRig) -> None:
    machine = await rig.make_machine("vm-a")
    await rig.engine.prepare(machine)
    command("ip", "link", "delete", machine.nic.link)
    with pytest.raises(AgentError, match=f"no network device {machine.nic.link} for VM vm-a"):
        await rig.engine.start(machine)
    other, _ = await rig.started("vm-b")
    with pytest.raises(AgentError, match=f"the tap {other.nic.link} cannot be given to user"):
        await rig.engine.start(replace(machine, nic=replace(machine.nic, link=other.nic.link)))
    with pytest.raises(AgentError, match="it needs a tap, on --network bridge"):
        await rig.engine.start(replace(machine, nic=replace(machine.nic, kind="user", link="")))
    assert set(find_processes(rig.runtime_dir)) == {other.id}


async def test_a_disk_may_be_a_block_device(rig: FirecrackerRig) -> None:
    plain = await rig.make_machine("vm-a")
    assert plain.disk is not None
    device = command("losetup", "--find", "--show", str(plain.disk.path)).strip()
    try:
        machine = replace(plain, disk=Disk(Path(device), "raw"))
        await rig.engine.prepare(machine)
        await rig.engine.start(machine)
        assert await rig.boots(machine) == 1
        await rig.engine.stop(machine, timedelta(seconds=20))
        assert (machine.folder / "disk.raw").read_bytes()[512] == 1, "the guest's count is on the device"
        await rig.engine.destroy(machine.id, machine.folder)
    finally:
        command("losetup", "--detach", device)


async def test_a_vm_keeps_its_kernel_when_the_image_is_built_anew_or_gone(rig: FirecrackerRig) -> None:
    machine, _ = await started(rig)
    await rig.engine.stop(machine, timedelta(seconds=20))
    shutil.rmtree(rig.image_dir / "guest")
    write_image(rig.image_dir / "guest", mode=2)
    await rig.engine.prepare(machine)
    await rig.engine.start(machine)
    assert await rig.boots(machine) == 2
    await rig.engine.stop(machine, timedelta(0))
    shutil.rmtree(rig.image_dir / "guest")
    await rig.engine.prepare(machine)
    await rig.engine.start(machine)
    assert await rig.boots(machine) == 3


async def test_an_initrd_is_given_to_the_guest_and_one_that_leads_elsewhere_is_not(rig: FirecrackerRig) -> None:
    (rig.image_dir / "guest" / "initrd").write_bytes(b"initramfs")
    (rig.image_dir / "deaf" / "initrd").symlink_to("/etc/shadow")
    machine, _ = await started(rig)
    told = await firecracker_api.get(rig.root(machine), "/vm/config")
    assert told["boot-source"]["initrd_path"] == "/initrd"
    assert (rig.root(machine) / "initrd").read_bytes() == b"initramfs"
    other = await rig.make_machine("vm-b", "deaf")
    await rig.engine.prepare(other)
    assert not (other.folder / "initrd").exists()


async def test_an_image_for_root_alone_is_copied_and_stays_for_root_alone(rig: FirecrackerRig) -> None:
    kernel = rig.image_dir / "guest" / "vmlinux"
    kernel.chmod(0o600)
    machine, _ = await started(rig)
    assert await rig.boots(machine) == 1
    assert (kernel.stat().st_mode & 0o777, kernel.stat().st_nlink) == (0o600, 1)


async def test_a_missing_image_is_told_by_name(rig: FirecrackerRig) -> None:
    machine = await rig.make_machine("vm-a")
    shutil.rmtree(rig.image_dir / "guest")
    with pytest.raises(ImageMissing, match=r"image guest is not in .* with vmlinux and rootfs\.ext4"):
        await rig.engine.prepare(machine)


async def test_more_processors_than_a_microvm_has_are_refused(rig: FirecrackerRig) -> None:
    machine = await rig.make_machine("vm-a")
    with pytest.raises(Unsupported, match="cpu 33 is more than the 32 processors"):
        rig.engine.check(machine.request.model_copy(update={"cpu": 33}))
    assert rig.engine.check(machine.request) == ()


async def test_what_a_guest_says_cannot_fill_the_disk(rig: FirecrackerRig, monkeypatch: pytest.MonkeyPatch) -> None:
    machine, pid = await started(rig)
    await rig.boots(machine)
    monkeypatch.setattr(processes, "CONSOLE_MAX", 4)
    await rig.pid(machine)
    assert rig.console(machine) == ""
    assert "guest: boot 1" in (machine.folder / "console.log.1").read_text()
    await rig.power_off(machine)
    await until(lambda: not rig.is_alive(pid))
    assert "exiting successfully" in rig.console(machine) and "\0" not in rig.console(machine)


async def test_a_runtime_folder_too_deep_for_a_socket_address_works(tmp_path: Path, namespace: None) -> None:
    deep = tmp_path.joinpath(*["a-folder-name-of-thirty-letters"] * 5) / "runtime"
    rig = FirecrackerRig(deep)
    machine, pid = await rig.started("vm-a")
    await rig.boots(machine)
    await rig.engine.stop(machine, timedelta(seconds=20))
    assert (machine.folder / "exit.json").read_text() == '{"status": 0}'
    assert not rig.is_alive(pid)
    await rig.close()


async def test_a_vm_whose_record_or_folder_is_gone_is_found_and_never_runs_twice(rig: FirecrackerRig) -> None:
    machine, pid = await started(rig)
    (machine.folder / "process.json").unlink()
    await rig.restart_agent()
    await rig.engine.start(machine)
    assert await rig.pid(machine) == pid
    shutil.rmtree(machine.folder)
    await rig.restart_agent()
    removed = await rig.engine.leftovers(frozenset())
    assert removed == (f"Firecracker process {pid} of unknown VM vm-a",)
    assert not rig.is_alive(pid)
    machine.folder.mkdir()


async def test_a_link_in_the_place_of_the_api_leads_nowhere(rig: FirecrackerRig, tmp_path: Path) -> None:
    machine, _ = await started(rig)
    (rig.root(machine) / "api.sock").rename(rig.root(machine) / "moved.sock")
    (rig.root(machine) / "api.sock").symlink_to("moved.sock")
    with pytest.raises(AgentError, match=r"api\.sock is no socket"):
        await firecracker_api.get(rig.root(machine), "/")


async def test_a_call_firecracker_refuses_is_told_in_its_words(rig: FirecrackerRig) -> None:
    machine, _ = await started(rig)
    with pytest.raises(AgentError, match=r"Firecracker refused PUT /actions: .*NoSuchThing"):
        await firecracker_api.act(rig.root(machine), "NoSuchThing")


async def test_a_host_that_lacks_something_is_told_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, namespace: None
) -> None:
    async def why(**changes: str) -> str:
        given = {"binary": firecracker_binary(), "network": "bridge", **changes}
        probe = await FirecrackerEngine(tmp_path / "runtime", tmp_path, lambda _: None, **given).probe()  # type: ignore[arg-type,return-value]
        return probe.why if isinstance(probe, Unusable) else ""

    assert await why() == ""
    assert list((tmp_path / "runtime").iterdir()) == []
    assert "run the agent with --network bridge" in await why(network="user")
    assert "give --firecracker-bin" in await why(binary="no-such-firecracker")
    alone = tmp_path / "firecracker"
    shutil.copy(firecracker_binary(), alone)
    with monkeypatch.context() as bare:
        bare.setenv("PATH", "/nonexistent")
        assert "there is no jailer beside" in await why(binary=str(alone))
    monkeypatch.setattr(firecracker_probe, "_KVM", tmp_path / "kvm")
    assert "Firecracker runs under KVM alone" in await why()


async def test_a_runtime_folder_without_device_nodes_is_told_before_any_vm_fails(tmp_path: Path, namespace: None) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    command("mount", "-t", "tmpfs", "-o", "nodev,size=16m", "tmpfs", str(bare))
    try:
        probe = await firecracker_probe.probe(firecracker_binary(), bare, "bridge")
        assert isinstance(probe, Unusable) and "must allow device nodes" in probe.why
        assert list(bare.iterdir()) == []
    finally:
        command("umount", str(bare))


async def test_binaries_are_found_under_the_names_of_a_release(tmp_path: Path) -> None:
    there = Path(firecracker_binary()).parent
    for name in ("firecracker", "jailer"):
        shutil.copy(there / name, tmp_path / f"{name}-v1.12.1-x86_64")
    found = find_binaries(str(tmp_path / "firecracker-v1.12.1-x86_64"))
    assert found.jailer == tmp_path / "jailer-v1.12.1-x86_64"
    assert isinstance(await firecracker_probe.probe(str(found.firecracker), tmp_path, "bridge"), Usable)
    cgroups = find_cgroups()
    assert cgroups is not None
    groups = list((cgroups.root / "muster").glob("*/"))
    assert groups or not (cgroups.root / "muster").exists(), "it stays for the VMs of other agents alone"


def test_a_host_name_cannot_add_kernel_arguments(tmp_path: Path) -> None:
    rig = object.__new__(FirecrackerRig)
    machine = rig.machine("vm-a", tmp_path, engine="firecracker")
    evil = machine.request.model_copy(update={"name": "a.init=/bin/sh"})
    words = kernel_arguments(replace(machine, request=evil)).split()
    assert words[-1].split(":")[4] == "a-init--bin-sh"
