from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest

from ctr_models.errors import ConfigError
from ctr_models.next_item import NextItemModel
from pipelines.config import RunConfig, parse_config
from pipelines.datasets.base import open_data
from pipelines.datasets.config import DataConfig
from pipelines.features.prepare import EncodedData, prepare
from pipelines.training.next_item import check_ranking, count_transitions, rank_split, training_transitions
from pipelines.training.trainer import train

MOVIES = 12


@pytest.fixture(scope="module")
def movies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty users; whoever sees a movie sees, mostly, the one with the next number."""
    folder, rng, rows = tmp_path_factory.mktemp("movies"), np.random.default_rng(0), []
    for user in range(60):
        start, length = rng.integers(MOVIES), rng.integers(5, 9)
        rows += [(user, (start + place) % MOVIES, 3, place) for place in range(length)]
    columns = ["user_id", "movie_id", "rating", "position"]
    pl.DataFrame(rows, schema=columns, orient="row").write_parquet(folder / "ratings.parquet")
    users = {"user_id": range(60), "gender": "F", "age": 1, "occupation": 1, "zip": "1"}
    pl.DataFrame(users).write_parquet(folder / "users.parquet")
    pl.DataFrame({"movie_id": range(MOVIES), "genres": "Drama"}).write_parquet(folder / "movies.parquet")
    return folder


@pytest.fixture(scope="module")
def data(movies: Path, tmp_path_factory: pytest.TempPathFactory) -> EncodedData:
    source = DataConfig(source="movielens_1m", path=movies, options={"task": "next_item", "dim": 8})
    return prepare(open_data(source), None, workdir=tmp_path_factory.mktemp("work"), seed=0, progress=False)


def settings(name: str = "mqsa_ted", **changes: object) -> RunConfig:
    tree = {
        "seed": 1,
        "model": {"name": name, "linear": False, "embedding_std": 0.1, "encoder": {"length": 4, "dropout": 0.0}},
        "recipe": {"name": "next_item", "options": {"distillation": {"weight": 0.1}}},
        "train": {
            "epochs": 8,
            "batch_size": 16,
            "optimizer": {"lr": 0.02},
            "embedding": {"backend": "dense"},
            "stopping": {"monitor": "ndcg_10", "patience": 8},
            "threads": 1,
        },
        "tracking": {"enabled": False},
    }
    tree["model"]["encoder"]["name"] = {"mqsa_ted": "mqsa", "sasrec": "sasrec"}.get(name, "sasrec")  # type: ignore[index]
    for path, value in changes.items():
        *keys, last = path.split("__")
        own: dict = tree  # type: ignore[type-arg]
        for key in keys:
            own = own[key]
        own[last] = value
    return parse_config(tree)


def test_it_learns_what_comes_next(data: EncodedData, tmp_path: Path) -> None:
    result = train(settings(), data, run_dir=tmp_path, progress=False)
    assert result.metrics["test_hr_5"] > 0.9  # 5 of about 6 unseen would be by chance; see ndcg
    assert result.metrics["test_ndcg_5"] > 0.9
    assert result.history[0]["valid_ndcg_10"] < result.metrics["valid_ndcg_10"]
    assert {k for k in result.metrics if k.startswith("test")} == {
        f"test_{m}_{k}" for m in ("hr", "ndcg") for k in (5, 10, 20)
    }


def test_a_broken_off_training_goes_on(data: EncodedData, tmp_path: Path) -> None:
    whole = train(settings(train__epochs=3), data, run_dir=tmp_path / "whole", progress=False)
    train(settings(train__epochs=1), data, run_dir=tmp_path / "cut", progress=False)
    (tmp_path / "cut" / "phases" / "0-fit.json").unlink()
    gone_on = train(settings(train__epochs=3), data, run_dir=tmp_path / "cut", resume=True, progress=False)
    assert gone_on.metrics == whole.metrics


def test_ranks_are_among_what_the_whole_history_leaves(data: EncodedData) -> None:
    """Of a history longer than the model's ``length``, what the model doesn't look at is left out too."""
    model = settings().model.build(data.schema)
    assert isinstance(model, NextItemModel)
    found = rank_split(model, data, "test", 7)
    rows = data.frame("test").select("history", "movie_id", "__user__").collect()
    assert rows["history"].list.len().max() > model.encoder.length
    items = model.items().detach().numpy()
    histories = [np.array(h) for h in rows["history"]]
    whole = rank_split(model, data, "test", 500)
    assert (found.rank == whole.rank).all()
    assert (found.user == rows["__user__"].to_numpy()).all()
    for rank, history in zip(found.rank, histories, strict=True):
        assert 1 <= rank <= len(items) - len(history)


def test_transitions_are_counted_within_the_training_rows(data: EncodedData) -> None:
    model = settings().model.build(data.schema)
    assert isinstance(model, NextItemModel)
    expected = np.zeros((len(model.items()),) * 2, dtype=int)
    for history, item in data.frame("train").select("history", "movie_id").collect().rows():
        sequence = [*history, item]
        for t in range(len(sequence)):
            for s in range(t + 1, min(t + 3, len(sequence))):
                expected[sequence[t] - 2, sequence[s] - 2] += 1
    counts = training_transitions(data, model, span=2)
    assert (counts.toarray() == expected).all()
    assert counts.nnz == np.count_nonzero(expected)


def test_what_is_no_item_breaks_a_transition() -> None:
    counts = count_transitions(np.array([0, -1, 1, 2]), np.array([0, 4]), items=3)
    assert counts.toarray().tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 0]]
    assert count_transitions(np.array([0, -1, 1]), np.array([0, 3]), items=3, span=5).toarray()[0, 1] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"name": "dnn"}}, "model.name: 'dnn' does not rank items. one of .'mqsa_ted', 'sasrec'"),
        ({"model__linear": True}, "model.linear: a linear term would stand beside the ranking"),
        ({"train__embedding": {"backend": "fused"}}, "train.embedding.backend: the softmax over all items"),
        ({"train__stopping": {"monitor": "auc"}}, "train.stopping.monitor: recipe next_item has no auc"),
        ({"train__slices": ["movie_id"]}, "train.slices: rankings are not reported by slices"),
    ],
)
def test_what_can_not_rank_is_refused(data: EncodedData, changes: dict[str, object], message: str) -> None:
    config = settings(**changes)
    context = SimpleNamespace(config=config, model=config.model, schema=data.schema, me=SimpleNamespace(world=1))
    with pytest.raises(ConfigError, match=message):
        check_ranking(context)  # type: ignore[arg-type]
