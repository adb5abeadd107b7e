"""The one owner of the database. A writer thread commits what many callers hand in as one transaction (group commit)."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import sqlite3
import threading
import uuid
from pathlib import Path

import sqlalchemy as sa
import structlog
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from alembic.util.exc import CommandError
from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_exponential_jitter

from reconciler.core.model import Change
from reconciler.store import rows
from specs.names import ClusterId

log = structlog.get_logger()

MIGRATIONS = Path(__file__).parent / "migrations"
TERM_EPOCH = 1735689600  # 2025-01-01 UTC: terms are seconds since then, and fit into 30 bits for 34 years
BUSY_SECONDS = 5.0  # how long a write waits for another process that holds the database before it is refused
_MAX_GROUP = 4096  # changes a transaction


class StoreUnavailable(Exception):
    """The write did not happen and nothing of it is kept: the database is locked, full or unreadable. Worth a retry."""


class StoreCorrupt(Exception):
    """The database cannot be trusted; the controller must not start, and the fleet is left as it is."""


class Database:
    """Desired state on disk. `open` in any thread, `commit` from the event loop, `close` at the end."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._engine: sa.Engine | None = None
        self._pending: queue.SimpleQueue[tuple[Change | None, asyncio.Future[None] | None]] = queue.SimpleQueue()
        self._writer: threading.Thread | None = None
        self.commits = 0
        self.changes = 0

    @classmethod
    def at(cls, path: Path) -> Database:
        """A SQLite database file; its folder must exist."""
        return cls(f"sqlite:///{path}")

    # ---- opening

    def open(self) -> None:
        """Checks, migrates and opens the database. Raises StoreCorrupt, StoreUnavailable."""
        engine = sa.create_engine(self.url)
        if engine.dialect.name == "sqlite":
            self._check_unchanged(engine.url.database)
            sa.event.listen(engine, "connect", _sqlite_pragmas)
            sa.event.listen(engine, "begin", begin_sqlite)
        try:
            with engine.begin() as connection:
                _migrate(connection)
        except (sa.exc.DatabaseError, sqlite3.DatabaseError) as error:
            engine.dispose()
            if isinstance(error, sa.exc.OperationalError):
                raise StoreUnavailable(f"{self.url} cannot be opened: {error.orig}") from error
            raise StoreCorrupt(f"{self.url} is not a database of muster: {error}") from error
        except CommandError as error:
            engine.dispose()
            raise StoreCorrupt(f"{self.url} was written by a newer muster: {error}") from error
        self._engine = engine
        self._writer = threading.Thread(target=self._write_forever, name="store-writer", daemon=True)
        self._writer.start()

    def _check_unchanged(self, path: str | None) -> None:
        """Raises StoreCorrupt on damage, StoreUnavailable, and leaves every byte as it is.

        A connection that may write would, when it is closed, copy what a killed controller left in its log over the damaged
        file, and remove the log (https://sqlite.org/wal.html#the_wal_file).
        """
        if not path or not Path(path).exists():
            return
        try:
            with contextlib.closing(sqlite3.connect(f"{Path(path).absolute().as_uri()}?mode=ro", uri=True)) as connection:
                verdict = connection.execute("PRAGMA quick_check").fetchone()[0]
        except sqlite3.OperationalError as error:
            raise StoreUnavailable(f"{self.url} cannot be opened: {error}") from error
        except sqlite3.DatabaseError as error:
            raise StoreCorrupt(f"{self.url} is not a database of muster: {error}") from error
        if verdict != "ok":
            raise StoreCorrupt(f"{self.url} is damaged ({verdict}); restore it from a backup, nothing was changed")

    def begin_term(self, now: float = 0.0) -> tuple[ClusterId, int]:
        """The cluster's id, made at first, and a term higher than every one before; both durable on return.

        `now` (Unix seconds) is what makes it higher than terms this store has never heard of: agents have seen those of the
        store in whose place an older copy was put, and would refuse every call of a lower one.
        """
        with self._open_engine().begin() as connection:
            known = rows.read_meta(connection)
            cluster = known.get("cluster") or uuid.uuid4().hex[:12]
            term = max(int(known.get("term", "0")) + 1, int(now) - TERM_EPOCH)
            rows.write_meta(connection, {"cluster": cluster, "term": str(term)})
        return ClusterId(cluster), term

    def load(self) -> Change:
        """Everything recorded, as one change to apply to an empty fleet. Raises StoreCorrupt on a row it cannot read."""
        with self._open_engine().connect() as connection:
            try:
                return rows.read(connection)
            except ValueError as error:
                raise StoreCorrupt(f"{self.url} holds a record this version cannot read: {error}") from error

    def _open_engine(self) -> sa.Engine:
        if self._engine is None:
            raise StoreUnavailable(f"{self.url} is not open")
        return self._engine

    # ---- writing

    async def commit(self, change: Change) -> None:
        """Returns once the change is on disk; raises StoreUnavailable if it is not, and then nothing of it is.

        An empty change writes something all the same, and so finds out whether writing is possible.
        """
        if self._writer is None:
            raise StoreUnavailable(f"{self.url} is not open")
        done = asyncio.get_running_loop().create_future()
        self._pending.put((change, done))
        await done

    def close(self) -> None:
        """Commits what is pending and closes."""
        if self._writer is not None:
            self._pending.put((None, None))
            self._writer.join()
            self._writer = None
        if self._engine is not None:
            self._engine.dispose()
            self._engine = None

    def _write_forever(self) -> None:
        while True:
            group = [self._pending.get()]
            with contextlib.suppress(queue.Empty):
                while len(group) < _MAX_GROUP:
                    group.append(self._pending.get_nowait())
            last = any(change is None for change, _ in group)
            waiting = [(change, done) for change, done in group if change is not None and done is not None]
            if waiting:
                self._finish(waiting, self._try_write([change for change, _ in waiting]))
            if last:
                return

    def _try_write(self, changes: list[Change]) -> StoreUnavailable | None:
        try:
            try:
                self._write(changes)
            except sa.exc.OperationalError as error:
                if not _may_pass(error):
                    raise
                Retrying(
                    retry=retry_if_exception(_may_pass),
                    wait=wait_exponential_jitter(multiplier=0.02, max=0.5),
                    stop=stop_after_delay(BUSY_SECONDS),
                    reraise=True,
                )(self._write, changes)
        except sa.exc.SQLAlchemyError as error:
            reason = getattr(error, "orig", None) or error
            log.warning("store write refused", error=str(reason), changes=len(changes))
            return StoreUnavailable(f"the change was not recorded: {reason}")
        except Exception as error:  # a dead writer thread would leave every caller waiting for ever
            log.exception("store write failed", changes=len(changes))
            return StoreUnavailable(f"the change was not recorded: {error}")
        self.commits += 1
        self.changes += len(changes)
        return None

    def _write(self, changes: list[Change]) -> None:
        with self._open_engine().begin() as connection:
            rows.write(connection, changes)

    @staticmethod
    def _finish(waiting: list[tuple[Change, asyncio.Future[None]]], error: StoreUnavailable | None) -> None:
        def resolve() -> None:
            for _, done in waiting:
                if done.done():
                    continue
                if error is None:
                    done.set_result(None)
                else:
                    done.set_exception(StoreUnavailable(*error.args))

        with contextlib.suppress(RuntimeError):  # the loop has ended with the process; nobody waits any more
            waiting[0][1].get_loop().call_soon_threadsafe(resolve)


def _may_pass(error: BaseException) -> bool:
    """Whether the same write may succeed a moment later: a lock is given back, a full disk is not emptied by waiting."""
    full = getattr(getattr(error, "orig", None), "sqlite_errorname", "") == "SQLITE_FULL"
    return isinstance(error, sa.exc.OperationalError) and not full


def begin_sqlite(connection: sa.Connection) -> None:
    """What SQLAlchemy's "begin" does here: the driver, told to leave transactions alone, begins none."""
    connection.connection.cursor().execute("BEGIN")


def _sqlite_pragmas(connection: sqlite3.Connection, _record: object) -> None:
    # Left to itself, sqlite3 commits before DDL: a crash in a migration would leave half of it.
    connection.isolation_level = None
    # An answer means "on disk": WAL with FULL syncs the log at every commit (https://sqlite.org/pragma.html#pragma_synchronous).
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=1000", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _migrate(connection: sa.Connection) -> None:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    ScriptDirectory.from_config(config)
    command.upgrade(config, "head")
