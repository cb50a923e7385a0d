"""A Bundle gives back what went in, proves itself, and refuses to load when anything changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from ctr_models.errors import ArtifactError, DataError
from pipelines.features.files import sha256_tree
from pipelines.release import bundle as module
from pipelines.release.bundle import FORMAT, SCORE, Bundle, _hash
from pipelines.release.example import example_bundle, example_log


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return example_bundle(tmp_path_factory.mktemp("made") / "bundle")


@pytest.fixture
def copy(bundle: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle.directory, tmp_path / "bundle"))


def test_what_is_loaded_scores_as_what_was_made(bundle: Bundle) -> None:
    log = example_log(500, seed=1)
    loaded = Bundle.load(bundle.directory)
    np.testing.assert_array_equal(loaded.score_frame(log), bundle.score_frame(log))
    assert loaded.manifest["features"] == bundle.state.hash
    assert loaded.metrics == {"test_auc": 0.7, "test_logloss": 0.5}
    assert loaded.gates.keys() == loaded.model.gate_specs.keys()
    assert not loaded.model.training


def test_batches_and_requests_score_alike(bundle: Bundle) -> None:
    log = example_log(300, seed=2)
    batch = bundle.score_frame(log, batch_size=64)
    rows = log.drop("click").to_dicts()
    request = bundle.score_request({}, {}, rows)
    np.testing.assert_allclose(request, batch, atol=1e-6)
    one = rows[5]
    user = {k: one[k] for k in ("user_id", "city", "clicked")}
    split = bundle.score_request(user, {"hour": one["hour"]}, [{k: one[k] for k in ("item_id", "price", "tags")}])
    np.testing.assert_allclose(split, batch[5:6], atol=1e-6)


@pytest.mark.parametrize("model", ["finalmlp", "din"])
def test_what_candidates_share_may_be_given_once(model: str, tmp_path: Path) -> None:
    bundle = example_bundle(tmp_path / "bundle", model=model)
    user, *rows = example_log(30, seed=4).drop("click").to_dicts()
    own = [{k: row[k] for k in ("item_id", "price", "tags")} for row in rows]
    found = bundle.score_request({k: user[k] for k in ("user_id", "city", "clicked")}, {"hour": user["hour"]}, own)
    np.testing.assert_allclose(found, bundle.score_request({}, {}, [{**user, **one} for one in own]), atol=1e-6)


def test_scores_depend_on_every_column(bundle: Bundle) -> None:
    row = example_log(50, seed=3).drop("click").filter(pl.col("price").is_not_null()).to_dicts()[0]
    base = bundle.score_request({}, {}, [row | {"clicked": ["item-1"], "tags": ["new"], "city": "Graz"}])
    for column in row:
        changed = row | {"clicked": ["item-1"], "tags": ["new"], "city": "Graz"} | {column: None}
        assert bundle.score_request({}, {}, [changed]) != base, column


def test_no_rows_give_no_scores(bundle: Bundle) -> None:
    assert bundle.score_frame(example_log(3).head(0)).shape == (0,)
    assert bundle.model.shares
    assert bundle.score_request({"user_id": 1}, {}, []).shape == (0,)


def test_the_same_inputs_give_the_same_bytes(bundle: Bundle, tmp_path: Path) -> None:
    again = example_bundle(tmp_path / "again")
    assert sha256_tree(again.directory) == sha256_tree(bundle.directory)
    assert again.hash == bundle.hash
    other = example_bundle(tmp_path / "other", seed=1)
    assert other.hash != bundle.hash


def test_nothing_is_pickled(bundle: Bundle) -> None:
    suffixes = {Path(name).suffix for name in sha256_tree(bundle.directory)}
    assert suffixes <= {".safetensors", ".json", ".yaml", ".parquet"}
    for path in bundle.directory.rglob("*"):
        assert path.is_dir() or not path.read_bytes().startswith(b"\x80")


def test_creating_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    made = example_bundle(tmp_path / "a")
    model = made.model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    Bundle.create(tmp_path / "b", model=model, state=made.state, config={}, metrics={}, golden=example_log(4))
    assert model.training
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


def test_a_bundle_of_weights_that_diverged_is_not_made(bundle: Bundle, tmp_path: Path) -> None:
    model = Bundle.load(bundle.directory).model
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(DataError, match=r"golden row 0: the model scores nan\. the weights have diverged"):
        Bundle.create(tmp_path / "b", model=model, state=bundle.state, config={}, metrics={}, golden=example_log(4))
    assert list(tmp_path.iterdir()) == []


def test_an_older_bundle_stays_until_the_new_one_has_proved_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = example_bundle(tmp_path / "b")
    golden = str(tmp_path / "b" / "golden.parquet")

    def unproved(self: Bundle) -> None:
        raise ArtifactError("expected another score", where=f"{self.directory / 'golden.parquet'}: row 0")

    monkeypatch.setattr(Bundle, "_replay", unproved)
    with pytest.raises(ArtifactError) as caught:
        example_bundle(tmp_path / "b", seed=1)
    assert str(caught.value).startswith(f"{golden}: row 0: expected another score")
    monkeypatch.undo()
    assert Bundle.load(tmp_path / "b").hash == old.hash


def test_decimals_score_alike_as_batch_and_request(tmp_path: Path) -> None:
    made = example_bundle(tmp_path / "made")
    log = example_log(8).with_columns(pl.col("price").cast(pl.Decimal(12, 2)))
    options = {"state": made.state, "config": {}, "metrics": {}, "golden": log}
    bundle = Bundle.create(tmp_path / "b", model=made.model, **options)  # replays both ways
    np.testing.assert_allclose(bundle.score_frame(log), bundle.score_frame(example_log(8)), atol=1e-6)


def test_a_bundle_needs_golden_rows(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a bundle needs at least one golden row"):
        Bundle.create(
            tmp_path / "b", model=bundle.model, state=bundle.state, config={}, metrics={}, golden=example_log(0)
        )
    assert list(tmp_path.iterdir()) == []


def test_every_changed_byte_is_found(bundle: Bundle, copy: Path) -> None:
    for name in sha256_tree(copy):
        path = copy / name
        good = path.read_bytes()
        at = len(good) // 2
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        with pytest.raises(ArtifactError, match=path.name.replace(".", r"\.")):
            Bundle.load(copy)
        path.write_bytes(good)
    assert Bundle.load(copy).hash == bundle.hash


def _edit_manifest(folder: Path, change: Callable[[dict], None]) -> None:
    """Change the manifest as somebody would who also knows how to seal it."""
    path = folder / "bundle.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    manifest["hash"] = _hash(manifest)
    path.write_text(json.dumps(manifest))


def _other_weights(folder: Path) -> None:
    example_bundle(folder.parent / "other", seed=9)
    shutil.copy(folder.parent / "other" / "weights.safetensors", folder)
    _reseal(folder)


def _reseal(folder: Path) -> None:
    files = {k: v for k, v in sha256_tree(folder).items() if k != "bundle.json"}
    _edit_manifest(folder, lambda m: m.update(files=files))


def _golden(folder: Path) -> None:
    rows = pl.read_parquet(folder / "golden.parquet")
    rows.with_columns(pl.col(SCORE) + 2e-5).write_parquet(folder / "golden.parquet")
    _reseal(folder)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, r"bundle: no such folder\. a bundle is a folder with bundle\.json"),
    "no manifest": (lambda f: (f / "bundle.json").unlink(), r"bundle\.json: no bundle here"),
    "no JSON": (lambda f: (f / "bundle.json").write_text("{"), r"bundle\.json: not a bundle's manifest"),
    "other JSON": (lambda f: (f / "bundle.json").write_text("[]"), r"bundle\.json: not a bundle's manifest"),
    "no weights": (
        lambda f: (f / "weights.safetensors").unlink(),
        r"weights\.safetensors: the file is missing\. copy the bundle again",
    ),
    "no features": (lambda f: shutil.rmtree(f / "features"), "the file is missing"),
    "cut off": (
        lambda f: (f / "golden.parquet").write_bytes((f / "golden.parquet").read_bytes()[:100]),
        r"golden\.parquet: SHA-256 expected [0-9a-f]{16}, found [0-9a-f]{16}\. copy the bundle again",
    ),
    "future format": (
        lambda f: _edit_manifest(f, lambda m: m.update(format=FORMAT + 1)),
        rf"format {FORMAT + 1}, this version of sluice reads {FORMAT}\. install sluice",
    ),
    "changed metric": (
        lambda f: (f / "bundle.json").write_text(
            (f / "bundle.json").read_text().replace('"test_auc": 0.7', '"test_auc": 0.9')
        ),
        r"bundle\.json: hash expected [0-9a-f]{16}, found",
    ),
    "unknown model": (
        lambda f: _edit_manifest(f, lambda m: m["model"].update(name="finalmpl")),
        r"can't build the model: .*unknown model 'finalmpl'\. did you mean 'finalmlp'",
    ),
    "a schema of a later version": (
        lambda f: _edit_manifest(f, lambda m: m["schema"].update(later=1)),
        r"can't build the model: .*later.*or the version of sluice that wrote it",
    ),
    "other gate hash": (
        lambda f: _edit_manifest(f, lambda m: m["gates"]["feature"].update(hash="0" * 12)),
        r"hash of gate 'sigmoid2' in slot 'feature' expected 0{12}, found [0-9a-f]{12}\. install the version",
    ),
    "other features": (
        lambda f: _edit_manifest(f, lambda m: m.update(features="0" * 64)),
        r"features hash expected 0{16}, found",
    ),
    "other schema": (
        lambda f: _edit_manifest(f, lambda m: m["schema"]["sparse"].pop()),
        "the model reads .*, the features give",
    ),
    "other sizes": (
        lambda f: _edit_manifest(f, lambda m: m["model"]["mlp1"].update(hidden=[10])),
        r"weights\.safetensors: weights don't fit the model",
    ),
    "other weights": (
        _other_weights,
        r"golden\.parquet: row 0: expected score 0\.\d+, found 0\.\d+ \(scored as a batch",
    ),
    "other scores": (_golden, r"golden\.parquet: row \d+: expected score"),
    "other library": (
        lambda f: (_golden(f), _edit_manifest(f, lambda m: m["libraries"].update(torch="1.0"))),
        r"made with torch 1\.0 \(here ",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_bundle_is_refused_and_says_why(copy: Path, damage: str) -> None:
    spoil, message = DAMAGE[damage]
    spoil(copy)
    with pytest.raises(ArtifactError, match=message):
        Bundle.load(copy)


def test_a_bundle_that_another_replaces_while_it_is_read_is_not_made_of_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"name": "dnn", "mlp": {"hidden": [8]}}
    for seed in (1, 2):
        example_bundle(tmp_path / str(seed), model=small, seed=seed)
    link, read = tmp_path / "current", module.load_file
    link.symlink_to(tmp_path / "1")

    def swapped(path: Path) -> dict[str, torch.Tensor]:
        link.unlink()
        link.symlink_to(tmp_path / "2")
        return read(path)

    monkeypatch.setattr(module, "load_file", swapped)
    with pytest.raises(ArtifactError, match="another bundle took its place while it was read"):
        Bundle.load(link)


def test_golden_rows_stay_when_the_folder_holds_another_bundle(tmp_path: Path) -> None:
    bundle = Bundle.load(example_bundle(tmp_path / "bundle", seed=1).directory)
    mine = bundle.golden
    example_bundle(tmp_path / "bundle", seed=2)
    assert bundle.golden.equals(mine)
    assert not Bundle.load(tmp_path / "bundle").golden.equals(mine)


def test_the_manifest_tells_what_it_is(bundle: Bundle) -> None:
    manifest = json.loads((bundle.directory / "bundle.json").read_text())
    assert manifest["created"] == datetime(2026, 1, 1, tzinfo=UTC).isoformat()
    assert manifest["model"]["name"] == "finalmlp"
    assert manifest["model"]["mlp1"]["hidden"] == [400]
    assert set(manifest["files"]) == set(sha256_tree(bundle.directory)) - {"bundle.json"}
    assert manifest["libraries"]["torch"] == version("torch")
