from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from ctr_models import FeatureEmbedding, Schema
from ctr_models.errors import ConfigError
from ctr_models.model import ModelSpec
from pipelines.config import RunConfig, parse_config
from pipelines.datasets.base import open_data
from pipelines.features.prepare import EncodedData, prepare
from pipelines.features.spec import FeatureSpec, Vocabulary
from pipelines.release.bundle import Bundle
from pipelines.training import optinter
from pipelines.training.config import TrainConfig
from pipelines.training.distributed import Ranks
from pipelines.training.optimizers import selection_parameters
from pipelines.training.optinter import OptInterOptions, add_crosses, picked_model
from pipelines.training.predict import predict
from pipelines.training.recipes import Context, RecipeConfig, make_recipe, run_recipe
from pipelines.training.trainer import TrainResult, train

USERS, ITEMS = 12, 12
COLUMNS = [
    {"name": "user", "kind": "categorical", "dim": 4},
    {"name": "item", "kind": "categorical", "dim": 4},
    {"name": "hour", "kind": "categorical", "dim": 4},
    {"name": "price", "kind": "numeric", "dim": 4},
]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clicks that are a coin flip for each user and item together: no other pair has anything to tell."""
    random = np.random.default_rng(5)
    rows = 6000
    user, item = random.integers(0, USERS, rows), random.integers(0, ITEMS, rows)
    file = tmp_path_factory.mktemp("log") / "log.parquet"
    pl.DataFrame(
        {
            "click": random.integers(0, 2, (USERS, ITEMS))[user, item],
            "user": [f"u{u}" for u in user],
            "item": item,
            "hour": random.integers(0, 5, rows),
            "price": random.normal(size=rows),
        }
    ).write_parquet(file)
    return file


def make_config(log: Path, workdir: Path, *, columns: Any = (), recipe: Any = None, **model: Any) -> RunConfig:
    settings = {"name": "optinter", "pair_dim": 4, "mlp": {"hidden": [8]}, "embedding_std": 0.01, **model}
    return parse_config(
        {
            "workdir": str(workdir),
            "seed": 3,
            "data": {"source": "parquet", "path": str(log), "split": {"by": "random"}},
            "features": {"label": "click", "columns": [*COLUMNS, *columns]},
            "model": settings,
            "recipe": {"name": "optinter", "options": recipe or {}},
            "train": {
                "epochs": 6,
                "batch_size": 200,
                "optimizer": {"lr": 0.02},
                "embedding": {"backend": "dense", "optimizer": "adam", "lr": 0.02},
                "plateau": None,
            },
            "tracking": {"enabled": False},
        }
    )


def run(config: RunConfig, **more: Any) -> TrainResult:
    data = prepare(
        open_data(config.data), config.features, workdir=config.workdir, seed=config.seed, progress=False
    )
    return train(config, data, run_dir=config.workdir / "run", progress=False, **more)


def crosses(data: EncodedData) -> dict[str, tuple[str, ...]]:
    assert {f.name: f.of for f in data.schema.sparse if f.of} == {c.name: c.of for c in data.state.spec.crosses}
    return {c.name: c.of for c in data.state.spec.crosses}


def test_the_pair_that_decides_is_memorised_and_no_other_cross_is_kept(log: Path, tmp_path: Path) -> None:
    config = make_config(log, tmp_path)
    result = run(config)
    searched = EncodedData.open(next((tmp_path / "run" / "cross" / "features").glob("[0-9a-f]*")))
    assert sorted(crosses(searched).values()) == [("item", "hour"), ("user", "hour"), ("user", "item")]
    assert searched.state.tables["user_x_item"].encoding == Vocabulary(min_count=2)

    report, judged = result.reports
    rows = {row["phase"]: row for row in judged["rows"]}
    assert list(rows) == ["search", "pick", "retrain"]
    assert rows["retrain"]["ece"] == result.metrics["valid_ece"]
    assert rows["pick"]["auc"] > 0.5 + (rows["search"]["auc"] - 0.5) / 2  # what was searched for is still there
    assert rows["pick"]["logloss"] != rows["search"]["logloss"]
    treatment = {row["pair"]: row["treatment"] for row in report["rows"]}
    assert treatment["user x item"] == "memorise"
    assert len(treatment) == 6
    counts = Counter(treatment.values())
    assert report["totals"] == {f"optinter/{t}": counts[t] for t in ("memorise", "factorise", "nothing")}
    row = next(r for r in report["rows"] if r["pair"] == "user x item")
    assert row["combinations"] == 2 + USERS * ITEMS
    assert row["memorise"] > max(row["factorise"], row["nothing"])

    memorised = {tuple(pair.split(" x ")) for pair, one in treatment.items() if one == "memorise"}
    assert set(crosses(result.data).values()) == memorised
    assert result.data.path.is_relative_to(tmp_path / "run")
    model = result.model
    assert {tuple(p) for p in model.config.memorise} == memorised
    tables = {t for m in model.modules() if isinstance(m, FeatureEmbedding) for t in m.table_of}
    assert {t for t in tables if t.startswith("memory_")} == {f"memory_{name}" for name in crosses(result.data)}
    assert result.metrics["test_auc"] > 0.9

    # The bundle holds the crosses that are left, and a request makes them from its parts.
    bundle = Bundle.create(
        tmp_path / "bundle",
        model=model,
        state=result.data.state,
        config=json.loads(config.model_dump_json()),
        metrics=result.metrics,
        golden=pl.read_parquet(log).head(20),
    )
    test = predict(model, result.data, "test")
    rows = pl.read_parquet(log)[pl.Series(test.row)].drop("click")
    np.testing.assert_allclose(bundle.score_frame(rows), test.probability, atol=1e-6)
    scored = bundle.score_request({"user": rows["user"][0]}, {}, rows.drop("user").head(1).to_dicts())
    np.testing.assert_allclose(scored, test.probability[:1], atol=1e-6)


def test_broken_off_it_goes_on_with_the_data_that_it_made(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(log, tmp_path, recipe={"pairs": [["item", "user"]], "search_epochs": 2})
    config = config.model_copy(update={"train": config.train.model_copy(update={"epochs": 3})})

    def broken(self: Any, context: Any) -> Any:
        raise KeyboardInterrupt

    whole = optinter.Retrain.run
    monkeypatch.setattr(optinter.Retrain, "run", broken)
    with pytest.raises(KeyboardInterrupt):
        run(config)
    for done in (optinter.Cross, optinter.Search, optinter.Pick):
        monkeypatch.setattr(done, "run", lambda self, context: pytest.fail("was done already"))
    monkeypatch.setattr(optinter.Retrain, "run", whole)
    result = run(config, resume=True)
    marker = json.loads((tmp_path / "run" / "phases" / "1-search.json").read_text())
    assert len(marker["outputs"]["history"]) == 2
    assert len(result.history) == 3
    assert set(crosses(result.data).values()) <= {("item", "user")}
    assert result.model.schema == result.data.schema


def test_crosses_that_are_given_are_used_and_the_search_may_go_without_noise(log: Path, tmp_path: Path) -> None:
    given = [
        {"name": "both", "kind": "cross", "of": ["item", "user"], "dim": 4},
        {"name": "all_three", "kind": "cross", "of": ["hour", "user", "item"], "dim": 4},
    ]
    gates = {"interaction": "none", "feature": "none"}
    config = make_config(log, tmp_path, columns=given, recipe={"pairs": [], "search_epochs": 1}, gates=gates)
    config = config.model_copy(update={"train": config.train.model_copy(update={"epochs": 1})})
    result = run(config)
    assert not (tmp_path / "run" / "cross").exists()  # nothing was added, so nothing was encoded anew
    assert "all_three" in crosses(result.data)
    treated = {row["pair"]: row["treatment"] for row in result.reports[0]["rows"]}
    assert ("both" in crosses(result.data)) == (treated["user x item"] == "memorise")
    assert list(result.model.gate_specs) == ["field", "feature", "interaction"]


def test_epochs_of_the_search_are_told_apart(log: Path, tmp_path: Path) -> None:
    config = make_config(log, tmp_path, recipe={"pairs": [], "search_epochs": 1})
    config = config.model_copy(update={"train": config.train.model_copy(update={"epochs": 1})})
    data = prepare(open_data(config.data), config.features, workdir=tmp_path, seed=3, progress=False)
    told: list[dict[str, Any]] = []
    me = Ranks(0, 1, torch.device("cpu"))
    context = Context(
        config, data, tmp_path / "run", me, config.model, data.schema, progress=False, on_epoch=told.append
    )
    run_recipe(make_recipe(config.recipe), context)
    search, retrain = told
    assert search["epoch"] == retrain["epoch"] == 1
    assert "search/valid_auc" in search
    assert "search/gate/gate/entropy" in search
    assert "valid_auc" not in search
    assert "valid_auc" in retrain


def test_the_logits_of_the_pairs_have_a_learning_rate_of_their_own(log: Path, tmp_path: Path) -> None:
    shares = {}
    for lr in (1e-6, 0.5):
        config = make_config(log, tmp_path / str(lr), recipe={"search_epochs": 1, "lr": lr})
        config = config.model_copy(update={"train": config.train.model_copy(update={"epochs": 1})})
        report = run(config).reports[0]["rows"]
        shares[lr] = [row[row["treatment"]] for row in report]
    assert max(shares[1e-6]) < 0.51
    assert max(shares[0.5]) > 0.7
    model = ModelSpec.parse("optinter").build(Schema.of({"a": 4, "b": 4}))
    assert list(selection_parameters(model)) == ["logits"]


def test_the_picked_model_has_one_treatment_a_pair() -> None:
    model = ModelSpec.parse(
        {"name": "optinter", "pair_dim": 8, "gates": {"interaction": "softmax", "field": "none"}}
    )
    best = {("a", "b"): "memorise", ("a", "c"): "nothing", ("b", "c"): "factorise"}
    picked = picked_model(model, best)
    assert picked.to_dict() == {
        "name": "optinter",
        "pair_dim": 8,
        "memorise": [["a", "b"]],
        "factorise": [["b", "c"]],
        "gates": {"field": {"name": "none"}},
    }
    assert ModelSpec.parse(picked.to_dict()) == picked


SPEC = FeatureSpec.model_validate(
    {
        "label": "click",
        "columns": [*COLUMNS, {"name": "item_x_hour", "kind": "cross", "of": ["item", "user"]}],
        "keep": ["user_x_hour"],
    }
)


def test_crosses_are_added_for_pairs_that_have_none_under_free_names() -> None:
    added = add_crosses(SPEC, "all", Vocabulary(min_count=3))
    assert {c.name: c.of for c in added} == {
        "user_x_hour_2": ("user", "hour"),
        "item_x_hour_2": ("item", "hour"),
    }
    assert all(c.encoding == Vocabulary(min_count=3) for c in added)
    assert add_crosses(SPEC, [("user", "item")], Vocabulary()) == []
    long = [{"name": letter * 100, "kind": "categorical"} for letter in "abc"]
    names = [c.name for c in add_crosses(FeatureSpec(label="click", columns=long), "all", Vocabulary())]  # type: ignore[arg-type]
    assert len(set(names)) == 3
    assert max(map(len, names)) <= 100


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([("user", "hours")], r"recipe.options.pairs: 'hours' is no categorical column\. did you mean 'hour'"),
        ([("user", "price")], r"recipe.options.pairs: 'price' is no categorical column"),
        ([("user", "user")], r"recipe.options.pairs: the pair \['user', 'user'\] is one column"),
    ],
)
def test_pairs_that_can_not_be_crossed_are_named(pairs: list[tuple[str, str]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        add_crosses(SPEC, pairs, Vocabulary())


def test_models_that_do_not_search_are_refused(log: Path, tmp_path: Path) -> None:
    for model, message in (
        ({"memorise": [], "factorise": [["user", "item"]]}, "treatments of the pairs are given"),
        ({"name": "dnn", "pair_dim": None}, "recipe 'optinter' searches for model 'optinter', not 'dnn'"),
    ):
        config = make_config(log, tmp_path)
        options = {k: v for k, v in {**config.model.to_dict(), **model}.items() if v is not None}
        config = config.model_copy(update={"model": ModelSpec.parse(options)})
        with pytest.raises(ConfigError, match=message):
            run(config)


def test_fused_tables_need_pairs_of_a_dimension_that_they_can_hold(log: Path, tmp_path: Path) -> None:
    config = make_config(log, tmp_path, pair_dim=6, recipe={"pairs": []})
    config = config.model_copy(update={"train": TrainConfig(epochs=1)})
    with pytest.raises(ConfigError, match="the model's table 'factor_.*' has dimension 6; .* multiple of 4"):
        run(config)


def test_options_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"recipe\.options.*serch_epochs"):
        make_recipe(RecipeConfig(name="optinter", options={"serch_epochs": 3}))
    with pytest.raises(ConfigError, match=r"recipe\.options"):
        make_recipe(RecipeConfig(name="optinter", options={"encode": {"how": "standard"}}))
    assert OptInterOptions().pairs == "all"
