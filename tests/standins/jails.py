"""jail(8), jls(8), jexec(8), rctl(8), devfs(8), mount(8), umount(8) and chflags(1) as far as jails need them.

A jailed process is a real one, chrooted into the jail's root; `ifconfig` and `route` in a jail change the stand-ins' state.
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
from typing import Any

from tests.standins.host import fail, folder, say, state
from tests.standins.net import configure

_PARAMETERS = {
    *(
        "name",
        "path",
        "host.hostname",
        "vnet",
        "vnet.interface",
        "devfs_ruleset",
        "enforce_statfs",
        "allow.raw_sockets",
        "persist",
    ),
    *("children.max", "securelevel", "allow.set_hostname"),
}
_BOOLEAN = {"persist", "allow.raw_sockets", "allow.set_hostname"}
_USAGE = "usage: jail [-dhilqv] [-J jid_file] [-u username] [-U username] -[cmr] param=value ... [command=command ...]"
_RESOURCES = {"memoryuse": "deny", "pcpu": "deny", "maxproc": "deny", "swapuse": "deny", "vmemoryuse": "deny"}


def jail(argv: list[str]) -> int:
    """`-c [-q] param=value …` and `[-q] -R name`."""
    words = [word for word in argv if word != "-q"]
    with state() as host:
        if words[:1] == ["-c"]:
            _create(host, words[1:])
        elif len(words) == 2 and words[0] == "-R":
            _remove(host, words[1])
        else:
            fail(_USAGE)
    return 0


def _create(host: dict[str, Any], words: list[str]) -> None:
    given: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if name not in _PARAMETERS or (not equals and name not in _BOOLEAN):
            fail(f"jail: unknown parameter: {name}" if name not in _PARAMETERS else f"jail: {name}: missing value")
        given[name] = value
    name = given.get("name", "")
    if not name or "." in name or name.isdigit():
        fail(f'jail: name "{name}" is not usable')
    if name in host["jails"]:
        fail(f'jail: "{name}" already exists')
    if not os.path.isdir(given.get("path", "")):
        fail(f"jail: {name}: path {given.get('path')}: No such file or directory")
    if "persist" not in given:
        fail(f"jail: {name}: no command and not persist")
    if given.get("vnet", "new") not in ("new", "inherit"):
        fail(f'jail: {name}: unknown jailsys value "{given["vnet"]}"')
    link = given.get("vnet.interface")
    if link is not None:
        if given.get("vnet") != "new":
            fail(f"jail: {name}: vnet.interface without vnet")
        if link not in host["interfaces"] or host["interfaces"][link].get("jail"):
            fail(f"ifconfig: interface {link} does not exist\njail: {name}: /sbin/ifconfig {link} vnet {name}: failed")
        if any(link in each.get("members", {}) for each in host["interfaces"].values()):
            fail(f"jail: {name}: {link} is a member of a bridge")
        host["interfaces"][link]["jail"] = name
    host["jails"][name] = {"jid": host["next_jid"], "path": given["path"], "hostname": given.get("host.hostname", "")}
    host["jails"][name]["links"] = {}
    host["next_jid"] += 1


def _remove(host: dict[str, Any], name: str) -> None:
    if name not in host["jails"]:
        fail(f'jail: jail "{name}" not found')
    path = host["jails"].pop(name)["path"]
    # Only what was chrooted into a test's own folder is ever killed.
    if os.path.realpath(path).startswith(os.path.dirname(os.path.realpath(folder())) + "/"):
        while members := _members(path):
            for pid in members:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.002)
    for link in host["interfaces"].values():
        if link.get("jail") == name:
            link.update(jail="", inet=[])


def _members(path: str) -> list[int]:
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                if os.readlink(f"/proc/{entry}/root") == os.path.realpath(path):
                    found.append(int(entry))
            except OSError:
                continue
    return found


def jls(argv: list[str]) -> int:
    """`--libxo=json parameter …`."""
    if not argv or argv[0] != "--libxo=json" or not set(argv[1:]) <= {"name", "path", "jid"}:
        fail("usage: jls [-dhNnqv] [-j jail] [param ...]")
    with state() as host:
        jails = [{**each, "name": name} for name, each in host["jails"].items()]
    shown = [{parameter: each[parameter] for parameter in argv[1:]} for each in jails]
    say(json.dumps({"__version": "2", "jail-information": {"jail": shown}}))
    return 0


def jexec(argv: list[str]) -> int:
    """`jail command …`: becomes the command, inside the jail's root."""
    if len(argv) < 2 or argv[0].startswith("-"):
        fail("usage: jexec [-l] [-d working-directory] [-e name=value] [-u username | -U username] jail [command ...]")
    name, command = argv[0], argv[1:]
    with state() as host:
        if name not in host["jails"]:
            fail(f'jexec: jail "{name}" not found')
        path = host["jails"][name]["path"]
        program = command[0].rpartition("/")[2]
        if program in ("ifconfig", "route"):
            _inside(host, name, program, command[1:])
            return 0
    os.chroot(path)
    os.chdir("/")
    try:
        os.execv(command[0], command)
    except OSError as error:
        fail(f"jexec: execvp: {command[0]}: {error.strerror}")


