"""Recipe optfs: search, harden, rewind and retrain, remove; broken off anywhere."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import save

from ctr_models.errors import ArtifactError, ConfigError
from ctr_models.layers.selection import FixedSelection
from ctr_models.model import ModelSpec
from pipelines.config import RunConfig, parse_config
from pipelines.datasets.base import RawData, RawPart
from pipelines.datasets.config import SplitConfig
from pipelines.features.prepare import EncodedData, prepare
from pipelines.features.spec import FeatureSpec
from pipelines.release.bundle import Bundle
from pipelines.training.checkpoint import read_tensors
from pipelines.training.distributed import Ranks
from pipelines.training.optfs import Detect, read_masks, searched_model, smaller
from pipelines.training.predict import predict
from pipelines.training.recipes import Context, RecipeConfig, make_recipe
from pipelines.training.trainer import train
from tests.pipelines.training.breaking import Broken, break_at

SPEC = FeatureSpec.model_validate(
    {
        "label": "y",
        "dim": 4,
        "columns": [
            {"name": "user", "kind": "categorical", "role": "user"},
            {"name": "item", "kind": "categorical", "role": "item"},
            {"name": "city", "kind": "categorical", "encode": {"how": "hash", "buckets": 9}},
            {"name": "age", "kind": "numeric", "encode": {"how": "quantile", "buckets": 5}},
            {"name": "price", "kind": "numeric"},
            {"name": "tags", "kind": "multi", "separator": "|"},
            {"name": "seen", "kind": "sequence", "table": "item", "target": "item", "max_length": 4},
        ],
    }
)
ITEMS, LOUD = 24, 8
"""Clicks depend on the first ``LOUD`` items alone."""


def log(seed: int, rows: int) -> pl.DataFrame:
    random = np.random.default_rng(seed)
    item = random.integers(0, ITEMS, rows)
    effect = np.where(item < LOUD, np.where(item % 2, 3.0, -3.0), 0.0)
    names = np.array([f"i{i}" for i in range(ITEMS)])
    return pl.DataFrame(
        {
            "y": (random.random(rows) < 1 / (1 + np.exp(-effect))).astype(int),
            "user": random.integers(0, 12, rows),
            "item": pl.Series(names[item].tolist()).set(pl.Series(random.random(rows) < 0.03), None),
            "city": random.choice(["rome", "oslo", "lima", "bern"], rows),
            "age": random.integers(0, 50, rows).astype(float),
            "price": random.normal(size=rows),
            "tags": random.choice(["x|y", "y", "", "z|x|y"], rows),
            "seen": [random.choice(names, random.integers(0, 4)).tolist() for _ in range(rows)],
        }
    )


def encode(folder: Path, rows: int = 1200) -> EncodedData:
    sizes = {"train": rows, "valid": rows // 4, "test": rows // 4}
    parts = {s: RawPart(log(seed, n).lazy(), folder / s) for seed, (s, n) in enumerate(sizes.items())}
    raw = RawData(parts, SplitConfig(by="given"), None, f"optfs-{rows}")
    return prepare(raw, SPEC, workdir=folder, seed=1, progress=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> EncodedData:
    return encode(tmp_path_factory.mktemp("optfs"))


def settings(workdir: Path, *, model: dict[str, Any] | None = None, **recipe: Any) -> RunConfig:
    gate = {"name": "annealed", "penalty": 5e-3, "sharpness": 50}
    tree = {"name": "deepfm", "embedding_std": 0.1, "mlp": {"hidden": [8], "batch_norm": True}}
    return parse_config(
        {
            "workdir": str(workdir),
            "model": {**tree, "gates": {"selection": gate}, **(model or {})},
            "recipe": {"name": "optfs", "options": {"search_epochs": 5, "lr": 0.02, **recipe}},
            "train": {
                "epochs": 2,
                "batch_size": 100,
                "optimizer": {"lr": 0.01},
                "embedding": {"backend": "dense"},
                "stopping": None,
                "plateau": None,
            },
            "tracking": {"enabled": False},
        }
    )


def run(config: RunConfig, data: EncodedData, run_dir: Path, *, resume: bool = False):
    return train(config, data, run_dir=run_dir, resume=resume, progress=False)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """One run that nothing broke off."""
    folder = tmp_path_factory.mktemp("whole")
    return run(settings(folder), data, folder / "run")


def masked_model(run_dir: Path, data: EncodedData, model: ModelSpec):
    """The model as it was retrained, before anything was removed."""
    plain = ModelSpec(name=model.name, options=model.options).build(data.schema)
    plain.select(FixedSelection(data.schema, read_masks(run_dir)))
    best = sorted((run_dir / "retrain").glob("best-*"))[-1]
    read_tensors(best, {f"model/{n}": t for n, t in plain.state_dict().items()})
    return plain.eval()


def test_the_useful_values_are_kept_and_others_dropped(whole, data):
    masks = read_masks(whole.run_dir)
    values, rows = data.state.tables["item"].known()
    kept = {name for name, row in zip(values, rows, strict=True) if masks["item"][row] > 0}
    assert kept >= {f"i{i}" for i in range(LOUD)}
    assert len(kept) <= LOUD + 2
    scale = 1 / torch.tensor(0.5).sigmoid()
    for mask in masks.values():
        torch.testing.assert_close(mask, scale * (mask != 0))


def test_scores_before_and_after_the_removal_are_equal(whole, data):
    masked = masked_model(whole.run_dir, data, settings(Path()).model)
    for split in ("train", "valid", "test"):
        before, after = predict(masked, data, split), predict(whole.model, whole.data, split)
        np.testing.assert_allclose(after.probability, before.probability, rtol=0, atol=1e-6)
        assert (before.row == after.row).all()
    assert whole.model.selection is None
    assert whole.model.schema == whole.data.schema.model_copy()
    rows = {table: f.rows for table, f in whole.model.schema.tables.items()}
    assert rows["item"] < data.schema.tables["item"].rows
    for table, weight in whole.model.inputs.embedding.tables().items():
        assert weight.shape[0] == rows[table]


def test_dropped_missing_and_unknown_values_each_score_as_under_the_masks(whole, data):
    from pipelines.features.transform import encoded_rows, transform

    masked = masked_model(whole.run_dir, data, settings(Path()).model)
    names = [*(f"i{i}" for i in range(ITEMS)), None, "never seen"]
    raw = log(9, len(names)).with_columns(
        item=pl.Series(names), seen=pl.Series([[n, "i0", "never seen"] for n in names])
    )
    found = []
    for model, state in ((masked, data.state), (whole.model, whole.data.state)):
        rows = encoded_rows(transform(state, raw.lazy(), source="log").collect(), model.schema)
        with torch.no_grad():
            found.append(model(rows.batch()))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-6)


def test_a_bundle_of_the_smaller_features_scores_batch_and_request_alike(whole, tmp_path):
    golden = log(5, 20).drop("y")
    bundle = Bundle.create(
        tmp_path / "bundle",
        model=whole.model,
        state=whole.data.state,
        config={},
        metrics=whole.metrics,
        golden=golden,
    )
    batch, request = bundle.score_frame(golden), bundle.score_request({}, {}, golden.to_dicts())
    np.testing.assert_allclose(batch, request, rtol=0, atol=1e-6)


def test_what_was_dropped_is_reported(whole, data):
    told, _ = whole.reports
    rows = {row["table"]: row for row in told["rows"]}
    assert list(rows) == [*sorted(data.schema.tables), "(all)"]
    masks = read_masks(whole.run_dir)
    for table, f in data.schema.tables.items():
        row, small = rows[table], whole.model.schema.tables[table]
        assert (row["rows before"], row["rows after"]) == (f.rows, small.rows)
        assert row["dropped"] == int((masks[table][2:] == 0).sum())
        assert row["values"] == f.rows - 2
        if row["dropped"]:
            assert small.rows == f.rows - row["dropped"] + 1
    total = rows["(all)"]
    assert total["share dropped"] == pytest.approx(total["dropped"] / total["values"])
    assert told["totals"]["optfs/share_dropped"] == total["share dropped"]


def test_the_valid_rows_are_judged_after_every_phase(whole, data):
    rows = {row["phase"]: row for row in whole.reports[-1]["rows"]}
    assert list(rows) == ["search", "harden", "retrain", "remove"]
    search = json.loads((whole.run_dir / "phases" / "0-search.json").read_text())["outputs"]
    config = settings(Path())
    models = {
        "search": searched_model(config.model).build(data.schema),
        "harden": ModelSpec(name=config.model.name, options=config.model.options).build(data.schema),
    }
    models["harden"].select(FixedSelection(data.schema, read_masks(whole.run_dir)))
    for phase, model in models.items():
        own = {n: t for n, t in model.state_dict().items() if phase == "search" or not n.startswith("selection.")}
        read_tensors(whole.run_dir / search["last"], {f"model/{n}": t for n, t in own.items()})
        found = predict(model, data, "valid").metrics()
        for name in ("auc", "logloss", "ece"):
            assert rows[phase][name] == pytest.approx(found[name], abs=1e-6), (phase, name)
    for name in ("auc", "logloss", "ece"):
        assert rows["remove"][name] == pytest.approx(rows["retrain"][name], abs=1e-5)
        assert rows["retrain"][name] == whole.metrics[f"valid_{name}"]
    assert rows["harden"]["logloss"] != rows["search"]["logloss"]


def test_the_full_model_is_trained_for_comparison_if_asked_for(data, tmp_path):
    config = settings(tmp_path, search_epochs=1, full=True)
    result = run(config, data, tmp_path / "run")
    plain = ModelSpec(name=config.model.name, options=config.model.options)
    alone = run(config.model_copy(update={"recipe": RecipeConfig(), "model": plain}), data, tmp_path / "alone")
    full = result.reports[-1]["rows"][0]
    assert full["phase"] == "full"
    for name in ("auc", "logloss", "ece"):
        assert full[name] == alone.metrics[f"valid_{name}"]
    without = run(settings(tmp_path, search_epochs=1), data, tmp_path / "without")
    assert without.metrics == result.metrics


@pytest.mark.parametrize("epoch", [0, 2])
def test_all_weights_go_back_to_the_start_of_an_epoch(data, tmp_path, monkeypatch, epoch):
    """Every weight of the model, cross layers' biases and statistics included."""
    from pipelines.training.engine import Engine

    config = settings(tmp_path, model={"name": "dcnv2"}, rewind_epoch=epoch, search_epochs=3)
    config = config.model_copy(update={"model": ModelSpec.parse({"name": "dcnv2", "mlp": {"hidden": [8]}})})
    config = config.model_copy(update={"train": config.train.model_copy(update={"epochs": 1})})
    seen: list[dict[str, torch.Tensor]] = []
    step = Engine.step

    def noted(self, batch):
        own = {n: t.clone() for n, t in self.model.state_dict().items() if not n.startswith("selection.")}
        seen.append(own)
        return step(self, batch)

    monkeypatch.setattr(Engine, "step", noted)
    run(config, data, tmp_path / "run")
    expected, found = seen[12 * epoch], seen[3 * 12]  # 12 steps an epoch
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name
    if epoch == 0:
        torch.manual_seed(config.seed)
        assert torch.equal(config.model.build(data.schema).cross.linears[1].weight, found["cross.linears.1.weight"])
    assert not torch.equal(seen[-1]["cross.linears.1.bias"], found["cross.linears.1.bias"])


