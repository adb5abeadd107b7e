"""What guests reach and what reaches them, tried from inside real guests, before and after a reboot of their host.

One host with QEMU and Docker and another host on a cable, each a network namespace; nothing has a route further.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.rig import Machine, machine, until
from tests.images_fixture import SshKey, ssh_key, tiny  # noqa: F401
from tests.netns import Lab, call, command, inside, sysctl

pytestmark = [pytest.mark.real, pytest.mark.e2e]

HOST, OTHER = "198.51.100.1", "198.51.100.2"  # RFC 5737: for documentation, in namespaces alone
HOST6, OTHER6 = "fd00:51::1", "fd00:51::2"
GATEWAY = "10.77.0.1"
OUTSIDE, OUTSIDE6, EVERYWHERE, LOOPBACK = 8080, 8081, 9300, 9301  # ports of the servers of these tests

# Prints `what|first line of the answer` for each line `what kind address port` on standard input, all tried at once.
TRY = """
each() {
  case $2 in
    tcp) said=$(nc -w 3 $3 $4 </dev/null 2>/dev/null | head -n 1);;
    web) said=$(printf 'GET /who HTTP/1.0\\r\\n\\r\\n' | nc -w 3 $3 $4 2>/dev/null | tail -n 1);;
    dns) timeout 3 nslookup $1.invalid $3 >/dev/null 2>&1; said=;;
    name) said=$(nslookup $3 2>/dev/null | sed -n 's/^Address[ 0-9]*: *//p' | grep -v ':53$' | grep -v '#53$' | tail -n 1);;
    ping) ping -c 1 -W 2 $3 >/dev/null 2>&1 && said=alive || said=;;
  esac
  echo "$1|$said"
}
while read -r what kind address port; do each "$what" $kind $address $port </dev/null & done
wait
"""
# Takes a neighbour's address on top of its own and speaks under it; then all is as before.
SPOOF = """
ip addr add {theirs}/16 dev eth0 && ip route add {other}/32 via {gateway} src {theirs} || echo cannot
nc -w 3 {other} {port} </dev/null 2>/dev/null
ip route del {other}/32 2>/dev/null; ip addr del {theirs}/16 dev eth0 2>/dev/null
echo done
"""


@dataclass
class Net:
    """The host, the other host, and who is where."""

    lab: Lab
    host: Machine
    other: str
    key: SshKey
    vms: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What the controller says of each VM, by name."""

    def sh(self, name: str, script: str, stdin: str = "") -> str:
        """Runs a script in a guest: over ssh through its forward, or in its container."""
        vm = self.vms[name]
        if vm["engine"] == "docker":
            words = [*self.host.docker.argv, "exec", "-i", f"muster-{vm['id']}", "sh", "-c", script]  # type: ignore[union-attr]
        else:
            words = self.key.command(vm["port_map"]["22"], script)
        with inside(self.host.namespace):
            done = subprocess.run(words, input=stdin, capture_output=True, text=True, timeout=90, check=False)
        assert done.returncode == 0, f"{name}: {done.returncode}: {done.stderr}"
        return done.stdout

    def tried(self, name: str, targets: dict[str, tuple[str, str, int]]) -> dict[str, str]:
        """What a guest hears from each target (kind, address, port); "" for nothing."""
        lines = "".join(f"{what} {kind} {address} {port}\n" for what, (kind, address, port) in targets.items())
        return dict(line.split("|", 1) for line in self.sh(name, TRY, lines).splitlines())  # type: ignore[misc]

    def port(self, name: str) -> int:
        """The host port of a guest's web server."""
        return int(self.vms[name]["port_map"]["80"])

    def look(self) -> None:
        """Waits until both environments are ready and every guest tells who it is."""
        for env in ("blue", "red"):
            for vm in self.host.await_ready(env)["vms"]:
                self.vms[vm["name"]] = vm
        for name in self.vms:
            until(lambda name=name: self.answers(name), f"{name} takes commands")  # type: ignore[misc]

    def answers(self, name: str) -> bool:
        """Whether a guest takes commands; it then tells its name on the web."""
        try:
            self.sh(name, f"echo {name} >/var/www/who")
        except AssertionError:
            return False
        return who(self.host.namespace, "127.0.0.1", self.port(name)) == name

    def reboot(self) -> None:
        """The host loses everything but its disks: processes, links, rules. Its kernel starts under a new boot id."""
        assert self.host.docker is not None and self.host.agent.boot_id is not None
        before, taps = self.host.pids(), self.host.there()["taps"]
        self.host.agent.kill()
        for name in ("open", "quiet"):
            os.kill(before[self.vms[name]["id"]], signal.SIGKILL)
        self.host.docker.stop()
        self.host.docker.host("nft", "flush", "ruleset")
        for link in ("muster0", *taps):
            self.host.docker.host("ip", "link", "delete", link)
        self.host.docker.host("sysctl", "-qw", "net.ipv4.ip_forward=0")
        self.host.agent.boot_id.write_text("00000000-0000-4000-8000-000000000002\n")
        self.lab.heard.clear()
        self.host.docker.start()
        self.host.start()
        until(
            lambda: (now := self.host.pids()).keys() == before.keys() and not set(now.values()) & set(before.values()),
            f"every VM runs again; see {self.host.agent.log}",
        )
        self.look()


