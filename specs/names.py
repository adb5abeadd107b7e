"""Names, identifiers and canonical spellings. Called by every model; knows nothing of HTTP or files."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated, NewType

from pydantic import AfterValidator, BeforeValidator, WithJsonSchema

EnvId = NewType("EnvId", str)
VmId = NewType("VmId", str)
HostId = NewType("HostId", str)
ClusterId = NewType("ClusterId", str)

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")
# Docker's reference grammar (distribution/reference): registry[:port]/path[:tag][@digest].
_DOCKER_REFERENCE = re.compile(
    r"(?:(?:[a-zA-Z0-9](?:[a-zA-Z0-9.-]*[a-zA-Z0-9])?)(?::[0-9]{1,5})?/)?"
    r"[a-z0-9]+(?:(?:\.|_{1,2}|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_{1,2}|-+)[a-z0-9]+)*)*"
    r"(?::[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?"
    r"(?:@[A-Za-z][A-Za-z0-9]*(?:[+._-][A-Za-z][A-Za-z0-9]*)*:[0-9a-fA-F]{32,128})?"
)
_DOCKER_REFERENCE_MAX = 383  # 255 for the name, 128 for the tag, as Docker limits them
_SSH_KEY = re.compile(
    r"(?P<type>ssh-ed25519|ssh-rsa|ssh-dss|ecdsa-sha2-nistp(?:256|384|521)"
    r"|sk-ssh-ed25519@openssh\.com|sk-ecdsa-sha2-nistp256@openssh\.com)"
    r" +(?P<blob>[A-Za-z0-9+/]+={0,3}|AAAA\.\.\.)(?: .*)?"
)
_SSH_KEY_MAX = 16 * 1024
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


class Engine(StrEnum):
    """What runs a machine. `qemu` is the default of the REST reference."""

    QEMU = "qemu"
    FIRECRACKER = "firecracker"
    DOCKER = "docker"
    BHYVE = "bhyve"
    JAIL = "jail"

    @property
    def is_container(self) -> bool:
        """Containers share the host's kernel and may be submitted without ssh keys."""
        return self in (Engine.DOCKER, Engine.JAIL)


class Storage(StrEnum):
    """How an agent keeps disks: qcow2 files, or ZFS volumes."""

    FILE = "file"
    ZVOL = "zvol"


ENGINE_ALIASES = {"kvm": "qemu", "fc": "firecracker", "podman": "docker"}
STORAGE_ALIASES = {"raw": "file", "zfs": "zvol"}


def canonical_engine(value: object) -> object:
    """Folds letter case and aliases of an engine name; anything that is not text passes through to the validator."""
    if not isinstance(value, str):
        return value
    folded = value.lower()
    return ENGINE_ALIASES.get(folded, folded)


def canonical_storage(value: object) -> object:
    """Folds letter case and aliases of a storage name."""
    if not isinstance(value, str):
        return value
    folded = value.lower()
    return STORAGE_ALIASES.get(folded, folded)


def check_name(value: str) -> str:
    """Accepts 1-128 of `[A-Za-z0-9._-]`, not starting with a dot and without `..`; raises ValueError otherwise."""
    if not _NAME.fullmatch(value) or ".." in value:
        raise ValueError("must be 1-128 of A-Z a-z 0-9 . _ - and must not start with '.' or contain '..'")
    return value


def check_docker_reference(value: str) -> str:
    """Accepts a full image reference (`registry/repo:tag@digest`) or a plain name; raises ValueError otherwise."""
    if len(value) > _DOCKER_REFERENCE_MAX or not (_NAME.fullmatch(value) or _DOCKER_REFERENCE.fullmatch(value)):
        raise ValueError("must be an image name or a reference such as registry:5000/team/app:1.2")
    if ".." in value:
        raise ValueError("must not contain '..'")
    return value


def check_ssh_key(value: str) -> str:
    """Accepts one line `type base64 [comment]` of a type OpenSSH knows; raises ValueError otherwise."""
    key = value.strip(" ")
    if _UNPRINTABLE.search(key):
        raise ValueError("must be one line without control characters")
    if len(key) > _SSH_KEY_MAX:
        raise ValueError(f"must be at most {_SSH_KEY_MAX} characters")
    if not _SSH_KEY.fullmatch(key):
        raise ValueError("must be an OpenSSH public key: 'ssh-ed25519 AAAA… comment'")
    return key


Name = Annotated[
    str, AfterValidator(check_name), WithJsonSchema({"type": "string", "pattern": rf"^(?!.*\.\.){_NAME.pattern}$"})
]
SshKey = Annotated[str, AfterValidator(check_ssh_key)]
EngineName = Annotated[Engine, BeforeValidator(canonical_engine)]
StorageName = Annotated[Storage, BeforeValidator(canonical_storage)]
