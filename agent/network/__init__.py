"""Network drivers, one file each; base.py is the protocol, fake.py a driver of its own kind."""

from __future__ import annotations

import sys
from ipaddress import IPv4Network
from typing import Literal

import structlog

from agent.errors import Unsupported
from agent.machine import Unusable, Usable
from agent.network.base import Network
from agent.network.nft import DEFAULT_BRIDGE
from agent.network.pool import DEFAULT_SUBNET
from agent.network.user import EVERY_ADDRESS, UserNetwork

log = structlog.get_logger()

Choice = Literal["auto", "bridge", "user"]


async def pick(
    choice: Choice,
    *,
    bridge: str = DEFAULT_BRIDGE,
    subnet: IPv4Network = DEFAULT_SUBNET,
    forward_addrs: tuple[str, ...] = EVERY_ADDRESS,
    docker_user: bool = True,
    tap_owner: int | None = None,
) -> Network:
    """The network to use: for `auto` the bridge where it works, else the user-mode one; the log says why.

    Raises Unsupported when `bridge` is asked for and cannot work here, with the reason and what to do.
    """
    user = UserNetwork(subnet, forward_addrs)
    if choice == "user":
        return await _told(user)
    found = await _bridge(bridge, subnet, docker_user=docker_user, tap_owner=tap_owner)
    if not isinstance(found, Unusable):
        return found
    if choice == "bridge":
        raise Unsupported(f"--network bridge does not work here: {found.why}")
    log.warning("user-mode network picked", why=found.why)
    return await _told(user)


async def _told(network: Network) -> Network:
    probe = await network.probe()
    for warning in probe.warnings if isinstance(probe, Usable) else ():
        log.warning("user network", warning=warning)
    return network


async def _bridge(name: str, subnet: IPv4Network, *, docker_user: bool, tap_owner: int | None) -> Network | Unusable:
    network: Network
    if sys.platform == "linux":
        # pyroute2 exists on Linux alone.
        from agent.network.linux import BridgeNetwork  # noqa: PLC0415

        network = BridgeNetwork(name, subnet, docker_user=docker_user, tap_owner=tap_owner)
    elif sys.platform.startswith("freebsd"):
        from agent.network.freebsd import PfNetwork  # noqa: PLC0415

        try:
            network = PfNetwork(name, subnet)
        except ValueError as error:
            return Unusable(str(error))
    else:
        return Unusable(f"bridges are made on Linux and FreeBSD only, this is {sys.platform}")
    probe = await network.probe()
    if isinstance(probe, Unusable):
        return probe
    log.info("bridge network picked", detail=probe.detail)
    for warning in probe.warnings:
        log.warning("bridge network", warning=warning)
    return network
