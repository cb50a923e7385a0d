"""The client sends the same by JSON and by Arrow, and gets the same."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import numpy as np
import polars as pl
import pytest

from ctr_models.errors import RequestError
from pipelines.release.example import example_bundle, example_log
from serving.app import create_app
from serving.client import score
from serving.settings import Settings

LOG = example_log(60, seed=5).select("item_id", "price", "tags")


@pytest.fixture(scope="module")
def server(listening, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder = tmp_path_factory.mktemp("client")
    example_bundle(folder / "bundle")
    with (
        listening(create_app(Settings(model=(str(folder / "bundle"),), max_batch_requests=4))) as port,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client,
    ):
        yield client


@pytest.mark.parametrize("frame", [True, False])
def test_arrow_and_json_give_the_same(server: httpx.Client, frame: bool) -> None:
    parts = [LOG.head(25), LOG.tail(3), LOG.select("price").head(7).with_columns(pl.lit("item-3").alias("item_id"))]
    requests = [
        {"user": {"user_id": i, "clicked": ["item-1"][:i]}, "request_id": f"r{i}", "candidates": part}
        for i, part in enumerate(parts)
    ]
    if not frame:
        requests = [{**one, "candidates": part.to_dicts()} for one, part in zip(requests, parts, strict=True)]
    plain, quick = score(server, requests), score(server, requests, arrow=True)
    for one, other in zip(plain, quick, strict=True):
        assert isinstance(other["scores"], np.ndarray)
        np.testing.assert_allclose(other.pop("scores"), one.pop("scores"), atol=1e-7)
        one["model"].pop("version"), other["model"].pop("version", None)
        assert one == other


@pytest.mark.parametrize("candidates", [[{"item_id": "item-1"}, {}], [{}, {}]])
def test_candidates_are_enough(server: httpx.Client, candidates: list[dict[str, str]]) -> None:
    (one,) = score(server, [{"candidates": candidates}], arrow=True)
    (other,) = score(server, [{"candidates": candidates}])
    assert one["scores"].tolist() == pytest.approx(other["scores"])


def test_candidates_that_give_nothing_keep_their_places(server: httpx.Client) -> None:
    given = [[{}, {}], [{"item_id": "item-1"}, {}, {"item_id": "item-2"}], [{}]]
    requests = [{"candidates": one} for one in given]
    plain, quick = score(server, requests), score(server, requests, arrow=True)
    assert [len(one["scores"]) for one in quick] == [2, 3, 1]
    for one, other in zip(plain, quick, strict=True):
        np.testing.assert_allclose(other["scores"], one["scores"], atol=1e-7)


def test_fields_that_only_later_requests_have_are_sent(server: httpx.Client) -> None:
    requests = [
        {"candidates": [{"item_id": "item-1"}]},
        {"candidates": [{"item_id": "item-1"}], "request_id": "mine"},
    ]
    assert score(server, requests, arrow=True)[1]["request_id"] == "mine"


@pytest.mark.parametrize("arrow", [True, False])
def test_what_is_wrong_is_told(server: httpx.Client, arrow: bool) -> None:
    (wrong,) = score(server, [{"candidates": [{"prize": 1.0}]}], arrow=arrow)
    assert wrong["status"] == 422
    assert wrong["detail"][0]["type"] == "value_error"
    with pytest.raises(RequestError, match="5 requests, at most 4 are allowed"):
        score(server, [{"candidates": [{"price": 1.0}]}] * 5, arrow=arrow)
