"""QEMU's command line says what was asked for, and no text can change its shape."""

from __future__ import annotations

import json
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.engines.qemu_argv import qemu_argv
from agent.errors import AgentError
from agent.machine import Disk, Lease, Machine, Nic
from specs.names import VmId
from specs.wire import CreateVmReq

LEASE = Lease(IPv4Address("10.77.0.3"), "52:54:00:11:22:33", {80: 20001, 22: 20000}, deny_outgoing=False, env_id="env")
USER = Nic("user", LEASE, IPv4Network("10.77.0.0/16"), IPv4Address("10.77.0.1"), forward_addrs=("127.0.0.1", "10.0.0.2"))
REQUEST = CreateVmReq(vm_id="vm-a", env_id="env", image="tiny", engine="qemu", cpu=3, mem=777, disk=64)
MACHINE = Machine(VmId("vm-a"), Path("/run/muster/vm-a"), REQUEST, USER, Disk(Path("/run/muster/vm-a/disk.qcow2"), "qcow2"))


def _after(argv: list[str], option: str) -> list[str]:
    return [argv[place + 1] for place, word in enumerate(argv) if word == option]


def test_size_name_and_accelerator_are_as_asked_for() -> None:
    argv = qemu_argv(MACHINE, "tcg", "qemu-x")
    assert argv[0] == "qemu-x"
    assert _after(argv, "-m") == ["777M"]
    assert _after(argv, "-smp") == ["3"]
    assert _after(argv, "-name") == ["guest=vm-a"]
    assert (_after(argv, "-accel"), _after(argv, "-cpu")) == (["tcg,thread=multi"], ["max"])
    argv = qemu_argv(MACHINE, "kvm", "qemu-x")
    assert (_after(argv, "-accel"), _after(argv, "-cpu")) == (["kvm"], ["host"])


def test_nothing_is_there_by_default_and_the_process_is_confined() -> None:
    argv = qemu_argv(MACHINE, "tcg", "qemu-x")
    assert {"-nodefaults", "-no-user-config"} <= set(argv)
    assert _after(argv, "-display") == ["none"]
    assert _after(argv, "-sandbox") == ["on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]
    assert "-daemonize" not in argv


def test_the_disk_is_written_and_the_seed_only_read() -> None:
    root, seed = map(json.loads, _after(qemu_argv(MACHINE, "tcg", "qemu-x"), "-blockdev"))
    assert root == {
        "driver": "qcow2",
        "node-name": "root",
        "read-only": False,
        "discard": "unmap",
        "file": {"driver": "file", "filename": "/run/muster/vm-a/disk.qcow2", "discard": "unmap"},
    }
    assert seed == {
        "driver": "raw",
        "node-name": "seed",
        "read-only": True,
        "file": {"driver": "file", "filename": "/run/muster/vm-a/seed.iso"},
    }


def test_a_block_device_is_opened_as_one() -> None:
    machine = replace(MACHINE, disk=Disk(Path("/dev/zvol/tank/vm-a"), "raw"))
    root = json.loads(_after(qemu_argv(machine, "tcg", "qemu-x"), "-blockdev")[0])
    assert (root["driver"], root["file"]["driver"]) == ("raw", "host_device")


def test_user_mode_gives_the_guest_the_leased_network_and_every_forward() -> None:
    argv = qemu_argv(MACHINE, "tcg", "qemu-x")
    assert _after(argv, "-netdev") == [
        "user,id=net,net=10.77.0.0/16,host=10.77.0.1,dns=10.77.255.254,dhcpstart=10.77.0.3,ipv6=off,restrict=off"
        ",hostfwd=tcp:127.0.0.1:20000-10.77.0.3:22,hostfwd=tcp:127.0.0.1:20001-10.77.0.3:80"
        ",hostfwd=tcp:10.0.0.2:20000-10.77.0.3:22,hostfwd=tcp:10.0.0.2:20001-10.77.0.3:80"
    ]
    assert "virtio-net-pci,netdev=net,mac=52:54:00:11:22:33,romfile=" in _after(argv, "-device")


def test_deny_outgoing_is_kept_by_user_mode_itself() -> None:
    machine = replace(MACHINE, nic=replace(USER, lease=replace(LEASE, deny_outgoing=True)))
    assert ",restrict=on," in _after(qemu_argv(machine, "tcg", "qemu-x"), "-netdev")[0]


@pytest.mark.parametrize(
    ("dns", "ip", "server"),
    [
        (("10.77.0.9",), "10.77.0.3", "10.77.0.9"),
        (("192.0.2.1", "fd00::1", "10.77.0.9"), "10.77.0.3", "10.77.0.9"),
        (("10.77.0.1", "10.77.0.3"), "10.77.0.3", "10.77.255.254"),
        ((), "10.77.255.254", "10.77.255.253"),
    ],
)
def test_the_name_server_is_where_the_guest_was_told_and_never_on_its_own_address(
    dns: tuple[str, ...], ip: str, server: str
) -> None:
    machine = replace(MACHINE, nic=replace(USER, dns=dns, lease=replace(LEASE, ip=IPv4Address(ip))))
    assert f",dns={server}," in _after(qemu_argv(machine, "tcg", "qemu-x"), "-netdev")[0]


def test_a_tap_is_joined_as_it_was_prepared() -> None:
    machine = replace(MACHINE, nic=replace(USER, kind="tap", link="mt0123456789ab", mtu=9000))
    argv = qemu_argv(machine, "tcg", "qemu-x")
    assert _after(argv, "-netdev") == ["tap,id=net,ifname=mt0123456789ab,script=no,downscript=no"]
    assert "virtio-net-pci,netdev=net,mac=52:54:00:11:22:33,romfile=,host_mtu=9000" in _after(argv, "-device")


def test_a_bridge_without_a_tap_and_a_vm_without_a_disk_are_refused() -> None:
    with pytest.raises(AgentError, match="tap"):
        qemu_argv(replace(MACHINE, nic=replace(USER, kind="bridge")), "tcg", "qemu-x")
    with pytest.raises(AgentError, match="no disk"):
        qemu_argv(replace(MACHINE, disk=None), "tcg", "qemu-x")


@given(st.text(st.characters(blacklist_characters="\0", blacklist_categories=("Cs",)), min_size=1))
def test_no_path_changes_the_shape_of_the_command_line(name: str) -> None:
    folder = Path("/run") / name.replace("/", ",")
    plain = qemu_argv(MACHINE, "tcg", "qemu-x")
    argv = qemu_argv(replace(MACHINE, folder=folder, disk=Disk(folder / "disk.qcow2", "qcow2")), "tcg", "qemu-x")
    differing = [place for place, (one, other) in enumerate(zip(argv, plain, strict=True)) if one != other]
    options = {plain[place - 1] for place in differing}
    assert options <= {"-blockdev", "-D"}
    root, seed = map(json.loads, _after(argv, "-blockdev"))
    assert root["file"]["filename"] == str(folder / "disk.qcow2")
    assert seed["file"]["filename"] == str(folder / "seed.iso")
