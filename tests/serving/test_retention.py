"""Retention: whole days go with all that hangs on them, nothing that is needed goes, what stays is as it was."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import sqlalchemy as sa
from polars.testing import assert_frame_equal
from typer.testing import CliRunner

from ctr_models.errors import ConfigError, DataError
from pipelines.cli import build_app
from pipelines.experiments.experiment import Arm, Experiment
from serving.analysis import analyse
from serving.database import (
    ASSIGNMENTS,
    EVENTS,
    EXPERIMENTS,
    Database,
    Row,
    assignments,
    events,
    exposures,
    matches,
)
from serving.events import EventStore, assigned
from serving.experiments import Experiments
from serving.export import export
from serving.off_policy import matched
from serving.retention import Plan, Pruned, plan, prune
from serving.router import Assignment
from tests.serving.live_log import DAY, LATER, event, micros, shown

FIRST, CUT = DAY.date(), DAY.date() + timedelta(days=2)
"""The first of three days, and the last, which stays."""


@pytest.fixture
def database(events_url: str) -> Database:
    made = Database(events_url)
    made.create()
    return made


def in_experiment(row: Row, arm: str, name: str = "gates") -> list[Row]:
    """The rows of an exposure in an experiment, in random order."""
    about = assigned(row, [Assignment(name, row[1]["unit"], Arm(name=arm), (), 0.0)], 2)
    return [row, *about, *matched(about, np.array([0.5, 0.25]), np.arange(2), "ab")]


def three_days(each: int = 5) -> list[Row]:
    """Exposures of three days with their clicks, the last of each day at its end, clicked after midnight."""
    rows = []
    for day in range(3):
        for i in range(each):
            request, hour = f"{day}-{i}", 24 * day + 23.99 * i / (each - 1)
            rows += in_experiment(shown(request, hour, unit=f"u{i}"), "open", f"of-day-{day}")
            rows += [
                event(hour + 0.5, request_id=request, candidate=i % 2),
                event(hour + 1, unit=f"u{i}", item="a"),
            ]
    return rows


def put_experiment(database: Database, name: str, hours: float, **online: Any) -> Experiment:
    """Store an experiment as somebody did so many hours after the first day began."""
    arms = [{"name": "open"}, {"name": "gated", "bundle": "next"}]
    tree = {"name": name, "control": "open", "arms": arms, "online": online}
    made = Experiment.from_tree(tree)
    body = made.model_dump_json(exclude_defaults=True)
    database.insert([(EXPERIMENTS, {"name": name, "version": 1, "body": body, "created": micros(hours)})])
    return made


def planned(database: Database, exported: Path | None = None, before: date = CUT, **more: Any) -> Plan:
    return plan(database, before, exported=exported, **{"now": LATER, **more})


def go(database: Database, exported: Path | None = None, before: date = CUT, **more: Any) -> Pruned:
    return prune(database, planned(database, exported, before, **more), pause=lambda _: None)


def ids(database: Database, column: sa.Column[Any]) -> list[Any]:
    return sorted(row[0] for row in database.rows(sa.select(column).where(column.is_not(None))))


def frame(out: Path) -> pl.DataFrame:
    found = pl.scan_parquet(out / "*" / "*.parquet", hive_partitioning=False).collect()
    return found.sort("time", "served_exposure_id", "served_candidate")


def halves(database: Database) -> int:
    """Rows whose exposure is gone, and old exposures that lost a row."""
    alone = 0
    for table in (assignments, matches):
        query = sa.select(sa.func.count()).where(~sa.exists().where(exposures.c.exposure_id == table.c.exposure_id))
        alone += database.rows(query.select_from(table))[0][0]
    bare = ~sa.exists().where(assignments.c.exposure_id == exposures.c.exposure_id)
    return int(alone + database.rows(sa.select(sa.func.count()).select_from(exposures).where(bare))[0][0])


def test_old_days_go_with_all_that_hangs_on_them(database: Database, tmp_path: Path) -> None:
    database.insert(three_days())
    export(database, tmp_path, now=LATER)
    whole = frame(tmp_path)
    what = planned(database, tmp_path)
    assert [(day.day, day.exposures, day.missing) for day in what.days] == [
        ("2026-11-20", 5, ""),
        ("2026-11-21", 5, ""),
    ]
    done = prune(database, what, pause=lambda _: None)
    assert (done.exposures, done.assignments) == (10, 10)
    assert ids(database, exposures.c.request_id) == [f"2-{i}" for i in range(5)]
    assert ids(database, assignments.c.request_id) == [f"2-{i}" for i in range(5)]
    assert set(ids(database, matches.c.experiment)) == {"of-day-2"}
    # Of the second day's last exposure the click by request went, though it came on the third.
    assert ids(database, events.c.request_id) == [f"2-{i}" for i in range(5)]
    assert export(database, tmp_path, now=LATER) == []
    export(database, tmp_path / "again", now=LATER)
    assert_frame_equal(frame(tmp_path / "again"), whole.filter(pl.col("time").dt.date() == CUT))
    assert_frame_equal(frame(tmp_path), whole)
    nothing = go(database, tmp_path)
    assert (nothing.exposures, nothing.events, nothing.assignments) == (0, 0, 0)


def test_what_is_not_exported_for_good_stays(database: Database, tmp_path: Path) -> None:
    database.insert(three_days())

    def refused() -> str:
        with pytest.raises(DataError, match="nothing is removed") as told:
            go(database, tmp_path)
        return str(told.value)

    assert "2026-11-20 (not exported), 2026-11-21 (not exported)" in refused() and "--without-export" in refused()
    export(database, tmp_path, now=DAY + timedelta(hours=47))
    assert "2026-11-20 (exported, but not final)" in refused()
    export(database, tmp_path, now=LATER)
    database.insert([shown("late", 3)])
    assert "2026-11-20 (exported without 1 of its exposures)" in refused()
    export(database, tmp_path, now=LATER)
    database.insert([event(40, "conversion", request_id="1-0", candidate=0)])
    assert "2026-11-21 (exported before some of its events came)" in refused()
    export(database, tmp_path, now=LATER)
    (tmp_path / "day=2026-11-20" / "part-00000.parquet").unlink()
    assert "2026-11-20 (exported, but not to be read" in refused()
    assert len(ids(database, exposures.c.exposure_id)) == 16
    assert go(database).exposures == 11


def test_shadow_arms_need_no_export(database: Database, tmp_path: Path) -> None:
    table, row = shown("r", 1)
    database.insert([(table, {**row, "served": False, "arm": "deep"})])
    assert go(database, tmp_path).exposures == 1


def test_exposures_that_may_still_get_events_stay(database: Database) -> None:
    database.insert(three_days())
    now = DAY + timedelta(hours=71)
    with pytest.raises(DataError, match=r"24 hours after an exposure still count.*prune before 2026-11-21"):
        go(database, now=now)
    assert go(database, now=now, before=CUT - timedelta(days=1)).exposures == 5
    assert go(database, now=now, window=timedelta(hours=23)).exposures == 5


@pytest.mark.parametrize("paused", [False, True])
def test_what_a_running_experiment_rests_on_stays(database: Database, paused: bool) -> None:
    for hours, arm in ((10, "open"), (34, "gated"), (58, "open")):
        database.insert(in_experiment(shown(f"r{hours}", hours, unit=arm), arm))
        database.insert([event(hours + 1, request_id=f"r{hours}", candidate=0)])
    put_experiment(database, "gates", 30)
    kept = Experiments(database)
    kept.refresh()
    if paused:
        kept.pause("gates", "gated", "wrong prices")
    with pytest.raises(DataError, match=r"'gates'.* from 2026-11-21 06:00 UTC on, still runs.*before 2026-11-21"):
        go(database)
    before = analyse(database, kept, "gates", at=LATER)
    assert go(database, before=CUT - timedelta(days=1)).exposures == 1
    # What went was from before its results begin: they are the same.
    same = analyse(database, kept, "gates", at=LATER)
    assert same.model_copy(update={"seconds": before.seconds}) == before and not same.problems
    assert go(database, despite_experiments=True).exposures == 1
    (problem,) = [p for p in analyse(database, kept, "gates", at=LATER).problems if "REMOVED" in p]
    assert "BEFORE 2026-11-22" in problem


def test_experiments_that_are_over_are_named_and_those_to_come_are_not(database: Database) -> None:
    database.insert(in_experiment(shown("r", 1), "open", "old"))
    put_experiment(database, "old", 0, ends=(DAY + timedelta(hours=5)).isoformat())
    put_experiment(database, "next", 0, starts=(LATER + timedelta(days=5)).isoformat())
    assert (planned(database).ended, planned(database).obstacles) == (["old"], [])
    database.insert([(EXPERIMENTS, {"name": "newer", "version": 1, "body": '{"name": "?"}', "created": 0})])
    assert "'newer' can't be read" in planned(database).obstacles[0][0]


def test_results_of_an_experiment_are_the_same_after_others_went(database: Database) -> None:
    rng, rows = np.random.default_rng(0), []
    for i in range(200):
        name, hours = ("old", rng.uniform(0, 48)) if i % 2 else ("new", rng.uniform(48.01, 72))
        exposed = in_experiment(shown(f"r{i}", hours, unit=f"u{i % 37}"), ("open", "gated")[i % 37 % 2], name)
        rows += [
            *exposed,
            *(event(hours + rng.uniform(-0.05, 20), request_id=f"r{i}", candidate=c) for c in (0, 1)),
        ]
        rows += [event(hours + rng.uniform(0, 30), "conversion", unit=f"u{i % 37}", item="b")]
    database.insert(rows)
    put_experiment(database, "new", 48)
    put_experiment(database, "old", 0, ends=(DAY + timedelta(hours=48)).isoformat())
    kept = Experiments(database)
    kept.refresh()
    before = analyse(database, kept, "new", at=LATER)
    assert before.arms[0].clicks and before.arms[1].conversions and before.arms[0].off_policy_ctr.value
    assert go(database).exposures == 100
    after = analyse(database, kept, "new", at=LATER)
    assert after.model_copy(update={"seconds": before.seconds}) == before


class Killed(Exception):
    """Somebody ended the process."""


def test_one_that_is_killed_leaves_no_half_and_goes_on(database: Database, tmp_path: Path) -> None:
    database.insert(three_days(40))
    export(database, tmp_path, now=LATER)
    whole = {path: path.read_bytes() for path in tmp_path.rglob("*.parquet")}
    left = []

    def killed(_: float) -> None:
        raise Killed

    while True:
        what = planned(database, tmp_path)
        try:
            prune(database, what, pause=killed)
        except Killed:
            left.append(len(ids(database, exposures.c.exposure_id)))
            assert halves(database) == 0
            # Who exports in between keeps what he had.
            export(database, tmp_path, now=LATER, again=True)
            assert {path: path.read_bytes() for path in whole if "22" not in path.parent.name} == {
                path: content for path, content in whole.items() if "22" not in path.parent.name
            }
            if len(left) > 50:
                raise AssertionError(left) from None
        else:
            break
    assert left[0] > left[-1] == 40
    assert ids(database, exposures.c.request_id) == sorted(f"2-{i}" for i in range(40))
    assert ids(database, events.c.request_id) == sorted(f"2-{i}" for i in range(40))


def test_events_that_come_for_what_is_gone_are_kept_count_nowhere_and_go_with_the_next(
    database: Database, tmp_path: Path
) -> None:
    rows = three_days()
    database.insert(rows)
    export(database, tmp_path, now=LATER)
    go(database, tmp_path)
    whole = frame(tmp_path)
    again = next(row for row in rows if row[0] == EVENTS)  # and one that nobody saw yet
    database.insert([again, event(1, "conversion", request_id="0-0", candidate=1)])
    export(database, tmp_path, now=LATER)
    assert_frame_equal(frame(tmp_path), whole)
    assert go(database, tmp_path).events == 2


def test_rows_that_come_for_days_that_are_gone_are_told(
    database: Database, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    database.insert(three_days())
    export(database, tmp_path, now=LATER)
    go(database, tmp_path)
    database.insert([shown("spooled", 3)])
    assert export(database, tmp_path, now=LATER, again=True)[0].day == "2026-11-22"
    assert "exposures of 2026-11-20 were pruned; 1 that are there are not exported" in caplog.text
    with pytest.raises(DataError, match="exposures of 2026-11-20 were pruned"):
        export(database, tmp_path, now=LATER, days=[FIRST])
    with pytest.raises(DataError, match="exported without 1 of its exposures"):
        go(database, tmp_path)
    assert go(database).exposures == 1


def test_rows_without_an_exposure_go_too(database: Database) -> None:
    row = {"experiment": "gates", "unit": "u", "arm": "open", "request_id": "r", "shown": 1}
    database.insert([(ASSIGNMENTS, {**row, "time": micros(h), "exposure_id": f"x{h}"}) for h in (1, 50)])
    assert go(database).assignments == 1
    assert ids(database, assignments.c.exposure_id) == ["x50"]


def test_a_writer_goes_on_meanwhile(events_url: str, tmp_path: Path) -> None:
    database = Database(events_url, lock_seconds=10)
    database.create()
    database.insert(three_days(600))
    written, going = [], threading.Event()
    with EventStore(Database(events_url), tmp_path / "spool") as store:

        def write() -> None:
            while not going.is_set():
                store.submit([shown(f"now-{len(written)}", 60)]).result()
                written.append(1)

        thread = threading.Thread(target=write)
        thread.start()
        done = prune(database, planned(database))
        going.set()
        thread.join()
        assert (store.status.spooled, store.status.lost) == (0, 0)
    assert done.exposures == 1200 and len(written) > 1
    assert len(ids(database, exposures.c.exposure_id)) == 600 + len(written)


def test_sqlite_gives_the_space_back(tmp_path: Path) -> None:
    path = tmp_path / "events.db"
    database = Database(f"sqlite:///{path}")
    database.create()
    database.insert([shown(f"r{i}", 1, "ab" * 100) for i in range(300)])
    database.close()
    before = path.stat().st_size
    done = go(database)
    database.close()
    assert done.spare_bytes == 0 and path.stat().st_size <= before - done.freed_bytes < 0.1 * before


def test_a_file_made_before_keeps_its_size_and_uses_it_again(tmp_path: Path) -> None:
    path = tmp_path / "events.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE other (x)")
    database = Database(f"sqlite:///{path}")
    database.create()
    rows = [shown(f"r{i}", 1, "ab" * 100) for i in range(300)]
    database.insert(rows)
    database.close()
    size = path.stat().st_size
    done = go(database)
    assert done.freed_bytes == 0 and done.spare_bytes > 0.5 * size
    database.insert(rows)
    database.close()
    assert path.stat().st_size == pytest.approx(size, rel=0.1)


@pytest.fixture
def run(database: Database, tmp_path: Path) -> Callable[..., Any]:
    def run(*words: str) -> Any:
        where = ["--events", database.name, "--exported", str(tmp_path / "out"), "--json", str(tmp_path / "told")]
        return CliRunner().invoke(build_app(), ["events", "prune", *where, *words])

    return run


def test_the_command(database: Database, tmp_path: Path, run: Callable[..., Any]) -> None:
    hours = -24 * 3000.0  # an age ago: 2018-09-03
    database.insert([shown("r", hours), event(hours + 1, request_id="r", candidate=0), shown("now", 1)])

    def told() -> Any:
        return json.loads((tmp_path / "told").read_text())

    refused = run("--older-than", "90d", "--dry-run")
    assert isinstance(refused.exception, DataError) and "2018-09-03 (not exported)" in str(refused.exception)
    (day,) = told()["days"]
    assert day == {"day": "2018-09-03", "exposures": 1, "events": 1, "missing": "not exported"}
    assert "lacks 2018-09-03" in told()["obstacles"][0]
    export(database, tmp_path / "out")
    shown_only = run("--before", "2019-01-01", "--dry-run")
    assert shown_only.exit_code == 0 and "2018-09-03" in shown_only.output and told()["obstacles"] == []
    assert len(ids(database, exposures.c.exposure_id)) == 2
    ran = run("--older-than", "12w")
    assert ran.exit_code == 0, ran.output
    assert (told()["exposures"], told()["events"]) == (1, 1)
    assert ids(database, exposures.c.request_id) == ["now"]
    assert "Examples" in run("--help").output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "which days go"),
        (["--older-than", "90d", "--before", "2026-01-01"], "which days go"),
        (["--older-than", "90"], "'90' is no age. write 90d"),
    ],
)
def test_the_command_needs_a_day(run: Callable[..., Any], words: list[str], message: str) -> None:
    told = run(*words)
    assert isinstance(told.exception, ConfigError) and message in str(told.exception)
