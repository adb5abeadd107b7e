"""The NoCloud seed: an ISO image that tells a guest its name, keys, address and user data at first boot.

Called by engines that boot disks. Everything is written as JSON, which is YAML too, so that no string of a spec can change its
shape (https://cloudinit.readthedocs.io, "NoCloud", "Networking config version 2"). The folder `muster/` says the same in
plain lines for guests without a YAML reader.
"""

from __future__ import annotations

import io
import json
import re
from email.mime.multipart import MIMEMultipart
from email.mime.text import MIMEText
from pathlib import Path
from typing import Any

from pycdlib import PyCdlib

from agent.errors import Unsupported
from agent.images.files import replacing
from agent.machine import Machine

VOLUME = "cidata"
# How cloud-init joins a person's cloud-config to ours: what we say stays (the keys above all), lists grow, the rest is added.
_MERGE = "dict(no_replace,recurse_list)+list(append)+str()"
# The first line of user data and the MIME type cloud-init knows it by ("User-data formats").
_KINDS = {
    "#!": "x-shellscript",
    "#cloud-config": "cloud-config",
    "#cloud-boothook": "cloud-boothook",
    "## template: jinja": "jinja2",
}


def check_user_data(text: str) -> None:
    """Raises Unsupported for user data that no guest would know what to do with."""
    if text:
        _kind(text)


def write_seed(path: Path, machine: Machine) -> None:
    """Writes the seed of a machine to `path`, whole or not at all. The same machine gives the same contents.

    ISO 9660 with Joliet and Rock Ridge, volume `cidata`: `meta-data`, `user-data`, `network-config`, and in `muster/`:
    `instance-id`, `hostname`, `authorized_keys` (a line each), `network` (`interface MAC ADDRESS/PREFIX GATEWAY MTU`,
    `nameserver ADDRESS`), and `user-data` as it was given. Raises Unsupported for user data of an unknown kind.
    """
    files = seed_files(machine)
    disc = PyCdlib()
    disc.new(interchange_level=3, joliet=3, rock_ridge="1.09", vol_ident=VOLUME)
    try:
        disc.add_directory("/MUSTER", rr_name="muster", joliet_path="/muster")
        for number, (name, data) in enumerate(sorted(files.items())):
            folder = "/MUSTER" if "/" in name else ""
            disc.add_fp(
                *(io.BytesIO(data), len(data), f"{folder}/F{number}.;1"),
                rr_name=name.rpartition("/")[2],
                joliet_path=f"/{name}",
            )
        with replacing(path) as temporary:
            disc.write(str(temporary))
            temporary.chmod(0o600)
    finally:
        disc.close()


def seed_files(machine: Machine) -> dict[str, bytes]:
    """The seed's files, path to contents."""
    request = machine.request
    files = {
        "meta-data": _json({"instance-id": machine.id, "local-hostname": machine.hostname}),
        "network-config": _json(network_config(machine)),
        "user-data": user_data(machine),
        "muster/instance-id": f"{machine.id}\n".encode(),
        "muster/hostname": f"{machine.hostname}\n".encode(),
        "muster/authorized_keys": "".join(f"{key}\n" for key in request.ssh_keys).encode(),
        "muster/network": _network_lines(machine).encode(),
    }
    if request.user_data:
        files["muster/user-data"] = request.user_data.encode()
    return files


def network_config(machine: Machine) -> dict[str, Any]:
    """Version 2: one device, known by its MAC address, with the lease's address."""
    nic = machine.nic
    device: dict[str, Any] = {
        "match": {"macaddress": nic.lease.mac.lower()},
        "set-name": "eth0",
        "addresses": [f"{nic.lease.ip}/{nic.subnet.prefixlen}"],
        "routes": [{"to": "0.0.0.0/0", "via": str(nic.gateway)}],
        "mtu": nic.mtu,
    }
    if nic.dns:
        device["nameservers"] = {"addresses": list(nic.dns)}
    return {"version": 2, "ethernets": {"eth0": device}}


def user_data(machine: Machine) -> bytes:
    """Our cloud-config alone, or a MIME message of it and what the request brings. Raises Unsupported."""
    config = "#cloud-config\n" + _json(_cloud_config(machine)).decode()
    theirs = machine.request.user_data
    if not theirs:
        return config.encode()
    kind = _kind(theirs)
    # A fixed boundary keeps the seed the same for the same machine; base64 bodies cannot hold it.
    message = MIMEMultipart(boundary="==muster-user-data==")
    message.attach(_part(config, "cloud-config"))
    part = _part(theirs, kind)
    if kind in ("cloud-config", "jinja2"):
        part["Merge-Type"] = _MERGE
    message.attach(part)
    return message.as_bytes()


def _cloud_config(machine: Machine) -> dict[str, Any]:
    keys = list(machine.request.ssh_keys)
    return {
        "hostname": machine.hostname,
        "disable_root": False,
        "ssh_pwauth": False,
        "users": [{"name": "root", "lock_passwd": True, "ssh_authorized_keys": keys}],
    }


def _part(text: str, kind: str) -> MIMEText:
    part = MIMEText(text, kind, "utf-8")
    part.add_header("Content-Disposition", "attachment", filename=kind)
    return part


def _kind(text: str) -> str:
    for start, kind in _KINDS.items():
        if text.startswith(start):
            return kind
    raise Unsupported(
        "user_data must start with #! (a script) or #cloud-config; #cloud-boothook and ## template: jinja work too"
    )


def _network_lines(machine: Machine) -> str:
    nic = machine.nic
    interface = f"interface {nic.lease.mac.lower()} {nic.lease.ip}/{nic.subnet.prefixlen} {nic.gateway} {nic.mtu}\n"
    return interface + "".join(f"nameserver {server}\n" for server in nic.dns)


def _json(value: Any) -> bytes:
    # What YAML and JSON both read the same: YAML folds some characters that JSON carries raw (U+0085, U+2028), and knows
    # no surrogate pairs, JSON's only escape for those above U+FFFF.
    text = json.dumps(value, indent=1, ensure_ascii=False)
    return re.sub(r"[\x7f-\uffff]", lambda match: f"\\u{ord(match[0]):04x}", text).encode() + b"\n"
