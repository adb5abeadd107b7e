"""FreeBSD's network interfaces through ifconfig(8): what there is, and the commands of the FreeBSD bridge network."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Interface

from agent.errors import CommandFailed
from agent.run import run

_LIMIT = 30.0  # seconds
_HEAD = re.compile(r"(\S+): flags=[0-9a-f]+<([^>]*)>")
_INET = re.compile(r"inet (\S+)(?: -->.*)? netmask (?:0x([0-9a-f]{8})|(\S+))")


@dataclass(frozen=True, slots=True)
class Interface:
    """One interface as `ifconfig -a` shows it. `members` are the links on it, for a bridge."""

    name: str
    flags: frozenset[str]
    description: str
    addresses: tuple[IPv4Interface, ...]
    members: tuple[str, ...]
    groups: tuple[str, ...]
    ether: str

    @property
    def is_bridge(self) -> bool:
        """Whether it was made by if_bridge(4)."""
        return "bridge" in self.groups


def parse(text: str) -> dict[str, Interface]:
    """The interfaces of `ifconfig -a`, by name."""
    blocks: list[list[str]] = []
    for line in text.splitlines():
        if _HEAD.match(line):
            blocks.append([line])
        elif blocks:
            blocks[-1].append(line.strip())
    return {found.name: found for found in map(_interface, blocks)}


def _interface(lines: list[str]) -> Interface:
    head = _HEAD.match(lines[0])
    name, flags = (head[1], head[2]) if head else ("", "")
    said = [line.partition(" ") for line in lines[1:]]
    return Interface(
        name=name,
        flags=frozenset(flags.split(",")),
        description=next((rest for word, _, rest in said if word == "description:"), ""),
        addresses=tuple(_addresses(lines[1:])),
        members=tuple(rest.split()[0] for word, _, rest in said if word == "member:"),
        groups=tuple(group for word, _, rest in said if word == "groups:" for group in rest.split()),
        ether=next((rest for word, _, rest in said if word == "ether"), ""),
    )


def _addresses(lines: Iterable[str]) -> Iterable[IPv4Interface]:
    for line in lines:
        found = _INET.match(line)
        if found:
            bits = bin(int(found[2], 16)).count("1") if found[2] else found[3]
            yield IPv4Interface(f"{found[1]}/{bits}")


async def interfaces() -> dict[str, Interface]:
    """Every interface of this network stack. Raises CommandFailed."""
    return parse(await run("ifconfig", "-a", limit=_LIMIT))


async def ifconfig(*words: str) -> str:
    """Runs ifconfig(8) and returns what it prints. Raises CommandFailed."""
    return (await run("ifconfig", *words, limit=_LIMIT)).strip()


async def destroy(name: str) -> bool:
    """Removes an interface; False if it was gone already. Raises CommandFailed."""
    try:
        await ifconfig(name, "destroy")
    except CommandFailed as error:
        if "does not exist" in error.stderr:
            return False
        raise
    return True
