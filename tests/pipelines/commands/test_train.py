from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ctr_models.errors import ArtifactError, ConfigError
from pipelines.cli import build_app
from pipelines.config import parse_config
from pipelines.release.bundle import Bundle

CONFIG = """
name: tiny
workdir: {workdir}
data: {{source: click_world, options: {{rows: 3000, users: 50, items: 40}}}}
model: {{name: finalmlp, mlp1: {{hidden: [8]}}, mlp2: {{hidden: [8]}}, heads: 2}}
train: {{epochs: 2, batch_size: 200, threads: 1, slices: [device]}}
tracking: {{system_metrics: false}}
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration whose features are encoded once for all tests here."""
    folder = tmp_path_factory.mktemp("train")
    path = folder / "ctr.yaml"
    path.write_text(CONFIG.format(workdir=folder / "work"))
    return path


def sluice(*arguments: object):
    return CliRunner().invoke(build_app(), ["train", *map(str, arguments)], catch_exceptions=False)


@pytest.fixture(scope="module")
def trained(file):
    """One run, by name, and what it printed and wrote."""
    out = file.parent / "result.json"
    done = sluice("-c", file, "--run", "monday", "--json", out)
    assert done.exit_code == 0, done.output
    return json.loads(out.read_text()), done.output


def test_from_raw_logs_to_a_registered_version(trained, file):
    result, output = trained
    assert result["version"] == 1
    assert {"valid_auc", "test_auc", "test_logloss", "test_ne", "test_ece"} <= set(result["metrics"])
    assert result["run_dir"] == str(file.parent / "work" / "runs" / "monday")
    assert "models:/tiny/1" in output
    assert "training rows/s" in output


def test_the_best_possible_stands_beside(trained):
    result, output = trained
    best = result["best_possible"]
    assert best["test_auc"] > result["metrics"]["test_auc"]
    assert best["test_logloss"] < result["metrics"]["test_logloss"]
    assert f"{best['test_auc']:.5f}" in output


def test_metrics_by_the_values_of_a_column(trained):
    result, output = trained
    slices = result["slices"]["device"]
    assert {s["value"] for s in slices} <= {"phone", "tablet", "desktop", "tv"}
    assert sum(s["rows"] for s in slices) <= 300
    assert all(0 < s["logloss"] < 2 for s in slices)
    assert "test rows by device" in output


def test_the_bundle_scores_its_golden_rows(trained):
    result, _ = trained
    bundle = Bundle.load(Path(result["bundle"]))  # replays them
    assert len(bundle.golden) == 64
    assert bundle.metrics == pytest.approx(result["metrics"])
    assert bundle.config["name"] == "tiny"
    assert bundle.reference is not None
    assert set(bundle.reference.fields) == {f.name for f in bundle.state.schema().fields}
    assert sum(bundle.reference.scores.shares) == pytest.approx(1)


def test_a_repeated_job_neither_trains_nor_registers_again(trained, file):
    result, _ = trained
    again = sluice("-c", file, "--run", "monday", "--json", "-")
    found = json.loads(again.stdout)
    assert found["metrics"] == result["metrics"]
    assert found["version"] == result["version"]


def test_a_run_goes_on_from_its_folder(trained, file):
    result, _ = trained
    done = sluice("--resume", result["run_dir"], "--json", "-")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["metrics"] == result["metrics"]
    assert found["version"] == result["version"]  # a finished run is not registered twice


def test_overrides_reach_the_run(file):
    done = sluice(
        "-c", file, "-o", "model=lr", "-o", "train.epochs=1", "-o", "tracking.enabled=false", "--json", "-"
    )
    found = json.loads(done.stdout)
    assert Path(found["run_dir"]).name.startswith("lr-")
    assert found["version"] is None
    assert found["epochs"] == 1


def test_bad_arguments_are_named(file, tmp_path):
    with pytest.raises(ArtifactError, match="no run to resume here"):
        sluice("--resume", tmp_path)
    with pytest.raises(ConfigError, match="give one of --resume and --run"):
        sluice("--resume", tmp_path, "--run", "monday")
    with pytest.raises(ConfigError, match=r"train\.epoch: unknown key\. did you mean 'epochs'"):
        sluice("-c", file, "-o", "train.epoch=3")
    with pytest.raises(ConfigError, match=r"train\.slices: 'devise' is no categorical .* did you mean 'device'"):
        sluice("-c", file, "-o", "train.slices=[devise]")


