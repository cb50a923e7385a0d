"""The event store: acknowledged means durable, whatever happens to the database or the process."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import random
import signal
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import sqlalchemy as sa

from pipelines.experiments.experiment import Arm
from serving import database as database_module
from serving.database import EVENTS, Database, Row, Unavailable, assignments, events, exposures, metadata
from serving.events import EventStore, NotStored, assigned, exposure
from serving.export import export
from serving.router import Assignment
from serving.schemas import ModelCard
from tests.serving.waiting import until

CARD = ModelCard(name="clicks", version=3, hash="ab", gates={"cross": "cd"})


def click(name: str, **more: Any) -> Row:
    return EVENTS, {"event_id": name, "time": 0, "received": 0, "type": "click", **more}


def shown(request: str) -> Row:
    candidates = [{"item_id": "a", "price": 1.5}, {"item_id": "b"}]
    return exposure(
        request_id=request,
        given=({"user_id": 7}, {"hour": 3}, candidates),
        scores=np.array([0.25, 0.5], dtype=np.float32),
        card=CARD,
        schema_hash="ef",
        unit="user_id",
        item="item_id",
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "events.db"


def opened(path: Path, **more: Any) -> EventStore:
    database = Database(f"sqlite:///{path}", lock_seconds=0.05)
    return EventStore(database, path.parent / "spool", **{"retry_seconds": 0.02, **more})


@pytest.fixture
def store(path: Path) -> Iterator[EventStore]:
    with opened(path) as store:
        store.submit([click("first")]).result()
        yield store


def stored(path: Path) -> list[str]:
    with sqlite3.connect(path) as connection:
        return [name for (name,) in connection.execute("SELECT event_id FROM sluice_events ORDER BY rowid")]


class Lock:
    """Another writer that does not let go."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        self._connection = sqlite3.connect(self._path, isolation_level=None, timeout=5)
        self._connection.execute("BEGIN IMMEDIATE")

    def __exit__(self, *_: object) -> None:
        self._connection.execute("ROLLBACK")
        self._connection.close()


def test_what_returned_is_there_and_a_key_is_stored_once(store: EventStore, path: Path) -> None:
    store.submit([click("a"), click("b")]).result()
    store.submit([click("b"), click("c")]).result()
    assert stored(path) == ["first", "a", "b", "c"]
    assert store.status.state == "ready" and store.status.waiting == 0


def test_concurrent_callers_share_commits(store: EventStore, monkeypatch: pytest.MonkeyPatch) -> None:
    commits = []
    insert = store.database.insert

    def slow(rows: Any) -> None:
        time.sleep(0.02)
        commits.append(len(rows))
        insert(rows)

    monkeypatch.setattr(store.database, "insert", slow)

    async def many() -> None:
        await asyncio.gather(*(store.record([click(f"e{i}")]) for i in range(500)))

    asyncio.run(many())
    assert sum(commits) == 500 and len(commits) < 10


def test_an_exposure_says_everything(store: EventStore) -> None:
    store.submit([shown("r1")]).result()
    (row,) = store.database.rows(sa.select(exposures))
    assert (row.request_id, row.unit, row.served, row.model, row.model_hash) == ("r1", "7", True, "clicks/3", "ab")
    assert json.loads(row.gates) == {"cross": "cd"} and row.schema_hash == "ef"
    assert json.loads(row.content) == {
        "user": {"user_id": 7},
        "context": {"hour": 3},
        "candidates": [{"item_id": "a", "price": 1.5}, {"item_id": "b"}],
        "items": ["a", "b"],
        "scores": [0.25, 0.5],
        "positions": [1, 0],
        "propensities": [1.0, 1.0],
        "assignments": {},
    }
    assert abs(row.time / 1e6 - time.time()) < 60


def test_an_exposure_names_its_experiments_and_shadows() -> None:
    dealt = [Assignment(name, "u1", Arm(name=arm), (), 0.0) for name, arm in (("gates", "open"), ("other", "new"))]
    about: dict[str, Any] = {
        "request_id": "r", "given": ({}, {}, [{}]), "scores": np.ones(1), "card": CARD,
        "schema_hash": "ef", "assignments": dealt,
    }  # fmt: skip
    _, served = exposure(**about)
    _, shadow = exposure(**about, shadow=("gates", "deep"))
    assert (served["experiment"], served["arm"], served["served"], served["unit"]) == ("gates", "open", True, "u1")
    assert (shadow["experiment"], shadow["arm"], shadow["served"]) == ("gates", "deep", False)
    assert json.loads(served["content"])["assignments"] == {"gates": "open", "other": "new"}


