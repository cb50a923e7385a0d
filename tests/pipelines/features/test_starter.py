"""The written ctr.yaml reads back as what was guessed, whatever the columns are called."""

from __future__ import annotations

import random
from pathlib import Path

import polars as pl
import pytest

from pipelines.config import load_config
from pipelines.datasets.base import open_data
from pipelines.features.guess import guess
from pipelines.features.starter import to_yaml

NAMES = ["a b", "naïve", "x\ny: {z}", "#c", "1st", "yes", "[q]", "'", '"', "\u2028"]


def test_the_file_loads_and_equals_the_guess(tmp_path: Path) -> None:
    rows, draw = 400, random.Random(0)
    frame = pl.DataFrame(
        {"click": [int(draw.random() < 0.3) for _ in range(rows)]}
        | {name: [draw.choice("abcdefg") for _ in range(rows)] for name in NAMES}
    )
    frame.write_parquet(tmp_path / "odd: names #1.parquet")
    proposal = guess(tmp_path / "odd: names #1.parquet")
    path = tmp_path / "ctr.yaml"
    path.write_text(to_yaml(proposal), encoding="utf-8")
    config = load_config(path)
    assert config.features == proposal.spec
    assert {c.column for c in proposal.spec.columns} == set(NAMES)
    assert config.data.split is not None
    assert config.data.split.by == "random"
    assert open_data(config.data).parts["all"].frame.collect().height == rows


def test_reasons_stand_above_what_they_explain(tmp_path: Path) -> None:
    frame = pl.DataFrame({"click": [0, 0, 1, 0] * 100, "user_id": list(range(40)) * 10, "empty": [None] * 400})
    frame.write_csv(tmp_path / "log.csv")
    text = to_yaml(guess(tmp_path / "log.csv"), name="mine")
    lines = text.splitlines()
    assert "name: mine" in lines
    assert lines[lines.index("  label: click") - 1] == "  # holds only 0 and 1; 25.0% of the rows are 1"
    at = lines.index("    - {name: user_id, kind: categorical, role: user}")
    assert lines[at - 1] == "    # 40 distinct values in 400 rows"
    assert "  # timestamp:" in lines
    assert "  #   empty: every value is missing" in lines
    assert "train: {epochs: 10, batch_size: 512}" in lines


@pytest.mark.data
@pytest.mark.parametrize("folder", ["frappe", "open_bandit/random_men.parquet", "movielens_100k/ml-100k.user"])
def test_real_files(data_root: Path, tmp_path: Path, folder: str) -> None:
    label = {"movielens_100k/ml-100k.user": "gender:token"}.get(folder)
    proposal = guess(data_root / folder, label=label)
    (tmp_path / "ctr.yaml").write_text(to_yaml(proposal), encoding="utf-8")
    assert load_config(tmp_path / "ctr.yaml").features == proposal.spec
