"""What is summed up does not hang on the order in which threads met the texts."""

from __future__ import annotations

import numpy as np
import polars as pl

from pipelines.features.fit import Coded, Fitter
from pipelines.features.spec import FeatureSpec


def test_the_order_of_a_dictionary_decides_nothing() -> None:
    columns = [
        {"name": "price", "kind": "numeric"},
        {"name": "cut", "kind": "numeric", "source": "price", "encode": {"how": "quantile", "buckets": 5}},
        {"name": "word", "kind": "categorical", "source": "price"},
    ]
    spec = FeatureSpec.model_validate({"label": "click", "columns": columns})
    random = np.random.default_rng(0)
    texts = pl.Series([f"{x:.6f}" for x in random.lognormal(3, 4, 2000)] + ["1", "1.0", "01"])
    index = random.integers(0, len(texts), 5000).astype(np.int32)
    hashes = set()
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(len(texts))
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        fitter = Fitter(spec, {"price": "text"}, "log")
        fitter.add({"price": Coded(texts[order], place[index].astype(np.int32))}, len(index))
        hashes.add(fitter.state().assign().hash)
    assert len(hashes) == 1
