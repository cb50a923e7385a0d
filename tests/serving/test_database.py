"""The database: durable settings, one row a key, and what is told when it is away."""

from __future__ import annotations

import errno
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from ctr_models.errors import ConfigError
from serving.database import Database, Row, Unavailable, Unfit, events


def click(name: str, **more: Any) -> Row:
    return "sluice_events", {"event_id": name, "time": 0, "received": 0, "type": "click", **more}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "events.db"


@pytest.fixture
def database(path: Path) -> Database:
    made = Database(f"sqlite:///{path}", lock_seconds=0.1)
    made.create()
    return made


def names(database: Database) -> list[str]:
    return [row.event_id for row in database.rows(sa.select(events).order_by(events.c.event_id))]


def test_sqlite_keeps_what_it_committed(database: Database) -> None:
    with database.engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2  # FULL


@pytest.fixture
def either(events_url: str) -> Database:
    made = Database(events_url)
    made.create()
    made.create()
    return made


def test_a_key_is_stored_once_and_the_first_wins(either: Database) -> None:
    database = either
    database.insert([click("a", value=1.0), click("a", value=2.0), click("b", item="x")])
    database.insert([click("a", value=3.0)])
    assert names(database) == ["a", "b"]
    assert [row.value for row in database.rows(sa.select(events.c.value).order_by(events.c.event_id))] == [
        1.0,
        None,
    ]


def test_an_unfit_row_is_told_and_takes_its_batch_along(either: Database) -> None:
    with pytest.raises(Unfit, match=r"(?i)not.null") as refused:
        either.insert([click("a"), click("b", type=None, unit="somebody")])
    assert "somebody" not in str(refused.value)
    assert names(either) == []


def test_a_reader_sees_one_moment(either: Database) -> None:
    either.insert([click("a")])
    count = sa.select(sa.func.count()).select_from(events)
    with either.reading() as connection:
        assert connection.execute(count).scalar() == 1
        either.insert([click("b")])
        assert connection.execute(count).scalar() == 1
    assert names(either) == ["a", "b"]


def test_what_goes_wrong_beside_the_database_is_not_blamed_on_it(either: Database) -> None:
    for open_ in (either.reading, either.writing):
        with pytest.raises(OSError, match="No space left"), open_():
            raise OSError(errno.ENOSPC, "No space left on device")


def test_a_server_refuses_what_its_texts_can_not_hold(postgres: Any) -> None:
    database = Database(postgres.new_database())
    database.create()
    for unfit in ({"item": "a\0"}, {"type": "x" * 17}, {"candidate": 2**40}):
        with pytest.raises(Unfit):
            database.insert([click("a", **unfit)])
    assert names(database) == []


def test_a_locked_database_is_unavailable_then_back(database: Database, path: Path) -> None:
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(Unavailable, match="locked"):
        database.insert([click("a")])
    other.execute("ROLLBACK")
    other.close()
    database.insert([click("a")])
    assert names(database) == ["a"]


def test_workers_that_begin_together_make_one_database(tmp_path: Path) -> None:
    def begin(path: Path) -> None:
        database = Database(f"sqlite:///{path}")
        database.create()
        database.rows(sa.select(events))
        database.close()

    with ThreadPoolExecutor(4) as pool:
        for round_ in range(80):
            list(pool.map(begin, [tmp_path / f"{round_}.db"] * 4))


def test_a_vanished_file_is_noticed_and_not_made_anew(database: Database, path: Path) -> None:
    database.insert([click("a")])
    aside = path.with_name("aside.db")
    path.rename(aside)
    with pytest.raises(Unavailable, match="vanished"):
        database.insert([click("b")])
    with pytest.raises(Unavailable, match="no such file"):
        database.insert([click("b")])
    assert not path.exists()
    aside.rename(path)
    database.insert([click("b"), click("c")])
    assert names(database) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("events.db", "not the URL of a database"),
        ("mysql://u:secret@host/x", r"mysql://u:\*\*\*@host/x' is no database for events"),
        ("mysql://host/x?password=secret", r"mysql://host/x\?password=\*\*\*' is no database for events"),
        ("sqlite://", "is no database for events"),
    ],
)
def test_other_urls_are_refused(url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Database(url)


def test_a_server_that_is_away_is_unavailable() -> None:
    database = Database("postgresql://nobody:secret@127.0.0.1:1/none")
    assert "secret" not in database.name
    with pytest.raises(Unavailable, match="refused"):
        database.insert([click("a")])
    with pytest.raises(Unavailable):
        database.rows(sa.select(events))


def test_one_of_many_gets_a_task_until_its_time_is_over(either: Database) -> None:
    assert [either.claim("check", 60), either.claim("check", 60), either.claim("other", 0)] == [True, False, True]
    assert either.claim("other", 60) and not either.claim("other", 60)


def test_a_reader_may_ask_for_more_time(postgres: Any) -> None:
    database = Database(postgres.new_database())
    with database.reading(seconds=0.2) as connection, pytest.raises(sa.exc.OperationalError, match="timeout"):
        connection.execute(sa.text("SELECT pg_sleep(5)"))
    with database.reading() as connection:
        assert connection.execute(sa.text("SHOW statement_timeout")).scalar() == "10s"


def test_a_server_that_syncs_lazily_syncs_for_us(postgres: Any) -> None:
    url = postgres.new_database()
    with Database(url).engine.connect() as connection:
        name = connection.execute(sa.text("SELECT current_database()")).scalar()
        connection.execute(sa.text(f"ALTER DATABASE {name} SET synchronous_commit = off"))
        connection.commit()
    with Database(url).engine.connect() as connection:
        assert connection.execute(sa.text("SHOW synchronous_commit")).scalar() == "on"


def test_options_of_the_address_hold(postgres: Any) -> None:
    database = Database(postgres.new_database() + "?options=-c%20search_path%3Dlogs")
    with database.engine.connect() as connection:
        shown = [connection.execute(sa.text(f"SHOW {n}")).scalar() for n in ("search_path", "statement_timeout")]
    assert shown == ["logs", "10s"]


def test_only_the_owner_reads_what_users_did(database: Database, path: Path) -> None:
    database.insert([click("e1")])
    files = sorted(path.parent.glob("events.db*"))
    assert len(files) == 3 and all(file.stat().st_mode & 0o077 == 0 for file in files)
    database.close()


def test_a_database_of_before_gets_its_indices_by_the_statements_of_the_docs(events_url: str) -> None:
    docs = Path(__file__).parents[2] / "docs" / "live-experiments.md"
    statements = docs.read_text().split("```sql")[1].split("```")[0]
    database = Database(events_url)
    database.create()

    def indices() -> list[Any]:
        inspector = sa.inspect(database.engine)
        found = [one for name in ("sluice_assignments", "sluice_events") for one in inspector.get_indexes(name)]
        return [
            (one["name"], one["column_names"], [str(o) for o in one["dialect_options"].values()]) for one in found
        ]

    new = indices()
    with database.writing() as connection:
        connection.exec_driver_sql("DROP INDEX ix_sluice_events_request")
        for statement in filter(str.strip, statements.split(";")):
            connection.exec_driver_sql(statement)
    assert indices() == new
    database.close()


def test_events_of_a_request_are_found_without_reading_all(database: Database) -> None:
    asked = "SELECT event_id FROM sluice_events WHERE request_id IN ('a', 'b') AND time >= 0"
    with database.reading() as connection:
        plan = str(connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {asked}").all())
    assert "ix_sluice_events_request (request_id=?)" in plan
