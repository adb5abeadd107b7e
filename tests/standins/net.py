"""ifconfig(8), arp(8), sysctl(8), kldload(8), kldstat(8) as far as a bridge with taps and epairs needs them."""

from __future__ import annotations

import re
from typing import Any

from tests.standins.host import alive, fail, say, state

_FAMILIES = {"bridge", "tap", "epair", "lo", "vlan"}
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.]{0,14}")


def ifconfig(argv: list[str]) -> int:
    """`-a`, `IF create …`, `IF destroy`, `IF operation …`."""
    with state() as host:
        links = host["interfaces"]
        if argv == ["-a"]:
            for name in sorted(links):
                if not links[name].get("jail"):
                    _show(name, links[name])
            return 0
        if not argv or argv[0].startswith("-"):
            fail("usage: ifconfig [-L] [-C] [-g groupname] interface address_family [address [dest_address]] [parameters]")
        name, words = argv[0], argv[1:]
        if words[:1] == ["-vnet"] and len(words) == 2:
            if name not in links or links[name].get("jail") != words[1]:
                fail(
                    f"ifconfig: SIOCSIFRVNET ({name}): {'No such process' if words[1] not in host['jails'] else 'No such file'}"
                )
            links[name]["jail"] = ""
            return 0
        is_made = words[:1] == ["create"]
        if is_made:
            name, words = _create(links, name), words[1:]
        elif name not in links or links[name].get("jail"):
            fail(f"ifconfig: interface {name} does not exist")
        if words == ["destroy"]:
            _destroy(links, name)
            return 0
        configure(links, name, words, say_name=is_made)
    return 0


def _create(links: dict[str, Any], name: str) -> str:
    found = re.fullmatch(r"([a-z_]+)(\d*)", name)
    if not found or found[1] not in _FAMILIES:
        fail(f"ifconfig: SIOCIFCREATE2 ({name}): Invalid argument")
    family = found[1]
    used = {link["unit"] for link in links.values() if link["family"] == family and "unit" in link}
    unit = int(found[2]) if found[2] else next(number for number in range(32768) if number not in used)
    if unit in used:
        fail(f"ifconfig: SIOCIFCREATE2 ({name}): File exists")
    for end in ("a", "b") if family == "epair" else ("",):
        made: dict[str, Any] = {"family": family, "unit": unit, "flags": [], "inet": [], "groups": [family], "descr": ""}
        made["ether"] = f"58:9c:fc:00:{unit // 256:02x}:{unit % 256:02x}"
        if family == "bridge":
            made["members"] = {}
        links[f"{family}{unit}{end}"] = made
    return f"{family}{unit}a" if family == "epair" else f"{family}{unit}"


def _destroy(links: dict[str, Any], name: str) -> None:
    link = links[name]
    if link["family"] not in _FAMILIES or name == "lo0":
        fail("ifconfig: SIOCIFDESTROY: Invalid argument")
    if alive(link.get("opened", 0)):
        fail("ifconfig: SIOCIFDESTROY: Device busy")
    both = [other for other, each in links.items() if (each["family"], each.get("unit")) == (link["family"], link["unit"])]
    for gone in both:
        links.pop(gone)
        for each in links.values():
            each.get("members", {}).pop(gone, None)


def configure(links: dict[str, Any], name: str, words: list[str], *, say_name: bool) -> None:
    """Carries out the operations of one command line in order, as ifconfig does."""
    first, words = name, list(words)
    while words:
        link, word = links[name], words.pop(0)
        if word in ("up", "down"):
            link["flags"] = [flag for flag in link["flags"] if flag != "UP"] + (["UP"] if word == "up" else [])
        elif word in ("descr", "description"):
            link["descr"] = _next(words, word)
        elif word in ("group", "ether", "inet"):
            _set(link, word, _next(words, word))
        elif word == "name":
            name = _rename(links, name, _next(words, word))
        elif word in ("addm", "deletem", "-learn", "static"):
            _change_member(links, name, word, words)
        else:
            fail(f"ifconfig: {word}: bad value")
    if say_name and name == first:
        say(name)


def _set(link: dict[str, Any], word: str, value: str) -> None:
    if word == "group":
        if value[-1].isdigit():
            fail("ifconfig: setifgroup: group names may not end in a digit")
        if len(value) > 15:
            fail("ifconfig: setifgroup: group name too long")
        link["groups"] = [*link["groups"], value]
    elif word == "ether":
        if not _MAC.fullmatch(value):
            fail(f"ifconfig: malformed link-level address: {value}")
        link["ether"] = value
    else:
        if not re.fullmatch(r"\d+(\.\d+){3}/\d+", value):
            fail(f"ifconfig: {value}: bad value")
        link["inet"] = [value]


