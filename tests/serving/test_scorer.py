"""One bundle scores: several requests in one pass get what each gets alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.release.bundle import SCORE, Bundle
from pipelines.release.example import example_bundle, example_log
from serving.scorer import Scorer, card_of

MODELS = ("finalmlp", "gdcn", {"name": "din"}, "autoint")
"""Of which the last takes plain rows."""


def requests(seed: int = 6) -> list[dict[str, Any]]:
    """Users with one, several and many candidates."""
    made, log = [], example_log(60, seed=seed).drop("click").to_dicts()
    item = ("item_id", "price", "tags")
    for user, counts in zip(log, (1, 3, 1, 40), strict=False):
        candidates = [{k: row[k] for k in item} for row in log[:counts]]
        context = {"hour": user["hour"]}
        given = {k: user[k] for k in ("user_id", "city", "clicked")}
        made.append({"user": given, "context": context, "candidates": candidates})
    return made


@pytest.mark.parametrize("model", MODELS, ids=str)
def test_requests_of_one_pass_get_what_each_gets_alone(model: Any, tmp_path: Path) -> None:
    bundle = example_bundle(tmp_path / "bundle", model=model)
    scorer = Scorer(bundle, card_of(bundle))
    found = scorer.run([scorer.encode(**r) for r in requests()])
    for scores, request in zip(found, requests(), strict=True):
        np.testing.assert_allclose(scores, bundle.score_request(**request), atol=1e-6)
    assert len(np.unique(np.concatenate(found))) > 30


def test_requests_that_share_other_columns_do_not_fit(tmp_path: Path) -> None:
    bundle = example_bundle(tmp_path / "bundle")
    scorer = Scorer(bundle, card_of(bundle))
    one = scorer.encode({"user_id": 1}, {}, [{"item_id": "item-1"}])
    two = scorer.encode({"user_id": 2}, {"hour": 3}, [{"item_id": "item-2"}, {}])
    other = scorer.encode({}, {}, [{"user_id": 1, "item_id": "item-1"}])
    assert one.fits(two)
    assert not one.fits(other)


def test_a_pass_of_more_rows_is_expected_to_take_longer(tmp_path: Path) -> None:
    bundle = example_bundle(tmp_path / "bundle")
    scorer = Scorer(bundle, card_of(bundle))
    assert 0 < scorer.seconds(1) <= scorer.seconds(500) <= scorer.seconds(5000)


def test_the_example_is_plain_json_and_outlives_its_folder(tmp_path: Path) -> None:
    bundle: Bundle = example_bundle(tmp_path / "bundle")
    scorer = Scorer.load(str(bundle.directory))
    expected = bundle.golden[SCORE].to_numpy()[:1]
    shutil.rmtree(bundle.directory)
    example = json.loads(json.dumps(scorer.example))
    assert example.keys() == {"user", "context", "candidates"}
    assert len(example["candidates"]) == 3
    np.testing.assert_allclose(scorer.run([scorer.encode(**example)])[0][:1], expected, atol=1e-5)
