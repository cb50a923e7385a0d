"""The tables of experiments, exposures and events, in SQLite or PostgreSQL."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from ctr_models.errors import ConfigError
from serving.logs import masked
from serving.silence import Silence

Row = tuple[str, dict[str, Any]]
"""The name of a table, and values by column."""

EXPERIMENTS, EXPOSURES, EVENTS = "sluice_experiments", "sluice_exposures", "sluice_events"
ASSIGNMENTS, MATCHES = "sluice_assignments", "sluice_matches"
PAUSES, CLAIMS, PRUNES = "sluice_pauses", "sluice_claims", "sluice_prunes"
metadata = sa.MetaData()


def _key() -> list[sa.Column[Any]]:
    """The key of an exposure in an experiment, in the order of units, so that sums over units are one pass."""
    return [
        sa.Column("experiment", sa.String(100), primary_key=True),
        sa.Column("unit", sa.Text, primary_key=True),
        sa.Column("time", sa.BigInteger, primary_key=True),
        sa.Column("exposure_id", sa.String(32), primary_key=True),
    ]


experiments = sa.Table(
    EXPERIMENTS,
    metadata,
    sa.Column("name", sa.String(100), primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True),
    sa.Column("body", sa.Text, nullable=False),
    sa.Column("created", sa.BigInteger, nullable=False),
)
"""Every version of every experiment; the last is the one in force."""
exposures = sa.Table(
    EXPOSURES,
    metadata,
    sa.Column("exposure_id", sa.String(32), primary_key=True),
    sa.Column("time", sa.BigInteger, nullable=False, index=True),
    sa.Column("request_id", sa.String(128), nullable=False, index=True),
    sa.Column("unit", sa.Text),
    sa.Column("experiment", sa.String(100)),
    sa.Column("arm", sa.String(100)),
    sa.Column("served", sa.Boolean, nullable=False),
    sa.Column("model", sa.Text, nullable=False),
    sa.Column("model_hash", sa.String(64), nullable=False),
    sa.Column("schema_hash", sa.String(64), nullable=False),
    sa.Column("gates", sa.Text, nullable=False),
    sa.Column("content", sa.Text, nullable=False),
)
"""A request scored by a model; shadow arms are not served. Times are microseconds since 1970."""
assignments = sa.Table(
    ASSIGNMENTS,
    metadata,
    *_key(),
    sa.Column("arm", sa.String(100), nullable=False),
    sa.Column("request_id", sa.String(128), nullable=False),
    sa.Column("shown", sa.Integer, nullable=False),
    # With all that sums over an arm's events need of a row.
    sa.Index("ix_sluice_assignments_request", "request_id", "experiment", "time", "arm", "shown"),
    sqlite_with_rowid=False,
)
"""An exposure in an experiment, as a narrow row."""
matches = sa.Table(
    MATCHES,
    metadata,
    *_key(),
    sa.Column("candidate", sa.Integer, primary_key=True),
    sa.Column("arm", sa.String(100), nullable=False),
    sa.Column("item", sa.Text),
    sa.Column("shown", sa.Integer, nullable=False),
    sqlite_with_rowid=False,
)
"""A candidate that a random order put where the arm's ranking would have, one of so many shown."""
pauses = sa.Table(
    PAUSES,
    metadata,
    sa.Column("experiment", sa.String(100), primary_key=True),
    sa.Column("arm", sa.String(100), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("paused", sa.Boolean, nullable=False),
    sa.Column("time", sa.BigInteger, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
)
"""Every pause and resumption of an arm; the last holds. Of two writers of one number the first wins."""
claims = sa.Table(
    CLAIMS,
    metadata,
    sa.Column("name", sa.String(100), primary_key=True),
    sa.Column("until", sa.BigInteger, nullable=False),
)
"""Who does what only one process need do: nobody else until then."""
prunes = sa.Table(
    PRUNES,
    metadata,
    sa.Column("before", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("began", sa.BigInteger, nullable=False),
)
"""Every prune: the exposures before a moment are gone, or are going."""
events = sa.Table(
    EVENTS,
    metadata,
    sa.Column("event_id", sa.String(128), primary_key=True),
    sa.Column("time", sa.BigInteger, nullable=False, index=True),
    sa.Column("received", sa.BigInteger, nullable=False),
    sa.Column("type", sa.String(16), nullable=False),
    sa.Column("request_id", sa.String(128)),
    sa.Column("candidate", sa.Integer),
    sa.Column("unit", sa.Text),
    sa.Column("item", sa.Text),
    sa.Column("value", sa.Float),
)
_by_request = events.c.request_id.is_not(None)
sa.Index("ix_sluice_events_request", events.c.request_id, sqlite_where=_by_request, postgresql_where=_by_request)


SILENT_SECONDS = 5.0
"""That a server may take to write rows, before it is taken for gone; to read some it may take thrice as long."""
_silence = Silence()
REMEDY = "give --events the database that the server writes"
"""Of commands whose database can't be read."""


class Unavailable(Exception):
    """The database can't be reached, is locked, full or damaged: what was to be written was not, or not surely."""


class Unfit(Exception):
    """The database refuses a row, and always will."""


class Database:
    """Reads and writes in transactions; a write that returned is on disk.

    SQLite runs in WAL mode with ``synchronous=FULL``. A file that vanishes is not made anew: a folder without its
    mounted disk looks alike, and what is written there would be lost.

    Args:
        url: ``sqlite:///runs/events.db`` or ``postgresql://user@host/name``.
        lock_seconds: how long a write waits for another writer's lock.

    Raises:
        ConfigError: another kind of database, or its driver is not installed.

    Example:
        >>> import tempfile
        >>> database = Database(f"sqlite:///{tempfile.mkdtemp()}/events.db")
        >>> database.create()
        >>> row = {"event_id": "e1", "time": 0, "received": 1, "type": "click"}
        >>> database.insert([(EVENTS, row), (EVENTS, row)])
        >>> len(database.rows(sa.select(events)))
        1
    """

    def __init__(self, url: str, *, lock_seconds: float = 1.0) -> None:
        try:
            parsed = sa.make_url(url)
        except sa.exc.ArgumentError:
            raise ConfigError("not the URL of a database", where="events_url", remedy=_KNOWN) from None
        kind = parsed.get_backend_name()
        self.name = masked(parsed.render_as_string(hide_password=True))
        self._lock_seconds = lock_seconds
        self._path: Path | None = None
        self._inode: tuple[int, int] | None = None
        if kind == "sqlite" and parsed.database and parsed.database != ":memory:":
            self._path = Path(parsed.database)
            self.engine = sa.create_engine("sqlite://", creator=self._connect, poolclass=sa.pool.QueuePool)
            sa.event.listen(self.engine, "begin", _begin)
            self._insert: Any = sqlite.insert
        elif kind == "postgresql":
            # A commit that returned is on disk, whatever the server's default is; what the address says wins.
            options = "-c synchronous_commit=on -c statement_timeout=10000"
            options += f" -c lock_timeout={max(1, round(1000 * lock_seconds))} {parsed.query.get('options', '')}"
            try:
                self.engine = sa.create_engine(
                    parsed.set(drivername="postgresql+psycopg"),
                    connect_args={"connect_timeout": 2, "options": options, "tcp_user_timeout": 5000},
                )
            except ModuleNotFoundError:
                remedy = "install the extra sluice[postgres]"
                raise ConfigError("psycopg is not installed", where="events_url", remedy=remedy) from None
            self._insert = postgresql.insert
        else:
            raise ConfigError(f"{self.name!r} is no database for events", where="events_url", remedy=_KNOWN)

    def create(self) -> None:
        """Make the tables, and SQLite's file, where they are missing.

        Raises:
            Unavailable: it can't be reached now.
        """
        try:
            if self._path is not None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._path.touch(mode=0o600)  # it holds what users did; SQLite makes its other files alike
            metadata.create_all(self.engine)
        except (OSError, sa.exc.DBAPIError) as error:
            raise self._unavailable(error) from error

    def insert(self, rows: Sequence[Row]) -> None:
        """Write rows in one transaction; one whose key is there already is left as it is.

        Raises:
            Unavailable: nothing is sure to be written; the same rows can be written again.
            Unfit: a row is refused; none is written.
        """
        by_table: dict[str, list[dict[str, Any]]] = {}
        for table, values in rows:
            if table not in metadata.tables:  # from the spool of another release
                raise Unfit(f"no such table: {table}")
            by_table.setdefault(table, []).append(values)
        try:
            with self.engine.begin() as connection, self._waiting(connection, SILENT_SECONDS):
                for name in sorted(by_table):  # always in one order: two writers can't wait for each other
                    statement = self._insert(metadata.tables[name]).on_conflict_do_nothing()
                    connection.execute(statement, _filled(metadata.tables[name], by_table[name]))
        except (sa.exc.DataError, sa.exc.IntegrityError) as error:
            raise Unfit(_reason(error)) from error
        except sa.exc.DBAPIError as error:
            if self._path is None and isinstance(error, sa.exc.ProgrammingError):
                with suppress(sa.exc.DBAPIError):  # the server's database was made anew: the next try finds tables
                    metadata.create_all(self.engine)
            raise self._unavailable(error) from error
        except (sa.exc.StatementError, OverflowError, UnicodeError) as error:
            raise Unfit(_reason(error)) from error
        except (sa.exc.SQLAlchemyError, OSError) as error:
            raise self._unavailable(error) from error
        if self._path is not None and self._inode != _inode(self._path):
            # SQLite goes on writing into a file without a name as if nothing were amiss.
            raise self._unavailable(FileNotFoundError("the file has vanished"))

    def claim(self, name: str, seconds: float) -> bool:
        """Take a task for some seconds, for all processes that share the database, or tell that another has it.

        Raises:
            Unavailable: it can't be written now.
        """
        now = time.time_ns() // 1000
        row = self._insert(claims).values(name=name, until=now + round(seconds * 1e6))
        taken = row.on_conflict_do_update(
            index_elements=["name"], set_={"until": row.excluded.until}, where=claims.c.until <= now
        ).returning(claims.c.name)
        with self.writing() as connection:
            return connection.execute(taken).first() is not None

    @contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        """Give a connection whose changes are made when the block ends well, all or none.

        Raises:
            Unavailable: it can't be written now; nothing is sure to be changed.
        """
        with self._connected() as connection, connection.begin():
            yield connection

    @contextmanager
    def reading(self, seconds: float | None = None) -> Iterator[sa.Connection]:
        """Give a connection that sees the database as it is at its first query, whatever is written meanwhile.

        Args:
            seconds: that a query may take on a server; None: ten, as everything else.

        Raises:
            Unavailable: it can't be reached now.
        """
        with self._connected() as connection:
            if self._path is None:
                connection.execution_options(isolation_level="REPEATABLE READ")
            connection.execution_options(reads=True)
            if self._path is None and seconds is not None:
                connection.exec_driver_sql(f"SET LOCAL statement_timeout = {round(1000 * seconds)}")
            yield connection

    def rows(self, query: sa.Select[Any]) -> list[Any]:
        """Return what a query finds.

        Raises:
            Unavailable: it can't be reached now.
        """
        with self.reading() as connection, self._waiting(connection, 3 * SILENT_SECONDS):
            return list(connection.execute(query).all())

    def size(self) -> int:
        """Return the bytes that it takes on disk.

        Raises:
            Unavailable: it can't be reached now.
        """
        if self._path is None:
            names = [sa.func.to_regclass(name) for name in metadata.tables]
            return int(
                sum(size or 0 for size in self.rows(sa.select(*map(sa.func.pg_total_relation_size, names)))[0])
            )
        try:
            return sum(path.stat().st_size for path in (self._path, Path(f"{self._path}-wal")) if path.exists())
        except OSError as error:
            raise self._unavailable(error) from error

    def spare(self) -> tuple[int, bool]:
        """Return the bytes inside SQLite's file that nothing uses, and whether :meth:`give_back` can free them.

        Raises:
            Unavailable: it can't be reached now.
        """
        if self._path is None:
            return 0, False
        with self.reading() as connection:
            pages, bytes_, kind = (
                int(connection.exec_driver_sql(f"PRAGMA {name}").scalar_one())
                for name in ("freelist_count", "page_size", "auto_vacuum")
            )
        return pages * bytes_, kind == _INCREMENTAL

    def give_back(self, pages: int) -> None:
        """Let SQLite's file end so many unused pages earlier.

        Raises:
            Unavailable: it can't be written now.
        """
        try:
            with closing(self.engine.raw_connection()) as connection:
                # Of such a statement Python's execute does the first page only.
                connection.driver_connection.executescript(f"PRAGMA incremental_vacuum({pages})")  # type: ignore[union-attr]
        except (sqlite3.Error, sa.exc.SQLAlchemyError, OSError) as error:
            raise self._unavailable(error) from error

    def close(self) -> None:
        """Let go of the connections."""
        self.engine.dispose()

    def _waiting(self, connection: sa.Connection, seconds: float) -> AbstractContextManager[None]:
        """Hang up on a server that is silent for so long: it looks after its own timeouts only while it runs."""
        if self._path is not None:
            return nullcontext()
        return _silence.limit(connection.connection.driver_connection, seconds)

    @contextmanager
    def _connected(self) -> Iterator[sa.Connection]:
        try:
            connection = self.engine.connect()
        except (sa.exc.SQLAlchemyError, OSError) as error:
            raise self._unavailable(error) from error
        try:  # another error of the system is not the database's: a full disk, where somebody writes what he reads
            with connection:
                yield connection
        except sa.exc.SQLAlchemyError as error:
            raise self._unavailable(error) from error

    def _unavailable(self, error: BaseException) -> Unavailable:
        self.engine.dispose()
        return Unavailable(_reason(error))

    def _connect(self) -> sqlite3.Connection:
        assert self._path is not None
        if not self._path.exists():
            raise FileNotFoundError("there is no such file")
        address = f"file:{quote(str(self._path))}?mode=rw"
        connection = sqlite3.connect(
            address, uri=True, timeout=self._lock_seconds, isolation_level=None, check_same_thread=False
        )
        try:
            with closing(connection.cursor()) as cursor:
                if not self._path.stat().st_size:  # later it takes a rewrite of the file
                    cursor.execute(f"PRAGMA auto_vacuum={_INCREMENTAL}")
                _write_ahead(cursor, self._lock_seconds)
                cursor.execute("PRAGMA synchronous=FULL")
        except BaseException:
            connection.close()
            raise
        self._inode = _inode(self._path)
        return connection


def _write_ahead(cursor: sqlite3.Cursor, seconds: float) -> None:
    """Turn WAL mode on; where several do so at once to a new file, SQLite lets all but one fail without waiting."""
    end = time.monotonic() + seconds
    while True:
        try:
            cursor.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() >= end:
                raise
        time.sleep(0.005)


def horizon(connection: sa.Connection) -> int:
    """Return the moment before which exposures are gone, or are going; 0 if none ever went.

    It is stored before the first of them goes: who reads it in the transaction in which he reads them, or after,
    knows what may lack.
    """
    if not sa.inspect(connection).has_table(PRUNES):  # nobody pruned, or wrote, since this table exists
        return 0
    return int(connection.execute(sa.select(sa.func.max(prunes.c.before))).scalar() or 0)


def _reason(error: BaseException) -> str:
    """The first line; those after it may hold the row, which concerns nobody who reads a log."""
    text = str(getattr(error, "orig", None) or error).strip().splitlines()
    return text[0] if text else type(error).__name__


_INCREMENTAL = 2
"""SQLite's number for a file that gives unused pages back when it is told to."""
_KNOWN = "give sqlite:///file.db or postgresql://user@host/name"


def _begin(connection: sa.Connection) -> None:
    # A writer takes its lock at once: one that reads first and writes later may be refused instead of waiting.
    reads = connection.get_execution_options().get("reads")
    connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _filled(table: sa.Table, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give all rows the same keys: those of the first would decide for all."""
    return [{column: row.get(column) for column in table.columns.keys()} for row in rows]  # noqa: SIM118
