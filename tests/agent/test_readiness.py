"""Guests are asked whether they answer, and an agent tells what it learnt."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from agent.errors import DoesNotFit, Unsupported
from agent.network.fake import FakeNetwork
from agent.network.user import UserNetwork
from agent.readiness import Target, check_ready, probe_guest
from agent.records import RecordStore
from agent.runtime import Drivers
from specs.names import VmId
from specs.wire import Readiness
from tests.agent.runtime_rig import NOBODY, Rig, request, until

Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
TCP = {"tcp": 22, "timeout": 3600}


@asynccontextmanager
async def guest(talk: Talk) -> AsyncIterator[int]:
    """A server on loopback; gives its port."""
    talks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await talk(reader, writer)
        except ConnectionError:
            pass  # a probe that has heard enough
        finally:
            writer.transport.abort()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        talks.add(asyncio.create_task(serve(reader, writer)))

    async with await asyncio.start_server(connected, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]
    if talks:
        await asyncio.wait(talks)


def says(text: bytes, *, asked: list[bytes] | None = None) -> Talk:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if asked is not None:
            asked.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(text)
        await writer.drain()

    return talk


@pytest.mark.parametrize(
    ("kind", "answer", "why"),
    [
        ("tcp", b"", ""),
        ("ssh-banner", b"SSH-2.0-dropbear\r\n", ""),
        ("ssh-banner", b"welcome\r\n\r\nSSH-2.0-OpenSSH_9.2\r\n", ""),
        ("ssh-banner", b"220 mail\r\n", "what came is no SSH banner"),
        ("ssh-banner", b"x" * 20_000, "what came is no SSH banner"),
        ("ssh-banner", b"", "the connection was closed without a banner"),
        ("http", b"HTTP/1.1 200 OK\r\n\r\n", ""),
        ("http", b"HTTP/1.0 302\r\n\r\n", ""),
        ("http", b"HTTP/1.1 503 Service Unavailable\r\n\r\n", "HTTP status 503"),
        ("http", b"SSH-2.0-dropbear\r\n", "what came is no HTTP answer"),
        ("http", b"", "the connection was closed without an answer"),
    ],
)
async def test_what_a_guest_says_decides(kind: Any, answer: bytes, why: str) -> None:
    asked: list[bytes] | None = [] if kind == "http" else None
    async with guest(says(answer, asked=asked)) as port:
        assert await probe_guest(Target(kind, "127.0.0.1", port, "/health?a=b")) == why
    assert not asked or asked[0].startswith(b"GET /health?a=b HTTP/1.1\r\nHost: 127.0.0.1:")


async def test_a_closed_port_and_a_guest_that_says_nothing_are_told_apart() -> None:
    async with guest(says(b"")) as port:
        pass
    assert await probe_guest(Target("tcp", "127.0.0.1", port)) == "connection refused"

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with guest(silent) as port:
        assert await probe_guest(Target("ssh-banner", "127.0.0.1", port), 0.05) == "nothing came within 0.05 s"


class Guests:
    """Answers probes as a test says."""

    def __init__(self) -> None:
        self.why = "connection refused"
        self.asked: list[Target] = []

    async def probe(self, target: Target, limit: float) -> str:
        """What `why` is now."""
        self.asked.append(target)
        await asyncio.sleep(0)
        return self.why


class ProbedRig(Rig):
    """A host whose guests are scripted."""

    guests: Guests

    def drivers(self) -> Drivers:
        """The rig's, with the script for a probe."""
        own = super().drivers()
        return Drivers(own.engines, own.storage, own.network, {}, self.guests.probe)


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[ProbedRig]:
    made = ProbedRig(tmp_path)
    made.guests = Guests()
    yield made
    for runtime in list(made.agents):
        await made.kill(runtime)


async def test_a_vm_that_must_answer_is_shown_as_probed_until_it_does(rig: ProbedRig) -> None:
    runtime = await rig.boot()
    vm, _ = await runtime.create(request(ready=TCP), NOBODY, wait=True)
    assert vm.ready is not None and (vm.state, vm.ready.status, vm.ready.reason) == ("running", False, "Probing")
    await until(lambda: "connection refused" in runtime.get("vm-a").ready.message)  # type: ignore[union-attr]
    assert rig.guests.asked[0] == Target("tcp", vm.ip, 22)
    seq = runtime.watch.seq
    rig.guests.why = ""
    await until(lambda: runtime.get("vm-a").ready.status)  # type: ignore[union-attr]
    assert runtime.get("vm-a").ready.reason == "Answered"  # type: ignore[union-attr]
    assert runtime.watch.seq > seq, "long polls are told"


