"""The training loop: epochs, evaluation, stopping, checkpoints."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ctr_models.errors import ConfigError
from ctr_models.gates import Gate
from ctr_models.model import CTRModel
from pipelines.evaluation.ranking import Rankings
from pipelines.training.checkpoint import Checkpoints, load, save, step_name
from pipelines.training.config import OPERATIONAL, TrainConfig
from pipelines.training.engine import Engine
from pipelines.training.loader import Loader
from pipelines.training.optimizers import Progress, judge
from pipelines.training.predict import Predictions, score
from pipelines.training.progress import Bar
from pipelines.training.recipes import Context

TELEMETRY_ROWS = 4096
SNAPSHOT = "snapshot"


def fit(
    context: Context,
    directory: Path,
    *,
    begin: Callable[[CTRModel], None] | None = None,
    snapshot: int | None = None,
) -> dict[str, Any]:
    """Train ``context.model`` and keep its best weights.

    Args:
        context: model, data and settings.
        directory: of this phase, for its checkpoints.
        begin: changes the freshly made model: gives it other weights, or masks.
        snapshot: an epoch, counted from 0; the weights as it begins are kept.

    Returns:
        Plain values: ``weights`` (folder of the best weights), ``last`` (of the last step's checkpoint),
        ``snapshot`` (of those asked for, or None), ``history`` (a record an epoch), ``best_epoch``,
        ``rows_per_second`` of the training steps.

    Raises:
        ConfigError: the loss is no longer finite, or the configuration is not the one that began the run.
    """
    return _Fit(context, directory, begin, snapshot).run()


class _Fit:
    def __init__(
        self,
        context: Context,
        directory: Path,
        begin: Callable[[CTRModel], None] | None,
        snapshot: int | None,
    ) -> None:
        self.context, self.me, self.data = context, context.me, context.data
        self.directory, self.snapshot = directory, snapshot
        self.config: TrainConfig = context.config.train
        self.parts = self.config.parts or self.me.world
        torch.manual_seed(context.config.seed)
        model = context.model.build(context.schema)
        if begin is not None:
            begin(model)
        counts = None
        if self.config.embedding.l2 and self.config.embedding.l2_mode == "touched":
            counts = {table: self.data.state.counts(table) for table in context.schema.tables}
        self.engine = Engine(model, self.config, self.me, counts)
        if self.me.world > 1:  # equal weights everywhere, but every rank drops other activations
            torch.manual_seed(context.config.seed + 7919 * (self.me.rank + 1))
        self.annealed = [gate for gate in model.gates() if type(gate).anneal is not Gate.anneal]
        self.fingerprint = _fingerprint(context, self.parts, bool(self.annealed))
        self.checkpoints = Checkpoints(directory, self.config.keep_checkpoints, self.me)
        self.progress, self.best = Progress(), ""
        self.history: list[dict[str, Any]] = []
        self.steps_done = 0
        self.files = self.data.files("train")

    def run(self) -> dict[str, Any]:
        if self.context.resume:
            self._resume()
        progress = self.progress
        first = self._loader(progress.epoch, 0)
        total = first.steps * self.config.epochs
        with Bar(self.context.progress and self.me.first, total, self.steps_done) as bar:
            while progress.epoch < self.config.epochs and not progress.done:
                self._epoch(bar)

        def inside(name: str) -> str:
            return self.checkpoints.path(name).relative_to(self.context.run_dir).as_posix()

        return {
            "weights": inside(self.best),
            "last": inside(step_name(self.steps_done)),
            "snapshot": None if self.snapshot is None else inside(SNAPSHOT),
            "history": self.history,
            "best_epoch": progress.best_epoch + 1,
            "rows_per_second": progress.rows / progress.seconds if progress.seconds else 0.0,
        }

    def _loader(self, epoch: int, start_step: int) -> Loader:
        return Loader(
            self.files,
            self.context.schema,
            batch_size=self.config.batch_size,
            seed=self.context.config.seed,
            epoch=epoch,
            shuffle=True,
            parts=self.parts,
            rank=self.me.rank,
            world=self.me.world,
            window_rows=self.config.window_rows,
            start_step=start_step,
            pin=self.me.device.type == "cuda",
        )

    def _epoch(self, bar: Bar) -> None:
        progress, engine, every = self.progress, self.engine, self.config.checkpoint_every
        if progress.epoch == self.snapshot and progress.step == 0:
            save(self.directory / SNAPSHOT, _named(engine.weights()), {"epoch": progress.epoch}, self.me)
        engine.scale_lr(progress.lr_scale)
        engine.train()
        loader = self._loader(progress.epoch, progress.step)
        loss = torch.tensor(progress.loss, dtype=torch.float64, device=self.me.device)
        begin = time.perf_counter()
        for batch in loader:
            rows = len(batch)
            for gate in self.annealed:
                gate.anneal((progress.epoch + progress.step / loader.steps) / self.config.epochs)
            loss += engine.step(batch.to(self.me.device, non_blocking=True))
            progress.step += 1
            self.steps_done += 1
            progress.rows += rows * self.me.world
            if bar.advance(rows * self.me.world):
                self._check_finite(float(loss))
            if every and progress.step % every == 0 and progress.step < loader.steps:
                progress.loss = float(loss)
                self._check_finite(progress.loss)  # a checkpoint of it could never be used
                progress.seconds += time.perf_counter() - begin
                self._save()
                begin = time.perf_counter()
        progress.loss = float(loss)
        progress.seconds += time.perf_counter() - begin
        self._check_finite(progress.loss)
        with engine.averaged():
            record = self._evaluate(loader.steps, bar)
        progress.epoch, progress.step, progress.loss = progress.epoch + 1, 0, 0.0
        self._save()
        if self.me.first:
            self.context.on_epoch(record)
        bar.epoch(record)

    def _evaluate(self, steps: int, bar: Bar) -> dict[str, Any]:
        """Judge the epoch on the valid rows and keep its weights if they are the best; return its record."""
        progress, engine, size = self.progress, self.engine, self.config.eval_batch_size
        bar.say("evaluating")
        begin = time.perf_counter()
        schema, tasks, own = self.context.schema, engine.model.tasks, self.context.judge
        found: Predictions | Rankings
        if own is None:
            found = score(engine.logits, self.data, "valid", schema, batch_size=size, me=self.me, tasks=tasks)
        else:
            found = own(engine.model, self.data, "valid", size)
        metrics = self.me.share(found.metrics() if self.me.first else {})
        record: dict[str, Any] = {
            "epoch": progress.epoch + 1,
            "lr": self.config.optimizer.lr * progress.lr_scale,
            "train_loss": progress.loss / steps,
            **{f"valid_{name}": value for name, value in metrics.items()},
            "rows_per_second": progress.rows / progress.seconds,
            "evaluation_seconds": time.perf_counter() - begin,
        }
        default = "auc" if own is None else "ndcg_10"
        monitor = self.config.stopping.monitor if self.config.stopping else default
        value = metrics.get(monitor, math.nan) * (-1 if monitor == "logloss" else 1)
        if math.isnan(value):
            raise ConfigError(
                f"{monitor} of the valid rows is undefined",
                where="train.stopping.monitor",
                remedy="monitor logloss, or give valid rows of both classes (for gauc: inside one user)",
            )
        record.update(self._telemetry())
        better = judge(progress, value, self.config.stopping, self.config.plateau, self.config.optimizer.lr)
        if better:
            self.best = self.checkpoints.save_best(progress.epoch, _named(engine.weights()))
        record["best"] = better
        self.history.append(record)
        return record

    def _telemetry(self) -> dict[str, float]:
        """What each gate does to the first valid rows, as ``gate/<path>/<figure>``."""
        if self.me.world > 1 or not self.engine.model.gates():
            return {}  # the hooks would see one rank's modules only
        loader = Loader(self.data.files("valid")[:1], self.context.schema, batch_size=TELEMETRY_ROWS)
        batches = iter(loader)
        batch = next(batches)
        batches.close()  # type: ignore[attr-defined]
        found = self.engine.model.telemetry(batch.to(self.me.device))
        return {f"gate/{path}/{name}": value for path, one in found.items() for name, value in one.items()}

    def _check_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise ConfigError(
                f"the loss is {loss} in epoch {self.progress.epoch + 1}, step {self.progress.step}",
                where="train",
                remedy="lower train.optimizer.lr or train.embedding.lr, or set train.clip_norm",
            )

    def _save(self) -> None:
        content = {
            "fingerprint": self.fingerprint,
            "progress": self.progress.to_dict(),
            "history": self.history,
            "best": self.best,
            "steps_done": self.steps_done,
        }
        self.checkpoints.save(self.steps_done, self.engine.state(), content)

    def _resume(self) -> None:
        found = self.checkpoints.latest()
        if found is None:
            if self.me.first:
                logging.getLogger(__name__).info("no whole checkpoint yet; training from the start")
            return
        path, content = found
        if content["fingerprint"] != self.fingerprint:
            raise ConfigError(
                "model, features or training settings are not those that began this run",
                where=str(path),
                remedy="resume with the run's own config.yaml, or start a new run",
            )
        self.engine.prepare_state()
        load(path, self.engine.state(), self.me)
        self.progress = Progress(**content["progress"])
        self.history, self.best, self.steps_done = content["history"], content["best"], content["steps_done"]
        self.engine.restored(self.steps_done)


def _named(weights: dict[str, Any]) -> dict[str, Any]:
    return {f"model/{name}": tensor for name, tensor in weights.items()}


def _fingerprint(context: Context, parts: int, annealed: bool) -> str:
    """Hash of all that decides the weights; things such as the number of epochs may change on resume."""
    free = set(OPERATIONAL)
    if not annealed:  # by the share of all epochs
        free.add("epochs")
    if context.config.train.selection_lr is None:
        free.add("selection_lr")
    content = {
        "model": context.model.to_dict(),
        "schema": context.schema.model_dump(mode="json"),
        "data": context.data.state.hash,
        "seed": context.config.seed,
        "train": context.config.train.model_dump(mode="json", exclude=free),
        "parts": parts,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