def test_a_mask_of_0_or_1_without_the_scale(data, tmp_path):
    run(settings(tmp_path, keep_scale=False, search_epochs=1), data, tmp_path / "run")
    for mask in read_masks(tmp_path / "run").values():
        assert set(mask.unique().tolist()) <= {0.0, 1.0}


def test_a_detector_finds_nothing_in_what_was_dropped_and_much_in_what_should_not_have_been(data, tmp_path):
    """Clicks depend on the first items alone, which the search keeps."""
    config = settings(tmp_path, detect=True)
    result = run(config, data, tmp_path / "run")
    rows = {row["phase"]: row for row in result.reports[-1]["rows"]}
    assert list(rows) == ["search", "harden", "retrain", "detect", "remove"]
    assert abs(rows["detect"]["auc"] - 0.5) < 0.08 < rows["retrain"]["auc"] - 0.5
    assert result.metrics["valid_auc"] == rows["retrain"]["auc"]

    masks = {table: torch.zeros_like(mask) for table, mask in read_masks(result.run_dir).items()}
    wrong = tmp_path / "wrong" / "harden" / "masks.safetensors"
    wrong.parent.mkdir(parents=True)
    wrong.write_bytes(save(masks))  # as if everything had been dropped
    plain = ModelSpec(name=config.model.name, options=config.model.options)
    me = Ranks(0, 1, torch.device("cpu"))
    context = Context(config, data, tmp_path / "wrong", me, plain, data.schema, progress=False)
    assert Detect().run(context).outputs["detect"]["valid"]["auc"] > 0.65


