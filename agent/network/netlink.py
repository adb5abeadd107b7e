"""Links and addresses of this network namespace, read and written over rtnetlink(7). Called by the Linux driver alone.

Knows nothing of VMs. What is written is read back: the kernel ignores some attributes without an error.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface
from typing import Any

from pyroute2 import AsyncIPRoute, NetlinkError

from agent.errors import AgentError

_UP = 1  # IFF_UP of linux/if.h
_TAP = 2  # IFLA_TUN_TYPE: IFF_TAP; the other kinds of pyroute2 leave a packet-info header before every frame
_HAIRPIN = 1  # IFLA_BRPORT_MODE


@dataclass(frozen=True, slots=True)
class Link:
    """One network interface. `kind` is "" for hardware; `master` is 0 for a link on no bridge."""

    index: int
    name: str
    kind: str
    mac: str
    master: int
    up: bool
    hairpin: bool
    tap: bool


class Links:
    """An open netlink socket; `open_links` makes one. Every method raises AgentError with what was tried on which link."""

    def __init__(self, netlink: Any) -> None:
        self._netlink = netlink

    async def find(self, name: str) -> Link | None:
        """The link of this name, None if there is none."""
        with _told(f"look for link {name}"):
            try:
                found = await self._netlink.link("get", ifname=name)
            except NetlinkError as error:
                if error.code == errno.ENODEV:
                    return None
                raise
            return _link(next(iter(found)))

    async def ports(self, bridge: Link) -> tuple[Link, ...]:
        """The links on a bridge."""
        with _told(f"list the ports of {bridge.name}"):
            links = [_link(found) async for found in await self._netlink.link("dump", master=bridge.index)]
        return tuple(link for link in links if link.master == bridge.index)

    async def stray_taps(self) -> tuple[Link, ...]:
        """The taps that are on no bridge."""
        with _told("list links"):
            links = [_link(found) async for found in await self._netlink.link("dump")]
        return tuple(link for link in links if link.tap and not link.master)

    async def addresses(self) -> tuple[tuple[int, IPv4Interface], ...]:
        """Every IPv4 address of the namespace with the index of its link."""
        with _told("list addresses"):
            found = [each async for each in await self._netlink.addr("dump", family=2)]
        return tuple((each["index"], IPv4Interface(f"{_address(each)}/{each['prefixlen']}")) for each in found)

    async def ensure_bridge(self, name: str, mac: str) -> Link:
        """The bridge, made if there is none, with this MAC, no spanning tree and no multicast snooping, and up."""
        with _told(f"make bridge {name}"):
            if await self.find(name) is None:
                await self._add(ifname=name, kind="bridge", address=mac, br_stp_state=0, br_mcast_snooping=0)
            link = await self._must_find(name)
            if link.mac != mac or not link.up:
                await self._netlink.link("set", index=link.index, address=mac, state="up")
                link = await self._must_find(name)
        if link.kind != "bridge" or link.mac != mac or not link.up:
            raise AgentError(f"{name} is no bridge that is up with MAC {mac}, though it was just made so: {link}")
        return link

    async def ensure_address(self, link: Link, address: IPv4Interface) -> None:
        """Gives the link this address."""
        if (link.index, address) in await self.addresses():
            return
        with _told(f"give {link.name} the address {address}"):
            try:
                await self._netlink.addr("add", index=link.index, address=str(address.ip), prefixlen=address.network.prefixlen)
            except NetlinkError as error:
                if error.code != errno.EEXIST:
                    raise

    async def ensure_tap(self, name: str, bridge: Link, owner: int | None) -> Link:
        """A persistent tap on the bridge, up, with hairpin. `owner` is the uid that may open it, None for root alone."""
        with _told(f"make tap {name}"):
            link = await self.find(name)
            if link is not None and not link.tap:
                await self._remove(link)
                link = None
            if link is None:
                await self._add(ifname=name, kind="tun", tun_type=_TAP, **({} if owner is None else {"tun_owner": owner}))
                link = await self._must_find(name)
            return await self._ensure_port(link, bridge)

    async def ensure_port(self, link: Link, bridge: Link) -> Link:
        """Puts an existing link on the bridge, up, with hairpin."""
        with _told(f"put {link.name} on {bridge.name}"):
            return await self._ensure_port(link, bridge)

    async def remove(self, name: str) -> bool:
        """Removes the link; False if there was none."""
        with _told(f"remove link {name}"):
            link = await self.find(name)
            return link is not None and await self._remove(link)

    async def _ensure_port(self, link: Link, bridge: Link) -> Link:
        if link.master != bridge.index or not link.up:
            await self._netlink.link("set", index=link.index, master=bridge.index, state="up")
            link = await self._must_find(link.name)
        if not link.hairpin:
            await self._netlink.brport("set", index=link.index, mode=_HAIRPIN)
            link = await self._must_find(link.name)
        if link.master != bridge.index or not link.up or not link.hairpin:
            raise AgentError(f"{link.name} is not up on {bridge.name} with hairpin, though it was just put there: {link}")
        return link

    async def _add(self, **attributes: object) -> None:
        try:
            await self._netlink.link("add", **attributes)
        except NetlinkError as error:
            if error.code != errno.EEXIST:
                raise

    async def _remove(self, link: Link) -> bool:
        try:
            await self._netlink.link("del", index=link.index)
        except NetlinkError as error:
            if error.code != errno.ENODEV:
                raise
            return False
        return True

    async def _must_find(self, name: str) -> Link:
        link = await self.find(name)
        if link is None:
            raise AgentError(f"link {name} vanished while it was being set up")
        return link


@contextlib.asynccontextmanager
async def open_links() -> AsyncIterator[Links]:
    """A netlink socket in the network namespace of the calling thread."""
    async with AsyncIPRoute() as netlink:
        yield Links(netlink)


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    try:
        yield
    except (NetlinkError, OSError) as error:
        reason = error.args[1] if len(error.args) > 1 else error
        raise AgentError(f"cannot {what}: {reason}") from error


def _link(found: Any) -> Link:
    info = found.get_attr("IFLA_LINKINFO")
    kind = (info.get_attr("IFLA_INFO_KIND") if info else None) or ""
    data = info.get_attr("IFLA_INFO_DATA") if info and kind == "tun" else None
    port = info.get_attr("IFLA_INFO_SLAVE_DATA") if info and info.get_attr("IFLA_INFO_SLAVE_KIND") == "bridge" else None
    return Link(
        index=found["index"],
        name=found.get_attr("IFLA_IFNAME"),
        kind=kind,
        mac=found.get_attr("IFLA_ADDRESS") or "",
        master=found.get_attr("IFLA_MASTER") or 0,
        up=bool(found["flags"] & _UP),
        hairpin=bool(port and port.get_attr("IFLA_BRPORT_MODE") == _HAIRPIN),
        tap=bool(data and data.get_attr("IFLA_TUN_TYPE") == _TAP),
    )


def _address(found: Any) -> IPv4Address:
    # On a point-to-point link IFA_ADDRESS is the other end's.
    return IPv4Address(found.get_attr("IFA_LOCAL") or found.get_attr("IFA_ADDRESS"))
