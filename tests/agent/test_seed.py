"""The NoCloud seed, read back from the ISO that was written."""

from __future__ import annotations

import email
import io
import json
from email.message import Message
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

import pytest
from pycdlib import PyCdlib
from ruamel.yaml import YAML

from agent.errors import Unsupported
from agent.machine import Lease, Machine, Nic
from agent.seed import check_user_data, write_seed
from specs.names import VmId
from specs.wire import CreateVmReq

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGJveA alice@laptop"
HOSTILE_COMMENTS = [
    "a: b",
    "# comment",
    "- item",
    '"quoted"',
    "'single'",
    "\\x41 \\n \\u0000",
    "{flow: [1, 2]}",
    "${HOME} $(reboot) `reboot`",
    "&anchor *alias !!python/object",
    "%d %s ---",
    "\ufeffbom \u00e9 \U0001f600 \u200f",
    "</script>",
    "--==muster-user-data==--",
]


def machine(**fields: Any) -> Machine:
    dns = fields.pop("dns", ("10.66.0.1", "10.66.0.2"))
    body = {
        "vm_id": "vm-7f",
        "env_id": "env",
        "image": "tiny",
        "engine": "qemu",
        "cpu": 1,
        "mem": 128,
        "disk": 512,
        "ssh_keys": [KEY],
        "name": "Web.1",
        **fields,
    }
    lease = Lease(IPv4Address("10.66.3.9"), "52:54:AA:00:11:22", {22: 20100}, False, "env")
    nic = Nic("tap", lease, IPv4Network("10.66.0.0/16"), IPv4Address("10.66.0.1"), dns=dns, link="mt0", mtu=1400)
    return Machine(VmId(body["vm_id"]), Path("/nowhere"), CreateVmReq.model_validate(body), nic)


def read(path: Path) -> tuple[str, dict[str, bytes]]:
    """(volume label, every file by its Rock Ridge path); the Joliet tree must say the same."""
    disc = PyCdlib()
    disc.open(str(path))
    label = disc.pvd.volume_identifier.decode().strip()
    trees: dict[str, dict[str, bytes]] = {"rr_path": {}, "joliet_path": {}}
    for kind, found in trees.items():
        for folder, _, names in disc.walk(**{kind: "/"}):
            for name in names:
                out = io.BytesIO()
                inner = f"{folder.rstrip('/')}/{name}"
                disc.get_file_from_iso_fp(out, **{kind: inner})
                found[inner.lstrip("/")] = out.getvalue()
    disc.close()
    assert trees["rr_path"] == trees["joliet_path"]
    return label, trees["rr_path"]


def seed(tmp_path: Path, **fields: Any) -> dict[str, bytes]:
    write_seed(tmp_path / "seed.iso", machine(**fields))
    return read(tmp_path / "seed.iso")[1]


def cloud_config(data: bytes) -> Any:
    head, _, body = data.partition(b"\n")
    assert head == b"#cloud-config"
    value = json.loads(body)
    assert YAML(typ="safe").load(body.decode()) == value
    return value


def parts(data: bytes) -> list[Message]:
    message = email.message_from_bytes(data)
    assert message.get_content_type() == "multipart/mixed"
    found = message.get_payload()
    assert isinstance(found, list)
    return [part for part in found if isinstance(part, Message)]


def text(part: Message) -> str:
    payload = part.get_payload(decode=True)
    assert isinstance(payload, bytes)
    return payload.decode()


OURS = {
    "hostname": "web-1",
    "disable_root": False,
    "ssh_pwauth": False,
    "users": [{"name": "root", "lock_passwd": True, "ssh_authorized_keys": [KEY]}],
}


