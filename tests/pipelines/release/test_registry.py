"""Bundles are registered as MLflow models, found by name, alias and version, and run as pyfunc."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from ctr_models.errors import ArtifactError, DataError
from pipelines.features.files import sha256_tree
from pipelines.release.bundle import Bundle
from pipelines.release.example import example_bundle, example_log
from pipelines.release.promotion import promote
from pipelines.release.registry import fetch, locate, model_names, of_run, register, releases, resolve
from pipelines.release.store import connect, default_uri, experiment_id


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return example_bundle(tmp_path_factory.mktemp("made") / "bundle")


@pytest.fixture(scope="module")
def uri(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store with two versions of ``clicks``; the second belongs to a run and is champion."""
    uri = default_uri(tmp_path_factory.mktemp("store"))
    client = connect(uri)
    run = client.create_run(experiment_id(client, uri, "clicks"))
    assert register(bundle.directory, "clicks", uri) == 1
    assert register(bundle.directory, "clicks", uri, run.info.run_id, {"run": "2026-01-10"}) == 2
    promote("clicks", 2, tracking_uri=uri)
    return uri


def test_a_version_tells_what_it_is(bundle: Bundle, uri: str) -> None:
    first, second = releases("clicks", uri)
    assert (first.version, first.aliases, first.run_id) == (1, (), "")
    assert (second.version, second.aliases) == (2, ("champion",))
    assert second.run_id
    assert second.metrics == bundle.metrics
    assert second.gates == bundle.gates
    assert second.bundle_hash == bundle.hash
    assert second.model == "finalmlp"
    assert model_names(uri) == ["clicks"]


def test_a_version_is_found_by_the_name_of_its_run(uri: str) -> None:
    found = of_run("clicks", "2026-01-10", uri)
    assert found is not None
    assert found.version == 2
    assert of_run("clicks", "2026-01-11", uri) is None
    assert of_run("clocks", "2026-01-10", uri) is None


def test_the_bundle_comes_back_byte_for_byte(bundle: Bundle, uri: str) -> None:
    assert locate("models:/clicks@champion", uri).version == 2
    folder = resolve("models:/clicks@champion", uri)
    assert sha256_tree(folder) == sha256_tree(bundle.directory)
    assert resolve("models:/clicks/1", uri) != folder
    assert resolve(str(bundle.directory), uri) == bundle.directory


def test_a_remote_bundle_is_fetched_once(
    bundle: Bundle, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.release.registry._local_path", lambda source: None)
    release = locate("models:/clicks/2", uri)
    folder = fetch(release, uri, cache=tmp_path)
    assert tmp_path in folder.parents
    assert sha256_tree(folder) == sha256_tree(bundle.directory)
    monkeypatch.setattr("mlflow.artifacts.download_artifacts", None)
    assert fetch(release, uri, cache=tmp_path) == folder


def test_mlflow_runs_it_without_knowing_sluice(bundle: Bundle, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    log = example_log(40, seed=4)
    model = mlflow.pyfunc.load_model(str(resolve("models:/clicks@champion", uri).parents[1]))
    expected = bundle.score_frame(log)
    rows = log.drop("click").to_pandas()
    np.testing.assert_allclose(model.predict(rows), expected, atol=1e-6)
    without = model.predict(rows.drop(columns=["price"]))
    np.testing.assert_allclose(
        without, bundle.score_frame(log.with_columns(price=pl.lit(None, pl.Float64))), atol=1e-6
    )
    own = model.unwrap_python_model()
    gaps = log.with_columns(hour=pl.Series([None, *log["hour"][1:]], dtype=pl.Int64)).to_pandas()
    assert gaps["hour"].dtype == float
    np.testing.assert_allclose(own.predict(None, gaps)[1:], expected[1:], atol=1e-6)
    gaps.loc[0, "hour"] = 1.5
    with pytest.raises(DataError, match="column hour: expected an integer, found 1.5"):
        own.predict(None, gaps)
    names = [column.name for column in model.metadata.signature.inputs]
    assert names == list(bundle.state.spec.request_columns)
    assert model.metadata.saved_input_example_info is not None


def test_nothing_registered_is_pickled(uri: str) -> None:
    root = resolve("models:/clicks@champion", uri).parents[1]
    assert {p.suffix for p in root.rglob("*") if p.is_file()}.isdisjoint({".pkl", ".pickle", ".pt", ".bin"})


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("models:/clocks@champion", "no registered model 'clocks'. did you mean 'clicks'?"),
        ("models:/clicks@champoin", "model 'clicks' has no alias 'champoin'. did you mean 'champion'?"),
        ("models:/clicks/7", "model 'clicks' has no version 7. versions: 1, 2."),
        ("models:/clicks", "models:/clicks: not a model's URI. write models:/name@alias"),
        ("models:/clicks@champion/x", "not a model's URI"),
    ],
)
def test_what_is_not_there_is_named(uri: str, model: str, message: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        resolve(model, uri)
    assert message in str(caught.value)


def test_a_damaged_bundle_is_not_registered(tmp_path: Path, uri: str) -> None:
    bundle = example_bundle(tmp_path / "bundle")
    with open(bundle.directory / "config.yaml", "a") as file:
        file.write("\n")
    with pytest.raises(ArtifactError, match=r"config\.yaml: SHA-256"):
        register(bundle.directory, "damaged", uri)
    assert "damaged" not in model_names(uri)


REGISTER = """
import sys
from pathlib import Path
from pipelines.release.registry import register
print(register(Path(sys.argv[1]), "together", sys.argv[2]))
"""


def test_registering_at_once_in_a_new_store_gives_each_its_version_and_says_nothing(
    bundle: Bundle, tmp_path: Path
) -> None:
    uri = default_uri(tmp_path)
    command = [sys.executable, "-c", REGISTER, str(bundle.directory), uri]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for _ in range(3)]
    said = [process.communicate(timeout=300)[0].decode() for process in running]
    assert sorted(said) == ["1\n", "2\n", "3\n"]
