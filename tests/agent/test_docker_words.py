"""What the docker engine would say and understands, without a daemon."""

from __future__ import annotations

import io
import json
import tarfile
from datetime import timedelta
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest

from agent.engines.docker import DockerEngine, owner_of, state_of
from agent.engines.docker_cli import (
    Container,
    ContainerMissing,
    DaemonDown,
    NetworkMissing,
    Version,
    typed_failure,
)
from agent.engines.docker_create import create_words, keys_archive, network_words
from agent.engines.docker_events import ended_vm
from agent.errors import AgentError, CommandFailed, DoesNotFit, ImageMissing, Unsupported
from agent.machine import Lease, Machine, Nic, Running, Stopped
from specs.names import VmId
from specs.wire import CreateVmReq

CAPABILITIES = (
    *("AUDIT_WRITE", "CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID"),
    *("KILL", "NET_BIND_SERVICE", "SETGID", "SETUID", "SYS_CHROOT"),
)
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGJveA alice@laptop"


def machine(
    kind: str = "bridge",
    *,
    deny_outgoing: bool = False,
    dns: tuple[str, ...] = ("10.0.0.53",),
    folder: Path = Path("/r/vm-1"),
    **fields: object,
) -> Machine:
    request = {
        "vm_id": "vm-1",
        "env_id": "e",
        "image": "web:1",
        "engine": "docker",
        "cpu": 2,
        "mem": 128,
        "disk": 512,
        **fields,
    }
    lease = Lease(IPv4Address("10.77.0.9"), "52:54:00:00:00:09", {80: 20080, 22: 20022}, deny_outgoing, "e")
    nic = Nic(
        kind=kind,  # type: ignore[arg-type]
        lease=lease,
        subnet=IPv4Network("10.77.0.0/16"),
        gateway=IPv4Address("10.77.0.1"),
        dns=dns,
        bridge="muster0",
        forward_addrs=("127.0.0.1", "10.0.0.2"),
        mtu=1400,
    )
    return Machine(VmId("vm-1"), folder, CreateVmReq.model_validate(request), nic)


def test_a_bridged_container_is_asked_for_with_every_limit() -> None:
    assert create_words(machine(), "own", quota=True) == (
        "create",
        "--pull=never",
        "--name=muster-vm-1",
        "--hostname=vm-1",
        "--label=muster.vm=vm-1",
        "--label=muster.env=e",
        "--label=muster.agent=own",
        "--restart=no",
        "--cpu-period=100000",
        "--cpu-quota=200000",
        "--memory=128m",
        "--memory-swap=128m",
        "--pids-limit=4096",
        "--security-opt=no-new-privileges",
        "--cap-drop=ALL",
        *(f"--cap-add={name}" for name in CAPABILITIES),
        "--log-driver=json-file",
        "--log-opt=max-size=10m",
        "--storage-opt=size=512M",
        "--network=muster-muster0",
        "--ip=10.77.0.9",
        "--mac-address=52:54:00:00:00:09",
        "--dns=10.0.0.53",
        "--",
        "web:1",
    )


def test_on_dockers_own_network_every_port_is_published_on_every_address() -> None:
    words = create_words(machine("user"), "own", quota=False)
    assert [word for word in words if word.startswith("--publish")] == [
        "--publish=127.0.0.1:20022:22",
        "--publish=127.0.0.1:20080:80",
        "--publish=10.0.0.2:20022:22",
        "--publish=10.0.0.2:20080:80",
    ]
    assert not any(word.startswith(("--network", "--ip", "--mac", "--storage-opt")) for word in words)


def test_denied_containers_ask_nobody_for_names_and_are_refused_without_our_bridge() -> None:
    words = create_words(machine(deny_outgoing=True), "own", quota=False)
    assert [word for word in words if word.startswith("--dns")] == ["--dns=127.0.0.1"]
    with pytest.raises(Unsupported, match="--network bridge"):
        create_words(machine("user", deny_outgoing=True), "own", quota=False)


def test_a_tap_is_no_place_for_a_container() -> None:
    with pytest.raises(AgentError, match="tap"):
        create_words(machine("tap"), "own", quota=False)


@pytest.mark.parametrize("image", ["-v", "--privileged", "registry:5000/a/b:1", "a@sha256:" + "0" * 64])
def test_an_image_name_is_never_taken_for_an_option(image: str) -> None:
    words = create_words(machine(image=image), "own", quota=False)
    assert words[-2:] == ("--", image)
    assert words.count("--") == 1


