"""Watches a docker daemon's events and says which VM to look at. Started by the docker engine, once per agent.

Level-triggered: an event only means "look at this VM again", and every connection, also a renewed one, begins with "look
at all of them", so what happened while nobody listened is seen as well.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import time
from collections.abc import Callable

import structlog

from agent.engines.docker_cli import OWNER_LABEL, VM_LABEL, DockerCli, uncut
from agent.errors import AgentError
from specs.names import VmId

_log = structlog.get_logger(__name__)

_ENDINGS = frozenset({"die", "died", "oom", "destroy", "remove"})  # docker's and podman's words
_BACKOFF = (0.2, 5.0)  # seconds: first and longest pause before the daemon is tried again
_LINE = 1 << 20  # bytes; an event repeats all labels of the image


class EventStream:
    """One long-lived `docker events` process, renewed when the daemon goes away and comes back."""

    def __init__(self, cli: DockerCli, owner: str, *, look_at: Callable[[VmId], None], look_at_all: Callable[[], None]) -> None:
        self._cli = cli
        self._owner = owner
        self._look_at = look_at
        self._look_at_all = look_at_all
        self._task: asyncio.Task[None] | None = None

    def ensure(self) -> None:
        """Starts watching if nobody does. Must be called from the event loop."""
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._watch(), name="docker events")

    async def close(self) -> None:
        """Ends the watcher and its process."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
            self._task = None

    async def _watch(self) -> None:
        pause = _BACKOFF[0]
        while True:
            try:
                began = time.monotonic()
                await self._listen()
                if time.monotonic() - began > _BACKOFF[1]:
                    pause = _BACKOFF[0]
            except (AgentError, OSError, ValueError) as error:
                _log.warning("docker events unavailable", error=str(error), retry_in=pause)
            await asyncio.sleep(pause)
            pause = min(2 * pause, _BACKOFF[1])

    async def _listen(self) -> None:
        """Returns when the stream ends. Raises AgentError while the daemon does not answer."""
        version = await uncut(self._cli.version())
        since = time.time() - 1
        await uncut(self._cli("ps", "--quiet", "--filter", f"label={OWNER_LABEL}={self._owner}", limit=20))
        words = [*self._cli.argv, "events", "--filter=type=container", "--format={{json .}}"]
        words += [f"--filter=label={OWNER_LABEL}={self._owner}"]
        if not version.podman:
            # What happens until the daemon has taken the subscription is replayed from its memory.
            words.append(f"--since={since:.3f}")
        process = await asyncio.create_subprocess_exec(
            *_die_with_us(),
            *words,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            limit=_LINE,
            start_new_session=True,
        )
        try:
            self._look_at_all()
            assert process.stdout is not None  # noqa: S101 asked for with PIPE
            async for line in process.stdout:
                vm_id = ended_vm(line)
                if vm_id is not None:
                    self._look_at(vm_id)
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


def ended_vm(line: bytes) -> VmId | None:
    """The VM an event line tells the end of, if it does. Raises ValueError for a line that is no JSON object."""
    event = json.loads(line)
    if not isinstance(event, dict):
        raise ValueError(f"docker events wrote {line[:80]!r}")
    attributes = (event.get("Actor") or {}).get("Attributes") or event.get("Attributes") or {}
    action = event.get("Action") or event.get("Status") or event.get("status")
    vm_id = attributes.get(VM_LABEL)
    return VmId(vm_id) if action in _ENDINGS and vm_id else None


def _die_with_us() -> tuple[str, ...]:
    """`docker events` would outlive a killed agent until the next event; setpriv(1) of util-linux ties it to us."""
    setpriv = shutil.which("setpriv")
    return (setpriv, "--pdeathsig", "KILL") if setpriv else ()
