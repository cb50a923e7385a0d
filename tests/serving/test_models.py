"""Bundles come and go while requests are answered: none fails, and each answer is one bundle's."""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI

from ctr_models.errors import ArtifactError
from pipelines.release.bundle import Bundle
from pipelines.release.example import example_bundle, example_log
from pipelines.release.promotion import promote
from pipelines.release.registry import register
from pipelines.release.store import default_uri
from serving.app import create_app
from serving.models import LONGEST_PAUSE, Models
from serving.schemas import Refused
from serving.settings import Settings

SWAPS, CLIENTS = 50, 2
SMALL = {"name": "dnn", "mlp": {"hidden": [8]}}
REQUEST = {
    "user": {"user_id": 3, "city": "Graz"},
    "candidates": example_log(5, seed=5).select("item_id", "price", "tags").to_dicts(),
}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> list[Bundle]:
    folder = tmp_path_factory.mktemp("made")
    return [example_bundle(folder / name, model=SMALL, seed=seed) for seed, name in enumerate(("one", "two"))]


def damaged(bundle: Bundle, folder: Path) -> Path:
    copy = Path(shutil.copytree(bundle.directory, folder))
    weights = bytearray((copy / "weights.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "weights.safetensors").write_bytes(weights)
    return copy


def point(link: Path, at: Path) -> None:
    """Let a link point elsewhere, in one step."""
    aside = link.with_suffix(".aside")
    aside.symlink_to(at)
    os.replace(aside, link)


def expected(bundle: Bundle) -> np.ndarray:
    return bundle.score_request(REQUEST["user"], {}, REQUEST["candidates"])


@asynccontextmanager
async def serving(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            while (await client.get("/readyz")).status_code != 200:
                await asyncio.sleep(0.01)
            yield client


def test_50_swaps_under_load(bundles: list[Bundle], tmp_path: Path) -> None:
    link = tmp_path / "current"
    point(link, bundles[0].directory)
    bad = damaged(bundles[0], tmp_path / "bad")
    right = {bundle.hash: expected(bundle) for bundle in bundles}
    seen: list[str] = []

    async def ask(client: httpx.AsyncClient, done: asyncio.Event) -> int:
        count = 0
        while not done.is_set():
            reply = await client.post("/v1/score", json=REQUEST)
            assert reply.status_code == 200, reply.text
            answer = reply.json()
            np.testing.assert_allclose(answer["scores"], right[answer["model"]["hash"]], atol=1e-6)
            seen.append(answer["model"]["hash"])
            count += 1
            await asyncio.sleep(0.02)  # a stream, which leaves the machine time to load
        return count

    async def run() -> tuple[str, dict[str, Any]]:
        app = create_app(Settings(model=f"clicks={link}", poll_seconds=0))
        async with serving(app) as client:
            done = asyncio.Event()
            clients = [asyncio.create_task(ask(client, done)) for _ in range(CLIENTS)]
            for swap in range(1, SWAPS + 1):
                if swap == SWAPS // 2:
                    point(link, bad)
                    await app.state.models.refresh()
                    state = (await client.get("/readyz")).json()
                    assert state["model"]["hash"] == bundles[(swap - 1) % 2].hash
                    assert "weights.safetensors: SHA-256 expected" in state["models"][0]["problem"]
                point(link, bundles[swap % 2].directory)
                await app.state.models.refresh()
            done.set()
            assert all(count > SWAPS for count in await asyncio.gather(*clients))
            return (await client.get("/metrics")).text, (await client.get("/readyz")).json()

    told, state = asyncio.run(run())
    assert f'sluice_model_loads_total{{result="swapped",slot="clicks"}} {SWAPS + 1}.0' in told
    assert 'sluice_model_loads_total{result="refused",slot="clicks"} 1.0' in told
    assert "problem" not in state["models"][0]
    changes = sum(a != b for a, b in itertools.pairwise(seen))
    assert changes >= SWAPS // 2  # the stream saw both, again and again


def test_an_alias_that_moves_is_followed(bundles: list[Bundle], tmp_path: Path) -> None:
    uri = default_uri(tmp_path)
    versions = [register(bundle.directory, "clicks", uri) for bundle in bundles]
    promote("clicks", versions[0], tracking_uri=uri)

    async def run() -> list[int | None]:
        swapped = []
        settings = Settings(model="models:/clicks@champion", tracking_uri=uri, poll_seconds=0.05)
        models = Models(settings, on_swap=lambda slot, card: swapped.append(card.version))
        await models.load()
        watching = asyncio.create_task(models.watch())
        await asyncio.to_thread(promote, "clicks", versions[1], tracking_uri=uri)
        while len(swapped) < 2:
            await asyncio.sleep(0.02)
        assert models.scorer().card.hash == bundles[1].hash
        watching.cancel()
        models.close()
        return swapped

    assert asyncio.run(asyncio.wait_for(run(), 60)) == versions


def test_a_refused_bundle_is_tried_again_after_a_pause_and_a_lost_folder_is_told(
    bundles: list[Bundle], tmp_path: Path
) -> None:
    link = tmp_path / "current"
    point(link, bundles[0].directory)
    refusals: list[str] = []

    async def run() -> None:
        models = Models(Settings(model=str(link)), on_refusal=lambda slot, reason: refusals.append(reason))
        await models.load()
        point(link, damaged(bundles[1], tmp_path / "bad"))
        for _ in range(3):
            await models.refresh()
        assert len(refusals) == 1
        slot = models.slots[models.default.name]
        slot.failures, slot.again = 2000, 0.0  # as after months
        await models.refresh()
        assert len(refusals) == 2
        assert slot.again <= time.monotonic() + LONGEST_PAUSE
        away = link.rename(tmp_path / "away")
        await models.refresh()
        assert "no bundle here any more" in models.status()[0]["problem"]
        away.rename(link)
        await models.refresh()
        assert models.status()[0]["problem"] == refusals[0]
        link.unlink()
        await models.refresh()
        assert "no bundle here any more" in models.status()[0]["problem"]
        point(link, bundles[0].directory)
        await models.refresh()
        assert models.status()[0]["model"]["hash"] == bundles[0].hash
        assert "problem" not in models.status()[0]
        models.close()

    asyncio.run(run())


def test_requests_name_a_slot(bundles: list[Bundle]) -> None:
    async def run() -> None:
        app = create_app(Settings(model=[f"{name}={b.directory}" for name, b in zip("ab", bundles, strict=True)]))
        async with serving(app) as client:
            asked = [("/v1/score", {}), ("/v1/score", {"model": "b"}), ("/v1/score?model=b", {})]
            for (path, more), bundle in zip(asked, (bundles[0], bundles[1], bundles[1]), strict=True):
                answer = (await client.post(path, json={**REQUEST, **more})).json()
                assert answer["model"]["hash"] == bundle.hash
                np.testing.assert_allclose(answer["scores"], expected(bundle), atol=1e-6)
            for path, more in (("/v1/score", {"model": "c"}), ("/v1/score?model=c", {})):
                reply = await client.post(path, json={**REQUEST, **more})
                assert reply.status_code == 404
                assert reply.json()["detail"][0] == {
                    "loc": ["model"],
                    "msg": "no such model; known: 'a', 'b'",
                    "type": "unknown_model",
                }
            told = (await client.get("/v1/models")).json()["models"]
            assert [m["slot"] for m in told] == ["a", "b"]
            assert [m["model"]["hash"] for m in told] == [bundle.hash for bundle in bundles]

    asyncio.run(run())


def test_before_a_bundle_is_there_the_slot_says_why(tmp_path: Path) -> None:
    async def run() -> None:
        models = Models(Settings(model=str(tmp_path / "nowhere")))
        with pytest.raises(Refused) as caught:
            models.scorer()
        assert caught.value.status == 503
        with pytest.raises(ArtifactError):
            await models.load()
        with pytest.raises(Refused, match="no such folder"):
            models.scorer()
        models.close()

    asyncio.run(run())
