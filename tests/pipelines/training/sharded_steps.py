"""Run by torchrun: twenty steps for each way of sharding, then whole runs. Not a test itself."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch

from conftest import World, make_config, make_schema, make_world
from ctr_models import create_model
from pipelines.training import checkpoint
from pipelines.training.config import TrainConfig
from pipelines.training.distributed import Ranks, ranks
from pipelines.training.engine import Engine
from pipelines.training.loader import Loader
from pipelines.training.predict import score
from pipelines.training.trainer import train

STEPS = 20
CASES: dict[str, dict] = {
    "row_wise": {"optimizer": "rowwise_adagrad"},
    "table_wise": {"optimizer": "rowwise_adagrad"},
    "column_wise": {"optimizer": "adagrad"},
    "data_parallel": {"optimizer": "rowwise_adagrad"},
    "row_wise-norm": {"optimizer": "sgd"},
    "data_parallel-dense": {"backend": "dense", "l2": 1e-3},
    "row_wise-tasks": {"optimizer": "rowwise_adagrad"},
}


def settings(case: str) -> TrainConfig:
    kind, _, variant = case.partition("-")
    # Under batch normalisation a bias has no gradient but rounding, which Adam would blow up to whole steps.
    optimizer = {"name": "sgd", "lr": 0.1} if variant == "norm" else {}
    return TrainConfig.model_validate(
        {"embedding": {"lr": 0.05, **CASES[case]}, "sharding": {"kind": kind}, "optimizer": optimizer}
    )


def model(world: World, case: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if case.endswith("-tasks"):
        small = {"hidden": [16]}
        return create_model("mmoe", world.schema, embedding_std=0.1, expert=small, tower=small, experts=3)
    mlp = {"hidden": [16], "batch_norm": case.endswith("-norm")}
    return create_model("finalmlp", world.schema, embedding_std=0.1, mlp1=mlp, mlp2=mlp, heads=4)


def steps(world: World, case: str, me: Ranks) -> Engine:
    engine = Engine(model(world, case), settings(case), me)
    engine.train()
    loader = iter(
        Loader(
            world.files("train"),
            world.schema,
            batch_size=24,
            seed=1,
            shuffle=True,
            parts=2,
            rank=me.rank,
            world=me.world,
        )
    )
    for _ in range(STEPS):
        engine.step(next(loader))
    loader.close()
    return engine


def lay(folder: Path) -> None:
    """Write the data, before the job."""
    make_world(folder / "plain")
    make_world(folder / "history", sequences=True)
    make_world(folder / "tasks", tasks=True)


def world_of(folder: Path, case: str) -> World:
    if case.endswith("-tasks"):
        return World(folder / "tasks", make_schema().model_copy(update={"tasks": ("conversion",)}))
    sequences = not case.startswith("data_parallel")  # the history's table can't be replicated
    return World(folder / ("history" if sequences else "plain"), make_schema(sequences=sequences))


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    with ranks() as me:
        torch.seed()
        for case in CASES:
            engine = steps(world_of(folder, case), case, me)
            weights = {f"model/{name}": tensor for name, tensor in engine.weights().items()}
            checkpoint.save(folder / "found" / case, weights, {}, me)
            if engine.model.tasks:
                world, tasks = world_of(folder, case), engine.model.tasks
                found = score(engine.logits, world, "valid", world.schema, batch_size=64, me=me, tasks=tasks)
                if me.first:
                    (folder / "tasks.json").write_text(json.dumps(found.metrics()))
        config = make_config(folder, epochs=2, parts=2, batch_size=48, sharding={"kind": "row_wise"})
        result = train(config, world_of(folder, "row_wise"), run_dir=folder / "run", progress=False)
        assert result.first == (me.rank == 0)
        # The same run, ended after one epoch and taken up again.
        world, again = world_of(folder, "row_wise"), folder / "again"
        half = config.model_copy(update={"train": config.train.model_copy(update={"epochs": 1})})
        train(half, world, run_dir=again, progress=False)
        if me.first:
            (again / "phases" / "0-fit.json").unlink()
            shutil.copytree(again, folder / "half")
        me.wait()
        resumed = train(config, world, run_dir=again, resume=True, progress=False)
        whole, taken_up = result.model.state_dict(), resumed.model.state_dict()
        assert all(torch.equal(whole[name], tensor) for name, tensor in taken_up.items())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
