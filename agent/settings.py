"""What the agent can be told. Filled by the command line; reads nothing but the key file."""

from __future__ import annotations

import os
import shlex
from datetime import timedelta
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from agent.errors import AgentError
from agent.network.pool import DEFAULT_PORT_RANGE, DEFAULT_SUBNET
from specs.desired import Label
from specs.names import EngineName, Name, Storage, StorageName
from specs.serving import Listen

_ROOT_DATA = Path("/var/lib/muster")
_MIN_KEY = 8
# zfs(8): components of letters, digits and `-_.:`; a pool's name begins with a letter. A name has 255 characters at most, of
# which a VM's takes up to 128.
ZFS_DATASET = r"^[A-Za-z][A-Za-z0-9_.:-]*(/[A-Za-z0-9_.:-]+)*$"


def default_data_dir() -> Path:
    """/var/lib/muster for root, the user's own data folder otherwise (XDG Base Directory: $XDG_DATA_HOME or ~/.local/share)."""
    if os.geteuid() == 0:
        return _ROOT_DATA
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "muster"


def listed(value: object) -> object:
    """`qemu,docker` as a list; "auto" and nothing mean every usable engine."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip() and part.strip().lower() != "auto")
    return value


def _labels(value: object) -> object:
    """`zone=a,disk=ssd` as a dictionary."""
    if not isinstance(value, str):
        return value
    pairs = [part.strip().partition("=") for part in value.split(",") if part.strip()]
    if not all(equals for _, equals, _ in pairs):
        raise ValueError("must be KEY=VALUE,KEY=VALUE")
    return {key.strip(): text.strip() for key, _, text in pairs}


def _words(value: object) -> object:
    return tuple(shlex.split(value)) if isinstance(value, str) else value


def _addresses(value: object) -> object:
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


def _ports(value: object) -> object:
    """`20000-32767` as (first, last)."""
    if isinstance(value, str):
        first, _, last = value.partition("-")
        return (first.strip(), last.strip() or first.strip())
    return value


class AgentSettings(BaseModel):
    """Every setting of the agent with its default. Sizes in MiB; 0 means detect. Raises ValidationError on nonsense."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    listen: str = "127.0.0.1:9100"
    data_dir: Path = Field(default_factory=default_data_dir)
    image_dir: Path | None = None
    """Base images; `<data_dir>/images` if not given."""
    runtime_dir: Path | None = None
    """One folder a VM; `<data_dir>/vms` if not given."""
    storage: StorageName = Storage.FILE
    zfs_images: Annotated[str, Field(pattern=ZFS_DATASET, max_length=100)] | None = None
    """Dataset of base images for zvol storage; the one mounted at the image folder if not given."""
    zfs_runtime: Annotated[str, Field(pattern=ZFS_DATASET, max_length=100)] | None = None
    """Dataset of VMs' disks for zvol storage; the one mounted at the runtime folder if not given."""
    host_id: Name | None = None
    """Made from the host name and kept in `<data_dir>/host-id` if not given."""
    labels: Annotated[dict[Name, Label], BeforeValidator(_labels)] = Field(default_factory=dict)

    engines: Annotated[tuple[EngineName, ...], BeforeValidator(listed)] = ()
    """Engines that must work, or the agent does not start; none given: all that work."""
    network: Literal["auto", "bridge", "user"] = "auto"
    accel: Literal["auto", "kvm", "tcg"] = "auto"
    firecracker_bin: Annotated[str, Field(min_length=1)] = "firecracker"
    """Name or path of the binary; its jailer lies beside it or on PATH."""
    docker: Annotated[tuple[str, ...], BeforeValidator(_words), Field(min_length=1)] = ("docker",)

    cpu_total: Annotated[int, Field(ge=0, le=2**31)] = 0
    mem_total: Annotated[int, Field(ge=0, le=2**31)] = 0
    disk_total: Annotated[int, Field(ge=0, le=2**31)] = 0

    bridge: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,14}$")] = "muster0"
    subnet: IPv4Network = DEFAULT_SUBNET
    port_range: Annotated[tuple[int, int], BeforeValidator(_ports)] = (DEFAULT_PORT_RANGE.start, DEFAULT_PORT_RANGE.stop - 1)
    """First and last host port for forwards."""
    forward_addrs: Annotated[tuple[str, ...], BeforeValidator(_addresses), Field(min_length=1)] = ("0.0.0.0",)  # noqa: S104
    """Addresses of the host that forwards listen on in the user network."""

    stop_grace: timedelta = timedelta(seconds=30)
    resync: timedelta = timedelta(seconds=30)

    api_key: str | None = Field(default=None, repr=False)
    api_key_file: Path | None = None
    insecure_no_auth: bool = False

    @field_validator("listen")
    @classmethod
    def _listen_is_an_address(cls, value: str) -> str:
        Listen.parse(value)
        return value

    @field_validator("forward_addrs")
    @classmethod
    def _forwards_are_on_addresses(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            IPv4Address(text)
        return value

    @field_validator("port_range")
    @classmethod
    def _ports_are_a_range(cls, value: tuple[int, int]) -> tuple[int, int]:
        if not 1 <= value[0] <= value[1] <= 65535:
            raise ValueError("must be FIRST-LAST with ports from 1 to 65535")
        return value

    @field_validator("subnet")
    @classmethod
    def _subnet_has_room(cls, value: IPv4Network) -> IPv4Network:
        if value.prefixlen > 29:
            raise ValueError("must be /29 or larger")
        return value

    @model_validator(mode="after")
    def _one_key(self) -> Self:
        if self.api_key and self.api_key_file:
            raise ValueError("give api_key or api_key_file, not both")
        return self

    @property
    def images_at(self) -> Path:
        """The folder of base images, absolute."""
        return (self.image_dir or self.data_dir / "images").absolute()

    @property
    def runtime_at(self) -> Path:
        """The folder of VMs, absolute."""
        return (self.runtime_dir or self.data_dir / "vms").absolute()

    @property
    def ports(self) -> range:
        """Host ports for forwards."""
        return range(self.port_range[0], self.port_range[1] + 1)

    def key(self) -> bytes | None:
        """The API key, from the file if one is named. Raises AgentError if it cannot be read or is too short to be one."""
        text = self.api_key
        if self.api_key_file is not None:
            try:
                text = self.api_key_file.read_text()
            except OSError as error:
                raise AgentError(f"the API key file {self.api_key_file} cannot be read: {error.strerror}") from error
        if text is None:
            return None
        key = text.strip()
        if len(key) < _MIN_KEY:
            raise AgentError(f"the API key is shorter than {_MIN_KEY} characters; make one with `openssl rand -hex 32`")
        return key.encode()
