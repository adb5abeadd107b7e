"""The httpx client of one agent's API: typed calls, typed failures. The only module here that knows HTTP."""

from __future__ import annotations

import functools
import os
import ssl
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx
import orjson
from httpx_aiohttp import AiohttpTransport
from pydantic import TypeAdapter, ValidationError
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from specs.names import ClusterId, VmId
from specs.wire import CLUSTER_HEADER, TERM_HEADER, AgentInfo, AgentVm, CreateVmReq

MAX_REPLY = 16 * 1024 * 1024  # bytes; a longer reply is no answer
READ_TIMEOUT = 10.0  # seconds
CALL_TIMEOUT = 300.0  # a plain agent answers a create only once the VM runs
CONNECT_TIMEOUT = 3.0
_VMS = TypeAdapter(tuple[AgentVm, ...])
M = TypeVar("M", AgentInfo, AgentVm, CreateVmReq)


class AgentFailure(Exception):
    """Base of what can go wrong with a call; the message is for people."""


class Unreachable(AgentFailure):
    """No answer: refused, timed out, cut off. Whether the call took effect is unknown."""


class BadReply(AgentFailure):
    """An answer that is no muster agent's: wrong shape, too long. It says nothing about the host's state."""


class Refused(AgentFailure):
    """The agent answered with an error. `status` is the HTTP status, `code` its slug or ""."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


@dataclass(frozen=True, slots=True)
class Listing:
    """A list of VMs; `boot_id` is "" on a plain agent, which then must be polled."""

    vms: dict[VmId, AgentVm]
    boot_id: str
    seq: int
    complete: bool


@dataclass(frozen=True, slots=True)
class Reply:
    """The outcome of a mutating call: the VM if the reply shows it, and the report number that includes it."""

    vm: AgentVm | None
    boot_id: str
    seq: int


class AgentClient:
    """One per host: a client shared by many hosts searches its connections linearly."""

    def __init__(self, addr: str, cluster: ClusterId, term: int, api_key: str | None) -> None:
        self.addr = addr
        headers = {CLUSTER_HEADER: cluster, TERM_HEADER: str(term)}
        if api_key:
            headers["Authorization"] = f"Bearer {api_key}"
        self._headers = headers
        self._urls = {path: httpx.URL(f"http://{addr}{path}") for path in ("/api/vms", "/api/info")}
        # The transport alone: httpx's client, with its redirects, cookies and merging of URLs, costs as much as the call.
        self._http = AiohttpTransport(verify=_tls(), trust_env=False, limits=httpx.Limits(max_connections=None))

    async def close(self) -> None:
        """Drops all connections."""
        await self._http.aclose()

    async def info(self) -> AgentInfo:
        """What the agent says of itself. Raises AgentFailure; tried twice."""
        body = await self._read("/api/info")
        return _parse(AgentInfo, body.get("data"), self.addr)

    async def list_vms(self, *, watch: float = 0, after: str = "") -> Listing:
        """The host's VMs; with `watch` the agent holds the answer until something changed since `after` or time is up."""
        query = f"?watch={watch:g}&after={after}" if watch else ""
        body = await self._send("GET", f"/api/vms{query}", limit=watch + READ_TIMEOUT)
        try:
            vms = _VMS.validate_python(body.get("data"))
            boot_id, seq = str(body.get("boot_id", "")), int(body.get("seq", 0))
        except (ValidationError, ValueError, TypeError) as error:
            raise BadReply(f"{self.addr} answered a list of VMs that makes no sense: {_short(error)}") from error
        return Listing({VmId(vm.id): vm for vm in vms}, boot_id, seq, body.get("complete", True) is True)

    async def spec(self, vm_id: VmId) -> CreateVmReq | None:
        """What the agent was asked for when it made the VM; None from an agent that does not tell. Raises AgentFailure."""
        try:
            body = await self._read(f"/api/vms/{vm_id}/spec")
        except Refused as error:
            if error.status in (404, 405):
                return None
            raise
        return _parse(CreateVmReq, body.get("data"), self.addr)

    async def create(self, request: CreateVmReq) -> Reply:
        """Creates and starts a VM, or finds it there already."""
        return await self._call("POST", "/api/vms", request.wire())

    async def start(self, vm_id: VmId) -> Reply:
        """Boots the VM's disk again."""
        return await self._call("POST", f"/api/vms/{vm_id}/start")

    async def stop(self, vm_id: VmId) -> Reply:
        """Powers the VM down."""
        return await self._call("POST", f"/api/vms/{vm_id}/stop")

    async def destroy(self, vm_id: VmId) -> Reply:
        """Removes the VM; already gone is fine."""
        return await self._call("DELETE", f"/api/vms/{vm_id}")

    async def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Reply:
        answer = await self._send(method, path, body, limit=CALL_TIMEOUT, prefer="respond-async")
        data = answer.get("data")
        vm: AgentVm | None = None
        if isinstance(data, dict):
            vm = _parse(AgentVm, data.get("vm", data), self.addr)
        seq = answer.get("seq")
        return Reply(vm, str(answer.get("boot_id", "")), seq if isinstance(seq, int) else 0)

    async def _read(self, path: str) -> dict[str, Any]:
        async for attempt in AsyncRetrying(
            retry=retry_if_exception_type(Unreachable),
            stop=stop_after_attempt(2),
            wait=wait_random_exponential(multiplier=0.1, max=1),
            reraise=True,
        ):
            with attempt:
                return await self._send("GET", path, limit=READ_TIMEOUT)
        raise AssertionError("tenacity reraises")

    async def _send(
        self, method: str, path: str, body: dict[str, Any] | None = None, *, limit: float, prefer: str = ""
    ) -> dict[str, Any]:
        headers = {**self._headers, "Prefer": prefer} if prefer else dict(self._headers)
        content = None
        if body is not None:
            content = orjson.dumps(body)
            headers["Content-Type"] = "application/json"
        try:
            url = self._urls.get(path) or httpx.URL(f"http://{self.addr}{path}")
            limits = httpx.Timeout(limit, connect=CONNECT_TIMEOUT, pool=None)
            request = httpx.Request(method, url, headers=headers, content=content, extensions={"timeout": limits.as_dict()})
            response = await self._http.handle_async_request(request)
            try:
                raw = bytearray()
                async for chunk in response.aiter_bytes():
                    raw += chunk
                    if len(raw) > MAX_REPLY:
                        raise BadReply(f"{self.addr} answered more than {MAX_REPLY} bytes to {method} {path}")
            finally:
                await response.aclose()
        except httpx.HTTPError as error:
            raise Unreachable(f"{method} http://{self.addr}{path}: {_cause(error)}") from error
        return self._envelope(method, path, response.status_code, bytes(raw))

    def _envelope(self, method: str, path: str, status: int, raw: bytes) -> dict[str, Any]:
        try:
            answer = orjson.loads(raw)
        except orjson.JSONDecodeError as error:
            raise BadReply(f"{self.addr} answered {status} without JSON to {method} {path}") from error
        if not isinstance(answer, dict) or not isinstance(answer.get("ok"), bool):
            raise BadReply(f"{self.addr} answered {status} without the envelope to {method} {path}")
        if answer["ok"] and 200 <= status < 300:
            return answer
        raise Refused(status, str(answer.get("code", "")), str(answer.get("error", f"HTTP {status}"))[:4000])


@functools.cache
def _tls() -> ssl.SSLContext:
    """One for all clients: reading the certificates takes longer than a thousand calls, and half a megabyte."""
    return httpx.create_ssl_context(trust_env=False)


def _parse(model: type[M], data: object, addr: str) -> M:
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise BadReply(f"{addr} answered a {model.__name__} that makes no sense: {_short(error)}") from error


def _short(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"[:300]
    return str(error)[:300]


def _cause(error: httpx.HTTPError) -> str:
    system = getattr(error.__cause__, "os_error", None)  # aiohttp's, which the transport passes off as a time-out
    if isinstance(system, OSError) and system.errno:
        return os.strerror(system.errno).lower()
    if isinstance(error, httpx.ConnectTimeout):
        return f"no connection within {CONNECT_TIMEOUT:g} s"
    if isinstance(error, httpx.TimeoutException):
        return "no answer in time"
    return str(error) or type(error).__name__
