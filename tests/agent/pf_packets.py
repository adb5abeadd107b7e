"""What PF would do with a packet under a rule set: the meaning of pf.conf(5)'s filters, translations and states.

A `Filter` holds rules, as tests/standins/pf.py parsed them, and the states they made. One connection is asked about at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, IPv4Network
from typing import Literal

from tests.standins.pf import Rule

Direction = Literal["in", "out"]


@dataclass(frozen=True)
class Packet:
    """The first packet of a connection, or with `reply` turned round one that answers it."""

    source: str
    target: str
    port: int = 80
    proto: str = "tcp"
    tag: str = ""

    @property
    def reply(self) -> Packet:
        """The answer; ports play no part in states here, since every test opens one connection between two addresses."""
        return Packet(self.target, self.source, self.port, self.proto)


@dataclass
class Filter:
    """`groups` are the interface groups, `own` the host's addresses."""

    rules: list[Rule]
    groups: dict[str, set[str]]
    own: set[str]
    states: set[tuple[str, Direction, str, str]] = field(default_factory=set)

    def pass_(self, packet: Packet, link: str, way: Direction) -> Packet | None:
        """The packet as it leaves the hook at `link`, translated; None if it is dropped there."""
        back: Direction = "out" if way == "in" else "in"
        for bound in (link, ""):
            if (bound, way, packet.source, packet.target) in self.states:
                return packet
            if (bound, back, packet.target, packet.source) in self.states:
                return packet
        packet = self._translated(packet, link, way)
        for rule in self.rules:
            if rule["kind"] == "filter" and self._matches(rule, packet, link, way):
                assert rule["quick"], rule["line"]
                return self._decided(rule, packet, link, way)
        return packet

    def _decided(self, rule: Rule, packet: Packet, link: str, way: Direction) -> Packet | None:
        if rule["action"] != "pass":
            return None
        if rule["state"] is None or "keep" in rule["state"]:
            bound = link if "if-bound" in (rule["state"] or "") else ""
            self.states.add((bound, way, packet.source, packet.target))
        return replace(packet, tag=rule["tag"] or packet.tag)

    def _translated(self, packet: Packet, link: str, way: Direction) -> Packet:
        kind = "rdr" if way == "in" else "nat"
        for rule in self.rules:
            if rule["kind"] != kind or not self._matches(rule, packet, link, way):
                continue
            if rule["no"]:
                return packet
            if kind == "nat":
                target = rule["target"]
                return replace(packet, source="192.0.2.10" if target.startswith("(") else target)
            port = int(rule["to_port"] or packet.port)
            return replace(packet, target=rule["target"], port=port, tag=rule["tag"] or packet.tag)
        return packet

    def _matches(self, rule: Rule, packet: Packet, link: str, way: Direction) -> bool:
        return (
            rule.get("dir") in (None, way)
            and self._on(rule["on"], link)
            and rule["af"] != "inet6"
            and rule.get("proto") in (None, packet.proto)
            and rule.get("tagged") in (None, packet.tag)
            and self._holds(rule["src"], packet.source)
            and self._holds(rule["dst"], packet.target)
            and rule["port"] in (None, str(packet.port))
        )

    def _on(self, wanted: str | None, link: str) -> bool:
        return wanted in (None, link) or link in self.groups.get(wanted or "", ())

    def _holds(self, where: str | None, address: str) -> bool:
        if where in (None, "any"):
            return True
        assert where is not None
        if where.startswith("!"):
            return not self._holds(where[1:].strip(), address)
        if where == "(self)":
            return address in self.own
        if where.startswith("<"):
            table = next(rule for rule in self.rules if rule["kind"] == "table" and f"<{rule['name']}>" == where)
            return address in table["body"].split()
        return IPv4Address(address) in IPv4Network(where)
