"""The click world: reproducible to the byte, with probabilities that mean what they say."""

from __future__ import annotations

import hashlib
import json
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from ctr_models.errors import ConfigError, DataError
from pipelines.datasets.base import RawData, open_data
from pipelines.datasets.click_world import (
    CAMPAIGNS,
    FIRST_DAY,
    SPEC,
    TRUTH,
    WEIGHTS,
    ClickWorldOptions,
    World,
    best_possible,
    day_file,
    world_folder,
    write_day,
    write_world,
)
from pipelines.datasets.click_world_conversions import CONVERSION, CONVERSION_TRUTH
from pipelines.datasets.config import DataConfig
from pipelines.features.files import sha256_tree

SMALL = ClickWorldOptions(rows=3001, users=60, items=50, days=4)


def _open(path: Path | None, **options: object) -> RawData:
    return open_data(DataConfig(source="click_world", path=path, options=options))


@pytest.fixture(scope="module")
def frame() -> pl.DataFrame:
    world = World(ClickWorldOptions(rows=60_000, days=6))
    return pl.concat([world.day(day) for day in range(6)])


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    write_world(SMALL, tmp_path / "a")
    write_world(SMALL, tmp_path / "b")
    assert sha256_tree(tmp_path / "a") == sha256_tree(tmp_path / "b")
    write_world(SMALL.model_copy(update={"seed": 1}), tmp_path / "c")
    one, other = day_file(tmp_path / "a", 0), day_file(tmp_path / "c", 0)
    assert hashlib.sha256(one.read_bytes()).digest() != hashlib.sha256(other.read_bytes()).digest()


def test_a_day_alone_has_the_bytes_it_has_in_the_whole(tmp_path: Path) -> None:
    write_world(SMALL, tmp_path / "whole")
    for day in (2, 0):
        path = write_day(SMALL, tmp_path / "grown", day)
        assert path.read_bytes() == day_file(tmp_path / "whole", day).read_bytes()
    assert _open(tmp_path / "grown").parts["all"].frame.collect()["time"].dt.date().unique().sort().to_list() == [
        FIRST_DAY,
        FIRST_DAY + timedelta(days=2),
    ]


def test_days_dates_and_order(tmp_path: Path) -> None:
    write_world(SMALL, tmp_path / "w")
    rows = _open(tmp_path / "w").parts["all"].frame.collect()
    assert len(rows) == 3001
    assert rows["time"].is_sorted()
    assert rows["time"].dt.date().unique().sort().to_list() == [FIRST_DAY + timedelta(days=d) for d in range(4)]
    by_day = _open(tmp_path / "w", until_day=2)
    by_date = _open(tmp_path / "w", until=date(2026, 1, 2))
    assert by_day.parts["all"].frame.collect().equals(by_date.parts["all"].frame.collect())
    assert by_day.parts["all"].frame.collect().height == 1500
    assert by_day.fingerprint != _open(tmp_path / "w").fingerprint


def test_every_column_of_the_spec_is_there_and_the_truth_is_kept(tmp_path: Path) -> None:
    data = _open(tmp_path / "w", **SMALL.model_dump(exclude_defaults=True))
    assert data.spec is not None
    assert set(data.spec.raw_columns) <= set(data.parts["all"].frame.collect_schema().names())
    assert (data.truth, data.spec.keep) == (TRUTH, (TRUTH,))
    assert all(c.column != TRUTH for c in data.spec.columns)


def test_probabilities_are_calibrated(frame: pl.DataFrame) -> None:
    truth, click = frame[TRUTH].to_numpy(), frame["click"].to_numpy()
    assert abs(truth.mean() - 0.2) < 0.01
    for low, high in ((0, 0.1), (0.1, 0.2), (0.2, 0.4), (0.4, 1.0)):
        inside = (truth >= low) & (truth < high)
        error = np.sqrt((truth[inside] * (1 - truth[inside])).sum()) / inside.sum()
        assert abs(click[inside].mean() - truth[inside].mean()) < 4 * error
    best = best_possible(frame)
    assert 0.78 <= best["auc"] <= 0.83
    entropy = -np.mean(truth * np.log(truth) + (1 - truth) * np.log(1 - truth))
    assert best["logloss"] == pytest.approx(entropy, abs=0.01)


def test_each_term_has_its_weight_and_gated_terms_are_zero_elsewhere() -> None:
    world = World(ClickWorldOptions())
    drawn = world._impressions(world._generator(9), 50_000, 5)
    terms = world._terms(drawn)
    assert list(terms) == list(WEIGHTS)
    for name, term in terms.items():
        assert term.std() * world.click.scale[name] == pytest.approx(WEIGHTS[name], rel=0.2), name
    for name in ("price | segment", "brand | category", "tags | device, channel", "rating | age"):
        assert 0.3 < (terms[name] == 0).mean() < 0.95, name


def test_tastes_drift_unless_told_not_to() -> None:
    def taste(drift: float, day: int) -> np.ndarray:
        world = World(ClickWorldOptions(drift=drift))
        drawn = world._impressions(world._generator(9), 5000, 0)
        drawn["day"][:] = day
        return world._terms(drawn)["taste"]

    assert np.array_equal(taste(0.0, 0), taste(0.0, 13))
    assert np.corrcoef(taste(1.0, 0), taste(1.0, 1))[0, 1] > 0.95
    assert np.corrcoef(taste(1.0, 0), taste(1.0, 13))[0, 1] < 0.6


