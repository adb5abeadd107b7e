"""The log of events: repeats are counted, bounds hold, and what is saved is what is kept."""

from __future__ import annotations

from itertools import count

from hypothesis import given
from hypothesis import strategies as st

from reconciler import events as log_module
from reconciler.core.events import select
from reconciler.events import KEPT_OF_A_KIND, REVISION_BITS, EventLog

names = st.sampled_from(["", "a", "b"])
notes = st.lists(
    st.tuples(st.sampled_from(["Placed", "Failed", "Running"]), st.integers(0, 20).map(str), names, names, st.booleans()),
    max_size=80,
)


def test_a_repeat_is_counted_and_not_kept_twice() -> None:
    seconds = count(100)
    log = EventLog(lambda: next(seconds), term=1)
    for _ in range(3):
        log.add("Failed", "no disk", env="web", vm="vm-1", vm_name="a")
        log.add("Failed", "no disk", env="web", vm="vm-2", vm_name="b")
    one, two = log
    assert (one.vm, one.count, one.first_seen, one.last_seen) == ("vm-1", 3, 100, 104)
    assert (two.count, two.revision - one.revision, two.is_warning) == (3, 1, True)


def test_what_is_no_news_is_not_noted_again() -> None:
    log = EventLog()
    assert log.add("Running", "runs", vm="vm-1", news=True)
    assert log.add("Running", "runs", vm="vm-1", news=True) is None
    log.add("Failed", "boom", vm="vm-1")
    assert log.add("Running", "runs", vm="vm-1", news=True), "it failed in between"


@given(notes, st.integers(1, 30), st.integers(0, 80))
def test_the_log_stays_bounded_and_the_store_can_follow_it(
    noted: list[tuple[str, str, str, str, bool]], kept: int, at: int
) -> None:
    before, log_module.KEPT = log_module.KEPT, kept
    try:
        log, stored = EventLog(term=3), dict[int, object]()

        def save() -> None:
            events, dropped = log.take_unsaved()
            stored.update((event.id, event) for event in events)
            for event_id in dropped:
                stored.pop(event_id, None)

        for number, (reason, message, vm, host, news) in enumerate(noted):
            log.add(reason, message, vm=vm, host=host, news=news)  # type: ignore[arg-type]
            assert len(log) <= kept
            if number == at:
                save()
                log.put_back(tuple(log), ())
        save()
        assert sorted(stored) == sorted(event.id for event in log)
        assert {event.id: event for event in log} == stored
        revisions = [event.revision for event in log]
        assert revisions == sorted(set(revisions)) and all(revision > 3 << REVISION_BITS for revision in revisions)
        again = EventLog(term=4)
        again.load(log)
        assert list(again) == list(log) and again.take_unsaved() == ((), ())
    finally:
        log_module.KEPT = before


def test_one_noisy_vm_does_not_push_out_the_others() -> None:
    log = EventLog()
    log.add("Placed", "on h1", vm="quiet")
    for number in range(log_module.KEPT * 2):
        log.add("Failed", f"error {number}", vm="noisy")
    assert [event.vm for event in log].count("noisy") == KEPT_OF_A_KIND and next(iter(log)).vm == "quiet"


def test_the_logs_of_two_controllers_on_one_store_can_be_taken_over() -> None:
    one, two = EventLog(term=1), EventLog(term=2)
    for number in range(KEPT_OF_A_KIND * 2):
        for log in (one, two):
            log.add("Failed", f"error {number}", vm="vm-1")
    third = EventLog(term=3)
    third.load([*one, *two])
    for number in range(KEPT_OF_A_KIND * 3):
        third.add("Failed", f"error {number}", vm="vm-1")
    assert len(third) == KEPT_OF_A_KIND


def test_readers_page_forward_from_a_revision_and_otherwise_get_the_latest() -> None:
    log = EventLog()
    for number in range(10):
        log.add("Placed", f"{number}", env="web" if number % 2 else "db", vm=f"vm-{number}", vm_name=f"name-{number}")
    every = list(log)
    assert select(every, limit=3) == every[-3:]
    assert select(every, since=every[3].revision, limit=3) == every[4:7]
    assert select(every, env="web", limit=99) == every[1::2]
    assert select(every, vm="vm-4", limit=9) == select(every, vm="name-4", limit=9) == [every[4]]
    assert select(every, host="h1", limit=9) == [] and select(every, limit=0) == []


def test_readers_can_ask_for_one_host() -> None:
    log = EventLog()
    for host in ("h1", "h2", "h1"):
        log.add("Cordoned", "gets no new VMs", host=host, env=host)
    assert {event.host for event in select(list(log), host="h1", limit=9)} == {"h1"}
    assert {event.host for event in select(list(log), limit=9)} == {"h1", "h2"}