def who(namespace: str, address: str, port: int) -> str:
    """Which guest answers on the web to a caller in a namespace; "" for none."""
    with contextlib.suppress(httpx.HTTPError), inside(namespace), httpx.Client(trust_env=False, timeout=5.0) as client:
        return client.get(f"http://{address}:{port}/who").text.strip()
    return ""


def spec(env: str, key: SshKey, *vms: dict[str, Any]) -> dict[str, Any]:
    small = {"cpu": 1, "mem": 128, "disk": 256, "ports": [80]}
    return {"id": env, "ssh_keys": [key.public], "vms": [{**small, **vm} for vm in vms]}


def calls_at_boot(name: str) -> str:
    """User data of a guest that asks for a name outside at every boot, before anything else."""
    asks = f"for i in 1 2 3; do timeout 3 nslookup early-{name}.invalid {OTHER}; done >/dev/null 2>&1"
    return f"#!/bin/sh\necho '{asks}' >/etc/early; echo '::once:/bin/sh /etc/early' >>/etc/inittab; sync; sh /etc/early &\n"


@pytest.fixture(scope="module")
def net(tiny: Path, ssh_key: SshKey) -> Iterator[Net]:  # noqa: F811
    """Environments blue (two VMs and a container) and red (two containers); `quiet` and `hush` must not go out."""
    lab = Lab()
    try:
        host, other = lab.namespace("p"), lab.namespace("o")
        lab.cable(host, f"{HOST}/24", other, f"{OTHER}/24")
        lab.cable(host, f"{HOST6}/64", other, f"{OTHER6}/64")
        with inside(host):
            sysctl("net/ipv6/conf/all/forwarding", "1")
        lab.serve(other, "0.0.0.0", OUTSIDE, "outside")
        lab.serve(other, "0.0.0.0", 53, "names", udp=True)
        lab.serve(other, "::", OUTSIDE6, "outside6")
        lab.serve(host, "0.0.0.0", EVERYWHERE, "everywhere")
        lab.serve(host, "127.0.0.1", LOOPBACK, "loopback")
        with machine(host, tiny, "--listen", "0.0.0.0:9100", "--insecure-no-auth") as built:
            built.agent.boot_id = built.folder / "boot-id"
            built.agent.boot_id.write_text("00000000-0000-4000-8000-000000000001\n")
            built.start()
            box = {"image": "muster/busybox", "engine": "docker"}
            blue = spec(
                "blue",
                ssh_key,
                {"name": "open", "image": "tiny", "user_data": calls_at_boot("open")},
                {"name": "quiet", "image": "tiny", "deny_outgoing": True, "user_data": calls_at_boot("quiet")},
                {"name": "box", **box},
            )
            red = spec("red", ssh_key, {"name": "hush", "deny_outgoing": True, **box}, {"name": "stranger", **box})
            for wanted in (blue, red):
                status, body = built.call("POST", "/api/envs", wanted)
                assert status == 201, body
            net = Net(lab, built, other, ssh_key)
            net.look()
            yield net
            for env in ("blue", "red"):
                built.delete(env)
    finally:
        lab.close()


