"""The client of one agent's API: typed calls, typed failures. The only module here that knows HTTP."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, TypeVar

import aiohttp
import orjson
from pydantic import TypeAdapter, ValidationError
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential
from yarl import URL

from specs.names import ClusterId, VmId
from specs.wire import CLUSTER_HEADER, TERM_HEADER, AgentInfo, AgentVm, Console, CreateVmReq

MAX_REPLY = 16 * 1024 * 1024  # bytes; a longer reply is no answer
READ_TIMEOUT = 10.0  # seconds
CALL_TIMEOUT = 300.0  # a plain agent answers a create only once the VM runs
CONNECT_TIMEOUT = 3.0
_VMS = TypeAdapter(tuple[AgentVm, ...])
M = TypeVar("M", AgentInfo, AgentVm, Console, CreateVmReq)


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
        self._headers = {CLUSTER_HEADER: cluster, TERM_HEADER: str(term)}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._urls = {path: URL(f"http://{addr}{path}") for path in ("/api/vms", "/api/info")}
        self._session: aiohttp.ClientSession | None = None  # it belongs to an event loop from its beginning

    async def close(self) -> None:
        """Drops all connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    def _http(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),
                cookie_jar=aiohttp.DummyCookieJar(),
                headers=self._headers,
                skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding"),
            )
        return self._session

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

    async def console(self, vm_id: VmId, tail: int) -> str:
        """The last `tail` lines of the VM's console. Raises AgentFailure; Refused with 404 also from an agent without this."""
        body = await self._read(f"/api/vms/{vm_id}/console?tail={tail}")
        return _parse(Console, body.get("data"), self.addr).text

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
        headers = {"Prefer": prefer} if prefer else {}
        content = None
        if body is not None:
            content = orjson.dumps(body)
            headers["Content-Type"] = "application/json"
        url = self._urls.get(path) or URL(f"http://{self.addr}{path}", encoded=True)
        limits = aiohttp.ClientTimeout(sock_connect=CONNECT_TIMEOUT, sock_read=limit)
        try:
            async with self._http().request(
                method, url, headers=headers, data=content, timeout=limits, allow_redirects=False
            ) as response:
                raw = bytearray()
                while chunk := await response.content.readany():
                    raw += chunk
                    if len(raw) > MAX_REPLY:
                        response.close()
                        raise BadReply(f"{self.addr} answered more than {MAX_REPLY} bytes to {method} {path}")
        except (aiohttp.ClientError, OSError) as error:
            raise Unreachable(f"{method} http://{self.addr}{path}: {_cause(error)}") from error
        return self._envelope(method, path, response.status, bytes(raw))

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


def _cause(error: Exception) -> str:
    system = getattr(error, "os_error", error)
    if isinstance(system, OSError) and system.errno:  # negative where a name was not found (getaddrinfo(3))
        return (os.strerror(system.errno) if system.errno > 0 else str(system.strerror)).lower()
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        return f"no connection within {CONNECT_TIMEOUT:g} s"
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return str(error) or type(error).__name__
