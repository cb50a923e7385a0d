"""How fast a log becomes encoded features: against polars' own copy, and against another library's preparation.

A Criteo-shaped CSV (label, 13 integers, 26 hexadecimal categories with heavy tails, missing values as in the
real log) is split into train, valid and test, and then, each in a process of its own, in turn:

ours
    ``prepare``: check, fit on train, encode all three, write, flush to disk;
copy
    polars reads the same files with its default types and writes one Parquet file;
fuxictr
    ``build_dataset`` of fuxictr on the same files, same encodings (standardised numbers, vocabularies with the
    same minimum count); importing it and starting its Ray workers is not counted.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ctr_models.errors import ConfigError
from pipelines.benchmarks.report import AtLeast, AtMost, BenchReport, JsonPath, known

if TYPE_CHECKING:
    import polars as pl

FUXICTR = ("fuxictr==2.3.10", "polars<2")
MIN_COUNT = 2
SHARES = {"train": 0.8, "valid": 0.1, "test": 0.1}
BLOCK = 250_000
"""Rows that are drawn, and written, together."""

# Distinct values and share of missing values of each column, about those of the published log's first week.
DISTINCT = (
    *(1460, 583, 10_131_227, 2_202_608, 305, 24, 12_517, 633, 3, 93_145, 5_683, 8_351_593, 3_194),
    *(27, 14_992, 5_461_306, 10, 5_652, 2_173, 4, 7_046_547, 18, 15, 286_181, 105, 142_572),
)
MISSING = (
    *(0, 0, 0.034, 0.034, 0, 0.12, 0, 0, 0, 0, 0, 0.034, 0),
    *(0, 0, 0.034, 0, 0, 0.44, 0.44, 0.034, 0.76, 0, 0.034, 0.44, 0.44),
)
MISSING_NUMBER = (0.45, 0, 0.21, 0.22, 0.026, 0.22, 0.043, 0.0005, 0.043, 0.45, 0.043, 0.77, 0.22)
LOG_MEAN = (0.5, 2, 2, 1.5, 8, 4, 2, 2, 4, 0, 1, 0, 1.5)
LOG_DEVIATION = (1.2, 1.8, 1.5, 1, 2, 1.5, 1.3, 1.2, 1.3, 0.5, 0.9, 0.7, 1.1)


def main(
    rows: Annotated[int, typer.Option(min=1000, help="Rows of the timed log.")] = 1_000_000,
    rows_large: Annotated[
        int, typer.Option(min=0, help="Rows of the log that memory is read at; 0: none.")
    ] = 10_000_000,
    rounds: Annotated[int, typer.Option(min=1, help="Times that every way is measured, in turn.")] = 3,
    fuxictr: Annotated[bool, typer.Option(help="Compare with fuxictr.")] = True,
    fuxictr_python: Annotated[
        Path | None, typer.Option(help="Python of an environment that has it; none: one is made beside the log.")
    ] = None,
    folder: Annotated[Path | None, typer.Option(help="Where the logs are written, and removed again.")] = None,
    json: JsonPath = None,
    at_least: AtLeast = None,
    at_most: AtMost = None,
) -> None:
    """Feature preparation: Criteo-shaped CSV to encoded Parquet, in full.

    Example: sluice bench features --rows 100000 --rows-large 0 --no-fuxictr --at-least ratio_copy=0.4
    """
    figures = {"rows_per_second", "peak_mb", "ratio_copy"}
    figures |= ({"ratio_fuxictr"} if fuxictr else set()) | ({"rows_per_second_large"} if rows_large else set())
    known(figures, at_least, at_most)
    report = BenchReport(f"Features, {rows:,} rows", ["way", "seconds", "rows/s", "peak MB"])
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        work = Path(scratch)
        write_log(work / "log", rows)
        ways = {"copy": (Path(sys.executable), _COPY), "ours": (Path(sys.executable), _OURS)}
        if fuxictr:
            ways["fuxictr"] = (fuxictr_python or _environment(work / "environment"), _FUXICTR)
        best = _in_turn(ways, work, rounds)
    for name, found in best.items():
        _row(report, name, found, rows)
    mine = best["ours"]["seconds"]
    report.figures["rows_per_second"] = rows / mine
    report.figures["peak_mb"] = best["ours"]["peak_mb"]
    report.figures["ratio_copy"] = best["copy"]["seconds"] / mine
    if fuxictr:
        report.figures["ratio_fuxictr"] = best["fuxictr"]["seconds"] / mine
    if rows_large:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            work = Path(scratch)
            write_log(work / "log", rows_large)
            large = _child(Path(sys.executable), _OURS, work / "log", work / "ours")
            _row(report, f"ours, {rows_large:,} rows", large, rows_large)
            report.figures["peak_mb"] = large["peak_mb"]
            report.figures["rows_per_second_large"] = rows_large / large["seconds"]
    report.note(
        f"{os.cpu_count()} processors; the best of {rounds} rounds; a process each, its imports not counted"
    )
    report.note(f"split {SHARES}, minimum count {MIN_COUNT}; peak MB: resident memory, the libraries included")
    report.finish(json, at_least, at_most)


def write_log(folder: Path, rows: int, seed: int = 2026) -> None:
    """Write ``train.csv``, ``valid.csv`` and ``test.csv`` of a Criteo-shaped log; same seed, same bytes."""
    folder.mkdir(parents=True)
    start = 0
    for name, share in SHARES.items():
        stop = rows if name == "test" else start + round(rows * share)
        with open(folder / f"{name}.csv", "wb") as file:
            for first in range(start, stop, BLOCK):
                draw(first, min(BLOCK, stop - first), seed).write_csv(file, include_header=first == start)
        start = stop


def draw(first: int, rows: int, seed: int) -> pl.DataFrame:
    """Draw rows of the log; ranks of categories are log-uniform: few values are everywhere, most are rare."""
    import numpy as np
    import polars as pl

    rng = np.random.default_rng([seed, first])
    columns: dict[str, Any] = {"label": (rng.random(rows) < 0.256).astype(np.int64)}
    for i, missing in enumerate(MISSING_NUMBER):
        number = np.floor(np.exp(rng.normal(LOG_MEAN[i], LOG_DEVIATION[i], rows))).astype(np.int64)
        number -= 3 if i == 1 else 1
        columns[f"I{i + 1}"] = pl.Series(number).set(pl.Series(rng.random(rows) < missing), None)
    for i, distinct in enumerate(DISTINCT):
        rank = np.floor(np.exp(rng.random(rows) ** 1.1 * np.log(distinct + 1))).astype(np.uint64)
        mixed = (rank + np.uint64(i * 1_000_003)) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
        digits = (mixed >> np.uint64(32)).astype(">u4").tobytes().hex()
        text = pl.Series([digits]).str.extract_all("(?s).{8}").explode()
        columns[f"C{i + 1}"] = text.set(pl.Series(rng.random(rows) < MISSING[i]), None)
    return pl.DataFrame(columns)


def ours(log: Path, out: Path) -> float:
    """Prepare the log; return the seconds it took."""
    from pipelines.datasets.base import DATASETS, open_data
    from pipelines.datasets.config import DataConfig
    from pipelines.features.prepare import prepare
    from pipelines.features.spec import FeatureSpec

    DATASETS["csv"]  # imports the sources

    numbers = [{"name": f"I{i + 1}", "kind": "numeric"} for i in range(len(LOG_MEAN))]
    vocabulary = {"how": "vocabulary", "min_count": MIN_COUNT}
    texts = [{"name": f"C{i + 1}", "kind": "categorical", "encode": vocabulary} for i in range(len(DISTINCT))]
    spec = FeatureSpec.model_validate({"label": "label", "columns": [*numbers, *texts]})
    begin = time.perf_counter()
    data = open_data(DataConfig(source="csv", path=log))
    prepare(data, spec, workdir=out, seed=1, progress=False)
    return time.perf_counter() - begin


def copy(log: Path, out: Path) -> float:
    """Let polars copy the log to Parquet; return the seconds it took."""
    import polars as pl

    out.mkdir()
    begin = time.perf_counter()
    pl.scan_csv([log / f"{name}.csv" for name in SHARES]).sink_parquet(out / "copy.parquet")
    return time.perf_counter() - begin


_OURS = "from pipelines.benchmarks.features_bench import measured, ours; measured(ours)"
_COPY = "from pipelines.benchmarks.features_bench import copy, measured; measured(copy)"
_FUXICTR = f"""
import json, sys, time
from fuxictr.preprocess import FeatureProcessor, build_dataset
from fuxictr.preprocess.build_dataset import init_ray
log, out = sys.argv[1:]
number = dict(active=True, dtype="float", type="numeric", fill_na=0, normalizer="StandardScaler")
text = dict(active=True, dtype="str", type="categorical", fill_na="")
columns = [dict(number, name=f"I{{i + 1}}") for i in range({len(LOG_MEAN)})]
columns += [dict(text, name=f"C{{i + 1}}") for i in range({len(DISTINCT)})]
init_ray()
begin = time.perf_counter()
encoder = FeatureProcessor(feature_cols=columns, label_col=dict(name="label", dtype="float"),
                           dataset_id="log", data_root=out)