def test_the_docker_network_leaves_addresses_and_masquerade_to_us() -> None:
    common = (
        "network",
        "create",
        "--driver=bridge",
        "--subnet=10.77.0.0/16",
        "--gateway=10.77.0.1",
        "--label=muster.agent=own",
    )
    assert network_words(machine().nic, "own", podman=False) == (
        *common,
        "--opt=com.docker.network.bridge.name=muster0",
        "--opt=com.docker.network.bridge.enable_ip_masquerade=false",
        "--opt=com.docker.network.bridge.inhibit_ipv4=true",
        "--opt=com.docker.network.driver.mtu=1400",
        "muster-muster0",
    )
    assert network_words(machine().nic, "own", podman=True) == (
        *common,
        "--interface-name=muster0",
        "--opt=mode=unmanaged",
        "--opt=mtu=1400",
        "--disable-dns",
        "muster-muster0",
    )


def test_keys_are_packed_for_root_alone() -> None:
    with tarfile.open(fileobj=io.BytesIO(keys_archive([KEY, KEY + "2"]))) as tar:
        entries = [(entry.name, entry.mode, entry.uid, entry.gid, entry.isdir()) for entry in tar]
        content = tar.extractfile("root/.ssh/authorized_keys")
        assert content is not None
        assert content.read().decode() == f"{KEY}\n{KEY}2\n"
    assert entries == [
        ("root", 0o700, 0, 0, True),
        ("root/.ssh", 0o700, 0, 0, True),
        ("root/.ssh/authorized_keys", 0o600, 0, 0, False),
    ]


@pytest.mark.parametrize(
    ("line", "vm_id"),
    [
        ({"Type": "container", "Action": "die", "Actor": {"Attributes": {"muster.vm": "a"}}}, "a"),
        ({"Type": "container", "Action": "destroy", "Actor": {"Attributes": {"muster.vm": "a"}}}, "a"),
        ({"Type": "container", "Status": "died", "Name": "muster-a", "Attributes": {"muster.vm": "a"}}, "a"),
        ({"Type": "container", "Action": "start", "Actor": {"Attributes": {"muster.vm": "a"}}}, None),
        ({"Type": "container", "Action": "die", "Actor": {"Attributes": {}}}, None),
        ({}, None),
    ],
)
def test_an_event_tells_whose_end_it_is_in_dockers_and_podmans_words(line: dict[str, object], vm_id: str | None) -> None:
    assert ended_vm(json.dumps(line).encode()) == vm_id


@pytest.mark.parametrize("line", [b"", b"[]", b"panic: x"])
def test_a_line_that_is_no_event_ends_the_stream(line: bytes) -> None:
    with pytest.raises(ValueError):
        ended_vm(line)


def container(status: str, *, pid: int = 0, code: int = 0, oom: bool = False, error: str = "") -> Container:
    state = {"Status": status, "Pid": pid, "ExitCode": code, "OOMKilled": oom, "Error": error}
    raw = {"Id": "1", "Name": "/muster-vm-1", "State": state, "HostConfig": {"Memory": 64 << 20}, "Config": {"Labels": None}}
    return Container.parse(raw)


@pytest.mark.parametrize(
    ("found", "asked", "state"),
    [
        (container("running", pid=7), False, Running(7)),
        (container("running", pid=7), True, Running(7)),
        (container("paused", pid=7), False, Running(7)),
        (container("created"), False, Stopped()),
        (container("created", code=127, error="no such file"), False, Stopped("crashed", "did not start: no such file")),
        (container("exited"), False, Stopped("exited", "its main program ended with status 0")),
        (container("exited", code=137), True, Stopped()),
        (container("exited"), True, Stopped()),
        (container("exited", code=2), False, Stopped("crashed", "its main program ended with status 2")),
        (container("exited", code=137), False, Stopped("crashed", "its main program ended with status 137 (signal 9)")),
        (
            container("exited", code=137, oom=True),
            False,
            Stopped("crashed", "killed by the kernel: it used up its 64 MiB of memory"),
        ),
        (
            container("dead", code=255, error="stuck"),
            False,
            Stopped("crashed", "its main program ended with status 255 (signal 127): stuck"),
        ),
    ],
)
def test_every_state_of_a_container_means_one_state_of_its_vm(found: Container, asked: bool, state: object) -> None:
    assert state_of(found, stop_asked=asked) == state


