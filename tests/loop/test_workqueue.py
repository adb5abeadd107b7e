"""Keys, workers and time."""

from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from reconciler.loop.workqueue import WorkQueue


async def drain(queue: WorkQueue[str]) -> list[str]:
    keys = []
    while True:
        try:
            async with asyncio.timeout(0.02):
                key = await queue.get()
        except TimeoutError:
            return keys
        keys.append(key)
        queue.done(key)


async def test_a_key_added_twice_is_worked_on_once() -> None:
    queue: WorkQueue[str] = WorkQueue()
    for key in ("a", "b", "a"):
        queue.add(key)
    assert await drain(queue) == ["a", "b"] and len(queue) == 0


async def test_a_key_in_work_is_not_given_out_again_but_runs_once_more() -> None:
    queue: WorkQueue[str] = WorkQueue()
    queue.add("a")
    assert await queue.get() == "a"
    queue.add("a")
    queue.add("a")
    assert await drain(queue) == []
    queue.done("a")
    assert await drain(queue) == ["a"]


async def test_the_earliest_time_counts_and_a_forgotten_one_does_not() -> None:
    queue: WorkQueue[str] = WorkQueue()
    now = asyncio.get_running_loop().time()
    queue.add_at("late", now + 3600)
    queue.add_at("late", now + 0.01)
    queue.add_at("never", now + 0.01)
    queue.forget_timer("never")
    async with asyncio.timeout(5):
        assert await queue.get() == "late"
    queue.done("late")
    await asyncio.sleep(0.03)
    assert await drain(queue) == []
    queue.close()


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=40))
def test_no_wish_is_lost_and_no_key_is_worked_on_twice_at_once(wishes: list[tuple[str, bool]]) -> None:
    async def main() -> None:
        queue: WorkQueue[str] = WorkQueue()
        asked: dict[str, int] = {}
        served: dict[str, int] = {}
        in_work: set[str] = set()

        async def worker() -> None:
            while True:
                key = await queue.get()
                assert key not in in_work
                in_work.add(key)
                served[key] = asked.get(key, 0)  # all wishes up to now are served by this run
                await asyncio.sleep(0)
                in_work.discard(key)
                queue.done(key)

        workers = [asyncio.create_task(worker()) for _ in range(3)]
        for key, pause in wishes:
            asked[key] = asked.get(key, 0) + 1
            queue.add(key)
            if pause:
                await asyncio.sleep(0)
        for _ in range(200):
            await asyncio.sleep(0)
        assert served == asked
        for task in workers:
            task.cancel()
        await asyncio.gather(*workers, return_exceptions=True)

    asyncio.run(main())
