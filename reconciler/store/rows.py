"""What recorded things look like as rows, and the statements that write and read them. Called by `database` alone.

Knows nothing of threads, retries and transactions: the caller has begun one.
"""

from __future__ import annotations

import functools
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import orjson
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert as postgresql_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlalchemy.sql.compiler import SQLCompiler

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
    _run(connection, _upsert(connection.dialect, meta), [{"key": key, "value": value} for key, value in values.items()])


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
    dialect = connection.dialect
    if Change() in group:  # finds out whether writing is possible
        write_meta(connection, {"probe": uuid.uuid4().hex})
    cache: dict[int, str] = {}
    _run(connection, _upsert(dialect, envs), [_env_row(env) for change in group for env in change.envs])
    mine = ("host_id", "gone_at")  # of `placed` and `gone` alone
    _run(connection, _upsert(dialect, vms, mine), [_vm_row(vm, cache) for change in group for vm in change.vms])
    _run(connection, _upsert(dialect, hosts), [_row(host, _HOST_FIELDS) for change in group for host in change.hosts])
    _run(connection, _upsert(dialect, events), [_row(event, _EVENT_FIELDS) for change in group for event in change.events])
    _run(connection, _update(dialect, "host_id"), [{"vm": vm, "new": host} for change in group for vm, host in change.placed])
    _run(connection, _update(dialect, "gone_at"), [{"vm": vm, "new": when} for change in group for vm, when in change.gone])
    for table, drop in ((vms, "drop_vms"), (envs, "drop_envs"), (hosts, "drop_hosts"), (events, "drop_events")):
        _run(connection, _delete(dialect, table), [{"dropped": key} for change in group for key in getattr(change, drop)])


# ---- statements: making one costs more than running it


@dataclass(frozen=True, slots=True)
class _Sql:
    """A statement's text for one dialect; `fields` in the order of its parameters, None where they have names."""

    text: str
    fields: tuple[str, ...] | None


def _run(connection: sa.Connection, sql: _Sql, rows: list[dict[str, Any]]) -> None:
    if rows:
        fields = sql.fields
        connection.exec_driver_sql(sql.text, [tuple([row[name] for name in fields]) for row in rows] if fields else rows)


def _compiled(statement: sa.ClauseElement, dialect: sa.Dialect) -> _Sql:
    compiled = cast(SQLCompiler, statement.compile(dialect=dialect))
    return _Sql(str(compiled), tuple(compiled.positiontup or ()) if compiled.positional else None)


@functools.lru_cache(maxsize=64)
def _upsert(dialect: sa.Dialect, table: sa.Table, keep: tuple[str, ...] = ()) -> _Sql:
    insert = postgresql_insert if dialect.name == "postgresql" else sqlite_insert
    statement = insert(table)
    key = [column.name for column in table.primary_key]
    changed = {c.name: statement.excluded[c.name] for c in table.columns if c.name not in key and c.name not in keep}
    return _compiled(statement.on_conflict_do_update(index_elements=key, set_=changed), dialect)


@functools.lru_cache(maxsize=64)
def _update(dialect: sa.Dialect, column: str) -> _Sql:
    return _compiled(sa.update(vms).where(vms.c.id == sa.bindparam("vm")).values({column: sa.bindparam("new")}), dialect)


@functools.lru_cache(maxsize=64)
def _delete(dialect: sa.Dialect, table: sa.Table) -> _Sql:
    (key,) = table.primary_key
    return _compiled(sa.delete(table).where(key == sa.bindparam("dropped")), dialect)


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