def _next(words: list[str], word: str) -> str:
    if not words:
        fail(f"ifconfig: '{word}' requires argument")
    return words.pop(0)


def _rename(links: dict[str, Any], name: str, new: str) -> str:
    if not _NAME.fullmatch(new):
        fail(f"ifconfig: ioctl SIOCSIFNAME (set name): {'File name too long' if len(new) > 15 else 'Invalid argument'}")
    if new in links:
        fail("ifconfig: ioctl SIOCSIFNAME (set name): File exists")
    links[new] = links.pop(name)
    for each in links.values():
        if name in each.get("members", {}):
            each["members"][new] = each["members"].pop(name)
    return new


def _change_member(links: dict[str, Any], name: str, word: str, words: list[str]) -> None:
    members = links[name].get("members")
    if members is None:
        fail(f"ifconfig: {word}: Operation not supported")
    port = _next(words, word)
    if word == "addm":
        if port not in links or links[port].get("jail"):
            fail(f"ifconfig: BRDGADD {port}: No such file or directory")
        if any(port in each.get("members", {}) for each in links.values()):
            fail(f"ifconfig: BRDGADD {port}: {'File exists' if port in members else 'Device busy'}")
        members[port] = {"learn": True, "static": []}
        return
    if port not in members:
        fail(f"ifconfig: {word} {port}: No such file or directory")
    if word == "deletem":
        del members[port]
    elif word == "-learn":
        members[port]["learn"] = False
    else:
        mac = _next(words, word)
        if not _MAC.fullmatch(mac):
            fail(f"ifconfig: {mac}: malformed link-level address")
        members[port]["static"].append(mac)


def _show(name: str, link: dict[str, Any]) -> None:
    flags = [*link["flags"], *(["RUNNING"] if "UP" in link["flags"] else []), "MULTICAST"]
    say(f"{name}: flags=8843<{','.join(flags)}> metric 0 mtu 1500")
    if link.get("descr"):
        say(f"\tdescription: {link['descr']}")
    say("\toptions=80000<LINKSTATE>")
    if link["ether"]:
        say(f"\tether {link['ether']}")
    for address in link["inet"]:
        ip, _, bits = address.partition("/")
        say(f"\tinet {ip} netmask 0x{(0xFFFFFFFF << (32 - int(bits))) & 0xFFFFFFFF:08x}")
    for port in link.get("members", {}):
        say(f"\tmember: {port} flags=142<DISCOVER,AUTOEDGE,AUTOPTP>")
        say("\t        port 5 priority 128 path cost 2000000")
    if link["groups"]:
        say(f"\tgroups: {' '.join(link['groups'])}")


def arp(argv: list[str]) -> int:
    """`arp -S address mac`."""
    if len(argv) != 3 or argv[0] != "-S" or not _MAC.fullmatch(argv[2]):
        fail("usage: arp -S hostname ether_addr [temp] [reject | blackhole] [pub [only]]")
    with state() as host:
        near = [address for link in host["interfaces"].values() for address in link["inet"]]
        if not any(address.rsplit(".", 2)[0] == argv[1].rsplit(".", 2)[0] for address in near):
            fail(f"arp: {argv[1]}: Network is unreachable")
        host["arp"][argv[1]] = argv[2]
    return 0


def sysctl(argv: list[str]) -> int:
    """`-n name …`, `-ie name …`, `name=value …`."""
    with state() as host:
        known = host["sysctl"]
        if argv[:1] in (["-n"], ["-ie"]) and len(argv) > 1:
            for name in argv[1:]:
                if name in known:
                    say(known[name] if argv[0] == "-n" else f"{name}={known[name]}")
                elif argv[0] == "-n":
                    fail(f"sysctl: unknown oid '{name}'")
            return 0
        if not argv or not all("=" in word for word in argv):
            fail("usage: sysctl [-bdeFhilNnoqTtWx] [-B <bufsize>] [-f filename] name[=value[,value]] ...")
        for word in argv:
            name, _, value = word.partition("=")
            if name not in known:
                fail(f"sysctl: unknown oid '{name}'")
            say(f"{name}: {known[name]} -> {value}")
            known[name] = value
    return 0


def kldload(argv: list[str]) -> int:
    """`-n module`: nothing is done where it is loaded."""
    if len(argv) != 2 or argv[0] != "-n":
        fail("usage: kldload [-nqv] file ...")
    with state() as host:
        if argv[1] in host.get("missing_modules", []):
            fail(f"kldload: can't load {argv[1]}: No such file or directory")
        if argv[1] not in host["modules"]:
            host["modules"].append(argv[1])
    return 0
