from __future__ import annotations

import json

import pytest
import torch
import typer

from ctr_models.errors import ConfigError
from pipelines.benchmarks import train_bench


@pytest.fixture
def tiny(monkeypatch):
    """The same benchmark on a few fields and rows."""
    monkeypatch.setattr(train_bench, "FIELDS", 3)
    monkeypatch.setattr(train_bench, "BATCH", 64)
    tower = {"hidden": [8]}
    models = {"finalmlp": {"mlp1": tower, "mlp2": tower, "heads": 2}, "gdcn": {"mlp": tower, "cross_layers": 1}}
    monkeypatch.setattr(train_bench, "MODELS", models)
    monkeypatch.setattr(train_bench, "VOCABULARIES", {"300k": 300, "4m": 400})
    torch.set_num_threads(1)


def test_every_figure_is_measured(tiny, tmp_path):
    with pytest.raises(typer.Exit):
        train_bench.main(2, 2, 1000, tmp_path / "out.json", ["ratio_floor=1000"], None)
    figures = json.loads((tmp_path / "out.json").read_text())["figures"]
    speeds = {f"rows_per_second_{name}_{size}" for name in ("finalmlp", "gdcn") for size in ("300k", "4m")}
    assert set(figures) == {"ratio_usual_300k", "ratio_usual_4m", "ratio_floor", "loader_share"} | speeds
    assert all(value > 0 for value in figures.values())


def test_a_bar_for_no_figure_is_refused_before_anything_is_measured(monkeypatch):
    monkeypatch.setattr(train_bench, "_World", lambda *_: pytest.fail("it was measured"))
    with pytest.raises(ConfigError, match="no figure 'ratio_flor'. did you mean 'ratio_floor'"):
        train_bench.main(at_least=["ratio_flor=0.75"])


def test_the_usual_loop_is_the_same_model(tiny, tmp_path):
    """One embedding a field gives the logits of the collection, once it holds the same numbers."""
    from ctr_models.batch import Batch
    from pipelines.training.loader import Loader

    world = train_bench._World(tmp_path, 300, 200)
    model = train_bench._model(world, "gdcn")
    batch = next(iter(Loader([world.file], world.schema, batch_size=64)))
    expected = model(batch)
    bags = train_bench._embeddings_a_field(world.schema)
    for field, table in zip(world.schema.sparse, bags.tables, strict=True):
        table.weight.data.copy_(model.inputs.embedding.bags.embedding_bags[field.name].weight)
    model.inputs.embedding.bags = bags
    ids = torch.from_numpy(world.ids[:64].astype("int64"))
    found = model(Batch(batch.dense, ids, batch.sequences, batch.label, batch.group))
    torch.testing.assert_close(found, expected)
