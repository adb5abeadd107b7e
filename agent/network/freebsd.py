"""The bridge network of FreeBSD: if_bridge(4), a tap(4) per VM, an epair(4) per jail, and a PF anchor rendered from the leases.

Called by the runtime through the protocol of base.py. Needs root and PF. Which packets pass is decided in pf.py; this module
makes the links, sets the kernel's switches and hands the text over. Every link carries a description from the moment it
exists, so that one whose naming was cut off is found again.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Coroutine, Iterable, Mapping
from hashlib import sha256
from ipaddress import IPv4Interface, IPv4Network
from typing import Literal

import structlog

from agent.errors import AgentError, CommandFailed, Conflict, Unsupported
from agent.machine import Lease, Nic, Probe, Unusable, Usable
from agent.network.host import RESOLV_CONF, port_can_be_bound, resolvers
from agent.network.ifconfig import Interface, destroy, ifconfig, interfaces
from agent.network.pf import CALLS, PRODUCT, PfSite, epair_names, render, tap_name
from agent.network.pool import DEFAULT_SUBNET, first_address
from agent.run import run
from specs.names import Engine, VmId

log = structlog.get_logger()

DEFAULT_BRIDGE = "muster0"
_LIMIT = 30.0  # seconds
_TAP_ENGINES = frozenset({Engine.BHYVE, Engine.QEMU})
_SWITCHES = {
    "net.inet.ip.forwarding": "1",
    "net.link.bridge.pfil_member": "1",
    "net.link.bridge.pfil_local_phys": "1",
    # The bridge would see what its members saw already, and as one more direction.
    "net.link.bridge.pfil_bridge": "0",
    "net.link.bridge.pfil_onlyip": "1",
}
"""sysctl(8) names and the values this network needs; meaning: if_bridge(4), inet(4)."""
_LOCAL_FORWARDS = "net.pf.filter_local"  # FreeBSD 13.3 and later: the host's own connections pass rdr too
_RDR_PORT = re.compile(r"^rdr .*? port = (\d+) .*->", re.MULTILINE)


class PfNetwork:
    """Implements base.Network on FreeBSD."""

    name = "bridge"

    def __init__(self, bridge: str = DEFAULT_BRIDGE, subnet: IPv4Network = DEFAULT_SUBNET) -> None:
        if subnet.prefixlen > 30:
            raise ValueError(f"subnet {subnet} has no room for a gateway and a VM")
        self.subnet = subnet
        self.gateway = first_address(subnet)
        digits = sha256(bridge.encode()).hexdigest()
        mac = ":".join(["02", *(digits[i : i + 2] for i in range(0, 10, 2))])
        self._site = PfSite(bridge, subnet, self.gateway, mac)
        self._changing = asyncio.Lock()
        self._foreign_ports: frozenset[int] = frozenset()

    @property
    def bridge(self) -> str:
        """The name of the bridge."""
        return self._site.bridge

    async def probe(self) -> Probe:
        """Asks PF whether it runs and calls our anchor, makes a bridge and a tap and removes them, has a rule set parsed."""
        if os.geteuid() != 0:
            return Unusable("the bridge network needs root; run the agent as root")
        try:
            refusal = await self._refusal_of_pf()
            if refusal:
                return Unusable(refusal)
            await self._try_links()
            example = {VmId("probe"): Lease(self.gateway + 1, "52:54:00:00:00:01", {22: 20000}, True, "probe")}
            await self._pfctl("-n", "-f", "-", stdin=render(self._site, example, ("lo0",)))
        except CommandFailed as error:
            return Unusable(f"{error.message}; the bridge network needs FreeBSD 13.3 or later with if_bridge, if_tuntap and pf")
        switches = await _sysctls(_SWITCHES)
        off = [name for name, value in _SWITCHES.items() if switches.get(name) != value]
        changed = f"the agent sets {', '.join(off)} and leaves it so, for others may rely on it"
        return Usable(f"bridge {self.bridge}, {self.subnet}, PF anchor {self._site.anchor}", (changed,) if off else ())

    async def _refusal_of_pf(self) -> str:
        try:
            info = await run("pfctl", "-s", "info", limit=_LIMIT)
        except CommandFailed as error:
            return f"PF does not answer ({error.message}); enable it: sysrc pf_enable=YES && service pf start"
        if "Status: Enabled" not in info:
            return "PF is not enabled; enable it: sysrc pf_enable=YES && service pf start"
        missing = []
        for what, calls in CALLS.items():
            shown = (await run("pfctl", "-s", what, limit=_LIMIT)).splitlines()
            missing += [call for call in calls if not any(line.startswith(call) for line in shown)]
        if missing:
            return f"/etc/pf.conf does not call the agent's rules; add {' and '.join(missing)} to it, then service pf reload"
        return ""

    async def _try_links(self) -> None:
        trial = f"mtp{os.getpid()}"
        try:
            await ifconfig("bridge", "create", "name", trial)
            await ifconfig("tap", "create", "name", f"tap{trial}")
            await ifconfig(trial, "addm", f"tap{trial}")
        finally:
            await destroy(f"tap{trial}")
            await destroy(trial)

    async def setup(self) -> None:
        """Bridge with the gateway's address, kernel switches. Raises Conflict when bridge or subnet are somebody else's."""
        async with self._changing:
            await self._setup()

    async def _setup(self) -> None:
        site, found = self._site, await interfaces()
        self._refuse(found)
        ours = found.get(site.bridge)
        naming = ("descr", site.mark, "name", site.bridge)
        address = ("inet", f"{site.gateway}/{site.subnet.prefixlen}")
        if ours is None:
            await _uncut(ifconfig("bridge", "create", "ether", site.mac, *address, "up", *naming))
        elif ours.ether != site.mac or not ours.addresses or "UP" not in ours.flags:
            await ifconfig(site.bridge, "ether", site.mac, *(() if ours.addresses else address), "up")
        await _set_switches()
        await self._learn_foreign_ports()

    def _refuse(self, found: Mapping[str, Interface]) -> None:
        site, expected = self._site, IPv4Interface((self.gateway, self.subnet.prefixlen))
        for link in found.values():
            if self._is_a_vms(link):
                continue  # a jail's end of an epair that came back when the jail ended, not configured by anybody
            for address in link.addresses:
                if link.name == site.bridge and address != expected:
                    raise Conflict(f"bridge {site.bridge} has the address {address}; remove it or choose another --bridge")
                if link.name != site.bridge and address.ip in self.subnet:
                    raise Conflict(f"{address.ip} of this host is inside {self.subnet}; choose another --subnet for the VMs")
        ours = found.get(site.bridge)
        if ours is None:
            return
        if not ours.is_bridge:
            raise Conflict(f"interface {site.bridge} is not a bridge; choose another --bridge")
        uplinks = [name for name in ours.members if name in found and not found[name].description.startswith(f"{PRODUCT}:")]
        if uplinks:
            raise Conflict(f"bridge {site.bridge} carries {', '.join(uplinks)}; choose a --bridge of the agent's own")

    async def _learn_foreign_ports(self) -> None:
        """What other agents on this host forward: nobody listens there, so binding does not show it."""
        ports: set[int] = set()
        for anchor in (await run("pfctl", "-a", PRODUCT, "-s", "Anchors", limit=_LIMIT)).split():
            if anchor != self._site.anchor:
                shown = await run("pfctl", "-a", anchor, "-s", "nat", limit=_LIMIT)
                ports.update(int(port) for port in _RDR_PORT.findall(shown))
        self._foreign_ports = frozenset(ports)

    async def ensure(self, vm_id: VmId, lease: Lease, engine: Engine) -> Nic:
        """A tap on the bridge for bhyve and QEMU; for a jail an epair, one end on the bridge, the other for the jail."""
        if engine not in _TAP_ENGINES and engine is not Engine.JAIL:
            raise Unsupported(f"engine {engine} does not run on FreeBSD, so its VMs cannot join bridge {self.bridge}")
        async with self._changing:
            found = await interfaces()
            if self.bridge not in found or "UP" not in found[self.bridge].flags:
                await self._setup()
                found = await interfaces()
            if engine is Engine.JAIL:
                port, link = epair_names(vm_id)
                await self._ensure_epair(vm_id, lease, found)
            else:
                port = link = tap_name(vm_id)
                if link not in found:
                    await self._make("tap", vm_id, link)
            if port not in found[self.bridge].members:
                # Addresses are told, not learnt: a guest that sends from another's MAC does not get the other's frames.
                await ifconfig(self.bridge, "addm", port, "-learn", port, "static", port, lease.mac)
            # Fixed, so that no guest can make the host send it another guest's packets.
            await run("arp", "-S", str(lease.ip), lease.mac, limit=_LIMIT)
        own = frozenset(address.ip for each in found.values() for address in each.addresses)
        dns = resolvers(own, (RESOLV_CONF,))
        kind: Literal["vnet", "tap"] = "vnet" if engine is Engine.JAIL else "tap"
        return Nic(kind, lease, self.subnet, self.gateway, dns=dns, link=link, bridge=self.bridge)

    async def _make(self, family: str, vm_id: VmId, name: str = "") -> str:
        """An interface of ours, described from its first moment; returns the name the kernel gave, "" with a `name`."""
        naming = ("name", name) if name else ()
        return await _uncut(
            ifconfig(family, "create", "descr", self._site.describe(vm_id), "group", self._site.group, "up", *naming)
        )

    async def _ensure_epair(self, vm_id: VmId, lease: Lease, found: Mapping[str, Interface]) -> None:
        port, inside = epair_names(vm_id)
        if port in found:
            return
        await self._remove_described(vm_id, found, keep=tap_name(vm_id))
        made = await self._make("epair", vm_id)
        other = f"{made[:-1]}b"
        await ifconfig(other, "descr", self._site.describe(vm_id), "ether", lease.mac, "name", inside)
        # Last: an end of this name means that both are complete.
        await ifconfig(made, "name", port)

    async def apply(self, leases: Mapping[VmId, Lease]) -> None:
        """Replaces the anchor's rules, translations and tables. Raises Conflict, CommandFailed."""
        async with self._changing:
            found = await interfaces()
            inside = {self.bridge, *(link.name for link in found.values() if self._is_a_vms(link))}
            outside = [link.name for link in found.values() if link.addresses and "LOOPBACK" not in link.flags]
            text = render(self._site, leases, [name for name in outside if name not in inside])
            if text:
                await self._pfctl("-f", "-", stdin=text)
            else:
                await self._pfctl("-F", "all")

    async def _pfctl(self, *words: str, stdin: str = "") -> str:
        return await run("pfctl", "-q", "-a", self._site.anchor, *words, stdin=stdin, limit=_LIMIT)

    async def remove(self, vm_id: VmId) -> None:
        """Removes the VM's tap or epair, also one that was never named. One that a jail holds comes back when it ends."""
        async with self._changing:
            await self._remove_described(vm_id, await interfaces())

    async def _remove_described(self, vm_id: VmId, found: Mapping[str, Interface], keep: str = "") -> None:
        for link in found.values():
            if link.description == self._site.describe(vm_id) and link.name != keep:
                await destroy(link.name)  # either end of an epair takes the other with it

    async def leftovers(self, known: frozenset[VmId]) -> tuple[str, ...]:
        """Removes links of this bridge that belong to none of `known`."""
        async with self._changing:
            return await self._remove_strays(frozenset(map(self._site.describe, known)))

    async def _remove_strays(self, keep: frozenset[str]) -> tuple[str, ...]:
        removed = []
        for link in (await interfaces()).values():
            if self._is_a_vms(link) and link.description not in keep and await destroy(link.name):
                removed.append(f"link {link.name}")
        return tuple(sorted(removed))

    def _is_a_vms(self, link: Interface) -> bool:
        return link.description.startswith(self._site.mark) and link.name != self.bridge

    def port_is_free(self, port: int) -> bool:
        """A forward takes packets for every local address, so nothing may listen on any; nor may another agent forward it."""
        return port not in self._foreign_ports and port_can_be_bound(port, ("0.0.0.0",))  # noqa: S104 bound, never listening

    async def teardown(self) -> None:
        """Removes rules, links and bridge. The switches stay: others may rely on them."""
        async with self._changing:
            await self._pfctl("-F", "all")
            await self._remove_strays(frozenset())
            link = (await interfaces()).get(self.bridge)
            if link is not None and link.description == self._site.mark:
                await destroy(self.bridge)


async def _sysctls(names: Iterable[str]) -> dict[str, str]:
    """The values of those that this kernel has."""
    shown = await run("sysctl", "-ie", *names, limit=_LIMIT)
    return dict(line.split("=", 1) for line in shown.splitlines() if "=" in line)


async def _set_switches() -> None:
    """Turns on what this network needs, where it is not on yet. Raises AgentError if a switch does not keep its value."""
    found = await _sysctls((*_SWITCHES, _LOCAL_FORWARDS))
    wanted = {**_SWITCHES, **({_LOCAL_FORWARDS: "1"} if _LOCAL_FORWARDS in found else {})}
    changes = {name: value for name, value in wanted.items() if found.get(name) != value}
    if not changes:
        return
    await run("sysctl", *(f"{name}={value}" for name, value in changes.items()), limit=_LIMIT)
    after = await _sysctls(changes)
    for name, value in changes.items():
        if after.get(name) != value:
            raise AgentError(f"sysctl {name} does not keep the value {value}")
    log.info("switches set", sysctl=changes)


async def _uncut(work: Coroutine[object, object, str]) -> str:
    """Carries a command through even if the caller is cancelled: cut off half way, nobody would know what it made."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise
