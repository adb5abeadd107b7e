"""One call to a VM's Firecracker over its API socket. Called by the firecracker driver; knows nothing of the VM's folder."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx

from agent.engines.firecracker_config import API
from agent.errors import AgentError

LIMIT = 5.0  # seconds for one call
_MAX_ANSWER = 1024 * 1024  # bytes; a configuration is a few KiB


async def get(root: Path, path: str, *, limit: float = LIMIT) -> dict[str, Any]:
    """The object at `path` (`/`, `/vm/config`, …) of the Firecracker whose jail is `root`. Raises AgentError."""
    answer = await _call(root, "GET", path, None, limit)
    if not isinstance(answer, dict):
        raise AgentError(f"Firecracker's API in {root} answered GET {path} with no object")
    return answer


async def act(root: Path, action: str, *, limit: float = LIMIT) -> None:
    """An action (`SendCtrlAltDel`, …). Returns when Firecracker has taken it, not when the guest has. Raises AgentError."""
    await _call(root, "PUT", "/actions", {"action_type": action}, limit)


async def _call(root: Path, method: str, path: str, body: Mapping[str, Any] | None, limit: float) -> Any:
    try:
        async with contextlib.AsyncExitStack() as open_:
            transport = httpx.AsyncHTTPTransport(uds=open_.enter_context(_socket(root)), verify=False)
            client = httpx.AsyncClient(transport=transport, base_url="http://firecracker", timeout=limit)
            await open_.enter_async_context(client)
            response = await open_.enter_async_context(client.stream(method, path, json=body))
            data = await _bounded(response)
    except (httpx.HTTPError, OSError, ValueError) as error:
        # A time-out of httpx has no text.
        raise AgentError(
            f"Firecracker's API in {root} did not take {method} {path}: {error or type(error).__name__}"
        ) from error
    try:
        answer = httpx.Response(response.status_code, content=data).json() if data else None
    except ValueError:
        raise AgentError(f"Firecracker's API in {root} answered {method} {path} with something other than JSON") from None
    if response.is_success:
        return answer
    fault = answer.get("fault_message") if isinstance(answer, dict) else None
    raise AgentError(f"Firecracker refused {method} {path}: {fault or response.status_code}")


async def _bounded(response: httpx.Response) -> bytes:
    """The body. The VMM is not trusted: whoever breaks out of a guest speaks here."""
    data = b""
    async for part in response.aiter_bytes():
        data += part
        if len(data) > _MAX_ANSWER:
            raise ValueError(f"its answer is longer than {_MAX_ANSWER} bytes")
    return data


@contextlib.contextmanager
def _socket(root: Path) -> Iterator[str]:
    """The socket under a name that fits the 107 bytes of a Unix socket's address, however deep the folder is (unix(7))."""
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        # The jailed process owns its folder: a link there could lead to another service's socket.
        if not stat.S_ISSOCK(os.stat(API, dir_fd=fd, follow_symlinks=False).st_mode):
            raise ValueError(f"{API} is no socket")
        yield f"/proc/self/fd/{fd}/{API}"
    finally:
        os.close(fd)
