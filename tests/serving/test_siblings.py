"""Metrics of several workers become one exposition that Prometheus can read."""

from __future__ import annotations

import asyncio
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from pipelines.release.example import example_bundle
from serving.app import create_app
from serving.monitoring import Metrics
from serving.settings import Settings
from serving.siblings import Place, Siblings, merged
from serving.stages import Stages


def counted(requests: int) -> Metrics:
    metrics = Metrics()
    for _ in range(requests):
        metrics.answered("/v1/score", 200, 0.003, Stages())
    metrics.errors.labels('odd "{reason}"\nrows 1').inc()
    return metrics


def by_worker(text: str, sample: str) -> dict[str, float]:
    families = list(text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families)
    return {s.labels["worker"]: s.value for family in families for s in family.samples if s.name == sample}


def test_every_sample_is_there_once_with_its_worker(tmp_path: Path) -> None:
    async def run() -> str:
        first, second = (Siblings(Place(i, 3, tmp_path), counted(i + 1)) for i in range(2))
        await first.open()
        await second.open()
        told = await second.exposition()
        await first.close()
        await second.close()
        return told.decode()

    told = asyncio.run(run())
    assert by_worker(told, "sluice_worker_up") == {"0": 1, "1": 1, "2": 0}
    assert by_worker(told, "sluice_requests_total") == {"0": 1, "1": 2}
    assert by_worker(told, "sluice_request_seconds_count") == {"0": 1, "1": 2}
    assert by_worker(told, "sluice_queue_rows") == {"0": 0, "1": 0}
    errors = [s for f in text_string_to_metric_families(told) if f.name == "sluice_errors" for s in f.samples]
    counted_errors = [s for s in errors if s.name.endswith("_total") and s.value]
    assert {s.labels["reason"] for s in counted_errors} == {'odd "{reason}"\nrows 1'}


def test_what_is_merged_says_what_each_said() -> None:
    one = counted(3).exposition()
    names = [(s.name, s.labels, s.value) for f in text_string_to_metric_families(one.decode()) for s in f.samples]
    both = list(text_string_to_metric_families(merged({0: one}).decode()))
    found = [
        (s.name, {k: v for k, v in s.labels.items() if k != "worker"}, s.value) for f in both[1:] for s in f.samples
    ]
    assert found == names


def test_the_socket_of_a_worker_that_died_is_taken_over(tmp_path: Path) -> None:
    async def run() -> None:
        place = Place(0, 1, tmp_path)
        place.socket(0).touch()
        siblings = Siblings(place, counted(1))
        await siblings.open()
        assert b'sluice_worker_up{worker="0"} 1' in await siblings.exposition()
        await siblings.close()

    asyncio.run(run())


def test_a_worker_that_hangs_is_not_waited_for(tmp_path: Path) -> None:
    async def hang(*_: object) -> None:
        await asyncio.sleep(60)

    async def run() -> float:
        server = await asyncio.start_unix_server(hang, tmp_path / "1.sock")
        siblings, loop = Siblings(Place(0, 2, tmp_path), counted(1)), asyncio.get_running_loop()
        begin = loop.time()
        told = await siblings.exposition()
        server.close()
        assert b'sluice_worker_up{worker="1"} 0' in told
        return loop.time() - begin

    assert asyncio.run(run()) < 10


def test_a_worker_that_others_can_not_reach_is_not_ready(tmp_path: Path) -> None:
    """Or it would say that it is ready, and end before it listens, again and again."""
    bundle = example_bundle(tmp_path / "bundle")
    ready: list[object] = []
    failed: list[Exception] = []
    app = create_app(
        Settings(model=(str(bundle.directory),)),
        on_ready=ready.append,
        on_failure=failed.append,
        place=Place(0, 2, tmp_path / "gone"),
    )

    async def run() -> None:
        async with app.router.lifespan_context(app):
            pass

    asyncio.run(run())
    assert [type(error) for error in failed] == [FileNotFoundError]
    assert not ready