def test_an_exposure_is_in_each_of_its_experiments_and_a_shadow_in_one(store: EventStore) -> None:
    dealt = [
        Assignment(name, unit, Arm(name=arm), (), 0.0)
        for name, unit, arm in (("gates", "u1", "open"), ("other", "s7", "new"))
    ]
    row = shown("r")
    rows = [*assigned(row, dealt, 2), *assigned(shown("r"), dealt, 2, shadow=("other", "deep"))]
    for _ in range(2):  # as after a crash: what comes twice is there once
        store.submit([row, *rows]).result()
    kept = store.database.rows(sa.select(assignments).order_by(assignments.c.experiment, assignments.c.arm))
    assert [(k.experiment, k.arm, k.unit, k.shown) for k in kept] == [
        ("gates", "open", "u1", 2), ("other", "deep", "s7", 2), ("other", "new", "s7", 2)
    ]  # fmt: skip
    assert (kept[0].exposure_id, kept[0].time, kept[0].request_id) == tuple(
        row[1][name] for name in ("exposure_id", "time", "request_id")
    )


def test_a_locked_database_buffers_tells_and_catches_up_in_order(store: EventStore, path: Path) -> None:
    with Lock(path):
        for i in range(20):
            store.submit([click(f"e{i:02}")]).result()
        status = store.status
        assert status.state == "buffering" and "locked" in status.reason and status.spooled_bytes > 0
        assert stored(path) == ["first"]
    until(lambda: store.status.state == "ready")
    assert stored(path) == ["first", *(f"e{i:02}" for i in range(20))]


def test_a_vanished_database_buffers_until_it_is_back(store: EventStore, path: Path) -> None:
    aside = path.with_name("aside.db")
    path.rename(aside)
    for i in range(3):
        store.submit([click(f"e{i}")]).result()
    assert store.status.state == "buffering" and not path.exists()
    aside.rename(path)
    until(lambda: store.status.state == "ready")
    assert sorted(stored(path)) == ["e0", "e1", "e2", "first"]


def test_a_database_that_is_away_at_the_start_is_no_reason_not_to(tmp_path: Path) -> None:
    (tmp_path / "sub").write_text("a file where a folder should be")
    database = Database(f"sqlite:///{tmp_path}/sub/events.db")
    with EventStore(database, tmp_path / "spool", retry_seconds=0.02) as store:
        store.submit([click("a")]).result()
        assert store.status.state == "buffering"
        (tmp_path / "sub").unlink()
        until(lambda: store.status.state == "ready")
    assert stored(tmp_path / "sub" / "events.db") == ["a"]


def test_a_full_spool_refuses_and_recovers(path: Path) -> None:
    with opened(path, spool_bytes=600) as store:
        store.submit([click("first")]).result()
        with Lock(path):
            kept = []
            with pytest.raises(NotStored, match="of 600 bytes"):
                for i in range(50):
                    store.submit([click(f"e{i}")]).result()
                    kept.append(f"e{i}")
            assert kept and store.status.state == "full" and "600 bytes" in store.status.reason
        until(lambda: store.status.state == "ready")
        store.submit([click("last")]).result()
    assert stored(path) == ["first", *kept, "last"]


def test_one_unfit_row_fails_its_caller_alone(store: EventStore, path: Path) -> None:
    held = threading.Event()
    insert = store.database.insert
    store.database.insert = lambda rows: (held.wait(5), insert(rows))[1]  # type: ignore[method-assign]
    futures = [store.submit([click("a")])]
    futures += [store.submit([click("b")]), store.submit([click("bad", type=None)]), store.submit([click("c")])]
    held.set()
    with pytest.raises(NotStored, match="refuses a row"):
        futures[2].result()
    for i in (0, 1, 3):
        futures[i].result()
    assert sorted(stored(path)) == ["a", "b", "c", "first"] and store.status.state == "ready"


def test_an_unfit_row_in_the_spool_does_not_stop_the_others(store: EventStore, path: Path) -> None:
    with Lock(path):
        futures = [store.submit([row]) for row in (click("a"), click("bad", type=None), click("b"))]
        for future in futures:
            future.result()
    until(lambda: store.status.state == "ready")
    assert stored(path) == ["first", "a", "b"] and store.status.refused == 1
    (line,) = (path.parent / "spool" / "0" / "refused.jsonl").read_text().splitlines()
    assert json.loads(line)[1]["event_id"] == "bad"


