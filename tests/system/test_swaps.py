"""Models change under load: no request fails, each answer is of one whole version, a damaged one never answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pipelines.release.bundle import Bundle
from pipelines.release.example import example_bundle
from pipelines.release.promotion import promote
from pipelines.release.registry import fetch, locate, register
from pipelines.release.store import default_uri
from serving.scorer import example_request

VERSIONS = 4
"""Whole ones; the next is damaged."""


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Bundle]]:
    """A registry with some versions, of which the last has one byte changed in its weights."""
    folder = tmp_path_factory.mktemp("registry")
    uri = default_uri(folder)
    bundles = [example_bundle(folder / f"bundle{seed}", seed=seed) for seed in range(VERSIONS + 1)]
    for bundle in bundles:
        version = register(bundle.directory, "clicks", uri)
    weights = fetch(locate(f"models:/clicks/{version}", uri), uri) / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    return uri, bundles[:VERSIONS]


@pytest.mark.timeout(1800)
def test_models_are_swapped_under_load(
    registered: tuple[str, list[Bundle]],
    serve: Callable[..., Any],
    clients: Any,
    rounds: Callable[[int], int],
) -> None:
    uri, bundles = registered
    request = example_request(bundles[0])
    promote("clicks", 1, tracking_uri=uri)
    server = serve("models:/clicks@champion", tracking_uri=uri, poll_seconds=0.1)
    server.start()
    server.wait()
    swaps = refusals = 0
    with clients(server.port, [request], events=False) as load:
        while swaps < rounds(5):
            load.go_on(5)
            if swaps % 5 == 2 and refusals <= swaps // 5:
                promote("clicks", VERSIONS + 1, tracking_uri=uri)
                told = server.wait(found=lambda told: "problem" in told["models"][0])
                assert "SHA-256 expected" in told["models"][0]["problem"]
                refusals += 1
            version = 1 + (swaps + 1) % VERSIONS
            promote("clicks", version, tracking_uri=uri)
            server.wait(found=lambda told, wanted=version: told["model"]["version"] == wanted)
            swaps += 1
        load.go_on(5)
    assert server.stop() == 0
    assert (load.broken, dict(load.others)) == (0, {})
    expected = {i + 1: (bundle.hash, bundle.score_request(**request)) for i, bundle in enumerate(bundles)}
    for answer in load.scored.values():
        version_hash, scores = expected[answer["model"]["version"]]
        assert answer["model"]["hash"] == version_hash
        np.testing.assert_allclose(answer["scores"], scores, atol=1e-5)
    print(f"{swaps} swaps, {refusals} damaged ones refused: {len(load.scored):,} requests, none failed")