def test_only_rank_0_opens_the_source_since_that_may_write_it(monkeypatch):
    import pipelines.datasets.base as base
    from pipelines.commands.train import _prepare
    from pipelines.features.prepare import EncodedData

    class Second:
        first = False
        share = staticmethod(lambda value: Path("encoded"))

    monkeypatch.setattr(base, "open_data", lambda config: pytest.fail("rank 1 opened the source"))
    monkeypatch.setattr(EncodedData, "open", lambda path: path)
    assert _prepare(parse_config({}), Second()) == (None, Path("encoded"))


@pytest.mark.parametrize("recipe", ["optfs", "fdo"])
def test_a_recipe_that_makes_tables_smaller_from_raw_logs_to_scores(file, tmp_path, recipe):
    import polars as pl

    from pipelines.config import load_config
    from pipelines.datasets.base import open_data
    from pipelines.features.prepare import EncodedData
    from pipelines.training.predict import predict

    changes = ["tracking.enabled=false", "model={name: fm, embedding_std: 0.05}", f"recipe.name={recipe}"]
    changes += ["train.embedding.backend=dense", "train.epochs=1"]
    if recipe == "optfs":
        gate = "{name: annealed, penalty: 0.002, sharpness: 50}"
        changes += [f"model.gates.selection={gate}", "recipe.options={search_epochs: 2, lr: 0.05}"]
    out = tmp_path / "result.json"
    done = sluice("-c", file, *(x for c in changes for x in ("-o", c)), "--run", recipe, "--json", out)
    assert done.exit_code == 0, done.output
    result = json.loads(out.read_text())
    told, judged = result["reports"]
    assert told["title"] in done.output
    assert judged["title"] in done.output
    assert f"{judged['rows'][-1]['ece']:.4f}" in done.output
    assert f"{told['rows'][-1][told_key(recipe)]:,}" in done.output
    bundle = Bundle.load(Path(result["bundle"]))
    fields = {f.table: (f.rows, f.stored) for f in (*bundle.model.schema.sparse, *bundle.model.schema.sequences)}
    for row in told["rows"][:-1]:
        expected = row["rows after"] if recipe == "optfs" else row["dim after"]
        assert fields[row["table"]][recipe == "fdo"] == expected

    config = load_config(file)
    raw = open_data(config.data).parts["all"].frame.collect()
    (encoded,) = (file.parent / "work" / "features").glob("*/manifest.json")
    data = EncodedData.open(encoded.parent)
    if recipe == "optfs":
        data = EncodedData.open(Path(result["run_dir"]) / "remove" / "features")
    test = predict(bundle.model, data, "test")
    raw.write_parquet(tmp_path / "log.parquet")  # whole: the histories come from it
    scored = CliRunner().invoke(
        build_app(),
        [
            "score",
            "-m",
            result["bundle"],
            "--data",
            str(tmp_path / "log.parquet"),
            "--out",
            str(tmp_path / "out.parquet"),
        ],
        catch_exceptions=False,
    )
    assert scored.exit_code == 0, scored.output
    scores = pl.read_parquet(tmp_path / "out.parquet")["score"].to_numpy()
    assert scores[test.row] == pytest.approx(test.probability, abs=1e-5)


def told_key(recipe: str) -> str:
    return {"optfs": "rows after", "fdo": "weights after"}[recipe]


def test_two_ranks_make_an_ordinary_bundle(file):
    out = file.parent / "two.json"
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "pipelines.cli", "train"]
    command += ["-c", str(file), "-o", "train.sharding.kind=table_wise", "-o", "tracking.enabled=false"]
    done = subprocess.run([*command, "--json", str(out)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    result = json.loads(out.read_text())
    assert Bundle.load(Path(result["bundle"])).metrics == pytest.approx(result["metrics"])
    assert done.stdout.count("training rows/s") == 1  # only rank 0 talks
