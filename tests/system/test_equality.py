"""Train-serve equality: rows scored offline, and one by one over HTTP as they would have been asked for."""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from ctr_models.model import ModelSpec
from pipelines.datasets.base import open_data
from pipelines.datasets.config import DataConfig
from pipelines.features.sequences import add_histories
from pipelines.features.state import FeatureState
from pipelines.release.bundle import Bundle
from pipelines.release.score import score_file
from serving.scorer import plain_row


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("model", ["finalmlp", "din"])
def test_rows_score_alike_offline_and_over_http(
    model: str, serve: Callable[..., Any], rounds: Callable[[int], int], tmp_path: Path
) -> None:
    count = rounds(500)
    options = {"rows": 2 * count, "users": 50, "days": 2}
    world = open_data(DataConfig(source="click_world", path=tmp_path / "world", options=options))
    assert world.spec is not None
    spec = world.spec.model_copy(update={"keep": ()})
    log = pl.concat([part.frame.collect() for part in world.parts.values()]).select(spec.raw_columns)
    state = FeatureState.fit(spec, log.head(count).lazy(), source="world")
    torch.manual_seed(0)
    built = ModelSpec.parse(model).build(state.schema())
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    bundle = Bundle.create(
        tmp_path / "bundle", model=built, state=state, config={"name": model}, metrics={}, golden=log.head(16)
    )
    log.write_parquet(tmp_path / "log.parquet")
    score_file(bundle, tmp_path / "log.parquet", tmp_path / "scores.parquet", chunk_rows=1000)
    offline = pl.read_parquet(tmp_path / "scores.parquet")["score"].tail(count).to_numpy()

    server = serve(str(bundle.directory))
    server.start()
    server.wait()
    role = {(c.name if c.from_log else c.column): c.role for c in spec.direct}
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    online = []
    for row in add_histories(spec, log).tail(count).select(*role).iter_rows(named=True):
        user, context, item = (
            plain_row({n: v for n, v in row.items() if role[n] == of}) for of in ("user", "context", "item")
        )
        asked = {"user": user, "context": context, "candidates": [item]}
        connection.request("POST", "/v1/score", json.dumps(asked), {"Content-Type": "application/json"})
        answer = json.loads(connection.getresponse().read())
        online += answer["scores"]
    connection.close()
    assert server.stop() == 0
    assert offline.std() > 0.01  # the scores say something of the rows
    np.testing.assert_allclose(np.array(online, dtype=np.float32), offline, atol=1e-6, rtol=0)
    print(f"{model}: {count:,} rows, at most {np.abs(np.array(online) - offline).max():.1e} apart")
