"""A training that is instant: its predictions are the truth plus noise, less for a larger ``cross_layers``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch

from pipelines.config import RunConfig, parse_config

ROWS, USERS = 1500, 60


@dataclass
class Rows:
    """As much of EncodedData as an experiment reads."""

    path: Path
    truth: str | None = "true_probability"
    table: pl.DataFrame = field(default_factory=lambda: _table())

    def frame(self, split: str) -> pl.LazyFrame:
        assert split == "test", "only the test rows are the experiment's business"
        return self.table.lazy()


def _table() -> pl.DataFrame:
    rng = np.random.default_rng(0)
    p = rng.beta(1, 3, ROWS)
    return pl.DataFrame(
        {
            "__row__": np.arange(ROWS),
            "__user__": rng.integers(0, USERS, ROWS),
            "__label__": (rng.random(ROWS) < p).astype(np.float32),
            "true_probability": p,
            "country": rng.choice(["DE", "FR"], ROWS),
        }
    )


@pytest.fixture
def config(tmp_path) -> RunConfig:
    return parse_config({"workdir": str(tmp_path), "model": {"name": "gdcn", "cross_layers": 1}})


@pytest.fixture
def rows(tmp_path) -> Rows:
    return Rows(tmp_path / "features" / "abc")


@pytest.fixture
def trained(monkeypatch) -> list[RunConfig]:
    """Replace training and prediction; the list tells what was trained, in order."""
    calls: list[RunConfig] = []

    def train(config, data, *, run_dir, resume=False, progress=True):
        calls.append(config)
        run_dir.mkdir(parents=True, exist_ok=resume)
        model = torch.nn.Linear(2, 1)
        model.config = config
        history = [{"epoch": 1, "train_loss": 0.5, "valid_auc": 0.7, "valid_logloss": 0.4, "best": True}]
        metrics = {"valid_auc": 0.7, "test_auc": 0.69}
        reports = [
            {"title": "dropped", "rows": [], "totals": {"optfs/share_dropped": 0.25}},
            {"title": "other", "rows": []},
        ]
        return SimpleNamespace(
            model=model, metrics=metrics, history=history, rows_per_second=1000.0, data=data, reports=reports
        )

    def predict(model, data, split, *, batch_size):
        config = model.config
        rng = np.random.default_rng(config.seed)
        truth = data.table["true_probability"].to_numpy()
        noise = rng.normal(0, 1 / config.model.options["cross_layers"], ROWS)
        return SimpleNamespace(
            row=data.table["__row__"].to_numpy(),
            user=data.table["__user__"].to_numpy(),
            label=data.table["__label__"].to_numpy(),
            probability=1 / (1 + np.exp(-(np.log(truth / (1 - truth)) + noise))),
            tasks={},
        )

    monkeypatch.setattr("pipelines.training.trainer.train", train)
    monkeypatch.setattr("pipelines.training.trainer.predict", predict)
    return calls