def test_the_seed_holds_all_a_guest_must_know(tmp_path: Path) -> None:
    write_seed(tmp_path / "seed.iso", machine())
    label, files = read(tmp_path / "seed.iso")
    assert label == "cidata"
    assert sorted(files) == [
        "meta-data",
        "muster/authorized_keys",
        "muster/hostname",
        "muster/instance-id",
        "muster/network",
        "network-config",
        "user-data",
    ]
    assert json.loads(files["meta-data"]) == {"instance-id": "vm-7f", "local-hostname": "web-1"}
    assert cloud_config(files["user-data"]) == OURS
    assert json.loads(files["network-config"]) == {
        "version": 2,
        "ethernets": {
            "eth0": {
                "match": {"macaddress": "52:54:aa:00:11:22"},
                "set-name": "eth0",
                "addresses": ["10.66.3.9/16"],
                "routes": [{"to": "0.0.0.0/0", "via": "10.66.0.1"}],
                "mtu": 1400,
                "nameservers": {"addresses": ["10.66.0.1", "10.66.0.2"]},
            }
        },
    }
    assert files["muster/network"].decode() == (
        "interface 52:54:aa:00:11:22 10.66.3.9/16 10.66.0.1 1400\nnameserver 10.66.0.1\nnameserver 10.66.0.2\n"
    )
    assert files["muster/authorized_keys"].decode() == f"{KEY}\n"
    assert (files["muster/hostname"], files["muster/instance-id"]) == (b"web-1\n", b"vm-7f\n")


def test_without_name_servers_none_are_named(tmp_path: Path) -> None:
    files = seed(tmp_path, dns=())
    assert "nameservers" not in json.loads(files["network-config"])["ethernets"]["eth0"]
    assert files["muster/network"].decode() == "interface 52:54:aa:00:11:22 10.66.3.9/16 10.66.0.1 1400\n"


@pytest.mark.parametrize("comment", HOSTILE_COMMENTS)
def test_no_text_of_a_spec_changes_the_shape_of_the_seed(tmp_path: Path, comment: str) -> None:
    key = f"ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGJveA {comment}"
    script = f"#!/bin/sh\necho {comment}\r\n{comment}"
    files = seed(tmp_path, ssh_keys=[KEY, key], user_data=script)
    config, theirs = parts(files["user-data"])
    users = [{"name": "root", "lock_passwd": True, "ssh_authorized_keys": [KEY, key]}]
    assert cloud_config(text(config).encode()) == {**OURS, "users": users}
    assert (theirs.get_content_type(), text(theirs)) == ("text/x-shellscript", script)
    assert files["muster/authorized_keys"].decode() == f"{KEY}\n{key}\n"
    assert files["muster/user-data"].decode() == script


def test_a_cloud_config_is_merged_below_ours_so_that_the_keys_stay(tmp_path: Path) -> None:
    theirs = "#cloud-config\nusers: []\npackages: [nginx]\n"
    files = seed(tmp_path, user_data=theirs)
    config, part = parts(files["user-data"])
    assert cloud_config(text(config).encode()) == OURS
    assert (part.get_content_type(), text(part)) == ("text/cloud-config", theirs)
    assert part["Merge-Type"] == "dict(no_replace,recurse_list)+list(append)+str()"


@pytest.mark.parametrize("data", ["echo hello\n", " #!/bin/sh\n", "MZ\u0000", "\n#cloud-config\n", "#include http://x\n"])
def test_user_data_of_an_unknown_kind_is_refused_and_nothing_written(tmp_path: Path, data: str) -> None:
    with pytest.raises(Unsupported, match=r"user_data must start with #! \(a script\) or #cloud-config"):
        check_user_data(data)
    with pytest.raises(Unsupported):
        write_seed(tmp_path / "seed.iso", machine(user_data=data))
    assert list(tmp_path.iterdir()) == []


def test_the_same_machine_gives_the_same_contents_and_replaces_the_old_seed_whole(tmp_path: Path) -> None:
    first = seed(tmp_path, user_data="#!/bin/sh\n")
    assert seed(tmp_path, user_data="#!/bin/sh\n") == first
    assert [path.name for path in tmp_path.iterdir()] == ["seed.iso"]
    assert (tmp_path / "seed.iso").stat().st_mode & 0o777 == 0o600


def test_a_full_disk_leaves_the_old_seed_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = seed(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("agent.images.files.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_seed(tmp_path / "seed.iso", machine(name="other"))
    assert read(tmp_path / "seed.iso")[1] == first
    assert [path.name for path in tmp_path.iterdir()] == ["seed.iso"]


def test_the_largest_user_data_fits(tmp_path: Path) -> None:
    script = "#!/bin/sh\n" + "é" * (64 * 1024 - 10)
    files = seed(tmp_path, user_data=script)
    assert text(parts(files["user-data"])[1]) == script
    assert files["muster/user-data"].decode() == script
