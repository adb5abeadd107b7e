"""A synchronous client of the controller's REST API, for the command line and for scripts.

Answers come back as the models of `specs.wire`; every failure is an ApiError whose text is one readable sentence.
"""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, Literal, Self, TypeVar
from urllib.parse import quote

import httpx
from pydantic import Field, TypeAdapter, ValidationError

from specs.desired import AdoptReq, EnvSpec, HostSpec, canonical_env
from specs.wire import Console, Env, EnvDetail, Event, FleetStatus, Host, ImageInfo, Message, Plan, UnknownVm, Vm

DEFAULT_URL = "http://127.0.0.1:9200"
CONNECT_LIMIT = 5.0  # seconds
ANSWER_LIMIT = 30.0  # seconds without a byte
STREAM_LIMIT = 35.0  # seconds; the controller sends a keep-alive every 10 s
_SHOWN_DETAILS = 20

T = TypeVar("T")


class ApiError(Exception):
    """A call that failed. `status` is the HTTP status, 0 when there was no answer; `code` the slug the controller gave."""

    def __init__(self, message: str, *, status: int = 0, code: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class Snapshot(Message):
    """The whole fleet at a revision: the first event of a watch."""

    revision: int
    hosts: tuple[Host, ...] = ()
    envs: tuple[Env, ...] = ()
    vms: tuple[Vm, ...] = ()


class Change(Message):
    """One object after a change; `object` is None when it is gone."""

    revision: int
    kind: Literal["host", "env", "vm", "event"]
    id: str
    object: dict[str, Any] | None = Field(default=None)

    def parsed(self) -> Host | Env | Vm | Event | None:
        """The object as its model."""
        if self.object is None:
            return None
        models: dict[str, type[Host] | type[Env] | type[Vm] | type[Event]] = {
            "host": Host,
            "env": Env,
            "vm": Vm,
            "event": Event,
        }
        try:
            return models[self.kind].model_validate(self.object)
        except ValidationError as error:
            raise _odd(error) from None


def check_url(value: str) -> str:
    """Completes `host:port` to a URL and accepts http and https without user, query and fragment; raises ValueError."""
    url = value if "://" in value else f"http://{value}"
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, ValueError, TypeError):
        raise ValueError(f"{value!r} is not a URL such as {DEFAULT_URL}") from None
    if parsed.scheme not in ("http", "https") or not parsed.host or parsed.userinfo or parsed.query or parsed.fragment:
        raise ValueError(f"{value!r} is not a URL such as {DEFAULT_URL}")
    return url.rstrip("/")


def check_api_key(value: str) -> str:
    """Accepts what fits into a header: printable ASCII without blanks; raises ValueError that does not quote the key."""
    if not re.fullmatch(r"[\x21-\x7e]+", value):
        raise ValueError("the API key must be one line of printable ASCII without blanks")
    return value


