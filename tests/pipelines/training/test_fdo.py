"""Recipe fdo: train, principal components of each table, retrain with as many dimensions."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from ctr_models.errors import ConfigError
from ctr_models.model import ModelSpec
from pipelines.config import RunConfig, parse_config
from pipelines.training.checkpoint import read_tensors
from pipelines.training.fdo import (
    choose_dim,
    explained_variance,
    main_tables,
    projected,
    start_projected,
    with_dims,
)
from pipelines.training.loader import Loader
from pipelines.training.predict import predict
from pipelines.training.recipes import RecipeConfig, make_recipe
from pipelines.training.trainer import train
from tests.pipelines.training.breaking import Broken, break_at


def settings(config: RunConfig, model: str = "gdcn", backend: str = "dense", **options) -> RunConfig:
    tree = config.model_dump(mode="json")
    tree["model"] = {"name": model, "embedding_std": 0.1}
    if model == "deepfm":
        tree["model"]["mlp"] = {"hidden": [8]}
    else:
        tree["model"] |= {"form": "cross_only", "cross_layers": 1}
    tree["recipe"] = {"name": "fdo", "options": options}
    tree["train"]["embedding"] = {"backend": backend, "lr": 0.05}
    return parse_config(tree)


def run(config, world, run_dir, *, resume=False):
    return train(config, world, run_dir=run_dir, resume=resume, progress=False)


@pytest.mark.parametrize("rows", [1, 2, 5, 40])
def test_explained_variance_is_that_of_the_singular_values(rows):
    torch.manual_seed(rows)
    table = torch.randn(rows, 6) * torch.tensor([3.0, 1.0, 0.5, 0.1, 0.0, 2.0]) + 10.0
    squares = torch.linalg.svdvals((table - table.mean(0)).double()).square()
    expected = torch.ones(6, dtype=torch.float64)
    if rows > 1:
        shares = squares.cumsum(0) / squares.sum()
        expected[: len(shares)] = shares
    found = explained_variance(table, np.ones(rows, dtype=bool))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_rows_never_seen_don_t_count():
    table = torch.zeros(6, 3)
    table[:2] = torch.randn(2, 3)
    table[2:, 0] = torch.arange(4.0)
    seen = np.array([False, False, True, True, True, True])
    assert choose_dim(explained_variance(table, seen), 1.0) == 1
    assert choose_dim(explained_variance(table, np.ones(6, dtype=bool)), 1.0) > 1
    assert choose_dim(explained_variance(table, np.zeros(6, dtype=bool)), 1.0) == 1


@pytest.mark.parametrize(("keep", "multiple", "expected"), [(0.5, 1, 1), (0.8, 1, 3), (0.5, 4, 4), (0.99, 4, 6)])
def test_the_smallest_dimension_that_explains_enough(keep, multiple, expected):
    explained = torch.tensor([0.6, 0.7, 0.85, 0.9, 0.95, 1.0])
    assert choose_dim(explained, keep, multiple=multiple) == expected


def test_a_model_that_takes_any_dimensions_gets_them(config, history_world, tmp_path):
    result = run(settings(config(epochs=1), keep=0.6), history_world, tmp_path / "run")
    tables = result.model.schema.tables
    assert all(f.rank is None for f in tables.values())
    assert {f.dim for f in tables.values()} != {8}
    assert result.model.schema.dense == history_world.schema.dense
    for table, weight in main_tables(result.model).items():
        assert weight.shape == (tables[table].rows, tables[table].dim)
    history, item = result.model.schema.sequences[0], tables["item"]
    assert (history.dim, history.table) == (item.dim, "item")  # one table, one dimension
    found = predict(result.model, history_world, "test")
    assert np.isfinite(found.probability).all()
    assert result.data is history_world


def test_a_model_that_needs_one_dimension_gets_an_alignment(config, history_world, tmp_path):
    result = run(settings(config(epochs=1), "deepfm", keep=0.6), history_world, tmp_path / "run")
    schema = result.model.schema
    assert {f.dim for f in schema.fields} == {8}
    ranks = {table: f.rank for table, f in schema.tables.items() if f.rank is not None}
    assert ranks
    align = result.model.inputs.embedding.align
    for table, rank in ranks.items():
        assert main_tables(result.model)[table].shape[1] == rank < 8
        assert align.tables[table].weight.shape == (8, rank)
    assert len(align) == len(ranks)
    assert not len(result.model.linear.embedding.align)  # of its own width


def test_fused_tables_have_multiples_of_4(config, world, tmp_path):
    result = run(settings(config(epochs=1), backend="fused", keep=0.3), world, tmp_path / "run")
    assert {f.dim for f in result.model.schema.tables.values()} <= {4, 8}
    aligned = settings(config(epochs=1), "deepfm", backend="fused", keep=0.3, align="always")
    result = run(aligned, world, tmp_path / "aligned")
    assert {f.stored for f in result.model.schema.tables.values()} <= {4, 8}


def test_dimensions_are_reported(config, world, tmp_path):
    result = run(settings(config(epochs=1), keep=0.6), world, tmp_path / "run")
    told, _ = result.reports
    rows = {row["table"]: row for row in told["rows"]}
    for table, f in result.model.schema.tables.items():
        assert (rows[table]["rows"], rows[table]["dim before"], rows[table]["dim after"]) == (f.rows, 8, f.dim)
        assert rows[table]["variance"] >= 0.6
        assert rows[table]["weights after"] == f.rows * f.dim
    total = rows["(all)"]
    assert total["weights after"] == sum(f.rows * f.dim for f in result.model.schema.tables.values())
    assert told["totals"] == {
        "fdo/weights_before": total["weights before"],
        "fdo/weights_after": total["weights after"],
    }


def test_the_valid_rows_are_judged_after_every_phase(config, world, tmp_path):
    result = run(settings(config(epochs=1), "deepfm", keep=0.6), world, tmp_path / "run")
    rows = {row["phase"]: row for row in result.reports[-1]["rows"]}
    markers = [json.loads(m.read_text()) for m in sorted((tmp_path / "run" / "phases").iterdir())]
    model = ModelSpec.parse(settings(config(epochs=1), "deepfm").model).build(world.schema)
    weights = {f"model/{n}": t for n, t in model.state_dict().items()}
    read_tensors(tmp_path / "run" / markers[0]["outputs"]["weights"], weights)
    full = predict(model, world, "valid").metrics()
    for table, weight in main_tables(model).items():
        dim = markers[1]["outputs"]["dims"][table]
        seen = world.state.counts(table) > 0
        rows_seen = weight[torch.from_numpy(seen)]
        mean = rows_seen.mean(0)
        _, _, axes = torch.linalg.svd(rows_seen - mean, full_matrices=False)
        weight.copy_(mean + (weight - mean) @ axes[:dim].T @ axes[:dim])
    cut = predict(model, world, "valid").metrics()
    for name in ("auc", "logloss", "ece"):
        assert rows["full"][name] == pytest.approx(full[name], abs=1e-6)
        assert rows["choose"][name] == pytest.approx(cut[name], abs=1e-4)
        assert rows["retrain"][name] == result.metrics[f"valid_{name}"]
    assert cut["logloss"] != pytest.approx(full["logloss"], abs=1e-5)


def test_all_components_are_the_table_itself():
    table = torch.randn(5, 3)
    torch.testing.assert_close(projected(table, np.ones(5, dtype=bool), 3), table)
    nothing = np.zeros(5, dtype=bool)
    torch.testing.assert_close(projected(table, nothing, 3), table)


@pytest.mark.parametrize("at_step", [3, 15])
def test_broken_off_it_ends_as_the_unbroken(config, world, tmp_path, monkeypatch, at_step):
    """In the first training, and in the second: 12 steps each."""
    chosen = settings(config(epochs=1), keep=0.6)
    whole = run(chosen, world, tmp_path / "whole")
    break_at(at_step, monkeypatch)
    with pytest.raises(Broken):
        run(chosen, world, tmp_path / "broken")
    monkeypatch.undo()
    resumed = run(chosen, world, tmp_path / "broken", resume=True)
    assert resumed.metrics == whole.metrics
    assert resumed.reports == whole.reports
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


def test_alignment_is_a_choice(world):
    dims = {"user": 3, "item": 8, "tags": 1}
    plain, always = (with_dims(ModelSpec.parse("dnn"), world.schema, dims, how) for how in ("auto", "always"))
    assert [f.dim for f in plain.sparse] == [3, 8, 1]
    assert [(f.dim, f.rank) for f in always.sparse] == [(8, 3), (8, None), (8, 1)]
    needed = with_dims(ModelSpec.parse("fm"), world.schema, dims, "auto")
    assert needed == always
    with pytest.raises(ConfigError, match=r"recipe\.options\.align: .*fields of one dimension.*set it to auto"):
        with_dims(ModelSpec.parse("fm"), world.schema, dims, "never")


def test_a_model_without_tables_is_refused_before_any_training(config, world, tmp_path):
    plain = config(epochs=1)
    chosen = plain.model_copy(update={"model": ModelSpec.parse("lr"), "recipe": RecipeConfig(name="fdo")})
    with pytest.raises(ConfigError, match="'lr' has no embedding tables"):
        run(chosen, world, tmp_path / "run")
    assert not (tmp_path / "run" / "full").exists()


def test_it_can_start_from_the_full_model(config, history_world, tmp_path):
    """With all components, the retraining begins with what the full model says."""
    settled = settings(config(epochs=1), keep=1.0, align="always", start="projected")
    schema = history_world.schema
    full = settled.model.build(schema).eval()
    for weight in main_tables(full).values():
        weight[:, 4:] = 0.0  # of rank 4, and of mean zero where it counts
        weight -= weight.mean(0)
    short = with_dims(settled.model, schema, {table: 5 for table in schema.tables}, "always")
    model = settled.model.build(short).eval()
    everyone = {table: np.ones(f.rows) for table, f in schema.tables.items()}
    start_projected(model, full, everyone.__getitem__)
    batch = next(iter(Loader(history_world.files("test"), schema, batch_size=64)))
    torch.testing.assert_close(model(batch), full(batch), rtol=1e-4, atol=1e-5)
    assert all(w.shape[1] == 5 for w in main_tables(model).values())
    with pytest.raises(ConfigError, match="start: projected needs align: always"):
        make_recipe(RecipeConfig(name="fdo", options={"start": "projected"}))
    result = run(settings(config(epochs=1), keep=0.6, align="always", start="projected"), history_world, tmp_path)
    fresh = run(settings(config(epochs=1), keep=0.6, align="always"), history_world, tmp_path / "fresh")
    assert result.history[-1]["train_loss"] < fresh.history[-1]["train_loss"]


def test_options_and_models_are_checked(world):
    with pytest.raises(ConfigError, match=r"recipe\.options\.keep"):
        make_recipe(RecipeConfig(name="fdo", options={"keep": 1.5}))
    with pytest.raises(ConfigError, match="'lr' has no embedding tables"):
        main_tables(ModelSpec.parse("lr").build(world.schema))