def test_a_row_of_a_table_of_another_release_does_not_stop_the_others(store: EventStore, path: Path) -> None:
    with Lock(path):
        for row in (click("a"), ("sluice_later", {"time": 0}), click("b")):
            store.submit([row]).result()
    until(lambda: store.status.state == "ready")
    assert stored(path) == ["first", "a", "b"] and store.status.refused == 1


def test_a_record_that_is_no_row_does_not_stop_the_others(store: EventStore, path: Path) -> None:
    with Lock(path):
        store.submit([click("a")]).result()
        store._own.append([b"?"])
        store.submit([click("b")]).result()
    until(lambda: store.status.state == "ready")
    assert stored(path) == ["first", "a", "b"] and store.status.refused == 1


def test_an_unfit_row_waits_while_it_can_not_be_put_aside(store: EventStore, path: Path) -> None:
    aside = path.parent / "spool" / "0" / "refused.jsonl"
    aside.mkdir()  # as a full disk: nothing can be written there
    with Lock(path):
        for row in (click("bad", type=None), click("a")):
            store.submit([row]).result()
    until(lambda: "a" in stored(path) or "refused" in store.status.reason)
    store.submit([click("b")]).result()  # who comes meanwhile is heard
    aside.rmdir()
    until(lambda: store.status.state == "ready")
    assert sorted(stored(path)) == ["a", "b", "first"] and store.status.refused == 1
    assert json.loads(aside.read_text().splitlines()[0])[1]["event_id"] == "bad"


def test_a_segment_that_vanishes_is_told_and_nothing_after_it_is_lost(store: EventStore, path: Path) -> None:
    with Lock(path):
        store.submit([click("gone")]).result()
        (segment,) = (path.parent / "spool" / "0").glob("*.spool")
        segment.unlink()
        with pytest.raises(NotStored, match="vanished"):
            store.submit([click("told")]).result()
        store.submit([click("a")]).result()
    until(lambda: store.status.state == "ready")
    assert stored(path) == ["first", "a"]


def test_other_folders_beside_the_spools_are_left_alone(path: Path) -> None:
    (path.parent / "spool" / "0.bak").mkdir(parents=True)
    with opened(path) as store:
        store.submit([click("a")]).result()
    assert stored(path) == ["a"]


def test_a_server_that_hangs_is_taken_for_gone(
    postgres: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_module, "SILENT_SECONDS", 0.5)
    with EventStore(Database(postgres.new_database()), tmp_path / "spool", retry_seconds=0.05) as store:
        store.submit([click("a")]).result()
        postgres.pause()
        try:
            store.submit([click("b")]).result(timeout=20)
            assert store.status.state == "buffering"
        finally:
            postgres.resume()
        until(lambda: store.status.state == "ready")
        assert sorted(row.event_id for row in store.database.rows(sa.select(events.c.event_id))) == ["a", "b"]


def test_who_asks_is_not_kept_waiting_by_looks_at_a_database_that_is_slow_to_fail(path: Path) -> None:
    with opened(path) as store:
        store.submit([click("first")]).result()

        def slow(rows: Any) -> None:
            time.sleep(0.2)
            raise Unavailable("no answer")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(store.database, "insert", slow)
            took = []
            for i in range(100):
                begin = time.monotonic()
                store.submit([click(f"e{i}")]).result()
                took.append(time.monotonic() - begin)
                time.sleep(0.01)
        assert sum(one > 0.1 for one in took) < 10, took
        until(lambda: store.status.state == "ready")


def test_tables_that_vanish_are_made_anew(postgres: Any, tmp_path: Path) -> None:
    url = postgres.new_database()
    with EventStore(Database(url), tmp_path / "spool", retry_seconds=0.05) as store:
        store.submit([click("a")]).result()
        with Database(url).writing() as connection:  # as where the database is made anew
            metadata.drop_all(connection)
        store.submit([click("b")]).result()
        until(lambda: store.status.state == "ready")
        assert [row.event_id for row in store.database.rows(sa.select(events.c.event_id))] == ["b"]


def test_a_row_that_is_no_json_fails_its_caller_and_nobody_else(store: EventStore, path: Path) -> None:
    with Lock(path):
        with pytest.raises(NotStored, match="could not be stored"):
            store.submit([click("a", item=object())]).result()
        store.submit([click("b")]).result()
    until(lambda: store.status.state == "ready")
    assert stored(path) == ["first", "b"]


