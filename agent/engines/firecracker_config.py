"""What one VM's Firecracker is told: its configuration file and the guest's kernel arguments. Called by the firecracker driver.

Pure: no I/O, the same machine gives the same words. Paths are those inside the VM's jail, where every file has a fixed name.
The format is that of `--config-file` (Firecracker's docs/getting-started.md), the same objects its API takes.
"""

from __future__ import annotations

from ipaddress import IPv4Address
from typing import Any

from agent.machine import Machine

KERNEL = "vmlinux"
INITRD = "initrd"
DISK = "disk"
SEED = "seed.iso"
API = "api.sock"

# i8042: the guest's keyboard controller is how Ctrl-Alt-Del reaches it, and its only port; probing for a mouse takes a second.
# reboot=k: the guest ends Firecracker through that controller. panic=1: a panicked guest ends too, and is started again.
_ARGUMENTS = (
    "console=ttyS0 reboot=k panic=1 pci=off i8042.noaux i8042.nomux i8042.dumbkbd random.trust_cpu=on net.ifnames=0 "
    "quiet loglevel=3"
)
_MAX_NAME_SERVERS = 2  # of the kernel's ip= argument


def vm_config(machine: Machine, *, has_initrd: bool) -> dict[str, Any]:
    """The whole configuration: kernel, two disks (root and seed), one network device on the tap, and a random number source."""
    boot = {"kernel_image_path": f"/{KERNEL}", "boot_args": kernel_arguments(machine)}
    if has_initrd:
        boot["initrd_path"] = f"/{INITRD}"
    return {
        "boot-source": boot,
        "machine-config": {"vcpu_count": machine.request.cpu, "mem_size_mib": machine.request.mem, "smt": False},
        # Without Writeback the guest is offered no flush, and what it has synced is lost when the host loses power.
        "drives": [
            _drive("root", DISK, is_root=True, read_only=False),
            _drive("seed", SEED, is_root=False, read_only=True),
        ],
        "network-interfaces": [
            {"iface_id": "eth0", "guest_mac": machine.nic.lease.mac, "host_dev_name": machine.nic.link},
        ],
        "entropy": {},
    }


def kernel_arguments(machine: Machine) -> str:
    """The guest's kernel command line; Firecracker adds the root device.

    `ip=` is the kernel's own static configuration (Documentation/admin-guide/nfs/nfsroot.rst); kernels built without it hand
    it to the first process, and the seed says the same.
    """
    nic = machine.nic
    servers = [text for text in nic.dns if _is_ipv4(text)][:_MAX_NAME_SERVERS]
    words = [str(nic.lease.ip), "", str(nic.gateway), str(nic.subnet.netmask), machine.hostname, "eth0", "off", *servers]
    return f"{_ARGUMENTS} ip={':'.join(words)}"


def _drive(name: str, file: str, *, is_root: bool, read_only: bool) -> dict[str, Any]:
    return {
        "drive_id": name,
        "path_on_host": f"/{file}",
        "is_root_device": is_root,
        "is_read_only": read_only,
        "cache_type": "Unsafe" if read_only else "Writeback",
    }


def _is_ipv4(text: str) -> bool:
    try:
        IPv4Address(text)
    except ValueError:
        return False
    return True
