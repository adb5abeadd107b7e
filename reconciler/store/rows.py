"""What recorded things look like as rows, and the statements that write and read them. Called by `database` alone.

Knows nothing of threads, retries and transactions: the caller has begun one.
"""

from __future__ import annotations

import functools
import itertools
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import orjson
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert as postgresql_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert

from reconciler.core.events import Event
from reconciler.core.model import Change, EnvIntent, HostIntent, VmIntent
from reconciler.store.schema import envs, events, hosts, meta, vms
from specs.desired import EnvSpec, VmSpec, canonical_env
from specs.names import EnvId, HostId, VmId

_HOST_FIELDS = tuple(HostIntent.__dataclass_fields__)
_EVENT_FIELDS = tuple(Event.__dataclass_fields__)


def write(connection: sa.Connection, changes: Sequence[Change]) -> None:
    """Writes changes in their order; each may be met by the next one as if it had been written alone."""
    for group in _commuting(changes):
        _write_group(connection, group)


def write_meta(connection: sa.Connection, values: dict[str, str]) -> None:
    """Sets facts about the store itself."""
    _run(connection, _upsert(connection.dialect.name, meta), [{"key": key, "value": value} for key, value in values.items()])


def read_meta(connection: sa.Connection) -> dict[str, str]:
    """All facts about the store itself."""
    return {row.key: row.value for row in connection.execute(_all_of(meta))}


def read(connection: sa.Connection) -> Change:
    """Everything recorded, oldest first, as one change. Raises ValueError on a row it cannot read."""
    return Change(
        envs=tuple(_env_from(row) for row in connection.execute(_all_of(envs, "created_at", "id"))),
        vms=tuple(_vms_from(connection.execute(_all_of(vms, "created_at", "id")))),
        hosts=tuple(
            HostIntent(row.addr, HostId(row.id) if row.id else None, row.registered_at, row.cordoned, row.drain_total)
            for row in connection.execute(_all_of(hosts, "registered_at", "addr"))
        ),
        events=tuple(Event(**row._mapping) for row in connection.execute(_all_of(events, "revision"))),
    )


# ---- groups


def _commuting(changes: Sequence[Change]) -> Iterator[Sequence[Change]]:
    """The changes in groups within which rows may be written table by table: those a group inserts, it only then changes."""
    group: list[Change] = []
    changed: set[object] = set()
    for change in changes:
        if changed and not changed.isdisjoint(_inserted(change)):
            yield group
            group, changed = [], set()
        group.append(change)
        changed.update(change.drop_envs, change.drop_vms, change.drop_hosts, change.drop_events)
        changed.update(vm_id for vm_id, _ in (*change.placed, *change.gone))
    if group:
        yield group


def _inserted(change: Change) -> Iterator[object]:
    yield from (env.id for env in change.envs)
    yield from (vm.id for vm in change.vms)
    yield from (host.addr for host in change.hosts)
    yield from (event.id for event in change.events)


def _write_group(connection: sa.Connection, group: Sequence[Change]) -> None:
    def each(pick: Callable[[Change], Iterable[Any]]) -> list[Any]:
        return list(itertools.chain.from_iterable(map(pick, group)))

    dialect = connection.dialect.name
    if Change() in group:  # finds out whether writing is possible
        write_meta(connection, {"probe": uuid.uuid4().hex})
    cache: dict[int, str] = {}
    _run(connection, _upsert(dialect, envs), [_env_row(env) for env in each(lambda change: change.envs)])
    placed_elsewhere = ("host_id", "gone_at")
    _run(connection, _upsert(dialect, vms, placed_elsewhere), [_vm_row(vm, cache) for vm in each(lambda change: change.vms)])
    _run(connection, _upsert(dialect, hosts), [_row(host, _HOST_FIELDS) for host in each(lambda change: change.hosts)])
    _run(connection, _upsert(dialect, events), [_row(event, _EVENT_FIELDS) for event in each(lambda change: change.events)])
    _run(connection, _update("host_id"), [{"vm": vm, "new": host} for vm, host in each(lambda change: change.placed)])
    _run(connection, _update("gone_at"), [{"vm": vm, "new": when} for vm, when in each(lambda change: change.gone)])
    _run(connection, _delete(vms), [{"dropped": key} for key in each(lambda change: change.drop_vms)])
    _run(connection, _delete(envs), [{"dropped": key} for key in each(lambda change: change.drop_envs)])
    _run(connection, _delete(hosts), [{"dropped": key} for key in each(lambda change: change.drop_hosts)])
    _run(connection, _delete(events), [{"dropped": key} for key in each(lambda change: change.drop_events)])


