"""The features benchmark measures what it says, on a log of the right shape."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest

from ctr_models.errors import ConfigError
from pipelines.benchmarks import features_bench as bench


def test_the_log_has_the_shape_of_the_published_one(tmp_path: Path) -> None:
    bench.write_log(tmp_path / "log", 3000)
    frames = [pl.read_csv(tmp_path / "log" / f"{name}.csv") for name in bench.SHARES]
    assert [len(f) for f in frames] == [2400, 300, 300]
    whole = pl.concat(frames)
    assert whole.columns == ["label", *(f"I{i}" for i in range(1, 14)), *(f"C{i}" for i in range(1, 27))]
    assert set(whole["label"].unique()) == {0, 1}
    assert whole["C3"].str.len_chars().unique().drop_nulls().to_list() == [8]
    assert whole["C9"].n_unique() == 3
    assert whole["C3"].n_unique() > 1000
    assert abs(whole["C22"].null_count() / 3000 - 0.76) < 0.04
    bench.write_log(tmp_path / "again", 3000)
    assert (tmp_path / "log/test.csv").read_bytes() == (tmp_path / "again/test.csv").read_bytes()


def test_both_ways_read_all_rows(tmp_path: Path) -> None:
    bench.write_log(tmp_path / "log", 3000)
    assert bench.ours(tmp_path / "log", tmp_path / "ours") > 0
    assert bench.copy(tmp_path / "log", tmp_path / "copy") > 0
    manifest = json.loads(next((tmp_path / "ours").rglob("manifest.json")).read_text())
    assert {name: split["rows"] for name, split in manifest["splits"].items()} == {
        "train": 2400,
        "valid": 300,
        "test": 300,
    }
    assert len(pl.read_parquet(tmp_path / "copy" / "copy.parquet")) == 3000


def test_the_report_has_the_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def child(python: Path, code: str, log: Path, out: Path) -> dict[str, float]:
        out.mkdir()
        way = "theirs" if "fuxictr" in code.split(";")[0] else "copy" if "import copy" in code else "ours"
        return {"seconds": {"theirs": 40.0, "copy": 1.0, "ours": 2.0}[way], "peak_mb": 500.0}

    monkeypatch.setattr(bench, "_child", child)
    bench.main(
        rows=1000,
        rows_large=1000,
        rounds=1,
        fuxictr=True,
        fuxictr_python=Path("python"),
        folder=tmp_path,
        json=tmp_path / "out.json",
        at_least=["ratio_copy=0.4", "ratio_fuxictr=8"],
        at_most=["peak_mb=3000"],
    )
    figures = json.loads((tmp_path / "out.json").read_text())["figures"]
    assert set(figures) == {"rows_per_second", "rows_per_second_large", "peak_mb", "ratio_copy", "ratio_fuxictr"}
    assert figures["ratio_copy"] == 0.5
    assert figures["ratio_fuxictr"] == 20.0
    assert figures["rows_per_second"] == 500.0
    assert figures["peak_mb"] == 500.0


def test_a_bar_for_no_figure_is_refused_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "write_log", lambda *_: pytest.fail("a log was written"))
    with pytest.raises(ConfigError, match="no figure 'ratio_cpy'. did you mean 'ratio_copy'"):
        bench.main(at_least=["ratio_cpy=0.4"])
    with pytest.raises(ConfigError, match="no figure 'ratio_fuxictr'"):
        bench.main(fuxictr=False, at_least=["ratio_fuxictr=8"])


def test_peak_memory_counts_what_was_given_back() -> None:
    block = b"x" * 300_000_000
    assert len(block) == 300_000_000
    del block
    assert bench._peak_mb() > 300_000_000 / 2**20
