"""bhyve(8), bhyveload(8) and bhyvectl(8) over vmm(4): VMs outlive their process until they are destroyed.

The guest counts its boots in the first bytes of its disk and says `guest: boot N` on the serial port. SIGTERM presses its power
button, unless the disk says `deaf`. What happens inside it comes by signals: SIGUSR1 powers it off, SIGUSR2 reboots it, SIGALRM
makes a triple fault. A disk that says `brief` powers off as soon as it is up.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from typing import Any

from tests.standins.host import alive, fail, folder, state

_NAME = re.compile(r"[A-Za-z0-9_-]{1,31}")
_SIZE = re.compile(r"[1-9]\d*[KkMmGgTt]?")
_SLOT = re.compile(r"(\d{1,2})(?::([0-7]))?,([a-z0-9-]+)(?:,(.*))?")
_ERROR = 4  # "exited due to an error"
_VALUED = {"-c", "-m", "-s", "-l", "-U", "-o", "-p", "-G", "-k", "-r"}
_PLAIN = set("aCDeHhPSuWwxY")
_USAGE = "Usage: bhyve [-aCDeHhPSuWwxY] [-c cpus] [-l lpcdev] [-m mem] [-s pci] vmname"


def _node(name: str) -> str:
    return os.path.join(folder(), "dev", "vmm", name)


def bhyve(argv: list[str]) -> int:
    """Runs one VM until its guest ends; returns what bhyve(8) says under EXIT STATUS."""
    given, name = _options(argv)
    devices = _devices(given)
    with state() as host:
        _check(host, given, name, devices)
        vm = host["vmm"].setdefault(name, {})
        vm.update(pid=os.getpid(), mem=given["-m"][0], loaded=False)
        tap = devices["virtio-net"].split(",")[0]
        host["interfaces"][tap]["opened"] = os.getpid()
        open(_node(name), "w").close()
        # From here on whoever looks sees a running VM, so signals must mean what they mean.
        for number, status in ((signal.SIGUSR1, 1), (signal.SIGUSR2, 0), (signal.SIGALRM, 3)):
            signal.signal(number, lambda _number, _frame, status=status: os._exit(status))
        disk = devices["virtio-blk"].split(",")[0]
        with open(disk, "r+b") as file:
            words = file.read(64)
            boots = words[0] + 1
            file.seek(0)
            file.write(bytes([boots]))
        if b"deaf" in words:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        else:
            signal.signal(signal.SIGTERM, lambda _number, _frame: os._exit(1))
    os.write(1, f"\r\nguest: boot {boots}\r\n".encode())
    if b"brief" in words:
        return 1
    while True:
        time.sleep(600)


def _options(argv: list[str]) -> tuple[dict[str, list[str]], str]:
    words, given = list(argv), {"-m": ["256M"], "-c": ["1"], "-s": [], "-l": []}
    while words and words[0].startswith("-"):
        word = words.pop(0)
        if word in _VALUED and words:
            value = words.pop(0)
            given[word] = [*given[word], value] if word in ("-s", "-l") else [value]
        elif len(word) < 2 or not set(word[1:]) <= _PLAIN:
            fail(_USAGE, _ERROR)
    if len(words) != 1 or not _NAME.fullmatch(words[0]):
        fail(_USAGE, _ERROR)
    return given, words[0]


def _devices(given: dict[str, list[str]]) -> dict[str, str]:
    """Emulation to its configuration; slots may not be given twice, and lpc devices need the lpc bridge."""
    slots, found = set(), {}
    for text in given["-s"]:
        match = _SLOT.fullmatch(text)
        if not match or int(match[1]) > 31:
            fail(f'Invalid PCI slot info field "{text}"', _ERROR)
        if (match[1], match[2]) in slots:
            fail(f"pci slot {match[1]}:{match[2] or 0} already occupied!", _ERROR)
        slots.add((match[1], match[2]))
        if match[3] not in ("hostbridge", "virtio-blk", "virtio-net", "virtio-rnd", "ahci-cd", "ahci-hd", "lpc"):
            fail(f'pci slot {match[1]}: unknown device "{match[3]}"', _ERROR)
        found[match[3]] = match[4] or ""
    if given["-l"] and "lpc" not in found:
        fail("bhyve: lpc devices need an lpc bridge", _ERROR)
    return found


def _check(host: dict[str, Any], given: dict[str, list[str]], name: str, devices: dict[str, str]) -> None:
    if "vmm" not in host["modules"]:
        fail("vm_create: No such file or directory: is vmm.ko loaded?", _ERROR)
    if not given["-c"][0].isdigit() or not 0 < int(given["-c"][0]) <= int(host["sysctl"]["hw.vmm.maxcpu"]):
        fail(f"{given['-c'][0]} vCPUs requested but {host['sysctl']['hw.vmm.maxcpu']} available", _ERROR)
    if not _SIZE.fullmatch(given["-m"][0]):
        fail("invalid memsize '" + given["-m"][0] + "'", _ERROR)
    vm = host["vmm"].get(name, {})
    if alive(vm.get("pid", 0)):
        fail("vm_open: Device busy", _ERROR)
    rom = [text.split(",")[1] for text in given["-l"] if text.startswith("bootrom,")]
    if rom and not os.path.isfile(rom[0]):
        fail(f"Error opening bootrom '{rom[0]}': No such file or directory", _ERROR)
    if not rom and not vm.get("loaded"):
        fail("spinup_ap: no boot rom, and nothing was loaded by bhyveload", _ERROR)
    if not rom and vm["mem"] != given["-m"][0]:
        fail("the memory size is not that given to bhyveload", _ERROR)
    for kind in ("virtio-blk", "ahci-cd"):
        path = devices.get(kind, "").split(",")[0]
        if kind in devices and not os.path.exists(path):
            fail(f"Could not open backing file: {path}: No such file or directory", _ERROR)
    _check_tap(host, devices.get("virtio-net", ""))


def _check_tap(host: dict[str, Any], text: str) -> None:
    tap, *options = text.split(",")
    if not tap.startswith(("tap", "vmnet")):
        fail(f'Could not find backend "{tap}"', _ERROR)
    if not all(re.fullmatch(r"mac=[0-9a-f]{2}(:[0-9a-f]{2}){5}|mtu=\d+", option) for option in options):
        fail(f"virtio-net: Invalid MAC address or option in '{text}'", _ERROR)
    link = host["interfaces"].get(tap)
    if link is None or link["family"] != "tap":
        fail(f"open of tap device /dev/{tap} failed: No such file or directory", _ERROR)
    if alive(link.get("opened", 0)):
        fail(f"open of tap device /dev/{tap} failed: Device busy", _ERROR)


def bhyveload(argv: list[str]) -> int:
    """Makes the VM unless it is there, and loads a FreeBSD kernel from its disk."""
    words, given = list(argv), dict[str, str]()
    while words and words[0] in ("-c", "-d", "-e", "-h", "-l", "-m") and len(words) > 1:
        option, value = words.pop(0), words.pop(0)
        if option == "-e" and "=" not in value:
            fail(f"bhyveload: invalid environment variable '{value}'")
        given[option] = value
    if len(words) != 1 or not _NAME.fullmatch(words[0]) or not _SIZE.fullmatch(given.get("-m", "256M")):
        fail("usage: bhyveload [-CS][-c <console-device>] [-d <disk-path>] [-e <name=value>] [-m mem-size] <vmname>")
    name, disk = words[0], given.get("-d", "")
    with state() as host:
        if "vmm" not in host["modules"]:
            fail("vm_create: No such file or directory")
        if not os.path.exists(disk):
            fail(f"Could not open '{disk}': No such file or directory")
        vm = host["vmm"].setdefault(name, {})
        if alive(vm.get("pid", 0)):
            fail("vm_open: Device busy")
        with open(disk, "rb") as file:
            if b"no-loader" in file.read(64):
                fail("Could not load loader.so: No such file or directory")
        vm.update(loaded=True, mem=given.get("-m", "256M"))
        open(_node(name), "w").close()
    return 0


def bhyvectl(argv: list[str]) -> int:
    """`--vm=NAME` with one of `--create`, `--destroy`, `--force-poweroff`."""
    names = [word.removeprefix("--vm=") for word in argv if word.startswith("--vm=")]
    does = [word for word in argv if not word.startswith("--vm=")]
    if len(names) != 1 or len(does) != 1 or does[0] not in ("--create", "--destroy", "--force-poweroff"):
        fail("Usage: bhyvectl --vm=<vmname> [--create] [--destroy] [--force-reset] [--force-poweroff] ...")
    name = names[0]
    with state() as host:
        if "vmm" not in host["modules"]:
            fail("vm_create: No such file or directory")
        if does == ["--create"]:
            if os.path.exists(_node(name)):
                fail("vm_create: File exists")
            host["vmm"][name] = {}
            open(_node(name), "w").close()
            return 0
        if not os.path.exists(_node(name)):
            fail(f"VM:{name} is not created.")
        pid = host["vmm"].get(name, {}).get("pid", 0)
        if does == ["--force-poweroff"]:
            if not alive(pid):
                fail("vm_suspend: Invalid argument")
            os.kill(pid, signal.SIGUSR1)
            return 0
        if alive(pid):
            os.kill(pid, signal.SIGKILL)
            while alive(pid):
                time.sleep(0.001)
        host["vmm"].pop(name, None)
        os.unlink(_node(name))
    sys.stdout.flush()
    return 0