@pytest.mark.parametrize("place", ["search", "harden", "retrain", "remove"])
def test_broken_off_in_any_phase_it_ends_as_the_unbroken(whole, data, tmp_path, monkeypatch, place):
    from pipelines.training import optfs

    config = settings(tmp_path)

    def broken(*args, **kwargs):
        raise Broken

    if place in ("search", "retrain"):
        break_at({"search": 30, "retrain": 60 + 15}[place], monkeypatch)
    else:
        monkeypatch.setattr(optfs, {"harden": "atomic_write", "remove": "without_values"}[place], broken)
    with pytest.raises(Broken):
        run(config, data, tmp_path / "run")
    monkeypatch.undo()
    half = tmp_path / "run" / "remove" / ".features.killed.tmp"
    half.mkdir(parents=True)
    assert not (
        tmp_path / "run" / "phases" / f"{['search', 'harden', 'retrain', 'remove'].index(place)}-{place}.json"
    ).exists()
    resumed = run(config, data, tmp_path / "run", resume=True)
    assert resumed.metrics == whole.metrics
    assert resumed.reports == whole.reports
    assert resumed.data.state.hash == whole.data.state.hash
    assert not half.exists()
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


def test_a_finished_run_is_read_back_with_its_smaller_features(whole, data):
    again = run(settings(whole.run_dir.parent), data, whole.run_dir, resume=True)
    assert again.metrics == whole.metrics
    assert again.data.state.hash == whole.data.state.hash != data.state.hash
    assert again.model.schema == whole.model.schema