@pytest.mark.parametrize(
    ("stderr", "kind"),
    [
        ("Cannot connect to the Docker daemon at unix:///x. Is the docker daemon running?", DaemonDown),
        ("failed to connect to the docker API at unix:///x", DaemonDown),
        ("Error response from daemon: No such image: a:1", ImageMissing),
        ("Error: a:1: image not known", ImageMissing),
        ("Error response from daemon: No such container: muster-a", ContainerMissing),
        ('Error: no container with name or ID "muster-a" found: no such container', ContainerMissing),
        ("Error response from daemon: network 12ab not found", NetworkMissing),
        ("Error: No such network: muster-x", NetworkMissing),
        ("Error response from daemon: Address already in use", DoesNotFit),
        ("Bind for 0.0.0.0:80 failed: port is already allocated", DoesNotFit),
        ("listen tcp4 0.0.0.0:80: bind: address already in use", DoesNotFit),
        ("write /x: no space left on device", DoesNotFit),
        ("Error response from daemon: something new", CommandFailed),
    ],
)
def test_what_the_command_says_becomes_a_typed_error(stderr: str, kind: type[AgentError]) -> None:
    failure = typed_failure(CommandFailed(("docker", "x"), status=1, stderr=stderr))
    assert type(failure) is kind


@pytest.mark.parametrize(
    ("version", "can"),
    [
        (Version(False, (20, 10, 24), (1, 41)), True),
        (Version(False, (28, 2, 2), (1, 41)), False),
        (Version(False, (28, 2, 2), (1, 50)), True),
        (Version(True, (4, 3, 1), (0, 0)), True),
    ],
)
def test_a_client_too_new_for_its_daemon_cannot_set_addresses(version: Version, can: bool) -> None:
    assert version.can_set_mac is can


def test_an_agent_is_known_by_where_its_records_are(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real").mkdir()
    assert owner_of(tmp_path / "link") == owner_of(tmp_path / "real")
    assert owner_of(tmp_path / "real") != owner_of(tmp_path)


_PODMAN = """#!/bin/sh
echo "$*" >> "$(dirname "$0")/said"
case "$1 $2" in
"--version ") echo "podman version 4.3.1" ;;
"container inspect") echo "Error: no such container muster-vm-1" >&2; exit 125 ;;
"network inspect") echo "Error: unable to find network with name or ID muster-muster0: network not found" >&2; exit 125 ;;
"image ls")
    printf '%s\\t%s\\t%s\\n' localhost/team/app latest sha256:11 '<none>' '<none>' '<none>' docker.io/library/web 1 '<none>' ;;
"events "*) exec sleep 100 ;;
create*) echo 0123abcd ;;
esac
"""


async def test_podman_is_told_the_same_in_its_own_words(tmp_path: Path) -> None:
    program = tmp_path / "podman"
    program.write_text(_PODMAN)
    program.chmod(0o755)
    engine = DockerEngine(tmp_path, (str(program),), owner="own")
    folder = tmp_path / "vm-1"
    folder.mkdir()
    wanted = machine(folder=folder, ssh_keys=[KEY])
    await engine.prepare(wanted)
    await engine.start(wanted)
    await engine.stop(wanted, timedelta(seconds=1))
    assert await engine.images() == (
        "docker.io/library/web:1",
        "localhost/team/app",
        "localhost/team/app:latest",
        "localhost/team/app:latest@sha256:11",
        "localhost/team/app@sha256:11",
        "team/app",
        "team/app:latest",
        "team/app:latest@sha256:11",
        "team/app@sha256:11",
        "web:1",
    )
    await engine.destroy(wanted.id, wanted.folder)
    await engine.close()
    asides = ("--version", "events", "ps", "network ls")
    said = [line for line in (tmp_path / "said").read_text().splitlines() if not line.startswith(asides)]
    assert said == [
        "container inspect muster-vm-1",
        "network inspect muster-muster0",
        " ".join(network_words(wanted.nic, "own", podman=True)),
        " ".join(create_words(wanted, "own", quota=False)),
        "cp - muster-vm-1:/",
        "start muster-vm-1",
        "container inspect muster-vm-1",
        "image ls --digests --format {{.Repository}}\t{{.Tag}}\t{{.Digest}}",
        "container inspect muster-vm-1",
    ]
