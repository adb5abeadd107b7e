"""Lets the bridge's traffic through the firewalls of others that drop what is forwarded. Called by the Linux driver alone.

Docker and ufw set the policy of iptables' FORWARD to DROP, and a packet must be accepted by every base chain of a hook, so no
rule in a table of ours can help. DOCKER-USER is the chain that Docker keeps for others
(https://docs.docker.com/engine/network/packet-filtering-firewalls/); where it is missing the rules go to FORWARD itself.
"""

from __future__ import annotations

import shutil

import structlog

from agent.errors import CommandFailed
from agent.run import run

log = structlog.get_logger()

_LIMIT = 20.0  # seconds; -w waits for the lock of another iptables
_DOCKERS, _EVERYBODYS = "DOCKER-USER", "FORWARD"


def _rules(bridge: str) -> tuple[tuple[str, ...], ...]:
    return (("-i", bridge, "-j", "ACCEPT"), ("-o", bridge, "-j", "ACCEPT"))


async def _chain(name: str) -> list[str] | None:
    """The rules of an IPv4 filter chain as `iptables -S` words them, None where there is no such chain or no iptables."""
    if shutil.which("iptables") is None:
        return None
    try:
        return (await run("iptables", "-w", "-S", name, limit=_LIMIT)).splitlines()
    except CommandFailed:
        return None


async def accept_bridge(bridge: str) -> None:
    """Accepts what comes from or goes to `bridge`: in DOCKER-USER if there is one, else in a FORWARD that drops. Repeatable."""
    name, present = _DOCKERS, await _chain(_DOCKERS)
    if present is None:
        name, present = _EVERYBODYS, await _chain(_EVERYBODYS)
        if present is None or f"-P {_EVERYBODYS} DROP" not in present:
            return
    for rule in _rules(bridge):
        if " ".join(("-A", name, *rule)) not in present:
            await run("iptables", "-w", "-I", name, *rule, limit=_LIMIT)
            log.info("let through the firewall", chain=name, rule=" ".join(rule))


async def forget_bridge(bridge: str) -> None:
    """Removes what `accept_bridge` added, however often it is there."""
    for name in (_DOCKERS, _EVERYBODYS):
        present = await _chain(name) or []
        for rule in _rules(bridge):
            for _ in range(present.count(" ".join(("-A", name, *rule)))):
                await run("iptables", "-w", "-D", name, *rule, limit=_LIMIT)