class Client:
    """Calls one controller. Use as a context manager; safe for one thread, a watch needs a client of its own.

    `transport` replaces the network, for tests.
    """

    def __init__(
        self, url: str = DEFAULT_URL, api_key: str | None = None, *, transport: httpx.BaseTransport | None = None
    ) -> None:
        self.url = check_url(url)
        self._http = httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {check_api_key(api_key)}"} if api_key else {},
            timeout=httpx.Timeout(ANSWER_LIMIT, connect=CONNECT_LIMIT),
            follow_redirects=False,
            trust_env=False,
            transport=transport,
        )
        self._has_key = bool(api_key)
        self.api_key = api_key
        self._streaming: socket.socket | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections; a watch under way in another thread ends at once with an ApiError."""
        if self._streaming is not None:
            # Closing a socket does not wake a thread that reads it; shutting it down does.
            with contextlib.suppress(OSError):
                self._streaming.shutdown(socket.SHUT_RDWR)
        self._http.close()

    def hosts(self) -> tuple[Host, ...]:
        """Every registered host."""
        return _parse(tuple[Host, ...], self._call("GET", "/api/hosts"))

    def host(self, name: str) -> Host:
        """One host by id or address."""
        return _parse(Host, self._call("GET", f"/api/hosts/{_part(name)}"))

    def add_host(self, spec: HostSpec) -> Host:
        """Registers a host; registering it again answers the same host."""
        return _parse(Host, self._call("POST", "/api/hosts", json=spec.model_dump(mode="json")))

    def remove_host(self, name: str) -> None:
        """Removes a host by id or address; refused while VMs are placed there."""
        self._call("DELETE", f"/api/hosts/{_part(name)}")

    def set_cordon(self, name: str, cordoned: bool) -> Host:
        """Says whether new VMs may be placed on a host, by id or address; those there stay."""
        self._call("POST", f"/api/hosts/{_part(name)}/{'cordon' if cordoned else 'uncordon'}")
        return self.host(name)

    def drain_host(self, name: str) -> Host:
        """Asks for a host's VMs to be made anew elsewhere, without their disks; answers as soon as that is recorded."""
        return _parse(Host, self._call("POST", f"/api/hosts/{_part(name)}/drain"))

    def unknown_vms(self, name: str) -> tuple[UnknownVm, ...]:
        """What a host has and the controller has no record of."""
        return _parse(tuple[UnknownVm, ...], self._call("GET", f"/api/hosts/{_part(name)}/unknown"))

    def adopt(self, host: str, vm_id: str, wish: AdoptReq) -> EnvDetail:
        """Makes an unknown VM part of an environment, as it runs."""
        path = f"/api/hosts/{_part(host)}/unknown/{_part(vm_id)}/adopt"
        return _parse(EnvDetail, self._call("POST", path, json=wish.model_dump(mode="json", exclude_none=True)))

    def destroy_unknown(self, host: str, vm_id: str) -> None:
        """Asks for an unknown VM to be destroyed."""
        self._call("DELETE", f"/api/hosts/{_part(host)}/unknown/{_part(vm_id)}")

    def events(self, *, since: int | None = None, **chosen: str | None) -> tuple[Event, ...]:
        """What happened, oldest first; `chosen` are `env`, `host`, `vm` and `limit`. With `since` only what came after."""
        params = {name: value for name, value in chosen.items() if value is not None}
        if since is not None:
            params["since"] = str(since)
        return _parse(tuple[Event, ...], self._call("GET", "/api/events", params=params))

    def envs(self, **filters: str) -> tuple[Env, ...]:
        """Every environment, or those that `owner`, `phase` and `host` leave."""
        return _parse(tuple[Env, ...], self._call("GET", "/api/envs", params=filters))

    def env(self, name: str) -> EnvDetail:
        """One environment with its VMs and warnings."""
        return _parse(EnvDetail, self._call("GET", f"/api/envs/{_part(name)}"))

    def put_env(self, spec: EnvSpec) -> EnvDetail:
        """Creates or replaces the desired state of an environment; returns as soon as that is recorded."""
        return _parse(EnvDetail, self._call("PUT", f"/api/envs/{_part(spec.id)}", json=canonical_env(spec)))

    def plan_env(self, spec: EnvSpec) -> Plan:
        """What `put_env` would do; changes nothing."""
        data = self._call("PUT", f"/api/envs/{_part(spec.id)}", json=canonical_env(spec), params={"dry_run": "true"})
        return _parse(Plan, {"plan": data} if isinstance(data, list) else data)

    def delete_env(self, name: str) -> None:
        """Asks for an environment to be destroyed; it stays visible as terminating until every VM is confirmed gone."""
        self._call("DELETE", f"/api/envs/{_part(name)}")

    def stop_env(self, name: str) -> None:
        """Asks for every VM of an environment to be stopped."""
        self._call("POST", f"/api/envs/{_part(name)}/stop")

    def start_env(self, name: str) -> None:
        """Asks for every VM of an environment to run."""
        self._call("POST", f"/api/envs/{_part(name)}/start")

    def vms(self, **filters: str) -> tuple[Vm, ...]:
        """Every VM, or those that `owner`, `phase`, `host` and `env` leave."""
        return _parse(tuple[Vm, ...], self._call("GET", "/api/vms", params=filters))

    def vm(self, vm_id: str) -> Vm:
        """One VM by its id."""
        return _parse(Vm, self._call("GET", f"/api/vms/{_part(vm_id)}"))

    def console(self, vm_id: str, tail: int) -> str:
        """The last lines of a VM's console, at most 64 KiB, control characters and all."""
        found = self._call("GET", f"/api/vms/{_part(vm_id)}/console", params={"tail": str(tail)})
        return _parse(Console, found).text

    def images(self) -> tuple[ImageInfo, ...]:
        """Every image on every host."""
        return _parse(tuple[ImageInfo, ...], self._call("GET", "/api/images"))

    def status(self) -> FleetStatus:
        """Sums over the fleet."""
        return _parse(FleetStatus, self._call("GET", "/api/status"))

    def is_ready(self) -> bool:
        """Whether the controller answers and is able to work; never raises."""
        try:
            return self._http.get("/readyz", timeout=2.0).status_code == 200
        except httpx.HTTPError:
            return False

    def watch(self, since: int | None = None) -> Iterator[Snapshot | Change]:
        """Follows the fleet (server-sent events, https://html.spec.whatwg.org/multipage/server-sent-events.html).

        Without `since` the first event is a Snapshot; with it only later changes follow. Ends when the controller closes the
        stream; raises ApiError when it breaks, with status 410 when `since` is too old to resume from.
        """
        params = {} if since is None else {"since": str(since)}
        timeout = httpx.Timeout(STREAM_LIMIT, connect=CONNECT_LIMIT)
        headers = {"Accept": "text/event-stream"}
        try:
            with self._http.stream("GET", "/api/watch", params=params, headers=headers, timeout=timeout) as answer:
                if answer.status_code != 200:
                    answer.read()
                    self._data(answer)
                if not answer.headers.get("content-type", "").startswith("text/event-stream"):
                    raise self._not_muster(answer)
                stream = answer.extensions.get("network_stream")
                self._streaming = stream.get_extra_info("socket") if stream else None
                yield from _events(answer.iter_lines())
        except httpx.HTTPError as error:
            raise self._unreachable(error) from None
        finally:
            self._streaming = None

    def _call(self, method: str, path: str, *, json: Any = None, params: Mapping[str, str] | None = None) -> Any:
        try:
            # A body is sent only where there is one: stop and start arrive without a Content-Type.
            answer = self._http.request(method, path, params=params, **({"json": json} if json is not None else {}))
        except httpx.HTTPError as error:
            raise self._unreachable(error) from None
        return self._data(answer)

    def _data(self, answer: httpx.Response) -> Any:
        try:
            body = answer.json()
        except ValueError:
            raise self._not_muster(answer) from None
        if not isinstance(body, dict) or not isinstance(body.get("ok"), bool):
            raise self._not_muster(answer)
        if answer.is_success and body["ok"]:
            return body.get("data")
        if answer.status_code == 401:
            need = "refused the API key" if self._has_key else "asks for an API key"
            hint = "give it with --api-key-file or MUSTER_API_KEY"
            raise ApiError(f"the controller at {self.url} {need}; {hint}", status=401, code="unauthorized")
        raise ApiError(_sentence(body, answer.status_code), status=answer.status_code, code=str(body.get("code", "")))

    def _not_muster(self, answer: httpx.Response) -> ApiError:
        return ApiError(
            f"{self.url} answered {answer.status_code} and nothing a muster controller would say; check --url",
            status=answer.status_code,
            code="not_muster",
        )

    def _unreachable(self, error: httpx.HTTPError) -> ApiError:
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            why = re.sub(r"^\[(Errno|SSL)[^\]]*\] ?", "", str(error)).lower() or "no answer"
            hint = "start it with `muster controller` or `muster up`, or name another with --url or MUSTER_URL"
            return ApiError(f"cannot reach a controller at {self.url} ({why}); {hint}", code="unreachable")
        if isinstance(error, httpx.TimeoutException):
            return ApiError(f"the controller at {self.url} did not answer in time", code="timeout")
        return ApiError(f"the connection to {self.url} broke: {error or type(error).__name__}", code="broken")


