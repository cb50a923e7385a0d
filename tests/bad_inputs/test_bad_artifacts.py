"""What a damaged bundle or FeatureState is told, word for word."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from ctr_models.errors import ArtifactError
from pipelines.features.files import sha256_file
from pipelines.features.state import FeatureState
from pipelines.release.bundle import Bundle
from pipelines.release.example import example_bundle

AGAIN = "copy the bundle again from where it was made, or train again."
STATE_AGAIN = "copy it again from where it was made, or fit again."


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return example_bundle(tmp_path_factory.mktemp("made") / "bundle").directory


@pytest.fixture
def bundle(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made, tmp_path / "bundle")
    monkeypatch.chdir(tmp_path)
    return Path("bundle")


def refused(load: Callable[[Path], Any], path: Path) -> str:
    with pytest.raises(ArtifactError) as caught:
        load(path)
    return str(caught.value)


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "name", ["weights.safetensors", "golden.parquet", "config.yaml", "features/table-0000.parquet"]
)
def test_a_bundle_with_one_byte_changed(bundle: Path, name: str) -> None:
    before = sha256_file(bundle / name)[:16]
    flip(bundle / name, -9)
    after = sha256_file(bundle / name)[:16]
    assert refused(Bundle.load, bundle) == f"bundle/{name}: SHA-256 expected {before}, found {after}. {AGAIN}"


def test_a_bundle_without_its_weights(bundle: Path) -> None:
    (bundle / "weights.safetensors").unlink()
    assert refused(Bundle.load, bundle) == f"bundle/weights.safetensors: the file is missing. {AGAIN}"


def test_a_bundle_with_a_metric_improved_by_hand(bundle: Path) -> None:
    manifest = json.loads((bundle / "bundle.json").read_text())
    manifest["metrics"]["test_auc"] = 0.99
    (bundle / "bundle.json").write_text(json.dumps(manifest))
    message = refused(Bundle.load, bundle)
    assert message.startswith(f"bundle/bundle.json: hash expected {manifest['hash'][:16]}, found ")
    assert message.endswith(f". {AGAIN}")


def test_a_manifest_that_is_cut(bundle: Path) -> None:
    text = (bundle / "bundle.json").read_text()
    (bundle / "bundle.json").write_text(text[:1])
    assert refused(Bundle.load, bundle) == (
        "bundle/bundle.json: not a bundle's manifest (Expecting property name enclosed in double quotes: line 1 "
        f"column 2 (char 1)). {AGAIN}"
    )


def test_a_bundle_of_a_later_format(bundle: Path) -> None:
    manifest = json.loads((bundle / "bundle.json").read_text())
    manifest["format"] = 99
    (bundle / "bundle.json").write_text(json.dumps(manifest))
    assert refused(Bundle.load, bundle) == (
        f"bundle/bundle.json: format 99, this version of sluice reads 1. install sluice {version('sluice')}, which "
        "wrote it."
    )


def test_a_folder_that_is_no_bundle(bundle: Path) -> None:
    (bundle / "bundle.json").unlink()
    assert refused(Bundle.load, bundle) == (
        "bundle/bundle.json: no bundle here. a bundle is a folder with bundle.json; sluice train makes one."
    )


def test_a_bundle_that_is_not_there(bundle: Path) -> None:
    assert refused(Bundle.load, Path("bundel")) == (
        "bundel: no such folder. a bundle is a folder with bundle.json; sluice train makes one."
    )


def test_a_state_with_one_byte_changed(bundle: Path) -> None:
    table = bundle / "features" / "table-0001.parquet"
    before = sha256_file(table)[:16]
    flip(table, 30)
    after = sha256_file(table)[:16]
    assert refused(FeatureState.load, bundle / "features") == (
        f"bundle/features/table-0001.parquet: SHA-256 expected {before}, found {after}. {STATE_AGAIN}"
    )


def test_a_state_with_another_hash_written_into_it(bundle: Path) -> None:
    file = bundle / "features" / "state.json"
    right = FeatureState.load(bundle / "features").hash
    wrong = "0" * len(right)
    file.write_text(file.read_text().replace(right, wrong))
    assert refused(FeatureState.load, bundle / "features") == (
        f"bundle/features/state.json: its hash is {right[:16]}, {wrong[:16]} was written. {STATE_AGAIN}"
    )


def test_a_state_without_a_table(bundle: Path) -> None:
    (bundle / "features" / "table-0000.parquet").unlink()
    assert refused(FeatureState.load, bundle / "features") == (
        f"bundle/features/table-0000.parquet: the file is missing. {STATE_AGAIN}"
    )


def test_a_folder_that_is_no_state(bundle: Path) -> None:
    (bundle / "features" / "state.json").unlink()
    assert refused(FeatureState.load, bundle / "features") == (
        "bundle/features/state.json: no FeatureState. sluice features fits one."
    )