def _inside(host: dict[str, Any], name: str, program: str, words: list[str]) -> None:
    if program == "route":
        if words[:3] != ["-q", "add", "default"] or not re.fullmatch(r"\d+(\.\d+){3}", words[-1]):
            fail("route: bad keyword")
        near = [link for link in host["interfaces"].values() if link.get("jail") == name and link["inet"]]
        if not near:
            fail(f"route: writing to routing socket: Network is unreachable\nadd net default: gateway {words[-1]}")
        host["jails"][name]["gateway"] = words[-1]
        return
    link, operations = words[0], words[1:]
    if link == "lo0":
        return
    if link not in host["interfaces"] or host["interfaces"][link].get("jail") != name:
        fail(f"ifconfig: interface {link} does not exist")
    configure(host["interfaces"], link, operations, say_name=False)


def rctl(argv: list[str]) -> int:
    """`-a rule`, `-r filter`."""
    if len(argv) != 2 or argv[0] not in ("-a", "-r"):
        fail("usage: rctl [ -h ] [-a rule | -l filter | -r filter | -u filter | filter]")
    with state() as host:
        if host["sysctl"]["kern.racct.enable"] != "1":
            fail("rctl: RACCT/RCTL present, but disabled; enable using kern.racct.enable=1 tunable")
        if argv[0] == "-a":
            rule = re.fullmatch(r"jail:([^:]+):(\w+):(\w+)=(\d+)", argv[1])
            if not rule or _RESOURCES.get(rule[2]) != rule[3]:
                fail(f"rctl: failed to add rule '{argv[1]}': Invalid argument")
            host["rctl"].append(argv[1])
        else:
            kept = [rule for rule in host["rctl"] if not rule.startswith(f"{argv[1]}:")]
            if len(kept) == len(host["rctl"]):
                fail(f"rctl: failed to remove rule '{argv[1]}': No such process")
            host["rctl"] = kept
    return 0


def devfs(argv: list[str]) -> int:
    """`rule -s number show`."""
    if len(argv) != 4 or argv[:2] != ["rule", "-s"] or argv[3] != "show":
        fail("usage: devfs [-m mount-point] [-s ruleset] keyword argument ...")
    with state() as host:
        if argv[2] in host["rulesets"]:
            say("100 include 1\n200 include 2\n300 include 3")
    return 0


def mount(argv: list[str]) -> int:
    """`-t devfs -o ruleset=N devfs folder`."""
    if argv[:2] != ["-t", "devfs"] or argv[2:3] != ["-o"] or argv[4:5] != ["devfs"] or len(argv) != 6:
        fail("usage: mount [-adflpruvw] [-F fstab] [-o options] [-t [no]type[,type...]] special node")
    with state() as host:
        if not re.fullmatch(r"ruleset=[1-9]\d*", argv[3]) or argv[3].partition("=")[2] not in host["rulesets"]:
            fail("mount: devfs: Invalid argument")
        if not os.path.isdir(argv[5]):
            fail(f"mount: {argv[5]}: No such file or directory")
        host["mounts"][argv[5]] = host["mounts"].get(argv[5], 0) + 1
    return 0


def umount(argv: list[str]) -> int:
    """`folder`."""
    if len(argv) != 1:
        fail("usage: umount [-fNnv] special ... | node ... | fsid ...")
    with state() as host:
        if argv[0] not in host["mounts"]:
            fail(f"umount: {argv[0]}: not a file system root directory")
        if any(argv[0] == os.path.join(each["path"], "dev") for each in host["jails"].values()):
            fail(f"umount: unmount of {argv[0]} failed: Device busy")
        host["mounts"][argv[0]] -= 1
        if not host["mounts"][argv[0]]:
            del host["mounts"][argv[0]]
    return 0


def chflags(argv: list[str]) -> int:
    """`-R noschg folder`; the files of a mounted devfs do not have the flag."""
    if len(argv) != 3 or argv[:2] != ["-R", "noschg"]:
        fail("usage: chflags [-fhvx] [-R [-H | -L | -P]] flags file ...")
    if not os.path.exists(argv[2]):
        fail(f"chflags: {argv[2]}: No such file or directory")
    return 0
