"""pfctl(8) with the part of pf.conf(5)'s grammar that rule sets of forwards, nat and stateful filters use, strictly."""

from __future__ import annotations

import re
import sys
from typing import Any

from tests.standins.host import fail, say, state

_IFSPEC = r"(?:(?:in|out) )?"
_ADDRESS = r"(?:any|! ?\S+|\(\S+?\)|<[a-z_0-9]+>|\d+(?:\.\d+){3}(?:/\d+)?)"
_HOSTS = rf"(?:all|from (?P<src>{_ADDRESS}) to (?P<dst>{_ADDRESS})(?: port (?P<port>\d+))?)"
_ON = r"(?: on (?P<on>! ?\w+|\w+))?"
_AF = r"(?: (?P<af>inet6?))?"
_TABLE = re.compile(r"table <(?P<name>[a-z_0-9]{1,31})>(?P<options>(?: (?:persist|const|counters))*)(?: \{(?P<body>[^{}]*)\})?")
_NAT = re.compile(rf"(?P<no>no )?nat{_ON}{_AF} {_HOSTS}(?: tagged (?P<tagged>\w+))?(?: -> (?P<target>\(\w+(?::0)?\)|[\d.]+))?")
_RDR = re.compile(
    rf"(?P<no>no )?rdr{_ON}{_AF}(?: proto (?P<proto>tcp|udp))? {_HOSTS}(?: tag (?P<tag>\w+))?"
    r"(?: -> (?P<target>[\d.]+)(?: port (?P<to_port>\d+))?)?"
)
_FILTER = re.compile(
    r"(?P<action>pass|block(?: drop| return)?)(?: (?P<dir>in|out))?(?P<quick> quick)?"
    rf"{_ON}{_AF}(?: proto (?P<proto>tcp|udp|icmp))?(?: {_HOSTS})?"
    r"(?: icmp-type (?P<icmp>\w+))?(?: tag (?P<tag>\w+))?(?: tagged (?P<tagged>\w+))?"
    r"(?P<state> no state| keep state(?: \(if-bound\))?)?"
)
_MODIFIERS = {"all", "nat", "rules", "states", "Tables", "info"}

Rule = dict[str, Any]


def parse(text: str) -> list[Rule]:
    """The rules of a file in order, each with `kind` and its parts; exits as pfctl does on the first mistake."""
    rules: list[Rule] = []
    tables: set[str] = set()
    stage = 0
    for number, line in enumerate(text.splitlines(), 1):
        rule = _rule(line)
        if rule is None:
            fail(f"stdin:{number}: syntax error\npfctl: Syntax error in config file: pf rules not loaded")
        order = {"table": 0, "nat": 1, "rdr": 1, "filter": 2}[rule["kind"]]
        if order < stage:
            fail(f"stdin:{number}: Rules must be in order: options, ethernet, normalization, queueing, translation, filtering")
        stage = order
        if rule["kind"] == "table":
            tables.add(rule["name"])
        for where in (rule.get("src"), rule.get("dst")):
            for named in re.findall(r"<(\w+)>", where or ""):
                if named not in tables:
                    fail(f"stdin:{number}: table <{named}> is not defined")
        _check(rule, number)
        rules.append(rule)
    return rules


def _rule(line: str) -> Rule | None:
    for kind, pattern in (("table", _TABLE), ("nat", _NAT), ("rdr", _RDR), ("filter", _FILTER)):
        found = pattern.fullmatch(line)
        if found:
            return {"kind": kind, "line": line, **found.groupdict()}
    return None


def _check(rule: Rule, number: int) -> None:
    if rule["kind"] in ("nat", "rdr") and bool(rule["no"]) == bool(rule["target"]):
        fail(f"stdin:{number}: {'no' if rule['no'] else 'missing'} redirection address")
    if rule.get("port") and not rule.get("proto"):
        fail(f"stdin:{number}: port only applies to tcp/udp/sctp")
    if rule.get("to_port") and rule.get("proto") not in ("tcp", "udp"):
        fail(f"stdin:{number}: port only applies to tcp/udp/sctp")
    if rule.get("icmp") and rule.get("proto") != "icmp":
        fail(f"stdin:{number}: icmp-type/code only applies to icmp")
    if rule.get("state") and rule["kind"] == "filter" and rule["action"].startswith("block"):
        fail(f"stdin:{number}: keep state on block rules doesn't make sense")
    for port in (rule.get("port"), rule.get("to_port")):
        if port and not 0 < int(port) < 65536:
            fail(f"stdin:{number}: illegal port value {port}")
    addresses = (rule.get("src"), rule.get("dst"), rule.get("target"), *(rule.get("body") or "").split())
    for octet in re.findall(r"\d+", " ".join(re.findall(r"\d+(?:\.\d+){3}", " ".join(filter(None, addresses))))):
        if int(octet) > 255:
            fail(f"stdin:{number}: could not parse host specification")


def pfctl(argv: list[str]) -> int:
    """`-s what`, `[-n] -f -`, `-F modifier`, each also with `-a anchor`; `-q`."""
    words, given = list(argv), {}
    while words:
        word = words.pop(0)
        if word in ("-q", "-n", "-e", "-d"):
            given[word] = ""
        elif word in ("-a", "-s", "-f", "-F") and words:
            given[word] = words.pop(0)
        else:
            fail("usage: pfctl [-AdeghMmNnOPqRrvz] [-a anchor] [-D macro=value] [-F modifier]\n\t[-f file] [-s modifier]")
    with state() as host:
        pf = host["pf"]
        if not pf.get("loaded", True):
            fail("pfctl: /dev/pf: No such file or directory")
        if "-s" in given:
            _show(pf, given["-s"], given.get("-a", ""))
        elif "-f" in given:
            _load(pf, given)
        elif "-F" in given:
            _flush(pf, given)
        else:
            fail("pfctl: nothing to do")
    return 0


def _load(pf: dict[str, Any], given: dict[str, str]) -> None:
    if given["-f"] != "-":
        fail(f"pfctl: {given['-f']}: No such file or directory")
    text = sys.stdin.read()
    parse(text)
    if "-a" not in given:
        fail("pfctl: this would replace the host's own rules")
    if "-n" not in given:
        pf["anchors"][given["-a"]] = text


def _flush(pf: dict[str, Any], given: dict[str, str]) -> None:
    if given["-F"] not in _MODIFIERS:
        fail(f"pfctl: Unknown flush modifier '{given['-F']}'")
    if "-a" not in given:
        fail("pfctl: this would flush the host's own rules")
    pf["anchors"].pop(given["-a"], None)


def _show(pf: dict[str, Any], what: str, anchor: str) -> None:
    if what == "info":
        say(f"Status: {'Enabled' if pf['enabled'] else 'Disabled'} for 0 days 00:01:00            Debug: Urgent")
    elif what == "Anchors":
        for name in sorted(pf["anchors"]):
            if name.startswith(f"{anchor}/"):
                say(f"  {name}")
    elif what in ("nat", "rules"):
        if not anchor and pf["calls"]:
            kinds = ("nat-", "rdr-") if what == "nat" else ("",)
            for kind in kinds:
                say(f'{kind}anchor "muster/*" all')
        for line in pf["anchors"].get(anchor, "").splitlines():
            if line.split()[0] in (("nat", "rdr", "no") if what == "nat" else ("pass", "block")):
                say(re.sub(r"(to \S+) port (\d+)", r"\1 port = \2", line))
    else:
        fail(f"pfctl: Unknown show modifier '{what}'")
