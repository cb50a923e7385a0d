"""What benchmarks serve and ask for is what it stands for."""

from __future__ import annotations

import json
from pathlib import Path

from pipelines.release.bundle import Bundle
from pipelines.release.example import example_bundle
from serving.benchmarks.synthetic import bundles, requests


def test_requests_are_random_and_can_be_scored(tmp_path: Path) -> None:
    bundle = example_bundle(tmp_path / "bundle")
    made = requests(bundle, 7)
    assert made == requests(bundle, 7)
    assert len({json.dumps(r) for r in made}) == len(made)
    for one in made:
        assert len(bundle.score_request(**one)) == 7
        assert set(one["user"]) <= {"user_id", "city", "clicked"}


def test_the_bundles_are_what_they_stand_for(tmp_path: Path) -> None:
    small, large = (Bundle.load(path) for path in bundles(tmp_path))
    assert (small.model.name, len(small.model.schema.fields)) == ("finalmlp", 10)
    assert (large.model.name, len(large.model.schema.fields)) == ("gdcn", 39)