# ---- statements: making one costs more than running it


def _run(connection: sa.Connection, statement: sa.Executable, rows: list[dict[str, Any]]) -> None:
    if rows:
        connection.execute(statement, rows)


@functools.cache
def _upsert(dialect: str, table: sa.Table, keep: tuple[str, ...] = ()) -> sa.Executable:
    insert = postgresql_insert if dialect == "postgresql" else sqlite_insert
    statement = insert(table)
    key = [column.name for column in table.primary_key]
    changed = {c.name: statement.excluded[c.name] for c in table.columns if c.name not in key and c.name not in keep}
    return statement.on_conflict_do_update(index_elements=key, set_=changed)


@functools.cache
def _update(column: str) -> sa.Executable:
    return sa.update(vms).where(vms.c.id == sa.bindparam("vm")).values({column: sa.bindparam("new")})


@functools.cache
def _delete(table: sa.Table) -> sa.Executable:
    (key,) = table.primary_key
    return sa.delete(table).where(key == sa.bindparam("dropped"))


@functools.cache
def _all_of(table: sa.Table, *order: str) -> sa.Select[Any]:
    return sa.select(table).order_by(*(table.c[name] for name in order))


# ---- rows


def _row(value: object, fields: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(value, name) for name in fields}


def _env_row(env: EnvIntent) -> dict[str, Any]:
    return {
        "id": env.id,
        "spec": orjson.dumps(canonical_env(env.spec)).decode(),
        "power": env.power,
        "generation": env.generation,
        "rolled": env.rolled,
        "created_at": env.created_at,
        "expires_at": env.expires_at,
        "deleting": env.deleting,
    }


def _env_from(row: Any) -> EnvIntent:
    return EnvIntent(
        id=EnvId(row.id),
        spec=EnvSpec.model_validate(orjson.loads(row.spec)),
        power=row.power,
        generation=row.generation,
        rolled=row.rolled,
        created_at=row.created_at,
        expires_at=row.expires_at,
        deleting=row.deleting,
    )


def _vm_row(vm: VmIntent, cache: dict[int, str]) -> dict[str, Any]:
    if id(vm.spec) not in cache:
        cache[id(vm.spec)] = vm.spec.model_dump_json(exclude_defaults=True)
    return {
        "id": vm.id,
        "env_id": vm.env_id,
        "name": vm.name,
        "spec": cache[id(vm.spec)],
        "spec_hash": vm.spec_hash,
        "desired": vm.desired,
        "host_id": vm.host_id,
        "created_at": vm.created_at,
        "generation": vm.generation,
        "gone_at": vm.gone_at,
    }


def _vms_from(rows: Iterable[Any]) -> Iterable[VmIntent]:
    specs: dict[str, VmSpec] = {}  # equal machines share one value in memory
    for row in rows:
        if row.spec not in specs:
            specs[row.spec] = VmSpec.model_validate(orjson.loads(row.spec))
        yield VmIntent(
            id=VmId(row.id),
            env_id=EnvId(row.env_id),
            name=row.name,
            spec=specs[row.spec],
            spec_hash=row.spec_hash,
            desired=row.desired,
            host_id=HostId(row.host_id) if row.host_id else None,
            created_at=row.created_at,
            generation=row.generation,
            gone_at=row.gone_at,
        )