def test_useless_values_leave_the_probability_alone() -> None:
    world = World(ClickWorldOptions())
    useless = world.useless_values()
    assert useless["campaign"] == list(CAMPAIGNS)
    assert (len(useless["city"]), len(useless["brand"]), len(useless["tags"])) == (54, 60, 20)
    drawn = world._impressions(world._generator(9), 5000, 0)
    before = world.click.spread(world._terms(drawn))
    drawn["campaign"] = drawn["campaign"][::-1]
    assert np.array_equal(world.click.spread(world._terms(drawn)), before)
    worthless = [i for i, brand in enumerate(world.brand) if f"brand-{brand:03d}" in useless["brand"]]
    world.brand[worthless] = int(useless["brand"][0][-3:])
    assert np.array_equal(world.click.spread(world._terms(drawn)), before)


def test_strength_0_leaves_nothing_to_learn() -> None:
    truth = World(SMALL.model_copy(update={"strength": 0.0})).day(0)[TRUTH]
    assert truth.n_unique() == 1
    assert truth[0] == pytest.approx(0.2, abs=1e-3)


def test_without_a_path_it_lies_in_the_work_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = SMALL.model_dump(exclude_defaults=True)
    first = _open(None, **options)
    second = _open(None, **options, until_day=1)
    assert first.parts["all"].path == second.parts["all"].path
    assert first.parts["all"].path.parent == Path("runs/click_world")
    assert len(list(Path("runs/click_world").iterdir())) == 1


@pytest.mark.parametrize("named", [True, False])
def test_a_world_made_for_an_early_day_has_the_later_ones_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    path, options = (tmp_path / "w" if named else None), SMALL.model_dump(exclude_defaults=True)
    days = [_open(path, **options, until_day=n).parts["all"].frame.collect()["time"].dt.date() for n in (1, 3)]
    assert [d.n_unique() for d in days] == [1, 3]


def test_another_world_or_other_files_are_not_touched(tmp_path: Path) -> None:
    write_world(SMALL, tmp_path / "w")
    with pytest.raises(DataError, match=r"world.json: the world there has seed 2026, the config asks for 7"):
        _open(tmp_path / "w", seed=7)
    with pytest.raises(DataError, match=r"world.json: the world there has rows 3001, the config asks for 9999"):
        write_day(ClickWorldOptions(rows=9999), tmp_path / "w", 0)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"mine: there is something, and no world.json"):
        _open(tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"


def test_damage_and_absent_days_are_named(tmp_path: Path) -> None:
    write_day(SMALL, tmp_path / "w", 3)
    with pytest.raises(DataError, match=r"has no day yet that is asked for. ask for 2026-01-01 or a later day"):
        _open(tmp_path / "w", until_day=2)
    with pytest.raises(DataError, match=r"click_world: the world has no 2026-01-05"):
        write_day(SMALL, tmp_path / "w", 4)
    card = tmp_path / "w" / "world.json"
    known = json.loads(card.read_text())
    card.write_text(json.dumps(known | {"version": 0}))
    with pytest.raises(DataError, match=r"was made by version 0 of the world"):
        _open(tmp_path / "w")
    card.write_text("{")
    with pytest.raises(DataError, match=r"world.json: is damaged. delete the folder"):
        _open(tmp_path / "w")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"row": 5}, r"data.options.row: unknown key. did you mean 'rows'"),
        ({"rows": 3}, r"rows must be at least one a day"),
        ({"until_day": 1, "until": "2026-01-01"}, r"until_day and until say the same; give one"),
        ({"click_rate": 2}, r"data.options.click_rate: must be less than 1, got 2"),
    ],
)
def test_options_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _open(None, **options)


def test_the_spec_marks_users_and_items() -> None:
    roles = {c.name: c.role for c in SPEC.columns}
    assert {n for n, r in roles.items() if r == "item"} == {
        "item_id",
        "category",
        "brand",
        "price",
        "rating",
        "tags",
    }
    assert {n for n, r in roles.items() if r == "user"} == {"user_id", "segment", "age", "city", "history"}


CONVERTING = ClickWorldOptions(rows=60_000, days=6, conversion_rate=0.3)


def test_conversions_leave_everything_else_as_it_was(frame: pl.DataFrame) -> None:
    day = World(CONVERTING).day(2)
    assert day.columns == [*frame.columns, CONVERSION, CONVERSION_TRUTH]
    assert day.select(frame.columns).equals(World(CONVERTING.model_copy(update={"conversion_rate": None})).day(2))


def test_a_world_without_conversions_is_known_by_what_it_was() -> None:
    """Its folder and the key of its features hang on this."""
    assert "conversion_rate" not in ClickWorldOptions().world()
    assert "conversion_rate" not in ClickWorldOptions().model_dump_json()
    assert world_folder(ClickWorldOptions()).name == "1f7faa826f75fd89"


def test_a_converting_world_brings_its_task_and_its_truth(tmp_path: Path) -> None:
    data = _open(tmp_path / "w", **SMALL.model_dump(exclude_defaults=True), conversion_rate=0.3)
    assert data.spec is not None
    assert data.spec.tasks == (CONVERSION,)
    assert data.task_truth == {CONVERSION: CONVERSION_TRUTH}
    assert data.fingerprint != _open(tmp_path / "plain", **SMALL.model_dump(exclude_defaults=True)).fingerprint
    with pytest.raises(DataError, match=r"has conversion_rate 0.3, the config asks for 0.2"):
        _open(tmp_path / "w", conversion_rate=0.2)
