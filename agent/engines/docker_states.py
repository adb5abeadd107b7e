"""Reads containers from the daemon for many askers at once. Called by the docker engine's state()."""

from __future__ import annotations

import asyncio

from agent.engines.docker_cli import Container, DockerCli, container_name
from specs.names import VmId

_PER_COMMAND = 200  # names in one command line, far below the kernel's limit


class StateReader:
    """Answers every question asked while a command runs with the next one: a resync of 100 VMs costs two commands.

    An answer is never older than its question.
    """

    def __init__(self, cli: DockerCli) -> None:
        self._cli = cli
        self._waiting: dict[str, asyncio.Future[Container | None]] = {}
        self._reader: asyncio.Task[None] | None = None

    async def read(self, vm_id: VmId) -> Container | None:
        """The VM's container, None if there is none. Raises AgentError when the daemon does not answer."""
        name = container_name(vm_id)
        future = self._waiting.get(name)
        if future is None:
            future = self._waiting[name] = asyncio.get_running_loop().create_future()
        if self._reader is None or self._reader.done():
            self._reader = asyncio.create_task(self._serve(), name="docker inspect")
        # One asker's cancellation must not cancel the others' answer.
        return await asyncio.shield(future)

    async def close(self) -> None:
        """Waits for the command that runs, if one does."""
        if self._reader is not None:
            await asyncio.wait({self._reader})

    async def _serve(self) -> None:
        while self._waiting:
            await asyncio.sleep(0)  # whoever asks in this turn of the loop comes along
            names = list(self._waiting)[:_PER_COMMAND]
            batch = {name: self._waiting.pop(name) for name in names}
            try:
                found = await self._cli.inspect(*names)
            except BaseException as error:
                _fail(batch, error)
                if not isinstance(error, Exception):
                    raise
                continue
            for name, future in batch.items():
                if not future.done():
                    future.set_result(found.get(name))


def _fail(batch: dict[str, asyncio.Future[Container | None]], error: BaseException) -> None:
    for future in batch.values():
        if not future.done():
            if isinstance(error, Exception):
                future.set_exception(error)
                future.exception()  # an asker that was cancelled meanwhile leaves nobody to retrieve it
            else:
                future.cancel()
