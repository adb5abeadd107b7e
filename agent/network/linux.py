"""The bridge network of Linux: a bridge, a tap per VM, and two nftables tables rendered from the leases.

Called by the runtime through the protocol of base.py. Works in the network namespace of the calling thread; needs root.
Which packets pass is decided in nft.py; this module makes the links, sets the kernel's switches and hands the text over.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Mapping
from dataclasses import replace
from hashlib import sha256
from ipaddress import IPv4Interface, IPv4Network

import structlog

from agent.errors import AgentError, CommandFailed, Conflict, Unsupported
from agent.machine import Lease, Nic, Probe, Unusable, Usable
from agent.network import iptables
from agent.network.host import ensure_sysctl, port_can_be_bound, read_sysctl, resolvers, ruleset_generation
from agent.network.names import Names, NameServer
from agent.network.netlink import Link, Links, open_links
from agent.network.nft import DEFAULT_BRIDGE, Site, change, clear, is_table_name, is_tap_name, render, tap_name
from agent.network.pool import DEFAULT_SUBNET, first_address
from agent.run import run
from specs.names import Engine, VmId

log = structlog.get_logger()

_LIMIT = 30.0  # seconds for one nft call; 5,000 elements take a tenth of a second
_PORT_KINDS = frozenset({"tun", "veth"})
_TAP_ENGINES = frozenset({Engine.QEMU, Engine.FIRECRACKER})


class BridgeNetwork:
    """Implements base.Network. `tap_owner` is the uid that may open the taps, None for root alone.

    With `docker_user` the bridge is also let through iptables' firewall (Docker's, ufw's), where there is one.
    """

    name = "bridge"

    def __init__(
        self,
        bridge: str = DEFAULT_BRIDGE,
        subnet: IPv4Network = DEFAULT_SUBNET,
        *,
        docker_user: bool = True,
        tap_owner: int | None = None,
    ) -> None:
        if subnet.prefixlen > 30:
            raise ValueError(f"subnet {subnet} has no room for a gateway and a VM")
        self.subnet = subnet
        self.gateway = first_address(subnet)
        self._site = Site(bridge, subnet, self.gateway, bridge_mac(bridge))
        self._docker_user = docker_user
        self._tap_owner = tap_owner
        self._setting_up = asyncio.Lock()
        self._applying = asyncio.Lock()
        self._applied: tuple[dict[VmId, Lease], int] | None = None
        """What the tables say, and the generation of the rules in which they began to."""
        self._bridge_is_new = False
        self._placed: frozenset[str] = frozenset()
        """Links known to be on some bridge, and on ours with hairpin: with hundreds, listing them again takes a second."""
        self._foreign_ports: frozenset[int] = frozenset()
        self._names = Names()
        self._name_server = NameServer(self._names)

    @property
    def bridge(self) -> str:
        """The name of the bridge."""
        return self._site.bridge

    async def open_names(self) -> None:
        """Begins to answer guests for the names of their environment, by rules from the next `apply` on."""
        try:
            self._site = replace(self._site, names_port=await self._name_server.open(self.gateway))
        except OSError as error:
            log.warning("VMs will not find each other by name", why=f"no socket at {self.gateway}: {error.strerror}")

    async def close_names(self) -> None:
        """Answers no more; guests go on to their next name server."""
        self._name_server.close()

    async def probe(self) -> Probe:
        """Makes a bridge and a tap under names of its own and removes them, and lets the kernel check a rule set."""
        if os.geteuid() != 0:
            return Unusable("the bridge network needs root; run the agent as root or use --network user")
        trial = f"mtp{os.getpid()}"
        try:
            async with open_links() as links:
                try:
                    bridge = await links.ensure_bridge(trial, bridge_mac(trial))
                    await links.ensure_tap(f"{trial}t", bridge, None)
                finally:
                    await links.remove(f"{trial}t")
                    await links.remove(trial)
        except AgentError as error:
            return Unusable(f"{error.message}; the bridge network needs the kernel's bridge and tun modules and /dev/net/tun")
        example = Lease(self.gateway + 1, "52:54:00:00:00:01", {22: 20000}, True, "probe")
        try:
            await run("nft", "-c", "-f", "-", stdin=render(self._site, {VmId("probe"): example}), limit=_LIMIT)
        except CommandFailed as error:
            if error.exit_status is None:
                return Unusable(f"{error.message}; on Debian: apt-get install nftables")
            return Unusable(f"the kernel refuses the rules this network needs: {error.message}")
        return Usable(f"bridge {self.bridge}, {self.subnet}", await self._warnings())

    async def _warnings(self) -> tuple[str, ...]:
        warnings = []
        if read_sysctl("net/ipv4/ip_forward") == "0":
            warnings.append("net.ipv4.ip_forward is off; the agent turns it on and leaves it on, for others may rely on it")
        warnings += await self._firewalls()
        return tuple(warnings)

    async def _firewalls(self) -> list[str]:
        """What to do about each nftables firewall of others that drops forwarded packets; iptables' own is dealt with."""
        listed = json.loads(await run("nft", "-j", "list", "chains", limit=_LIMIT))
        chains = [each["chain"] for each in listed["nftables"] if "chain" in each]
        return [
            f"table {chain['family']} {chain['table']} drops forwarded packets (policy of chain {chain['name']}), those of VMs "
            "too; let them pass: "
            + "; ".join(
                f"nft insert rule {chain['family']} {chain['table']} {chain['name']} {way} {self.bridge} accept"
                for way in ("iifname", "oifname")
            )
            for chain in chains
            if chain.get("hook") == "forward" and chain.get("policy") == "drop" and chain["family"] in ("ip", "inet")
            if not is_table_name(chain["table"]) and (chain["table"], chain["name"]) != ("filter", "FORWARD")
        ]

    async def setup(self) -> None:
        """Bridge with the gateway's address, kernel switches, Docker's chain, and hairpin on every port.

        Raises Conflict when the bridge or the subnet is somebody else's.
        """
        async with self._setting_up, open_links() as links:
            found = await links.find(self.bridge)
            if found is None:
                self._bridge_is_new, self._placed = True, frozenset()
            await self._refuse_addresses(links, found)
            placed = [link for link in await self._new_links(links) if link.master]
            if found is not None:
                self._refuse_bridge(found, [link for link in placed if link.master == found.index])
            bridge = await links.ensure_bridge(self.bridge, self._site.mac)
            await links.ensure_address(bridge, IPv4Interface((self.gateway, self.subnet.prefixlen)))
            self._set_switches()
            for port in placed:
                if port.master == bridge.index:
                    await links.ensure_port(port, bridge)
            self._placed |= {link.name for link in placed}
            if self._docker_user:
                await iptables.accept_bridge(self.bridge)
            await self._learn_foreign_ports()

    async def _new_links(self, links: Links) -> list[Link]:
        """Links of this namespace that are not known to be on a bridge."""
        names = frozenset(name for _, name in socket.if_nameindex())
        self._placed &= names
        found = [await links.find(name) for name in sorted(names - self._placed)]
        return [link for link in found if link is not None]

    async def _refuse_addresses(self, links: Links, bridge: Link | None) -> None:
        for index, address in await links.addresses():
            if bridge is not None and index == bridge.index:
                if address != IPv4Interface((self.gateway, self.subnet.prefixlen)):
                    raise Conflict(f"bridge {self.bridge} has the address {address}; remove it or choose another --bridge")
            elif address.ip in self.subnet:
                raise Conflict(f"{address.ip} of this host is inside {self.subnet}; choose another --subnet for the VMs")

    def _refuse_bridge(self, link: Link, ports: list[Link]) -> None:
        if link.kind != "bridge":
            raise Conflict(f"link {self.bridge} is of kind {link.kind or 'hardware'}, not a bridge; choose another --bridge")
        # Docker may have made our bridge at boot, before this agent; a bridge with an uplink was made by the administrator.
        uplinks = [port.name for port in ports if port.kind not in _PORT_KINDS]
        if uplinks:
            raise Conflict(f"bridge {self.bridge} carries {', '.join(uplinks)}; choose a --bridge of the agent's own")

    def _set_switches(self) -> None:
        """Meaning of each: the kernel's Documentation/networking/ip-sysctl.rst."""
        if ensure_sysctl("net/ipv4/ip_forward", "1"):
            log.info("ip forwarding turned on", sysctl="net.ipv4.ip_forward")
        conf = f"net/ipv4/conf/{self.bridge}"
        ensure_sysctl(f"{conf}/forwarding", "1")
        # For the host's own connections to forwards on 127.0.0.1; the guard chain keeps guests from using it.
        ensure_sysctl(f"{conf}/route_localnet", "1")
        # The host answers for every address of the subnet: no guest ever needs, or gets, another guest's MAC.
        ensure_sysctl(f"{conf}/proxy_arp_pvlan", "1")
        if read_sysctl(f"net/ipv6/conf/{self.bridge}/disable_ipv6") is not None:
            ensure_sysctl(f"net/ipv6/conf/{self.bridge}/disable_ipv6", "1")

    async def _learn_foreign_ports(self) -> None:
        """What other agents in this namespace forward: nobody listens there, so binding does not show it."""
        ports: set[int] = set()
        for line in (await run("nft", "list", "tables", "inet", limit=_LIMIT)).splitlines():
            table = line.split()[-1]
            if is_table_name(table) and table != self._site.table:
                try:
                    listed = await run("nft", "list", "map", "inet", table, "forwards", limit=_LIMIT)
                except CommandFailed:
                    continue  # gone since it was listed
                _, _, elements = listed.partition("elements = {")
                ports.update(int(part.split(":")[0]) for part in elements.strip(" }\n\t").split(",") if ":" in part)
        self._foreign_ports = frozenset(ports)

    async def ensure(self, vm_id: VmId, lease: Lease, engine: Engine) -> Nic:
        """A tap on the bridge for QEMU and Firecracker. Docker attaches to the bridge itself.

        Docker makes its ports without hairpin, which a container needs to reach its own forwards: called again once the
        container runs, this gives its port what it lacks.
        """
        if engine not in _TAP_ENGINES and engine is not Engine.DOCKER:
            raise Unsupported(f"engine {engine} does not run on Linux, so its VMs cannot join bridge {self.bridge}")
        link = ""
        async with open_links() as links:
            bridge = await self._require_bridge(links)
            own = frozenset(address.ip for _, address in await links.addresses())
            if engine in _TAP_ENGINES:
                link = tap_name(vm_id)
                await links.ensure_tap(link, bridge, self._tap_owner)
                if read_sysctl(f"net/ipv6/conf/{link}/disable_ipv6") is not None:
                    ensure_sysctl(f"net/ipv6/conf/{link}/disable_ipv6", "1")
                self._placed |= {link}
            else:
                await self._finish_ports(links, bridge)
        dns = resolvers(own)
        if self._site.names_port:
            dns = (str(self.gateway), *(() if lease.deny_outgoing else dns[:2]))
        elif engine is Engine.DOCKER and (lease.deny_outgoing or not dns):
            # Without a server of its own Docker resolves names from the host's side of the bridge, past deny_outgoing.
            # The gateway answers no queries.
            dns = (str(self.gateway),)
        return Nic("tap" if link else "bridge", lease, self.subnet, self.gateway, dns=dns, link=link, bridge=self.bridge)

    async def _finish_ports(self, links: Links, bridge: Link) -> None:
        async with self._setting_up:
            placed = [link for link in await self._new_links(links) if link.master]
            for port in placed:
                if port.master == bridge.index:
                    await links.ensure_port(port, bridge)
            self._placed |= {link.name for link in placed}

    async def _require_bridge(self, links: Links) -> Link:
        bridge = await links.find(self.bridge)
        if bridge is None or not bridge.up:
            await self.setup()
            bridge = await links.find(self.bridge)
        if bridge is None:
            raise AgentError(f"bridge {self.bridge} vanished right after it was made")
        return bridge

    async def apply(self, leases: Mapping[VmId, Lease]) -> None:
        """Makes both tables what the leases say: where nobody has touched any rule since, by what differs; else as a whole."""
        async with self._applying:
            if self._bridge_is_new:
                await self._return_taps(frozenset(map(tap_name, leases)))
            before = ruleset_generation()
            known = self._applied[0] if self._applied is not None and self._applied[1] == before else None
            self._names.learn(leases.values())
            if known == leases:
                return
            text = render(self._site, leases) if known is None else change(self._site, known, leases)
            self._applied = None
            await run("nft", "-f", "-", stdin=text, limit=_LIMIT)
            after = ruleset_generation()
            # Any other step than one means that somebody else's transaction came in between, perhaps undoing ours.
            if before is not None and after == (before + 1) % 2**32:
                self._applied = (dict(leases), after)

    async def _return_taps(self, names: frozenset[str]) -> None:
        """Puts taps of running VMs back on a bridge that somebody had removed from under them."""
        async with open_links() as links:
            bridge = await self._require_bridge(links)
            for tap in await links.stray_taps():
                if tap.name in names:
                    await links.ensure_port(tap, bridge)
        self._bridge_is_new = False

    async def remove(self, vm_id: VmId) -> None:
        """Removes the VM's tap. A container's link goes with the container."""
        async with open_links() as links:
            await links.remove(tap_name(vm_id))

    async def leftovers(self, known: frozenset[VmId]) -> tuple[str, ...]:
        """Removes taps on this bridge that belong to none of `known`; other bridges' taps are other agents'."""
        keep = frozenset(map(tap_name, known))
        async with open_links() as links:
            bridge = await links.find(self.bridge)
            if bridge is None:
                return ()
            stale = [port.name for port in await links.ports(bridge) if is_tap_name(port.name) and port.name not in keep]
            return tuple([f"tap {name}" for name in sorted(stale) if await links.remove(name)])

    def port_is_free(self, port: int) -> bool:
        """A forward takes packets for every local address, so nothing may listen on any; nor may another agent forward it."""
        return port not in self._foreign_ports and port_can_be_bound(port, ("0.0.0.0",))  # noqa: S104 bound, never listening

    async def teardown(self) -> None:
        """Removes tables, taps, bridge and what was put into Docker's chain. ip_forward stays on: others may rely on it."""
        async with self._setting_up, self._applying:
            self._applied = None
            await run("nft", "-f", "-", stdin=clear(self._site), limit=_LIMIT)
            if self._docker_user:
                await iptables.forget_bridge(self.bridge)
            await self.leftovers(frozenset())
            async with open_links() as links:
                link = await links.find(self.bridge)
                if link is not None and link.kind == "bridge" and link.mac == self._site.mac:
                    await links.remove(self.bridge)


def bridge_mac(bridge: str) -> str:
    """A bridge's MAC, derived from its name: a bridge without one takes its ports', and guests would lose their gateway."""
    digits = sha256(bridge.encode()).hexdigest()
    return ":".join(["02", *(digits[i : i + 2] for i in range(0, 10, 2))])
