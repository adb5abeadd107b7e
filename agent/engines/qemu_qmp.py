"""One conversation with a VM's QEMU at a time. Called by the qemu driver; knows nothing of folders beyond the socket's.

A monitor serves one client: a second one would wait for ever, so a session is short, the runtime's per-VM lock keeps sessions
apart, and each has a time limit. That a VM has ended is never asked here: its process says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from qemu.qmp import QMPClient, QMPError

from agent.engines.qemu_argv import QMP
from agent.errors import AgentError

LIMIT = 5.0  # seconds for a greeting and one command

# Every failure reaches the caller as an exception; the library would print it a second time.
logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)


async def execute(folder: Path, command: str, *, limit: float = LIMIT) -> object:
    """Sends one command and returns its answer. Raises AgentError if QEMU refuses it or does not answer in time."""
    try:
        async with asyncio.timeout(limit), _session(folder) as client:
            return await client.execute(command)
    except (QMPError, OSError, EOFError, TimeoutError) as error:
        # TimeoutError is an OSError since Python 3.11 and has no text.
        said = str(error) or f"no answer within {limit:g} s"
        raise AgentError(f"QEMU's monitor in {folder} did not take {command}: {said}") from error


@contextlib.asynccontextmanager
async def _session(folder: Path) -> AsyncIterator[QMPClient]:
    client = QMPClient()
    with _short_path(folder) as path:
        await client.connect(path)
    try:
        yield client
    finally:
        # QEMU may be gone by now, which disconnect reports as an error.
        with contextlib.suppress(QMPError, OSError, EOFError):
            async with asyncio.timeout(LIMIT):
                await client.disconnect()


@contextlib.contextmanager
def _short_path(folder: Path) -> Iterator[str]:
    """The socket under a name that fits the 107 bytes of a Unix socket's address, however deep the folder is (unix(7))."""
    if sys.platform != "linux":
        yield str(folder / QMP)
        return
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{QMP}"
    finally:
        os.close(fd)