def test_too_many_waiting_are_refused_at_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = threading.Event()
    with opened(path, most_waiting=10) as store:
        insert = store.database.insert
        monkeypatch.setattr(store.database, "insert", lambda rows: (held.wait(5), insert(rows)))
        futures = [store.submit([click(f"e{i}")]) for i in range(10)]
        with pytest.raises(NotStored, match="10 rows wait"):
            store.submit([click("more")]).result(timeout=1)
        held.set()
        for future in futures:
            future.result()
    with pytest.raises(NotStored, match="closing"):
        store.submit([click("late")]).result()


def test_a_store_takes_over_what_dead_ones_left(path: Path) -> None:
    one, two = opened(path), opened(path)
    one.submit([click("first")]).result()
    two.submit([click("second")]).result()
    with Lock(path):
        one.submit([click("a")]).result()
        two.submit([click("b")]).result()
        one.close()
        two.close()
    assert sorted(p.name for p in (path.parent / "spool").iterdir()) == ["0", "1"]
    with opened(path) as store:
        until(lambda: store.status.state == "ready")
    assert sorted(stored(path)) == ["a", "b", "first", "second"]


def test_a_server_is_killed_and_restarted_in_mid_load(postgres: Any, tmp_path: Path) -> None:
    url = postgres.new_database()
    acknowledged: list[str] = []
    going = True
    with EventStore(Database(url), tmp_path / "spool", retry_seconds=0.05) as store:

        def client(number: int) -> None:
            i = 0
            while going:
                store.submit([click(f"{number}-{i}")]).result()
                acknowledged.append(f"{number}-{i}")
                i += 1

        threads = [threading.Thread(target=client, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(0.3)
        postgres.kill()
        before = len(acknowledged)
        until(lambda: len(acknowledged) > before + 20)
        state = store.status.state
        postgres.start()
        until(lambda: store.status.state == "ready", 30)
        going = False
        for thread in threads:
            thread.join()
        found = Counter(row.event_id for row in store.database.rows(sa.select(events.c.event_id)))
    assert state == "buffering"
    assert set(found) == set(acknowledged) and max(found.values()) == 1


def write_until_killed(path: Path, acknowledgements: int, again: list[str], run: int) -> None:
    """Write from several threads; tell of each row once it is acknowledged."""
    store = opened(path)

    def client(number: int) -> None:
        for name in again[number::4]:  # a client that got no answer sends once more
            store.submit([click(name)]).result()
            os.write(acknowledgements, f"{name}\n".encode())
        for i in range(10**9):
            name = f"{run}-{number}-{i}"
            now = time.time_ns() // 1000
            event = click(name, time=now, request_id=name, candidate=1)
            rows = [shown(name), event] if i % 5 == 0 else [event]
            store.submit(rows).result()
            os.write(acknowledgements, f"{name}\n".encode())

    for number in range(4):
        threading.Thread(target=client, args=(number,), daemon=True).start()
    signal.pause()


def kill_and_count(path: Path, kills: int, seed: int = 0) -> Counter[str]:
    """Kill a writing process again and again; return how many times each row was acknowledged."""
    make = random.Random(seed)
    Database(f"sqlite:///{path}").create()
    acknowledged: Counter[str] = Counter()
    last: list[str] = []
    for run in range(kills):
        reader, writer = os.pipe()
        process = multiprocessing.get_context("fork").Process(
            target=write_until_killed, args=(path, writer, last, run), daemon=True
        )
        process.start()
        os.close(writer)
        with Lock(path) if run % 3 == 1 else threading.Lock():  # now and then the spool has to take it all
            time.sleep(make.uniform(0.05, 0.4))
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
            process.join()
        with open(reader, "rb") as pipe:
            last = [line.decode() for line in pipe.read().split(b"\n")[:-1]]
        acknowledged.update(last)
    return acknowledged


def test_what_was_acknowledged_survives_sigkill(path: Path) -> None:
    acknowledged = kill_and_count(path, kills=10)
    assert len(acknowledged) > 100
    with opened(path) as store:
        until(lambda: store.status.state == "ready", 30)
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    found = Counter(stored(path))
    assert set(acknowledged) <= set(found) and max(found.values()) == 1
    export(Database(f"sqlite:///{path}"), path.parent / "logs")
    rows = pl.scan_parquet(path.parent / "logs" / "*" / "*.parquet").collect()
    requests = Counter(rows["served_request_id"])
    assert {name for name in acknowledged if int(name.split("-")[2]) % 5 == 0} <= set(requests)
    assert set(requests.values()) == {2}  # two candidates, each once
    assert rows["click"].sum() == len(requests)
