"""The reference of a bundle: what it measures, that it is verified, and that bundles without one still load."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ctr_models.batch import EncodedRows, Ragged
from ctr_models.errors import ArtifactError
from ctr_models.schema import Schema
from pipelines.release.bundle import REFERENCE, Bundle
from pipelines.release.example import example_bundle, example_log
from pipelines.release.reference import Reference, Spread, columns


def test_groups_of_ids_begin_with_missing_and_unknown_and_are_of_equal_size() -> None:
    ids = np.concatenate([np.zeros(100), np.ones(50), 2 + np.arange(850) % 100]).astype(np.int32)
    rows = EncodedRows(
        schema=Schema.of({"ad": 102}),
        dense=np.empty((1000, 0), dtype=np.float32),
        single=ids[None],
        ragged={},
        label=np.zeros(1000, dtype=np.float32),
        group=np.zeros(1000, dtype=np.int64),
    )
    spread = Reference.of(rows, np.full(1000, 0.5)).fields["ad"]
    assert spread.edges[:2] == [1, 2]
    assert spread.shares[:2] == [0.1, 0.05]
    assert len(spread.shares) == 12
    np.testing.assert_allclose(spread.shares[2:], 0.085, atol=0.01)


def test_a_row_without_elements_is_missing_once() -> None:
    ragged = Ragged(np.array([5, 1, 7], dtype=np.int32), np.array([0, 2, 2, 3, 3]))
    rows = EncodedRows(
        schema=Schema.of({"x": 3}),
        dense=np.empty((4, 0), dtype=np.float32),
        single=np.zeros((1, 4), dtype=np.int32),
        ragged={"tags": ragged},
        label=np.zeros(4, dtype=np.float32),
        group=np.zeros(4, dtype=np.int64),
    )
    assert sorted(columns(rows)["tags"].tolist()) == [0, 0, 1, 5, 7]


def test_psi_is_that_of_the_books() -> None:
    spread = Spread(edges=[0.5], shares=[0.5, 0.5])
    expected = (0.8 - 0.5) * np.log(0.8 / 0.5) + (0.2 - 0.5) * np.log(0.2 / 0.5)
    assert spread.psi(np.array([8, 2])) == pytest.approx(expected)
    assert np.isfinite(spread.psi(np.array([1, 0])))


def test_a_bundle_brings_its_reference(tmp_path: Path) -> None:
    bundle = Bundle.load(example_bundle(tmp_path / "bundle").directory)
    reference = bundle.reference
    assert reference is not None
    assert set(reference.fields) == {f.name for f in bundle.state.schema().fields}
    nulls = example_log()["city"].null_count() / len(example_log())
    assert reference.fields["city"].shares[0] == pytest.approx(nulls)
    scores = bundle.score_frame(example_log())
    assert reference.scores.psi(reference.scores.counts(scores)) == pytest.approx(0, abs=1e-3)
    moved = reference.scores.counts(np.full(100, 0.999, dtype=np.float32))
    assert reference.scores.psi(moved) > 1


def test_a_bundle_without_one_loads(tmp_path: Path) -> None:
    made = example_bundle(tmp_path / "made")
    options = {"state": made.state, "config": made.config, "metrics": {}, "golden": example_log(4)}
    old = Bundle.create(tmp_path / "old", model=made.model, **options)
    assert not (old.directory / REFERENCE).exists()
    assert Bundle.load(old.directory).reference is None


@pytest.mark.parametrize(
    "content", [b"{}", b'{"rows": 1, "fields": {}, "scores": {"edges": [2, 1], "shares": [0, 0, 1]}}']
)
def test_what_is_none_is_refused_by_name(content: bytes, tmp_path: Path) -> None:
    (tmp_path / REFERENCE).write_bytes(content)
    with pytest.raises(ArtifactError, match=f"{REFERENCE}: not the reference of a bundle"):
        Reference.read(tmp_path / REFERENCE)


def test_one_byte_changed_is_refused_by_its_hash(tmp_path: Path) -> None:
    bundle = example_bundle(tmp_path / "bundle")
    path = bundle.directory / REFERENCE
    tree = json.loads(path.read_text())
    path.write_text(json.dumps({**tree, "rows": tree["rows"] + 1}))
    with pytest.raises(ArtifactError, match="SHA-256 expected"):
        Bundle.load(bundle.directory)
