"""What is stored of a user counts wherever a request comes in: for scores, for experiments, for exposures."""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import sqlalchemy as sa
from fastapi.testclient import TestClient

from pipelines.features.spec import FeatureSpec
from pipelines.release.example import example_bundle
from serving import app as module
from serving.app import create_app
from serving.arrow import stream
from serving.database import Database, exposures
from serving.limits import ARROW
from serving.online_features import Found
from serving.settings import Settings

IN_ARROW = {"Content-Type": ARROW, "Accept": ARROW}
USERS: dict[Any, dict[str, Any]] = {
    3: {"city": "Graz", "clicked": ["item-1", "item-2"]},
    4: {"city": "Łódź", "clicked": []},
}
ITEMS: dict[Any, dict[str, Any]] = {"item-1": {"price": 2.5, "tags": ["new"]}, "item-2": {"price": 7.0}}


class Store:
    """What a store of features gives, without one."""

    stored = None

    async def fetch(self, spec: FeatureSpec, user_id: Any, item_ids: Sequence[Any]) -> Found:
        return Found(USERS.get(user_id), [ITEMS.get(item) for item in item_ids], "v1")

    async def refresh(self) -> None:
        """Nothing changes."""

    async def watch(self) -> None:
        await asyncio.Event().wait()

    def status(self) -> dict[str, Any]:
        return {"store": "here", "version": "v1"}

    async def close(self) -> None:
        """Nothing is held."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scoring")
    example_bundle(folder / "one", seed=1)
    example_bundle(folder / "two", seed=2)
    return folder


@pytest.fixture
def client(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ready: Callable[[TestClient], TestClient]
) -> Iterator[TestClient]:
    monkeypatch.setattr(module, "open_features", lambda *_, **__: Store())
    settings = Settings(
        model=(f"one={folder}/one", f"two={folder}/two"),
        features="here",
        events_url=f"sqlite:///{tmp_path}/events.db",
        events_spool=tmp_path / "spool",
    )
    with TestClient(create_app(settings)) as client:
        yield ready(client)


def left(tmp_path: Path) -> list[dict[str, Any]]:
    database = Database(f"sqlite:///{tmp_path}/events.db")
    try:
        return [dict(row._mapping) for row in database.rows(sa.select(exposures).order_by(exposures.c.time))]
    finally:
        database.close()


def infer(client: TestClient, users: list[int], items: list[str], path: str = "/v2/models/one", **more: Any) -> Any:
    size = len(items)
    inputs = [
        {"name": "user_id", "shape": [size], "datatype": "INT64", "data": users},
        {"name": "hour", "shape": [size], "datatype": "INT64", "data": [9] * size},
        {"name": "item_id", "shape": [size], "datatype": "BYTES", "data": items},
    ]
    return client.post(f"{path}/infer", json={"inputs": inputs, **more})


def ask(client: TestClient, user: int, *items: str, **more: Any) -> dict[str, Any]:
    asked = {
        "user": {"user_id": user},
        "context": {"hour": 9},
        "candidates": [{"item_id": i} for i in items],
        **more,
    }
    reply = client.post("/v1/score", json=asked)
    assert reply.status_code == 200, reply.text
    return reply.json()


def test_rows_of_one_user_are_a_request_of_his(client: TestClient, tmp_path: Path) -> None:
    plain = ask(client, 3, "item-1", "item-2", "new")
    reply = infer(client, [3] * 3, ["item-1", "item-2", "new"], id="mine")
    assert reply.status_code == 200, reply.text
    assert reply.json()["outputs"][0]["data"] == pytest.approx(plain["scores"], abs=1e-6)
    assert (reply.json()["id"], reply.headers["x-request-id"]) == ("mine", "mine")
    first, second = left(tmp_path)
    assert (second["request_id"], second["unit"], second["served"]) == ("mine", "3", True)
    one, other = (json.loads(row["content"]) for row in (first, second))
    assert (one["user"], one["candidates"], one["items"]) == (other["user"], other["candidates"], other["items"])


def test_arrow_is_looked_up_and_leaves_the_same_exposure(client: TestClient, tmp_path: Path) -> None:
    asked = {
        "user": {"user_id": 3},
        "context": {"hour": 9},
        "candidates": [{"item_id": "item-1"}, {"item_id": "new"}],
    }
    plain = client.post("/v1/score", json=asked).json()
    reply = client.post("/v1/score", content=stream(pa.RecordBatch.from_pylist([asked])), headers=IN_ARROW)
    (row,) = pa.ipc.open_stream(reply.content).read_all().to_pylist()
    assert row["scores"] == pytest.approx(plain["scores"], abs=1e-7)
    assert row["features"] == plain["features"] == {**row["features"], "missing": {"user": False, "items": ["new"]}}
    one, other = (json.loads(kept["content"]) for kept in left(tmp_path))
    assert one == other


def test_null_gives_nothing_in_json_as_in_arrow(client: TestClient, tmp_path: Path) -> None:
    assert client.post("/v1/experiments", json=experiment()).status_code == 201
    left_out = {"user": {"user_id": 3}, "context": {"hour": 9}, "candidates": [{"item_id": "item-1"}]}
    nulls = {
        "user": {"user_id": 3, "city": None, "clicked": None},
        "context": {"hour": 9, "user_id": None, "city": None},
        "candidates": [{"item_id": "item-1", "price": None, "tags": None}],
    }
    arrow = stream(pa.RecordBatch.from_pylist([nulls]))
    replies = [client.post("/v1/score", json=one).json() for one in (left_out, nulls)]
    replies.append(client.post("/v1/score", content=arrow, headers={"Content-Type": ARROW}).json())
    for reply in replies:
        assert reply["scores"] == pytest.approx(replies[0]["scores"], abs=1e-7)
        assert reply["features"]["missing"] == {"user": False, "items": []}
        assert reply["experiments"] == {"graz": "new"}  # whose population is a stored city
    assert {row["unit"] for row in left(tmp_path)} == {"3"}


def test_rows_of_several_users_are_scored_as_they_are(client: TestClient, tmp_path: Path) -> None:
    several = infer(client, [3, 4], ["item-1", "item-1"])
    alone = infer(client, [3], ["item-1"])
    assert several.status_code == alone.status_code == 200
    assert several.json()["outputs"][0]["data"][0] != pytest.approx(alone.json()["outputs"][0]["data"][0], abs=1e-6)
    assert len(left(tmp_path)) == 1


def test_what_is_wrong_is_told_in_the_words_of_the_protocol(client: TestClient) -> None:
    item = {"name": "item_id", "shape": [1], "datatype": "BYTES", "data": ["a"]}
    price = {"name": "price", "shape": [1], "datatype": "BYTES", "data": ["cheap"]}
    reply = client.post("/v2/models/one/infer", json={"inputs": [item, price]})
    assert reply.status_code == 400
    assert reply.json()["error"].startswith("candidates.0.price: expected a number, found 'cheap'")


def experiment(**online: Any) -> dict[str, Any]:
    return {
        "name": "graz",
        "control": "old",
        "arms": [{"name": "old"}, {"name": "new", "bundle": "two"}],
        "allocation": {"weights": {"old": 0.000001, "new": 0.999999}},
        "population": [{"column": "city", "values": ["Graz"]}],
        "online": {"model": "one", **online},
    }


def test_a_population_is_chosen_by_what_is_stored_too(client: TestClient, tmp_path: Path) -> None:
    made = client.post("/v1/experiments", json=experiment())
    assert made.status_code == 201, made.text
    dealt = ask(client, 3, "item-1")
    assert dealt["experiments"] == {"graz": "new"}
    assert dealt["scores"] == pytest.approx(ask(client, 3, "item-1", model="two")["scores"])
    assert "experiments" not in ask(client, 4, "item-1")  # stored, and of elsewhere
    assert "experiments" not in ask(client, 99, "item-1")  # not stored
    asked = {"user": {"user_id": 3, "city": "Łódź"}, "candidates": [{"item_id": "item-1"}]}
    assert "experiments" not in client.post("/v1/score", json=asked).json()  # what the request gives wins


def test_who_names_a_model_by_the_protocol_is_in_no_experiment(client: TestClient, tmp_path: Path) -> None:
    before = infer(client, [3], ["item-1"]).json()
    assert client.post("/v1/experiments", json=experiment()).status_code == 201
    assert infer(client, [3], ["item-1"]).json() == before
    assert [row["experiment"] for row in left(tmp_path)] == [None, None]


def swapping(client: TestClient, monkeypatch: pytest.MonkeyPatch, scorer: Any) -> list[list[Any]]:
    """Let slot one get another bundle while the first request is looked up; return the items asked for."""
    asked: list[list[Any]] = []
    fetch = Store.fetch

    async def swapped(self: Store, spec: FeatureSpec, user_id: Any, item_ids: Sequence[Any]) -> Found:
        client.app.state.models.slots["one"].scorer = scorer  # type: ignore[attr-defined]
        asked.append(list(item_ids))
        return await fetch(self, spec, user_id, item_ids)

    monkeypatch.setattr(Store, "fetch", swapped)
    return asked


def test_items_are_looked_up_by_the_ids_of_the_bundle_that_scores(client, monkeypatch) -> None:
    scorer = copy.copy(client.app.state.models.scorer("one"))
    scorer.bundle = copy.copy(scorer.bundle)
    state = copy.copy(scorer.bundle.state)
    object.__setattr__(state, "spec", state.spec.model_copy(update={"item": None}))
    object.__setattr__(scorer.bundle, "state", state)
    asked = swapping(client, monkeypatch, scorer)
    assert "item-1" not in str(ask(client, 3, "item-1")["features"])
    assert asked == [["item-1"], [None]]


def test_a_version_that_was_asked_for_answers_whatever_is_swapped(client, monkeypatch) -> None:
    models = client.app.state.models
    mine, other = models.scorer("one").card.hash[:12], models.scorer("two")
    before = infer(client, [3], ["item-1"]).json()["outputs"]
    swapping(client, monkeypatch, other)
    reply = infer(client, [3], ["item-1"], path=f"/v2/models/one/versions/{mine}").json()
    assert (reply["model_version"], reply["outputs"]) == (mine, before)
    assert infer(client, [3], ["item-1"]).json()["outputs"] != before


def test_what_was_begun_before_a_swap_does_not_count_for_what_came_after(client, monkeypatch) -> None:
    models, drift = client.app.state.models, client.app.state.metrics.drift
    old, new = models.scorer("one"), models.scorer("two")
    ask(client, 3, "item-1")
    monkeypatch.setattr(models.slots["one"], "scorer", new)
    ask(client, 3, "item-1")
    swapping(client, monkeypatch, new)
    monkeypatch.setattr(models.slots["one"], "scorer", old)
    infer(client, [3], ["item-1"])  # ends with the old one
    assert drift._slots["one"].scorer is new


def test_a_watch_that_breaks_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any, ready: Any
) -> None:
    async def broken(self: Store) -> None:
        raise RuntimeError("a mistake")

    monkeypatch.setattr(Store, "watch", broken)
    monkeypatch.setattr(module, "open_features", lambda *_, **__: Store())
    with TestClient(create_app(Settings(model=(f"one={folder}/one",), features="here"))) as client:
        ready(client)
        assert ask(client, 3, "item-1")["scores"]
    (told,) = [record for record in caplog.records if record.name == "sluice.server"]
    assert "broken" in told.message and str(told.exc_info[1]) == "a mistake"
