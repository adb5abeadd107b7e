"""Commands: what they answer, how they fail, and that nothing of them stays."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import psutil
import pytest

from agent.errors import CommandFailed
from agent.run import run
from tests.netns import Lab, inside


async def test_output_comes_back_whole_however_many_run_at_once() -> None:
    big, *small = await asyncio.gather(
        run("head", "-c", "3000000", "/dev/zero"), *(run("echo", f"line {number}") for number in range(40))
    )
    assert len(big) == 3_000_000
    assert small == [f"line {number}\n" for number in range(40)]


async def test_input_environment_and_folder_reach_the_command(tmp_path: Path) -> None:
    assert await run("cat", stdin="a\nb") == "a\nb"
    assert await run("cat") == ""
    assert await run("printenv", "MUSTER_TRIAL", env={"MUSTER_TRIAL": "yes"}) == "yes\n"
    assert await run("pwd", cwd=tmp_path) == f"{tmp_path}\n"


async def test_a_failure_says_what_was_run_and_what_it_said() -> None:
    with pytest.raises(CommandFailed, match=r"`ls /nowhere` exited with 2: .*No such file") as failure:
        await run("ls", "/nowhere", env={"LC_ALL": "C"})
    assert failure.value.exit_status == 2
    with pytest.raises(CommandFailed, match="`no-such-command` is not installed or not on PATH"):
        await run("no-such-command")


async def test_a_command_out_of_time_or_unwanted_is_killed(tmp_path: Path) -> None:
    mark = tmp_path / "alive"
    with pytest.raises(CommandFailed, match=r"did not end within 0.2 s and was killed"):
        await run("sh", "-c", f"sleep 2; touch {mark}", limit=0.2)
    task = asyncio.create_task(run("sh", "-c", f"sleep 2; touch {mark}"))
    await asyncio.sleep(0.2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.sleep(2.2)
    assert not mark.exists()


@pytest.mark.real
def test_a_command_runs_in_its_callers_network_namespace() -> None:
    asyncio.run(run("true"))  # a thread of an earlier command must not lend its namespace
    with contextlib.closing(Lab()) as lab, inside(lab.namespace("run")):
        links = asyncio.run(run("ip", "-o", "link"))
    assert "eth0" not in links and " lo:" in links


async def test_a_cancelled_command_is_gone_before_its_caller_goes_on(tmp_path: Path) -> None:
    for number in range(5):
        note = tmp_path / f"pid-{number}"
        task = asyncio.ensure_future(run("sh", "-c", f"echo $$ > {note}.new && mv {note}.new {note} && exec sleep 60"))
        async with asyncio.timeout(60):
            while not note.exists():  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        assert not psutil.pid_exists(int(note.read_text()))
