"""Made-up rows in a published layout."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from pipelines.datasets.frappe import FIELDS


@pytest.fixture(scope="session")
def frappe(tmp_path_factory):
    """Files in the layout of Frappe_x1 with made-up rows."""
    folder = tmp_path_factory.mktemp("frappe")
    rng = np.random.default_rng(0)
    for part, rows in (("train", 1200), ("valid", 400), ("test", 400)):
        ids = {name: rng.integers(0, 12, rows) for name in FIELDS}
        chance = 1 / (1 + np.exp(-(ids["user"] - ids["item"]) / 3))
        columns = {name: ids[name].astype(str) for name in FIELDS}
        pl.DataFrame({"label": (rng.random(rows) < chance).astype(np.int8), **columns}).write_parquet(
            folder / f"{part}.parquet"
        )
    return folder