build_dataset(encoder, train_data=f"{{log}}/train.csv", valid_data=f"{{log}}/valid.csv",
              test_data=f"{{log}}/test.csv", min_categr_count={MIN_COUNT})
print(json.dumps({{"seconds": time.perf_counter() - begin}}))
"""


def measured(way: Callable[[Path, Path], float]) -> None:
    """Run one way on the log and folder that the command line names; print seconds and peak memory."""
    seconds = way(Path(sys.argv[1]), Path(sys.argv[2]))
    print(json.dumps({"seconds": seconds, "peak_mb": _peak_mb()}))


def _peak_mb() -> float:
    """Peak resident memory of this process. Linux counts the parent's into ru_maxrss, but not into VmHWM."""
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    unit = 2**20 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def _in_turn(ways: dict[str, tuple[Path, str]], work: Path, rounds: int) -> dict[str, dict[str, float]]:
    """Run the ways one after the other, over and over, so that a busy machine slows all; keep each one's best."""
    best: dict[str, dict[str, float]] = {}
    for turn in range(rounds):
        for name, (python, code) in ways.items():
            out = work / f"{name}{turn}"
            found = _child(python, code, work / "log", out)
            shutil.rmtree(out)
            if name not in best or found["seconds"] < best[name]["seconds"]:
                best[name] = found
    return best


def _child(python: Path, code: str, log: Path, out: Path) -> dict[str, float]:
    done = subprocess.run([str(python), "-c", code, str(log), str(out)], capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ConfigError(f"the measured process failed: {last}", where=str(python), remedy="see its own message")
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _environment(folder: Path) -> Path:
    """Make an environment with fuxictr and return its Python."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", *FUXICTR], check=True)
    return python


def _row(report: BenchReport, name: str, found: dict[str, float], rows: int) -> None:
    report.row(name, found["seconds"], rows / found["seconds"], found.get("peak_mb", "-"))