def check(net: Net) -> None:
    """Everything that must hold, at any time."""
    ip = {name: str(vm["ip"]) for name, vm in net.vms.items()}
    for name in net.vms:
        answered = {
            "another host": who(net.other, HOST, net.port(name)),
            "the host": who(net.host.namespace, HOST, net.port(name)),
            "loopback": who(net.host.namespace, "127.0.0.1", net.port(name)),
            "bridge address": who(net.host.namespace, GATEWAY, net.port(name)),
        }
        assert answered == dict.fromkeys(answered, name)
    assert call(net.host.namespace, OTHER6, OUTSIDE6) is not None
    with inside(net.host.namespace), httpx.Client(trust_env=False) as client:
        assert client.get(f"http://{HOST}:9100/readyz").status_code == 200

    friends = {"open": "box", "quiet": "box", "box": "open", "hush": "stranger", "stranger": "hush"}
    enemies = {"open": "stranger", "quiet": "hush", "box": "hush", "hush": "open", "stranger": "quiet"}
    env_of = {"open": "blue", "quiet": "blue", "box": "blue", "hush": "red", "stranger": "red"}
    targets, expected = {}, {}
    for name, friend in friends.items():
        enemy, quiet = enemies[name], name in ("quiet", "hush")
        targets[name] = {
            "outside": ("tcp", OTHER, OUTSIDE),
            "outside6": ("tcp", OTHER6, OUTSIDE6),
            f"{name}-asks": ("dns", OTHER, 53),
            "ping": ("ping", OTHER, 0),
            "friend": ("web", ip[friend], 80),
            "friend-name": ("name", friend, 0),
            "friend-full-name": ("name", f"{friend}.{env_of[name]}.internal", 0),
            "enemy-name": ("name", enemy, 0),
            "enemy-full-name": ("name", f"{enemy}.{env_of[enemy]}.internal", 0),
            "enemy": ("web", ip[enemy], 80),
            "enemy-ping": ("ping", ip[enemy], 0),
            "enemy-forward": ("web", HOST, net.port(enemy)),
            "own-forward": ("web", HOST, net.port(name)),
            "own-forward-by-bridge": ("web", GATEWAY, net.port(name)),
            **{f"service-{at}": ("tcp", at, EVERYWHERE) for at in (HOST, GATEWAY)},
            **{f"loopback-{at}": ("tcp", at, LOOPBACK) for at in (HOST, GATEWAY, "127.0.0.1")},
            **{f"agent-{at}": ("web", at, 9100) for at in (HOST, GATEWAY, "127.0.0.1")},
            **{f"controller-{at}": ("web", at, 9200) for at in (HOST, GATEWAY, "127.0.0.1")},
        }
        if net.vms[name]["engine"] == "docker":
            del targets[name]["enemy-name"]  # docker's own name server tells all containers' names to each other
        answers = {
            "outside": f"outside {HOST}",
            # A container may not open raw sockets.
            "ping": "" if net.vms[name]["engine"] == "docker" else "alive",
            "friend": friend,
            "enemy-forward": enemy,
            "own-forward": name,
            "own-forward-by-bridge": name,
        }
        names = {"friend-name": ip[friend], "friend-full-name": ip[friend]}
        expected[name] = dict.fromkeys(targets[name], "") | ({} if quiet else answers) | names
    with ThreadPoolExecutor(len(targets)) as pool:
        tried = dict(zip(targets, pool.map(net.tried, targets, targets.values()), strict=True))
    otherwise = {
        (name, what): (said, expected[name].get(what)) for name in tried for what, said in tried[name].items()
        if said != expected[name].get(what)
    }  # fmt: skip
    assert otherwise == {}
    assert {name: len(answers) for name, answers in tried.items()} == {name: len(want) for name, want in expected.items()}
    heard = {name for name in friends if any(f"{name}-asks" in said for said in net.lab.heard)}
    assert heard == {"open", "box", "stranger"}
    assert not any("early-quiet" in said for said in net.lab.heard)
    assert any("early-open" in said for said in net.lab.heard)

    spoof = SPOOF.format(theirs=ip["box"], other=OTHER, gateway=GATEWAY, port=OUTSIDE)
    assert net.sh("open", spoof) == "done\n"
    assert net.sh("box", SPOOF.format(theirs=ip["open"], other=OTHER, gateway=GATEWAY, port=OUTSIDE) + "true").startswith(
        "cannot\n"
    )
    assert net.tried("open", {"outside": ("tcp", OTHER, OUTSIDE)}) == {"outside": f"outside {HOST}"}


def test_forwards_isolation_and_deny_outgoing_hold_as_guests_see_them(net: Net) -> None:
    check(net)


def test_they_hold_after_a_reboot_of_the_host_and_before_a_guests_first_word(net: Net) -> None:
    net.reboot()
    check(net)
    assert command("nsenter", f"--net=/run/netns/{net.host.namespace}", "sysctl", "-n", "net.ipv4.ip_forward") == "1\n"
