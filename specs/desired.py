"""What people may ask for: the request models of the REST API and of spec files. An unknown field is an error."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    field_serializer,
    model_validator,
)

from specs.names import Engine, EngineName, Name, SshKey, check_docker_reference, check_name

DEFAULT_LIFETIME = 21600  # seconds; the REST reference's six hours
NEVER = -1  # lifetime of an environment that does not expire
MAX_VMS = 1000  # per environment
_U32 = 2**32 - 1
_DURATION = re.compile(r"(\d{1,9})([smhdw])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_MAX_LIFETIME = 100 * 365 * 86400

Restart = Literal["always", "on-failure", "never"]
Spread = Literal["pack", "hosts"]
OnHostLoss = Literal["wait", "recreate"]


def parse_lifetime(value: object) -> object:
    """Turns the accepted spellings into seconds: None and 0 mean the default, "never" means NEVER, "90m" 5400.

    Raises ValueError on a text that is neither; other types pass through to the integer validator.
    """
    if value is None or (value == 0 and not isinstance(value, bool)):
        return DEFAULT_LIFETIME
    if isinstance(value, str):
        if value == "never":
            return NEVER
        match = _DURATION.fullmatch(value)
        if not match or int(match[1]) == 0:
            raise ValueError('must be seconds, a duration such as "90m" or "2d", or "never"')
        return int(match[1]) * _SECONDS[match[2]]
    if isinstance(value, int) and value < 0:
        raise ValueError("must be 0 or more seconds")
    return value


Quantity = Annotated[int, Field(gt=0, le=_U32, strict=True)]
Port = Annotated[int, Field(ge=1, le=65535, strict=True)]
Lifetime = Annotated[int, BeforeValidator(parse_lifetime), Field(ge=NEVER, le=_MAX_LIFETIME, strict=True)]
Label = Annotated[str, StringConstraints(max_length=256, pattern=r"^[^\x00-\x1f\x7f]*$")]
UserData = Annotated[str, StringConstraints(max_length=64 * 1024)]


class Request(BaseModel):
    """Base of everything people send: frozen, and a misspelt field is refused by name."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def parse_timeout(value: object) -> object:
    """Turns a duration such as "90s" or "2m" into seconds; raises ValueError on other texts. Other types pass through."""
    if isinstance(value, str):
        match = _DURATION.fullmatch(value)
        if not match:
            raise ValueError('must be seconds, or a duration such as "90s" or "2m"')
        return int(match[1]) * _SECONDS[match[2]]
    return value


class HttpProbe(Request):
    """GET `path` on a guest port; a status from 200 to 399 counts."""

    port: Port = 80
    path: Annotated[str, StringConstraints(pattern=r"^/[!-~]*$", max_length=1024)] = "/"


class Ready(Request):
    """What must answer inside the guest before a VM counts as ready: exactly one probe. `timeout` in seconds from its boot."""

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True, serialize_by_alias=True)

    tcp: Port | None = None
    ssh_banner: Port | None = Field(default=None, alias="ssh-banner")
    http: HttpProbe | None = None
    timeout: Annotated[int, BeforeValidator(parse_timeout), Field(ge=1, le=86400, strict=True)] = 60

    @model_validator(mode="after")
    def _one_probe(self) -> Self:
        if sum(probe is not None for probe in (self.tcp, self.ssh_banner, self.http)) != 1:
            raise ValueError("ready needs exactly one of tcp, ssh-banner and http")
        return self

    @property
    def port(self) -> int:
        """The guest port that is probed."""
        return self.tcp or self.ssh_banner or (self.http.port if self.http else 0)


class VmSpec(Request):
    """One VM or container, or `count` equal ones. Sizes in MiB."""

    image: str
    engine: EngineName = Engine.QEMU
    cpu: Quantity = 2
    mem: Quantity = 1024
    disk: Quantity = 40960
    ports: tuple[Port, ...] = ()
    deny_outgoing: bool = Field(default=False, strict=True)
    ssh_keys: tuple[SshKey, ...] = ()
    name: Name | None = None
    count: Annotated[int, Field(ge=1, le=MAX_VMS, strict=True)] = 1
    restart: Restart = "always"
    spread: Spread = "pack"
    host_labels: dict[Name, Label] = Field(default_factory=dict)
    user_data: UserData = ""
    ready: Ready | None = None
    """None: ready once its process runs."""

    @model_validator(mode="after")
    def _image_suits_engine(self) -> Self:
        check = check_docker_reference if self.engine is Engine.DOCKER else check_name
        try:
            check(self.image)
        except ValueError as error:
            raise ValueError(f"image {error}") from None
        return self

    @model_validator(mode="after")
    def _user_data_has_a_reader(self) -> Self:
        if self.user_data and self.engine is Engine.DOCKER:
            raise ValueError(f"user_data cannot be honoured by engine {self.engine}: a container has no cloud-init to run it")
        return self

    @model_validator(mode="after")
    def _ports_differ(self) -> Self:
        twice = sorted(port for port, times in Counter(self.ports).items() if times > 1)
        if twice:
            raise ValueError(f"ports lists {', '.join(map(str, twice))} more than once")
        return self

    @property
    def all_ports(self) -> tuple[int, ...]:
        """The guest ports to forward, ascending; 22 is always among them."""
        return tuple(sorted({22, *self.ports}))


