"""What is acknowledged is on disk, all of it or nothing."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reconciler.core.model import Change, HostIntent
from reconciler.store import database, rows
from reconciler.store.database import Database, StoreCorrupt, StoreUnavailable
from reconciler.store.schema import metadata
from specs.desired import EnvSpec, canonical_env
from specs.names import HostId, VmId
from tests.core.worlds import env_intent, specs, vm_intent


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "muster.db"


@pytest.fixture
def store(path: Path) -> Iterator[Database]:
    store = Database.at(path)
    store.open()
    yield store
    store.close()


def reopened(path: Path) -> Change:
    store = Database.at(path)
    store.open()
    try:
        return store.load()
    finally:
        store.close()


ENV = env_intent(EnvSpec(id="web", ssh_keys=(), vms=({"image": "tiny"},)))  # type: ignore[arg-type]


async def test_everything_recorded_is_there_after_a_restart(store: Database, path: Path) -> None:
    first, second = vm_intent(host=None), vm_intent(id=VmId("vm-2"), host=None)
    host = HostIntent("10.0.0.2:9100", HostId("h1"), 5, cordoned=True)
    await store.commit(Change(envs=(ENV,), vms=(first, second), hosts=(host,)))
    await store.commit(Change(placed=((VmId("vm-2"), HostId("h1")),), gone=((VmId("vm-1"), 77),)))
    store.close()
    kept = reopened(path)
    assert kept.envs == (ENV,)
    assert kept.hosts == (host,)
    assert {vm.id: (vm.host_id, vm.gone_at) for vm in kept.vms} == {"vm-1": (None, 77), "vm-2": ("h1", 0)}


async def test_a_deletion_and_a_placement_do_not_undo_each_other(store: Database, path: Path) -> None:
    await store.commit(Change(vms=(vm_intent(host=None),)))
    await asyncio.gather(
        store.commit(Change(placed=((VmId("vm-1"), HostId("h1")),))),
        store.commit(Change(vms=(vm_intent("absent", host=None),))),
    )
    store.close()
    (vm,) = reopened(path).vms
    assert (vm.desired, vm.host_id) == ("absent", "h1")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
@given(specs)
def test_every_spec_comes_back_as_it_was(tmp_path: Path, spec: EnvSpec) -> None:
    store = Database.at(tmp_path / "specs.db")
    store.open()
    asyncio.run(store.commit(Change(envs=(env_intent(spec),))))
    (kept,) = store.load().envs
    store.close()
    assert canonical_env(kept.spec) == canonical_env(spec) and kept == env_intent(spec)


async def test_many_writers_share_few_commits(store: Database) -> None:
    changes = [Change(vms=(vm_intent(id=VmId(f"vm-{number}")),)) for number in range(1000)]
    await asyncio.gather(*(store.commit(change) for change in changes))
    assert store.changes == 1000 and store.commits <= 20
    assert len(store.load().vms) == 1000


def test_terms_only_grow_and_the_cluster_stays(path: Path) -> None:
    seen = []
    for _ in range(3):
        store = Database.at(path)
        store.open()
        seen.append(store.begin_term())
        store.close()
    assert [term for _, term in seen] == [1, 2, 3] and len({cluster for cluster, _ in seen}) == 1


def test_a_store_put_back_from_an_older_copy_begins_a_term_higher_than_those_it_never_heard_of(path: Path) -> None:
    def begin(now: float) -> int:
        store = Database.at(path)
        store.open()
        term = store.begin_term(now)[1]
        store.close()
        return term

    began = 1_800_000_000.5
    first = begin(began)
    copy = path.read_bytes()
    later = [begin(began), begin(began - 3600), begin(began + 5)]
    assert [first, *later] == sorted({first, *later})
    path.write_bytes(copy)
    assert begin(began + 3600) > later[-1]


async def test_a_locked_database_refuses_the_write_and_recovers(
    store: Database, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.1)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreUnavailable, match="locked"):
        await store.commit(Change(envs=(ENV,)))
    other.execute("ROLLBACK")
    other.close()
    assert store.load().envs == ()
    await store.commit(Change(envs=(ENV,)))
    assert store.load().envs == (ENV,)


async def test_a_full_disk_refuses_the_write_and_keeps_what_was_there(store: Database) -> None:
    await store.commit(Change(envs=(ENV,)))
    engine = store._open_engine()

    @sa.event.listens_for(engine, "begin")
    def limit(connection: sa.Connection) -> None:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
        connection.exec_driver_sql(f"PRAGMA max_page_count={pages}")

    big = tuple(vm_intent(id=VmId(f"vm-{number}")) for number in range(5000))
    async with asyncio.timeout(database.BUSY_SECONDS):  # others wait behind it: a full disk is not emptied by trying again
        with pytest.raises(StoreUnavailable, match="full"):
            await store.commit(Change(vms=big))
    kept = store.load()
    assert kept.envs == (ENV,) and kept.vms == ()


@pytest.mark.parametrize("content", [b"this is no database" * 100, b"SQLite format 3\0" + b"\xff" * 5000])
def test_a_damaged_file_is_refused_and_not_touched(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(StoreCorrupt, match=r"muster\.db"):
        Database.at(path).open()
    assert path.read_bytes() == content


async def test_a_damaged_file_is_not_touched_either_when_a_killed_controller_left_its_log(
    store: Database, path: Path, tmp_path: Path
) -> None:
    store.close()  # from here on the log holds what is new, and no longer the whole database
    store.open()
    await store.commit(Change(envs=(ENV,)))
    left = tmp_path / "left"
    left.mkdir()
    content = {name: (path.parent / name).read_bytes() for name in ("muster.db", "muster.db-wal")}
    content["muster.db"] = bytes(range(256)) * 64
    for name, data in content.items():
        (left / name).write_bytes(data)
    with pytest.raises(StoreCorrupt, match=r"muster\.db"):
        Database.at(left / "muster.db").open()
    assert {name: (left / name).read_bytes() for name in content} == content


async def test_a_record_nobody_can_read_is_refused(store: Database, path: Path) -> None:
    await store.commit(Change(envs=(ENV,)))
    store.close()
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE envs SET spec='{\"id\": 7}'")
    connection.close()
    with pytest.raises(StoreCorrupt, match="cannot read"):
        reopened(path)


def test_a_newer_database_is_refused(path: Path) -> None:
    reopened(path)
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE alembic_version SET version_num='9999'")
    connection.close()
    with pytest.raises(StoreCorrupt, match="newer"):
        Database.at(path).open()


def test_the_migrations_make_the_tables_the_code_uses(path: Path) -> None:
    reopened(path)
    with sa.create_engine(f"sqlite:///{path}").connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
        connection.engine.dispose()


def test_what_was_acknowledged_survives_sigkill(path: Path) -> None:
    program = textwrap.dedent(
        """
        import asyncio, sys
        from pathlib import Path
        from reconciler.core.model import Change
        from reconciler.store.database import Database
        from tests.core.worlds import vm_intent

        async def main():
            store = Database.at(Path(sys.argv[1]))
            store.open()
            for number in range(100000):
                await store.commit(Change(vms=(vm_intent(id=f"vm-{number}"),)))
                print(number, flush=True)

        asyncio.run(main())
        """
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    for line in process.stdout:
        if int(line) == 200:
            os.kill(process.pid, signal.SIGKILL)
            break
    acknowledged = 200 + len(process.stdout.read().split())
    process.stdout.close()
    process.wait()
    kept = {vm.id for vm in reopened(path).vms}
    assert {f"vm-{number}" for number in range(acknowledged + 1)} <= kept


_IDS = [VmId(f"vm-{number}") for number in range(2)]
_ONE = st.one_of(
    st.sampled_from(_IDS).map(lambda vm_id: Change(vms=(vm_intent(id=vm_id, host=None),))),
    st.sampled_from(_IDS).map(lambda vm_id: Change(vms=(vm_intent("absent", id=vm_id, host=None),))),
    st.sampled_from(_IDS).map(lambda vm_id: Change(placed=((vm_id, HostId("h1")),))),
    st.sampled_from(_IDS).map(lambda vm_id: Change(gone=((vm_id, 7),))),
    st.sampled_from(_IDS).map(lambda vm_id: Change(drop_vms=(vm_id,))),
    st.sampled_from([Change(envs=(ENV,)), Change(drop_envs=(ENV.id,)), Change()]),
    st.sampled_from([Change(hosts=(HostIntent("h:1", None, 1),)), Change(drop_hosts=("h:1",))]),
)


@settings(max_examples=80, deadline=None)
@given(st.lists(_ONE, max_size=8))
def test_changes_written_together_leave_what_they_leave_when_written_one_by_one(changes: list[Change]) -> None:
    kept = []
    for groups in ([changes], [[change] for change in changes]):
        engine = sa.create_engine("sqlite://")
        metadata.create_all(engine)
        with engine.begin() as connection:
            for group in groups:
                rows.write(connection, group)
            kept.append(rows.read(connection))
        engine.dispose()
    assert kept[0] == kept[1]
