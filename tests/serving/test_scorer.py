"""The scorer keeps the event loop free."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.release.bundle import Bundle
from pipelines.release.example import example_bundle, example_log
from serving.scorer import Scorer
from serving.settings import Settings


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return example_bundle(tmp_path_factory.mktemp("made") / "bundle")


def test_the_loop_runs_while_a_request_is_scored(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()

    def slow(*_: Any) -> np.ndarray:
        assert release.wait(30)
        return np.zeros(1, dtype=np.float32)

    async def run() -> np.ndarray:
        scorer = Scorer.load(Settings(model=str(bundle.directory)))
        monkeypatch.setattr(scorer.bundle, "score_request", slow)
        scoring = asyncio.create_task(scorer.score({}, {}, [{}]))
        await asyncio.sleep(0.05)
        assert not scoring.done()
        release.set()  # only a loop that still runs gets here
        scores = await scoring
        scorer.close()
        return scores

    assert asyncio.run(run()).shape == (1,)


def test_concurrent_requests_get_their_own_scores(bundle: Bundle) -> None:
    rows = example_log(40, seed=6).drop("click").to_dicts()

    async def run() -> list[np.ndarray]:
        scorer = Scorer.load(Settings(model=str(bundle.directory), workers=4))
        found = await asyncio.gather(*(scorer.score({}, {}, [row]) for row in rows))
        scorer.close()
        return found

    np.testing.assert_allclose(np.concatenate(asyncio.run(run())), bundle.score_request({}, {}, rows), atol=1e-6)


def test_the_example_is_plain_json(bundle: Bundle, tmp_path: Path) -> None:
    import json

    scorer = Scorer.load(Settings(model=str(bundle.directory)))
    example = json.loads(json.dumps(scorer.example()))
    assert example.keys() == {"user", "context", "candidates"}
    assert len(example["candidates"]) == 3
    scorer.close()
