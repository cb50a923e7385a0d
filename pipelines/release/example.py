"""A small Bundle made of nothing: for examples, tests and trying out a server."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from ctr_models.model import ModelSpec
from pipelines.features.spec import FeatureSpec
from pipelines.features.state import FeatureState
from pipelines.features.transform import encoded_rows, transform
from pipelines.release.bundle import Bundle

SPEC = FeatureSpec.model_validate(
    {
        "label": "click",
        "user": "user_id",
        "item": "item_id",
        "dim": 4,
        "columns": [
            {"name": "user_id", "kind": "categorical", "role": "user"},
            {"name": "city", "kind": "categorical", "role": "user"},
            {"name": "clicked", "kind": "sequence", "role": "user", "table": "item_id", "target": "item_id"},
            {"name": "hour", "kind": "categorical"},
            {"name": "item_id", "kind": "categorical", "role": "item"},
            {"name": "price", "kind": "numeric", "role": "item"},
            {"name": "tags", "kind": "multi", "role": "item"},
        ],
    }
)


def example_log(rows: int = 200, *, seed: int = 0) -> pl.DataFrame:
    """Return a random log with columns of every kind and some gaps."""
    make = np.random.default_rng(seed)
    items = [f"item-{i}" for i in range(20)]
    lists = [list(make.choice(items, size=make.integers(0, 4))) for _ in range(rows)]
    price = np.round(make.lognormal(size=rows), 2)
    return pl.DataFrame(
        {
            "click": make.integers(0, 2, rows),
            "user_id": make.integers(1, 30, rows),
            "city": [("Graz", "Łódź", "São Paulo", None)[i] for i in make.integers(0, 4, rows)],
            "clicked": pl.Series(lists, dtype=pl.List(pl.String)),
            "hour": make.integers(0, 24, rows),
            "item_id": [items[i] for i in make.integers(0, 20, rows)],
            "price": [None if p < 0.3 else float(p) for p in price],
            "tags": [[("new", "sale", "red")[i] for i in range(3) if make.random() < 0.4] for _ in range(rows)],
        },
        schema_overrides={"tags": pl.List(pl.String)},
    )


def example_bundle(
    directory: Path, *, model: dict[str, Any] | str = "finalmlp", seed: int = 0, **metrics: float
) -> Bundle:
    """Write a bundle of an untrained model; the same arguments give the same bytes.

    Args:
        directory: where it shall stand.
        model: as in a config.
        seed: of the weights.
        metrics: what it shall claim to have reached.

    Example:
        >>> import tempfile
        >>> bundle = example_bundle(Path(tempfile.mkdtemp()) / "bundle", test_auc=0.7)
        >>> bundle.score_request({"user_id": 3}, {"hour": 9}, [{"item_id": "item-1"}, {"item_id": "new"}]).shape
        (2,)
    """
    log = example_log()
    state = FeatureState.fit(SPEC, log.lazy(), source="example")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        built = ModelSpec.parse(model).build(state.schema())
        for parameter in built.parameters():  # far from zero, so that every input shows in the score
            torch.nn.init.normal_(parameter, std=0.3)
    built.eval()
    rows = encoded_rows(transform(state, log.lazy(), source="example").collect(), state.schema())
    return Bundle.create(
        directory,
        model=built,
        state=state,
        config={"name": "example"},
        metrics=metrics or {"test_auc": 0.7, "test_logloss": 0.5},
        golden=log.head(16),
        seen=rows,
        created=datetime(2026, 1, 1, tzinfo=UTC),
    )