def _events(lines: Iterator[str]) -> Iterator[Snapshot | Change]:
    kind, data = "", list[str]()
    for line in lines:
        if not line:
            if data and kind in ("snapshot", "change"):
                yield _parse_event(kind, "\n".join(data))
            kind, data = "", []
        elif line.startswith("event:"):
            kind = line[6:].strip()
        elif line.startswith("data:"):
            data.append(line[5:].removeprefix(" "))


def _parse_event(kind: str, text: str) -> Snapshot | Change:
    model = Snapshot if kind == "snapshot" else Change
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        raise _odd(error) from None


def _parse(shape: type[T], data: Any) -> T:
    try:
        return TypeAdapter(shape).validate_python(data)
    except ValidationError as error:
        raise _odd(error) from None


def _odd(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False)[0]
    where = ".".join(map(str, first["loc"]))
    return ApiError(
        f"the controller's answer is not understood ({where}: {first['msg']}); is it of another version?", code="odd_answer"
    )


def _sentence(body: dict[str, Any], status: int) -> str:
    text = str(body.get("error") or f"the controller answered {status}")
    details = body.get("details")
    found = [d for d in details if isinstance(d, dict)] if isinstance(details, list) else []
    told = [f"{d.get('loc')}: {d.get('msg')}" if d.get("loc") else str(d.get("msg")) for d in found]
    # The sentence often is the first detail already.
    missing = [line for line in told if line not in text][:_SHOWN_DETAILS]
    return f"{text} ({'; '.join(missing)})" if missing else text


def _part(name: str) -> str:
    # A dot segment would be resolved away by HTTP clients and address something else.
    if name in ("", ".", ".."):
        raise ApiError(f"{name!r} is not a name", code="bad_name")
    return quote(name, safe="")