async def test_a_vm_nobody_wants_an_answer_of_is_not_probed(rig: ProbedRig) -> None:
    runtime = await rig.boot()
    vm, _ = await runtime.create(request(), NOBODY, wait=True)
    assert vm.ready is None
    assert rig.guests.asked == []


async def test_once_its_time_is_up_the_reason_says_so_and_a_late_answer_still_counts(rig: ProbedRig) -> None:
    runtime = await rig.boot()
    await runtime.create(request(ready={"ssh-banner": 22, "timeout": 1}), NOBODY, wait=True)
    await until(lambda: runtime.get("vm-a").ready.reason == "TimedOut", limit=60)  # type: ignore[union-attr]
    told = runtime.get("vm-a").ready
    assert told is not None and not told.status
    assert told.message == "ssh on guest port 22 has not answered within 1 s of the boot: connection refused"
    rig.guests.why = ""
    await until(lambda: runtime.get("vm-a").ready.status, limit=60)  # type: ignore[union-attr]


async def test_every_boot_is_probed_anew_and_a_stopped_vm_not_at_all(rig: ProbedRig) -> None:
    rig.guests.why = ""
    runtime = await rig.boot()
    await runtime.create(request(ready=TCP), NOBODY, wait=True)
    await until(lambda: runtime.get("vm-a").ready.status)  # type: ignore[union-attr]
    await runtime.set_power("vm-a", "stopped", NOBODY, wait=True)
    assert runtime.get("vm-a").ready is None
    rig.guests.why = "connection refused"
    await runtime.set_power("vm-a", "running", NOBODY, wait=True)
    assert runtime.get("vm-a").ready is not None and not runtime.get("vm-a").ready.status  # type: ignore[union-attr]
    rig.machines.crash(VmId("vm-a"), "power cut")
    await until(lambda: runtime.get("vm-a").state == "stopped")
    asked = len(rig.guests.asked)
    for _ in range(50):
        await asyncio.sleep(0.01)
    assert len(rig.guests.asked) <= asked + 1, "at most the probe under way ended"


async def test_an_agent_that_comes_back_neither_forgets_nor_invents_an_answer(rig: ProbedRig) -> None:
    rig.guests.why = ""
    first = await rig.boot()
    await first.create(request("vm-a", ready=TCP), NOBODY, wait=True)
    await until(lambda: first.get("vm-a").ready.status)  # type: ignore[union-attr]
    since = first.get("vm-a").ready.since  # type: ignore[union-attr]
    rig.guests.why = "connection refused"
    await first.create(request("vm-b", ready=TCP), NOBODY, wait=True)
    await rig.kill(first)
    second = await rig.boot(settle=False)
    for _ in range(100):
        assert second.get("vm-a").ready == Readiness(status=True, reason="Answered", since=since)
        assert not second.get("vm-b").ready.status  # type: ignore[union-attr]
        await asyncio.sleep(0.001)
    await until(lambda: second.complete)
    assert second.get("vm-a").ready == Readiness(status=True, reason="Answered", since=since)


async def test_a_full_disk_does_not_hide_that_a_guest_answers(rig: ProbedRig, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = await rig.boot()
    await runtime.create(request(ready=TCP), NOBODY, wait=True)

    async def full(self: RecordStore, record: object) -> None:
        raise DoesNotFit("no space left")

    monkeypatch.setattr(RecordStore, "save", full)
    rig.guests.why = ""
    await until(lambda: runtime.get("vm-a").ready.status)  # type: ignore[union-attr]


async def test_deleting_ends_the_probing(rig: ProbedRig) -> None:
    runtime = await rig.boot()
    await runtime.create(request(ready=TCP), NOBODY, wait=True)
    await runtime.delete("vm-a", NOBODY)
    assert rig.traces() == rig.NOTHING
    asked = len(rig.guests.asked)
    for _ in range(50):
        await asyncio.sleep(0.01)
    assert len(rig.guests.asked) == asked


@pytest.mark.parametrize(
    ("ready", "why"),
    [
        ({"tcp": 22}, "accepts connections in the guest's place"),
        ({"http": {"port": 8080}}, "ready cannot probe port 8080"),
        ({"ssh-banner": 22}, ""),
        ({"http": {"port": 80}}, ""),
    ],
)
def test_what_the_user_network_could_not_tell_is_refused_there(ready: dict[str, Any], why: str) -> None:
    asked = request(ready=ready)
    check_ready(asked, FakeNetwork())
    if why:
        with pytest.raises(Unsupported, match=why):
            check_ready(asked, UserNetwork())
    else:
        check_ready(asked, UserNetwork())
