"""Keeps a controller and an agent running side by side for `muster up`. Knows their ports and output, nothing of VMs."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import click
import httpx

from api.cli.common import Failure, note, say, wants_colour
from api.client import ApiError, Client
from specs.desired import HostSpec
from specs.mistakes import printable

READY_LIMIT = 60.0  # seconds until a part must answer; an agent may first prove KVM with a guest start
DESTROY_LIMIT = 180.0  # seconds for all environments to go
STOP_LIMIT = 30.0  # seconds between SIGTERM and SIGKILL
_PAUSE_MIN, _PAUSE_MAX = 1.0, 30.0  # seconds before a part that ended is started again
_STEADY = 60.0  # seconds after which a part counts as healthy again
_PR_SET_PDEATHSIG = 1  # prctl(2)
_NEAR = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}  # noqa: S104
_REPLACED = ("MUSTER_LISTEN", "MUSTER_API_KEY", "MUSTER_API_KEY_FILE", "MUSTER_DATA_DIR", "MUSTER_INSECURE_NO_AUTH")


@dataclass(frozen=True, slots=True)
class Part:
    """One process to keep running: `address` is where it answers, `secret` what only its environment may carry."""

    name: str
    address: str
    arguments: list[str]
    secret: Mapping[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        """Where to reach it from this machine, also when it listens on every address."""
        host, _, port = self.address.rpartition(":")
        return f"http://{_NEAR.get(host, host)}:{port}"


def run(controller: Part, agent: Part, *, key: Callable[[], str | None], destroy_on_exit: bool, hosts: int = 1) -> None:
    """Runs both until SIGINT or SIGTERM, and registers the agent. `key` tells the API key once the controller runs.

    `hosts` is how many consecutive ports the agent answers on. Raises Failure when one of them cannot be started.
    """
    asyncio.run(_Up(controller, agent, key, destroy_on_exit=destroy_on_exit, hosts=hosts).run())


class _Up:
    def __init__(
        self, controller: Part, agent: Part, key: Callable[[], str | None], *, destroy_on_exit: bool, hosts: int
    ) -> None:
        self._controller, self._agent = _Keeper(controller), _Keeper(agent)
        self._key = key
        self._destroy = destroy_on_exit
        self._hosts = hosts
        self._stop = asyncio.Event()

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stop.set)
        for keeper in (self._controller, self._agent):
            _check_free(keeper.part)
        try:
            if await self._started():
                await self._until_stopped()
        finally:
            # The controller first: it would else see its agent disappear.
            for keeper in (self._controller, self._agent):
                await keeper.stop()
        say("stopped" if self._destroy else "stopped; VMs keep running")

    async def _started(self) -> bool:
        """True once both answer and the agent is registered; False when told to stop before."""
        for keeper in (self._controller, self._agent):
            await keeper.start()
            if not await self._ready(keeper):
                return False
        host = await asyncio.to_thread(self._register)
        say(f"host         {host}")
        say(f"dashboard    {self._controller.part.url}/")
        say("next         muster apply -f FILE --wait")
        return True

    async def _ready(self, keeper: _Keeper) -> bool:
        deadline = time.monotonic() + READY_LIMIT
        while not self._stop.is_set():
            if keeper.ended:
                raise Failure(f"the {keeper.part.name} {keeper.ended}; what it said is above")
            if await asyncio.to_thread(_answers, keeper.part.url):
                return True
            if time.monotonic() > deadline:
                raise Failure(f"the {keeper.part.name} does not answer at {keeper.part.url} after {READY_LIMIT:g} s")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), 0.1)
        return False

    def _client(self) -> Client:
        return Client(self._controller.part.url, self._key())

    def _register(self) -> str:
        name, _, port = self._agent.part.url.removeprefix("http://").rpartition(":")
        with self._client() as client:
            try:
                for number in range(int(port), int(port) + self._hosts):
                    host = client.add_host(HostSpec(addr=f"{name}:{number}"))
            except ApiError as error:
                before = re.search(r"another address, (\S+)", str(error))
                if error.status != 409 or not before:
                    raise
                raise Failure(f"{error}; start it there again with --agent-listen {before[1]}") from None
            return (
                f"{host.id} ({host.state})"
                if self._hosts == 1
                else f"{self._hosts} simulated, the last is {host.id} ({host.state})"
            )

    async def _until_stopped(self) -> None:
        keepers = [asyncio.create_task(keeper.keep()) for keeper in (self._controller, self._agent)]
        try:
            await self._stop.wait()
            if self._destroy:
                await self._destroy_all()
        finally:
            for task in keepers:
                task.cancel()
            await asyncio.gather(*keepers, return_exceptions=True)

    async def _destroy_all(self) -> None:
        self._stop.clear()
        note("destroying every environment; Ctrl-C again leaves them running")
        work = asyncio.create_task(self._envs_gone())
        impatient = asyncio.create_task(self._stop.wait())
        await asyncio.wait((work, impatient), timeout=DESTROY_LIMIT, return_when=asyncio.FIRST_COMPLETED)
        impatient.cancel()
        if not work.done():
            work.cancel()
            note("environments are left behind; the next `muster up` goes on destroying them")
        await asyncio.gather(work, impatient, return_exceptions=True)
        if not work.cancelled() and (error := work.exception()):
            raise Failure(f"not every environment could be destroyed: {error}")

    async def _envs_gone(self) -> None:
        while await asyncio.to_thread(self._delete_all):  # noqa: ASYNC110 - another process empties the list
            await asyncio.sleep(0.2)

    def _delete_all(self) -> bool:
        """Asks for every environment to go; False once there is none. A controller that is just restarting is asked again."""
        try:
            with self._client() as client:
                envs = client.envs()
                for env in envs:
                    if env.phase != "terminating":
                        client.delete_env(env.id)
                return bool(envs)
        except ApiError as error:
            if error.status in (0, 404, 503):
                return True
            raise


def _answers(url: str) -> bool:
    try:
        with httpx.Client(trust_env=False, timeout=2.0) as client:
            return client.get(f"{url}/healthz").status_code == 200
    except httpx.HTTPError:
        return False


def _check_free(part: Part) -> None:
    host, _, port = part.url.removeprefix("http://").rpartition(":")
    with contextlib.suppress(OSError), socket.create_connection((host.strip("[]"), int(port)), timeout=1):
        raise Failure(f"something listens on {part.address} already; stop it, or choose another address for the {part.name}")


class _Keeper:
    """Starts one part and passes its output on, each line with the part's name."""

    def __init__(self, part: Part) -> None:
        self.part = part
        self._process: asyncio.subprocess.Process | None = None
        self._output: asyncio.Task[None] | None = None

    @property
    def ended(self) -> str:
        """How the process ended, in words; "" while it runs."""
        code = self._process.returncode if self._process else None
        if code is None:
            return ""
        return f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"

    async def start(self) -> None:
        environment = {name: value for name, value in os.environ.items() if name not in _REPLACED}
        libc = ctypes.CDLL(None) if sys.platform == "linux" else None

        def die_with_parent() -> None:
            # Killed outright, `muster up` could not stop its parts: they would hold the ports of the next one.
            if libc is not None:
                libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

        # -P: a folder called `api` where the user happens to stand must not be taken for ours.
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "api.cli.main", *self.part.arguments),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={**environment, **self.part.secret, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,  # Ctrl-C reaches `muster up` alone, which stops its parts in order
            preexec_fn=die_with_parent,
        )
        self._output = asyncio.create_task(self._pass_on(self._process))

    async def keep(self) -> None:
        """Starts the process again whenever it ends, later each time it ends early. Returns only when cancelled."""
        pause, began = _PAUSE_MIN, time.monotonic()
        while self._process is not None:
            await self._process.wait()
            pause = _PAUSE_MIN if time.monotonic() - began > _STEADY else pause
            note(f"the {self.part.name} {self.ended}; starting it again in {pause:g} s")
            await asyncio.sleep(pause)
            pause, began = min(pause * 2, _PAUSE_MAX), time.monotonic()
            await self.start()

    async def stop(self) -> None:
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(self._process.wait(), STOP_LIMIT)
        except TimeoutError:
            note(f"the {self.part.name} does not end and is killed")
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
        if self._output:
            await self._output

    async def _pass_on(self, process: asyncio.subprocess.Process) -> None:
        if process.stdout is None:
            return
        prefix = f"{self.part.name:10} | "
        if wants_colour():
            prefix = click.style(prefix, dim=True)
        rest = b""
        while chunk := await process.stdout.read(65536):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                click.echo(prefix + printable(line.decode(errors="replace")))
            rest = rest[-65536:]
        if rest:
            click.echo(prefix + printable(rest.decode(errors="replace")))