class EnvSpec(Request):
    """CreateEnvReq: an environment as people write it. `lifetime` is held in seconds, NEVER for none."""

    id: Name
    owner: Label = "default"
    ssh_keys: tuple[SshKey, ...] = ()
    vms: Annotated[tuple[VmSpec, ...], Field(min_length=1)]
    lifetime: Lifetime = DEFAULT_LIFETIME
    on_host_loss: OnHostLoss = "wait"

    @model_validator(mode="before")
    @classmethod
    def _keys_are_asked_for(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("owner", "") is None:
            data = {key: value for key, value in data.items() if key != "owner"}
        return data

    @field_serializer("lifetime")
    def _lifetime_as_accepted(self, value: int) -> int | str:
        return "never" if value == NEVER else value

    @model_validator(mode="after")
    def _someone_can_log_in(self) -> Self:
        if "ssh_keys" in self.model_fields_set:
            return self
        needing = [vm for vm in self.vms if not vm.engine.is_container and not vm.ssh_keys]
        if needing:
            raise ValueError(f"ssh_keys is required because a {needing[0].engine} VM can only be entered with a key")
        return self

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        if sum(vm.count for vm in self.vms) > MAX_VMS:
            raise ValueError(f"vms asks for more than {MAX_VMS} machines")
        names = Counter(self.vm_names())
        twice = sorted(name for name, times in names.items() if times > 1)
        if twice:
            raise ValueError(f"vms names {', '.join(twice[:5])} more than once")
        too_long = next((name for name in names if len(name) > 128), None)
        if too_long:
            raise ValueError(f"vms has the name {too_long[:40]}…, longer than 128 characters with its number")
        return self

    def vm_names(self) -> tuple[str, ...]:
        """One name per machine, in order: the given one, else `vm-<position>`; numbered from 0 when `count` is above 1."""
        return tuple(name for name, _ in self.machines())

    def machines(self) -> tuple[tuple[str, VmSpec], ...]:
        """Every machine asked for with its name and the entry it comes from."""
        out: list[tuple[str, VmSpec]] = []
        for position, vm in enumerate(self.vms):
            base = vm.name or f"vm-{position}"
            if vm.count == 1:
                out.append((base, vm))
            else:
                out.extend((f"{base}-{number}", vm) for number in range(vm.count))
        return tuple(out)


def canonical_env(env: EnvSpec) -> dict[str, Any]:
    """The shortest JSON object that means the same: two specs are equal exactly if these are. Accepted as a request again."""
    body = env.model_dump(mode="json", exclude_defaults=True)
    body["ssh_keys"] = list(env.ssh_keys)
    return body


_DNS_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_HOSTNAME = re.compile(rf"(?=.{{1,253}}$){_DNS_LABEL}(?:\.{_DNS_LABEL})*")
_IPV6 = re.compile(r"\[[0-9A-Fa-f:.]{2,45}\]")


def check_addr(value: str) -> str:
    """Accepts `host:port` with a name, an IPv4 or a bracketed IPv6 address; raises ValueError otherwise."""
    host, colon, port = value.rpartition(":")
    plain = colon and (_HOSTNAME.fullmatch(host) or _IPV6.fullmatch(host))
    if not plain or not re.fullmatch(r"[1-9][0-9]{0,4}", port) or int(port) > 65535:
        raise ValueError("addr must be host:port, such as 10.0.0.2:9100")
    return value


class HostSpec(Request):
    """The body of POST /api/hosts."""

    addr: Annotated[str, AfterValidator(check_addr)]


def spec_hash(vm: VmSpec, env_keys: tuple[str, ...]) -> str:
    """A digest of what makes a machine what it is: another digest means it must be replaced.

    `count`, `name`, `spread`, `restart` and `host_labels` are the controller's business alone and do not count.
    """
    parts = vm.model_dump(mode="json", include={"image", "engine", "cpu", "mem", "disk", "deny_outgoing", "user_data"})
    if vm.ready is not None:
        parts["ready"] = vm.ready.model_dump(mode="json")
    parts["ports"] = vm.all_ports
    parts["ssh_keys"] = sorted({*env_keys, *vm.ssh_keys})
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class AdoptReq(Request):
    """The body of POST /api/hosts/{id}/unknown/{vm_id}/adopt; `name` is the agent's word for the VM, or its id, if left out."""

    env: Name
    name: Name | None = None


class ExtendReq(Request):
    """The body of POST /api/envs/{id}/extend: seconds from now, or NEVER."""

    lifetime: Lifetime
