"""How fast a model trains: against the usual loop, and against its own dense layers.

Three ways are timed in turn, a few steps each, over and over, so that a busy machine slows all of them:

ours
    the trainer's step on batches that the loader reads from encoded Parquet, reading included;
usual
    the same model in plain torch, with one ``nn.Embedding`` a field and ``torch.optim.Adam`` over everything,
    rows from a ``torch.utils.data.DataLoader`` that indexes in-memory arrays a batch at a time;
floor
    our dense layers alone, forward and backward on random input that takes a gradient, as embeddings do.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipelines.benchmarks.report import AtLeast, AtMost, BenchReport, JsonPath, known

if TYPE_CHECKING:
    import numpy as np

    from ctr_models.batch import Batch
    from ctr_models.model import CTRModel
    from ctr_models.schema import Schema
    from pipelines.training.loader import Loader

FIELDS, DIM, BATCH = 39, 16, 4096
TOWER = {"hidden": [400, 400, 400]}
MODELS: dict[str, dict[str, Any]] = {
    "finalmlp": {"mlp1": TOWER, "mlp2": TOWER, "heads": 10},
    "gdcn": {"mlp": TOWER, "cross_layers": 3},
}
VOCABULARIES = {"300k": 300_000, "4m": 4_000_000}
RATIOS = ("ratio_usual_300k", "ratio_usual_4m", "ratio_floor", "loader_share")


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Times that every way is measured.")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Steps of each in a round.")] = 4,
    rows: Annotated[int, typer.Option(min=BATCH, help="Rows of the encoded Parquet.")] = 262_144,
    json: JsonPath = None,
    at_least: AtLeast = None,
    at_most: AtMost = None,
) -> None:
    """Training speed: FinalMLP and GDCN, 39 fields x 16, towers 3 x 400, batch 4,096, on this machine.

    Example: sluice bench train --rounds 8 --at-least ratio_usual_4m=2 --at-least ratio_floor=0.75
    """
    import torch

    speeds = [f"rows_per_second_{name}_{size}" for size in VOCABULARIES for name in MODELS]
    known([*RATIOS, *speeds], at_least, at_most)
    columns = ["model, vocabulary", "ours rows/s", "usual", "floor", "ours/usual", "ours/floor", "loader %"]
    report = BenchReport("Training", columns)
    ratios: dict[str, list[float]] = {"300k": [], "4m": [], "floor": [], "loader": []}
    for size, vocabulary in VOCABULARIES.items():
        with tempfile.TemporaryDirectory() as folder:
            world = _World(Path(folder), vocabulary, rows)
            for name in MODELS:
                seconds, loader = _measure(world, name, rounds, steps)
                rate = {way: rounds * steps * BATCH / spent for way, spent in seconds.items()}
                usual, floor = rate["ours"] / rate["usual"], rate["ours"] / rate["floor"]
                share = (loader.waited + loader.worked) / seconds["ours"]
                report.row(
                    f"{name}, {vocabulary:,}", rate["ours"], rate["usual"], rate["floor"], usual, floor, 100 * share
                )
                report.figures[f"rows_per_second_{name}_{size}"] = rate["ours"]
                ratios[size].append(usual)
                ratios["floor"].append(floor)
                ratios["loader"].append(share)
    worst = (min(ratios["300k"]), min(ratios["4m"]), min(ratios["floor"]), max(ratios["loader"]))
    report.figures |= dict(zip(RATIOS, worst, strict=True))
    report.note(
        f"{torch.get_num_threads()} threads, {rounds} rounds of {steps} steps each, in turn; figures: the worst"
    )
    report.note("loader %: the trainer's waiting plus the loader thread's CPU time, over the time of the steps")
    report.finish(json, at_least, at_most)


class _World:
    """Rows with skewed ids, as encoded Parquet and in memory."""

    def __init__(self, folder: Path, vocabulary: int, rows: int) -> None:
        import numpy as np
        import pyarrow as pa
        import pyarrow.parquet as pq

        from ctr_models.schema import Schema

        weights = 1.0 / np.arange(1, FIELDS + 1)
        sizes = np.maximum(4, vocabulary * weights / weights.sum()).astype(int)
        self.schema: Schema = Schema.of({f"c{i}": int(n) for i, n in enumerate(sizes)}, dim=DIM)
        random = np.random.default_rng(0)
        self.ids: np.ndarray = np.stack(
            [(n * random.random(rows) ** 3).astype(np.int32) for n in sizes], axis=1
        )  # (rows, FIELDS)
        self.label: np.ndarray = (random.random(rows) < 0.25).astype(np.float32)
        self.file = folder / "part-00000.parquet"
        columns = {f"c{i}": self.ids[:, i] for i in range(FIELDS)}
        zeros = np.zeros(rows, dtype=np.int64)
        table = pa.table({**columns, "__label__": self.label, "__user__": zeros, "__row__": np.arange(rows)})
        pq.write_table(table, self.file, row_group_size=65_536, compression="lz4")


def _measure(world: _World, name: str, rounds: int, steps: int) -> tuple[dict[str, float], Loader]:
    ours, loader, close = _ours(world, name)
    ways: dict[str, Callable[[int], None]] = {
        "ours": ours,
        "usual": _usual(world, name),
        "floor": _floor(world, name),
    }
    seconds = dict.fromkeys(ways, 0.0)
    for run in ways.values():
        run(steps)  # warm caches, allocator and optimiser state
    loader.waited = loader.worked = 0.0
    for _ in range(rounds):
        for way, run in ways.items():
            begin = time.perf_counter()
            run(steps)
            seconds[way] += time.perf_counter() - begin
    close()
    return seconds, loader


def _model(world: _World, name: str) -> CTRModel:
    import torch

    from ctr_models.model import create_model

    torch.manual_seed(0)
    return create_model(name, world.schema, **MODELS[name])


def _ours(world: _World, name: str) -> tuple[Callable[[int], None], Loader, Callable[[], None]]:
    import torch

    from pipelines.training.config import TrainConfig
    from pipelines.training.distributed import Ranks
    from pipelines.training.engine import Engine
    from pipelines.training.loader import Loader

    engine = Engine(_model(world, name), TrainConfig(), Ranks(0, 1, torch.device("cpu")))
    engine.train()
    loader = Loader([world.file], world.schema, batch_size=BATCH, shuffle=True, window_rows=65_536)

    def batches() -> Iterator[Batch]:
        while True:
            yield from loader

    stream = batches()

    def run(steps: int) -> None:
        for _ in range(steps):
            engine.step(next(stream))
        # What the loader prepares while others are timed must be paid for here.
        loader.settle()

    return run, loader, stream.close  # type: ignore[attr-defined]


def _usual(world: _World, name: str) -> Callable[[int], None]:
    import torch
    from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

    from ctr_models.batch import Batch

    ids, label = world.ids.astype("int64"), world.label

    class Rows(Dataset):
        def __len__(self) -> int:
            return len(label)

        def __getitem__(self, index: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.from_numpy(ids[index]), torch.from_numpy(label[index])

    rows: Any = Rows()
    data = DataLoader(rows, sampler=BatchSampler(RandomSampler(rows), BATCH, drop_last=True), batch_size=None)
    model = _model(world, name)
    model.inputs.embedding.bags = _embeddings_a_field(world.schema)  # type: ignore[union-attr]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    empty = torch.empty(0)

    def batches() -> Iterator[Any]:
        while True:
            yield from data

    stream = batches()
    model.train()

    def run(steps: int) -> None:
        for _ in range(steps):
            values, y = next(stream)
            optimizer.zero_grad()
            # Plain ids in place of a KeyedJaggedTensor: the usual loop has no need of one.
            loss, _ = model.loss(Batch(empty, values, empty, y, empty))  # type: ignore[arg-type]
            loss.backward()
            optimizer.step()

    return run


def _embeddings_a_field(schema: Schema) -> Any:
    import torch
    from torch import nn
    from torchrec.sparse.jagged_tensor import KeyedTensor

    class PerField(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tables = nn.ModuleList(nn.Embedding(f.rows, f.dim) for f in schema.sparse)
            for table in self.tables:
                nn.init.normal_(table.weight, std=1e-4)  # type: ignore[arg-type]
            self._keys, self._dims = [f.name for f in schema.sparse], [f.dim for f in schema.sparse]

        def forward(self, ids: torch.Tensor) -> KeyedTensor:
            values = torch.cat([table(ids[:, i]) for i, table in enumerate(self.tables)], dim=1)
            return KeyedTensor(keys=self._keys, length_per_key=self._dims, values=values)

    return PerField()


def _floor(world: _World, name: str) -> Callable[[int], None]:
    import torch
    from torch import nn

    from ctr_models.batch import Batch
    from ctr_models.embeddings import Embedded
    from pipelines.training.cpu import speed_up

    model = _model(world, name)
    speed_up(model)
    names, dims = model.inputs.embedding.names, model.inputs.embedding.dims  # type: ignore[union-attr]
    x = torch.randn(BATCH, FIELDS * DIM)

    class Random(nn.Module):
        def forward(self, batch: Batch) -> Embedded:
            return Embedded(x.detach().requires_grad_(), names, dims)  # type: ignore[arg-type]

    model.inputs.embedding = Random()  # type: ignore[union-attr]
    empty = torch.empty(0)
    y = (torch.rand(BATCH) < 0.25).float()
    batch = Batch(empty, empty, empty, y, empty)  # type: ignore[arg-type]
    model.train()

    def run(steps: int) -> None:
        for _ in range(steps):
            loss, _ = model.loss(batch)
            loss.backward()
            model.zero_grad()

    return run
