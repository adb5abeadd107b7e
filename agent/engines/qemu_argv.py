"""The command line of one VM's QEMU. Called by the qemu driver; pure: no I/O, the same machine gives the same words.

Relative names are relative to the VM's folder, which is QEMU's working directory: a Unix socket's path is limited to 107 bytes
(unix(7)), a runtime folder's is not. Disks are given as JSON, so that no character of a path can change an option.
"""

from __future__ import annotations

import json
from ipaddress import IPv4Address
from pathlib import Path
from typing import Literal

from agent.errors import AgentError
from agent.machine import Disk, Machine, Nic

Accel = Literal["kvm", "tcg"]

SEED = "seed.iso"
CONSOLE = "console.log"
ENDING = "ending.log"
STDERR = "qemu.log"
QMP = "qmp.sock"

SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"


def accel_argv(accel: Accel) -> list[str]:
    """Machine, accelerator and processor: with KVM the host's own, with TCG everything that QEMU can emulate."""
    if accel == "kvm":
        return ["-machine", "q35", "-accel", "kvm", "-cpu", "host"]
    return ["-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", "max"]


def qemu_argv(machine: Machine, accel: Accel, binary: str) -> list[str]:
    """The whole command line. Raises AgentError for a machine without a disk or on a network QEMU cannot join."""
    if machine.disk is None:
        raise AgentError(f"VM {machine.id} has no disk, so QEMU cannot boot it")
    return [
        binary,
        *("-name", f"guest={machine.id}"),
        *("-nodefaults", "-no-user-config"),
        *("-display", "none"),
        *("-sandbox", SANDBOX),
        *accel_argv(accel),
        *("-m", f"{machine.request.mem}M"),
        *("-smp", f"{machine.request.cpu}"),
        *("-rtc", "base=utc"),
        *("-blockdev", _root_node(machine.disk)),
        *("-device", "virtio-blk-pci,drive=root,bootindex=1"),
        *("-blockdev", _seed_node(machine.folder / SEED)),
        *("-device", "virtio-blk-pci,drive=seed"),
        *("-device", "virtio-rng-pci"),
        *_nic_argv(machine.nic),
        # Opened for appending, so that the driver can cut the file short while the guest writes to it.
        *("-chardev", f"file,id=console,path={CONSOLE},append=on"),
        *("-serial", "chardev:console"),
        *("-chardev", f"socket,id=qmp,path={QMP},server=on,wait=off"),
        *("-mon", "chardev=qmp,mode=control"),
        # QEMU's own note of who asked for the end: the one witness of a guest's power-off while no agent runs.
        *("-trace", "qemu_system_shutdown_request"),
        *ending_argv(machine.folder),
    ]


def ending_argv(folder: Path) -> list[str]:
    """The words that tie a QEMU process to its VM's folder: leftovers are found by them."""
    return ["-D", str(folder / ENDING)]


def _node(name: str, disk: Disk, *, read_only: bool) -> str:
    node: dict[str, object] = {"driver": disk.format, "node-name": name, "read-only": read_only}
    host = "host_device" if disk.path.is_relative_to("/dev") else "file"
    file: dict[str, object] = {"driver": host, "filename": str(disk.path)}
    if not read_only:
        node["discard"] = file["discard"] = "unmap"
    return json.dumps({**node, "file": file})


def _root_node(disk: Disk) -> str:
    return _node("root", disk, read_only=False)


def _seed_node(path: Path) -> str:
    return _node("seed", Disk(path, "raw"), read_only=True)


def _nic_argv(nic: Nic) -> list[str]:
    match nic.kind:
        case "tap":
            backend = f"tap,id=net,ifname={nic.link},script=no,downscript=no"
        case "user":
            backend = ",".join(["user,id=net", *_user_options(nic)])
        case "bridge" | "vnet":
            raise AgentError("QEMU cannot join a bridge without a tap; the network driver must give it one")
    device = f"virtio-net-pci,netdev=net,mac={nic.lease.mac},romfile="
    if nic.mtu != 1500:
        device += f",host_mtu={nic.mtu}"
    return ["-netdev", backend, "-device", device]


def _user_options(nic: Nic) -> list[str]:
    """QEMU's user-mode network made to look like the leased one: the guest's static address is right there too."""
    lease = nic.lease
    options = [
        f"net={nic.subnet}",
        f"host={nic.gateway}",
        f"dns={_name_server(nic)}",
        f"dhcpstart={lease.ip}",
        "ipv6=off",
        f"restrict={'on' if lease.deny_outgoing else 'off'}",
    ]
    for address in nic.forward_addrs:
        options += [f"hostfwd=tcp:{address}:{host}-{lease.ip}:{guest}" for guest, host in sorted(lease.ports.items())]
    return options


def _name_server(nic: Nic) -> IPv4Address:
    """Where QEMU's forwarder of DNS answers: as the guest was told if that is inside the subnet, else out of the VMs' way."""
    for text in nic.dns:
        address = IPv4Address(text) if ":" not in text else None
        if address is not None and address in nic.subnet and address not in (nic.gateway, nic.lease.ip):
            return address
    last = nic.subnet.broadcast_address - 1
    return last if last not in (nic.gateway, nic.lease.ip) else last - 1
