"""The numbering of changes and the long poll: no change is ever missed, a burst is one reply."""

from __future__ import annotations

import asyncio
import random

from agent.network.fake import FakeNetwork
from agent.rules import Rules
from agent.watch import Watch
from tests.agent.runtime_rig import until


async def test_a_position_of_the_past_or_of_another_process_returns_at_once() -> None:
    watch = Watch()
    watch.changed()
    await watch.wait(watch.boot_id, watch.seq - 1, 60)
    await watch.wait("another", watch.seq, 60)
    await watch.wait(watch.boot_id, watch.seq + 7, 60)
    await watch.wait("", 0, 60)


async def test_a_waiter_sleeps_until_something_changes() -> None:
    watch = Watch()
    waiting = asyncio.create_task(watch.wait(watch.boot_id, watch.seq, 60))
    await asyncio.sleep(0.01)
    assert not waiting.done()
    watch.changed()
    await asyncio.wait_for(waiting, 5)


async def test_a_wait_ends_after_its_time_without_a_change() -> None:
    watch = Watch()
    await asyncio.wait_for(watch.wait(watch.boot_id, watch.seq, 0.01), 5)
    assert watch.seq == 1


async def test_a_change_after_quiet_is_told_at_once_and_the_burst_after_it_in_one_reply() -> None:
    watch = Watch(settle=0.05)
    seen = []

    async def client() -> None:
        seq = watch.seq
        while seq < 101:
            await watch.wait(watch.boot_id, seq, 60)
            seq = watch.seq
            seen.append(seq)

    task = asyncio.create_task(client())
    await asyncio.sleep(0)
    for _ in range(100):
        watch.changed()
        await asyncio.sleep(0)
    await asyncio.wait_for(task, 5)
    assert seen == [2, 101]


async def test_no_change_is_missed_however_it_falls_between_two_polls() -> None:
    watch = Watch(settle=0)
    chance = random.Random(7)
    seen: list[list[int]] = [[] for _ in range(10)]

    async def client(mine: list[int]) -> None:
        seq = 1
        while seq < 301:
            await asyncio.wait_for(watch.wait(watch.boot_id, seq, 60), 5)
            assert watch.seq > seq
            seq = watch.seq
            mine.append(seq)
            for _ in range(chance.randrange(3)):
                await asyncio.sleep(0)

    clients = [asyncio.create_task(client(mine)) for mine in seen]
    for _ in range(300):
        watch.changed()
        for _ in range(chance.randrange(4)):
            await asyncio.sleep(0)
    await asyncio.gather(*clients)
    assert all(mine[-1] == 301 and mine == sorted(set(mine)) for mine in seen)


async def test_closing_lets_everybody_go() -> None:
    watch = Watch()
    waiting = asyncio.create_task(watch.wait(watch.boot_id, watch.seq, 60))
    await asyncio.sleep(0)
    watch.close()
    await asyncio.wait_for(waiting, 5)
    await asyncio.wait_for(watch.wait(watch.boot_id, watch.seq, 60), 5)


async def test_a_failed_round_of_rules_fails_its_own_waiters_alone() -> None:
    network = FakeNetwork()
    rules = Rules(network, dict)
    network.host.faults.fail_next("apply", RuntimeError("nft said no"))
    network.host.faults.hold["apply"] = gate = asyncio.Event()
    first = asyncio.create_task(rules.apply())
    await until(lambda: network.host.faults.steps)
    later = [asyncio.create_task(rules.apply()) for _ in range(3)]
    await asyncio.sleep(0)
    gate.set()
    results = await asyncio.gather(first, *later, return_exceptions=True)
    assert [type(result) for result in results] == [RuntimeError, type(None), type(None), type(None)]
    assert network.host.applied == 1
    await rules.close()
