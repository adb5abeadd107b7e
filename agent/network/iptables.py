"""Lets the bridge's traffic through Docker's own firewall. Called by the Linux driver; knows nothing of VMs.

Docker sets the policy of iptables' FORWARD to DROP, and a packet must be accepted by every base chain of a hook, so no rule in
a table of ours can help. DOCKER-USER is the chain that Docker keeps for others:
https://docs.docker.com/engine/network/packet-filtering-firewalls/
"""

from __future__ import annotations

import shutil

from agent.errors import CommandFailed
from agent.run import run

_LIMIT = 20.0  # seconds; -w waits for the lock of another iptables


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
    """Accepts what comes from or goes to `bridge` in DOCKER-USER, where that chain exists. Repeatable."""
    present = await _chain("DOCKER-USER")
    if present is None:
        return
    for rule in _rules(bridge):
        if " ".join(("-A", "DOCKER-USER", *rule)) not in present:
            await run("iptables", "-w", "-I", "DOCKER-USER", *rule, limit=_LIMIT)


async def forget_bridge(bridge: str) -> None:
    """Removes what `accept_bridge` added, however often it is there."""
    present = await _chain("DOCKER-USER") or []
    for rule in _rules(bridge):
        for _ in range(present.count(" ".join(("-A", "DOCKER-USER", *rule)))):
            await run("iptables", "-w", "-D", "DOCKER-USER", *rule, limit=_LIMIT)


async def forward_drops() -> bool:
    """Whether some other firewall than Docker's drops what FORWARD does not accept: forwards would not work."""
    forward = await _chain("FORWARD")
    return forward is not None and "-P FORWARD DROP" in forward and await _chain("DOCKER-USER") is None