SCRIPT = """
import sys
sys.path.insert(0, {here!r})
import torch
from pathlib import Path
from test_optfs import encode, run, settings
torch.set_num_threads(1)
folder = Path({folder!r})
run(settings(folder), encode(folder), folder / "run")
"""


def test_killed_between_phases_it_goes_on(whole, tmp_path):
    """SIGKILL as soon as the marker of the decision stands."""
    data = encode(tmp_path)
    script = SCRIPT.format(here=str(Path(__file__).parent), folder=str(tmp_path))
    child = subprocess.Popen([sys.executable, "-W", "ignore", "-c", script], env={**os.environ})
    marker, deadline = tmp_path / "run" / "phases" / "1-harden.json", time.monotonic() + 120
    while not marker.exists():
        assert child.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (tmp_path / "run" / "phases" / "2-retrain.json").exists()
    resumed = run(settings(tmp_path), data, tmp_path / "run", resume=True)
    assert resumed.metrics == whole.metrics
    assert resumed.data.state.hash == whole.data.state.hash


def test_fused_tables_are_searched_too(data, tmp_path):
    config = settings(tmp_path, search_epochs=2)
    changes = {"embedding": config.train.embedding.model_copy(update={"backend": "fused"})}
    config = config.model_copy(update={"train": config.train.model_copy(update=changes)})
    result = run(config, data, tmp_path / "run")
    masked = masked_model(tmp_path / "run", data, config.model)
    before, after = predict(masked, data, "test"), predict(result.model, result.data, "test")
    np.testing.assert_allclose(after.probability, before.probability, rtol=0, atol=1e-6)


