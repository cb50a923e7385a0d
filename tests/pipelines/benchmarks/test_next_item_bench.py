from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import typer
from typer.testing import CliRunner, Result

from pipelines.benchmarks import accuracy_bench, next_item_bench
from pipelines.config import load_config
from pipelines.experiments.trial import Trial

SETTINGS = """
seed: 3
data: {{source: movielens_1m, options: {{task: next_item, dim: 8}}}}
model: {{name: {model}, linear: false, embedding_std: 0.1, encoder: {{name: {encoder}, length: 4}}}}
recipe: {{name: next_item}}
train: {{epochs: 1, batch_size: 16, threads: 1, embedding: {{backend: dense}}, stopping: {{monitor: ndcg_10}}}}
"""


@pytest.fixture
def movies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "movies"
    folder.mkdir()
    rows = [(user, (user + place) % 9, 3, place) for user in range(20) for place in range(6)]
    columns = ["user_id", "movie_id", "rating", "position"]
    pl.DataFrame(rows, schema=columns, orient="row").write_parquet(folder / "ratings.parquet")
    users = {"user_id": range(20), "gender": "F", "age": 1, "occupation": 1, "zip": "1"}
    pl.DataFrame(users).write_parquet(folder / "users.parquet")
    pl.DataFrame({"movie_id": range(9), "genres": "Drama"}).write_parquet(folder / "movies.parquet")
    for model, encoder in (("sasrec", "sasrec"), ("mqsa_ted", "mqsa")):
        path = tmp_path / "published" / next_item_bench.DATASET / f"{model}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(SETTINGS.format(model=model, encoder=encoder))
    monkeypatch.setattr(accuracy_bench, "PUBLISHED", tmp_path / "published")
    return folder


def bench(*arguments: object) -> Result:
    app = typer.Typer()
    app.command()(next_item_bench.main)
    return CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "200"})


def test_each_training_is_made_once_and_held_against_the_bars(movies: Path, tmp_path: Path) -> None:
    given = ["--data", movies, "--seeds", 1, "--workdir", tmp_path / "runs", "--json", "-"]
    first = bench(*given, "--at-most", "ndcg_10_sasrec=1")
    assert first.exit_code == 0, first.output
    figures = json.loads(first.stdout)["figures"]
    assert figures["ndcg_10_difference"] == pytest.approx(figures["ndcg_10_mqsa_ted"] - figures["ndcg_10_sasrec"])
    stamps = [p.stat().st_mtime_ns for p in sorted((tmp_path / "runs").rglob("result.json"))]
    again = bench(*given, "--at-least", "hr_5_sasrec=2")
    assert again.exit_code == 1
    assert "missed: hr_5_sasrec is" in again.stderr
    assert json.loads(again.stdout)["figures"] == figures
    assert [p.stat().st_mtime_ns for p in sorted((tmp_path / "runs").rglob("result.json"))] == stamps


def test_the_difference_is_that_of_the_same_users() -> None:
    """Ranks that are better by one for all users: the interval leaves out zero, however unlike the users are."""
    rng = np.random.default_rng(0)

    def trial(ranks: np.ndarray) -> Trial:
        test = pl.DataFrame({"row": range(400), "user": range(400), "rank": ranks})
        history = [{"epoch": 1, "valid_ndcg_10": 0.1, "evaluation_seconds": 1.0, "rows_per_second": 400.0}]
        return Trial(test, {}, history, 400.0, 10, {}, True)

    ranks = [rng.integers(2, 10, 400) for _ in range(2)]
    trials = {"sasrec": [trial(r) for r in ranks], "mqsa_ted": [trial(r - 1) for r in ranks]}
    found = next_item_bench.report(trials, 2)
    gain = np.mean([(1 / np.log2(r) - 1 / np.log2(r + 1)).mean() for r in ranks])
    assert found.figures["ndcg_10_difference"] == pytest.approx(gain)
    assert 0 < found.figures["ndcg_10_low"] < gain < found.figures["ndcg_10_high"]
    assert found.figures["hr_20_difference"] == 0
    assert [row[-1] for row in found.rows if row[0] in ("HR@20", "NDCG@10")] == ["noise", "better"]
    assert found.figures["minutes_sasrec"] == pytest.approx(2 / 60)


def test_both_models_have_one_budget() -> None:
    both = [
        load_config(accuracy_bench.PUBLISHED / next_item_bench.DATASET / f"{m}.yaml")
        for m in ("sasrec", "mqsa_ted")
    ]
    assert both[0].train == both[1].train
    assert both[0].data == both[1].data
    encoders = [c.model.options["encoder"] for c in both]
    shared = ("blocks", "heads", "dropout", "length")
    assert {k: encoders[0][k] for k in shared} == {k: encoders[1][k] for k in shared}
