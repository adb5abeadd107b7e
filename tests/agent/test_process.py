"""Processes are known by pid and start time, outlive who started them, and their end is seen."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from agent import process
from agent.errors import AgentError
from agent.process import ExitWatch, ProcessRecord

SLEEP = ("sleep", "600")


@pytest.fixture
async def folder(tmp_path: Path) -> AsyncIterator[Path]:
    """A folder whose name marks the processes started in it; they are ended afterwards."""
    yield tmp_path
    for running in psutil.process_iter(["cwd"]):
        if running.info["cwd"] == str(tmp_path):
            running.kill()


def _spawn(folder: Path, *argv: str) -> ProcessRecord:
    return process.spawn(argv or SLEEP, cwd=folder, log=folder / "log")


_AGENT = """
import asyncio, sys
from pathlib import Path
from agent import process

async def main(here):
    record = process.spawn(["sleep", "600"], cwd=here, log=here / "log")
    process.ExitWatch(record, print)
    process.write_record(here / "r", record)
    %s

asyncio.run(main(Path(sys.argv[1])))
"""


def _run_agent(folder: Path, then: str) -> subprocess.Popen[bytes]:
    """A process that spawns one, watches it and keeps its record in `folder/r`."""
    script = (sys.executable, "-c", _AGENT % then, str(folder))
    return subprocess.Popen(script, start_new_session=True, stderr=subprocess.DEVNULL)


async def _status_at_exit(record: ProcessRecord) -> int | None:
    told: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()
    watch = ExitWatch(record, told.set_result)
    async with asyncio.timeout(20):
        status = await told
    assert watch.gone.is_set()
    return status


def test_a_record_survives_in_its_file(tmp_path: Path) -> None:
    record = ProcessRecord(4242, "81734", "boot")
    process.write_record(tmp_path / "process.json", record)
    assert process.read_record(tmp_path / "process.json") == record
    assert [path.name for path in tmp_path.iterdir()] == ["process.json"]


def test_no_record_is_none(tmp_path: Path) -> None:
    assert process.read_record(tmp_path / "process.json") is None


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"pid": "x", "start": "1", "boot": "b"}', "null"])
def test_an_unreadable_record_is_an_error_and_never_taken_for_no_process(tmp_path: Path, text: str) -> None:
    (tmp_path / "process.json").write_text(text)
    with pytest.raises(AgentError, match="cannot be read"):
        process.read_record(tmp_path / "process.json")


async def test_a_living_process_is_alive_under_its_own_record_only(folder: Path) -> None:
    record = _spawn(folder)
    assert process.identify(record.pid) == record
    assert process.alive(record)
    assert not process.alive(replace(record, start="1"))
    assert not process.alive(replace(record, boot="another"))
    await process.kill(record)


async def test_a_process_whose_name_imitates_a_status_line_is_identified(folder: Path) -> None:
    program = folder / "a) R 1 (b c"
    program.symlink_to("/bin/sleep")
    record = _spawn(folder, str(program), "600")
    assert process.alive(record)
    await process.kill(record)


async def test_whoever_has_the_pid_now_is_never_signalled(folder: Path) -> None:
    innocent = _spawn(folder)
    for stale in (replace(innocent, start="1"), replace(innocent, boot="another")):
        assert process.send_signal(stale, signal.SIGKILL) is False
        await process.kill(stale)
        assert process.alive(innocent)
    await process.kill(innocent)


async def test_a_killed_process_is_gone_and_leaves_no_zombie(folder: Path) -> None:
    record = _spawn(folder)
    await process.kill(record)
    assert not process.alive(record)
    assert not psutil.pid_exists(record.pid)
    await process.kill(record)


@pytest.mark.parametrize(("argv", "status"), [(("sh", "-c", "exit 3"), 3), (("true",), 0), (("sh", "-c", "kill -9 $$"), -9)])
async def test_the_end_of_a_child_is_told_with_its_status_and_it_is_reaped(
    folder: Path, argv: tuple[str, ...], status: int
) -> None:
    record = _spawn(folder, *argv)
    assert await _status_at_exit(record) == status
    assert not psutil.pid_exists(record.pid)


async def test_the_end_of_a_process_that_another_agent_started_is_told_without_a_status(folder: Path) -> None:
    _run_agent(folder, "").wait()
    record = process.read_record(folder / "r")
    assert record is not None
    assert process.alive(record)
    exiting = asyncio.ensure_future(_status_at_exit(record))
    await asyncio.sleep(0)
    assert process.send_signal(record, signal.SIGKILL)
    assert await exiting is None


async def test_a_process_that_is_gone_already_is_told_too(folder: Path) -> None:
    assert await _status_at_exit(ProcessRecord(2**22 - 1, "1", process.boot_id())) is None


async def test_a_closed_watch_tells_nothing_and_leaves_the_process(folder: Path) -> None:
    record = _spawn(folder)
    told: list[int | None] = []
    watch = ExitWatch(record, told.append)
    watch.close()
    watch.close()
    assert process.alive(record)
    await process.kill(record)
    assert told == []


async def test_without_pidfds_the_end_is_told_as_well(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "pidfd_open")
    monkeypatch.setattr(process, "POLL_INTERVAL", 0.01)
    record = _spawn(folder)
    exiting = asyncio.ensure_future(_status_at_exit(record))
    await asyncio.sleep(0)
    assert process.send_signal(record, signal.SIGTERM)
    assert await exiting in (-15, None)
    assert not process.alive(record)


async def test_waiting_for_a_process_that_goes_on_says_so(folder: Path) -> None:
    record = _spawn(folder)
    assert await process.wait_gone(record, 0.01) is False
    await process.kill(record)
    assert await process.wait_gone(record, 20) is True


async def test_a_spawned_process_has_a_session_of_its_own_no_input_and_a_log(folder: Path) -> None:
    record = _spawn(folder, "sh", "-c", "cat; pwd; echo trouble >&2; echo done; exec sleep 600")
    async with asyncio.timeout(20):
        while "done" not in (folder / "log").read_text():  # noqa: ASYNC110 another process writes it
            await asyncio.sleep(0.01)
    assert (folder / "log").read_text() == f"{folder}\ntrouble\ndone\n"
    assert os.getsid(record.pid) == record.pid
    await process.kill(record)


def test_a_program_that_is_missing_is_named(folder: Path) -> None:
    with pytest.raises(AgentError, match="`no-such-program` cannot be started"):
        _spawn(folder, "no-such-program")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGHUP])
async def test_a_spawned_process_outlives_its_agent(folder: Path, number: signal.Signals) -> None:
    agent = _run_agent(folder, "await asyncio.sleep(600)")
    async with asyncio.timeout(20):
        while not (folder / "r").exists():  # noqa: ASYNC110 another process writes it
            await asyncio.sleep(0.01)
    os.killpg(agent.pid, number)  # as a terminal signals everything in the foreground
    await asyncio.to_thread(agent.wait)
    record = process.read_record(folder / "r")
    assert record is not None
    assert process.alive(record)
    await process.kill(record)