def test_the_decay_of_the_tables_leaves_the_logits_alone(data, tmp_path):
    """Without a price, and far from any gradient, a logit stays where it was."""
    from pipelines.training.distributed import Ranks
    from pipelines.training.engine import Engine
    from pipelines.training.loader import Loader

    config = settings(tmp_path)
    embedding = config.train.embedding.model_copy(update={"l2": 10.0})
    optimizer = config.train.optimizer.model_copy(update={"l2": 10.0})
    changes = {"embedding": embedding, "optimizer": optimizer, "selection_lr": 0.125}
    model = searched_model(
        ModelSpec.parse(
            {"name": "dnn", "embedding_std": 0.3, "gates": {"selection": {"name": "annealed", "penalty": 0}}}
        )
    )
    built = model.build(data.schema)
    engine = Engine(built, config.train.model_copy(update=changes), Ranks(0, 1, torch.device("cpu")))
    engine.train()
    batch = next(iter(Loader(data.files("train"), data.schema, batch_size=100)))
    engine.step(batch)
    logits = built.selection.tables()["user"].detach().flatten()
    assert logits[1] == 0.5  # no unknown user in training
    moved = (logits[2:] - 0.5).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 0.125), rtol=0.05, atol=0)  # Adam's first step


def test_a_search_needs_a_gate_and_an_epoch_to_go_back_to(data, tmp_path):
    config = settings(tmp_path, model={"gates": {"selection": "none"}})
    with pytest.raises(ConfigError, match="gate 'none' selects nothing"):
        run(config, data, tmp_path / "none")
    with pytest.raises(ConfigError, match=r"rewind_epoch: the search has no epoch 5, it has 5.*use 0 to 4"):
        run(settings(tmp_path, rewind_epoch=5), data, tmp_path / "late")
    assert searched_model(ModelSpec.parse("fm")).gates["selection"].name == "annealed"
    with pytest.raises(ConfigError, match=r"recipe\.options\.keeep_scale"):
        make_recipe(RecipeConfig(name="optfs", options={"keeep_scale": True}))


def test_a_price_too_high_for_anything_is_said_so(data, tmp_path):
    gate = {"name": "annealed", "penalty": 100.0}
    with pytest.raises(ConfigError, match=r"dropped every feature value.*lower the gate's penalty"):
        run(
            settings(tmp_path, model={"gates": {"selection": gate}}, lr=0.5, search_epochs=1),
            data,
            tmp_path / "run",
        )


def test_missing_or_damaged_masks_are_named(tmp_path):
    with pytest.raises(ArtifactError, match="masks are missing or damaged"):
        read_masks(tmp_path)
    (tmp_path / "harden").mkdir()
    (tmp_path / "harden" / "masks.safetensors").write_bytes(b"half")
    with pytest.raises(ArtifactError, match=r"masks\.safetensors: the masks are missing or damaged"):
        read_masks(tmp_path)


def test_sizes_of_tables(data):
    rows = {table: f.rows + 1 for table, f in data.schema.tables.items()}
    assert {t: f.rows for t, f in smaller(data.schema, rows).tables.items()} == rows
