"""The steps of ``sluice demo``, each resting on what the one before left."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipelines.config import RunConfig, dump_config, parse_config, plain_config
from pipelines.datasets.base import RawData, open_data
from pipelines.experiments.report import ReportArm, write_report
from pipelines.experiments.statistics import Difference, compare
from pipelines.features.files import atomic_write
from pipelines.features.prepare import EncodedData, prepare
from pipelines.release.bundle import SCORE, Bundle
from pipelines.release.golden import golden_rows
from pipelines.release.promotion import promote
from pipelines.release.registry import model_names, register, releases
from pipelines.release.sample import sampled
from pipelines.release.store import connect, quiet
from pipelines.training.predict import Predictions, predict
from pipelines.training.tracking import tracking_uri
from pipelines.training.trainer import train
from pipelines.training.truth import best_possible
from serving.client import running_server
from serving.scorer import plain_row

STEPS = ("logs", "features", "training", "comparison", "registry", "serving", "report")
MODELS = {"finalmlp": ("feature", ("none", "sigmoid2")), "gdcn": ("cross", ("none", "sigmoid"))}
"""Each model with the slot whose gates are compared; the first gate is the control."""
RESULT = "arm.json"
REQUESTS, CANDIDATES = 50, 100
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Arm:
    """A trained model with its gate.

    Args:
        model, slot, gate: what it is.
        bundle: released.
        run_id: its MLflow run.
        history: a record an epoch.
        rows_per_second: of its training.
        test: what it says of the test rows.
    """

    model: str
    slot: str
    gate: str
    bundle: Bundle
    run_id: str | None
    history: list[dict[str, Any]]
    rows_per_second: float
    test: Predictions

    @property
    def name(self) -> str:
        """As it stands in tables."""
        return f"{self.model}, gate {self.gate}"


class Walkthrough:
    """One call of the demo.

    Args:
        out: folder for everything.
        data: MovieLens-100K; None simulates.
        rows: of the simulated world.
        screen: where it is told.
    """

    def __init__(self, out: Path, data: Path | None, rows: int, screen: Console) -> None:
        self.out, self.screen, self.step = out, screen, 0
        source: dict[str, Any] = (
            {"source": "movielens_100k", "path": str(data)}
            if data is not None
            else {"source": "click_world", "path": str(out / f"world-{rows}"), "options": {"rows": rows}}
        )
        self.base = {
            "name": "movielens" if data is not None else "clicks",
            "workdir": str(out),
            "data": source,
            "train": {
                "epochs": 4,
                "batch_size": 2048,
                "embedding": {"backend": "fused", "lr": 0.05},
                "stopping": {"patience": 1},
                "plateau": None,
                "threads": 1,
            },
            "tracking": {"system_metrics": False},
        }

    def run(self) -> dict[str, Any]:
        """Take every step; return the figures."""
        quiet()
        # Models this small gain nothing from more threads, and lose much when another process wants a core.
        torch.set_num_threads(1)
        begin = time.perf_counter()
        config = parse_config(self.base, "demo")
        self.uri = tracking_uri(config)
        with self._step("as they came"):
            raw = open_data(config.data)
            self._say(f"{config.data.source}, parts: {', '.join(raw.parts)}")
        with self._step("fitted on the training rows, encoded to Parquet"):
            data = prepare(raw, config.features, workdir=self.out, seed=config.seed)
            counted = ", ".join(f"{data.rows(s):,} {s}" for s in ("train", "valid", "test"))
            self._say(f"{len(data.schema.fields)} fields, {counted} rows: {data.path}")
        with self._step("two models, two gates each"):
            connect(self.uri)
            arms = [
                self._arm(raw, data, model, slot, gate) for model, (slot, gates) in MODELS.items() for gate in gates
            ]
        with self._step("on the test rows, read once"):
            truth = best_possible(data, "test")
            differences = self._compare(arms)
            self._table(arms, truth)
            self._differences(differences)
        with self._step("the best on the validation rows becomes champion"):
            best = max(arms, key=lambda arm: arm.bundle.metrics["valid_auc"])
            version = self._release(best, config.name)
        with self._step("raw values in, scores out"):
            sample, served = self._serve(best, config.name)
        with self._step("one HTML file"):
            path = self._report(arms, differences, truth, sample, data, best, version)
        seconds = time.perf_counter() - begin
        self.screen.print(f"\ndone in {seconds:.0f} s. The report:")
        self.screen.print(str(path), style="bold cyan", soft_wrap=True)
        return {
            "arms": {arm.name: {**arm.bundle.metrics, "rows_per_second": arm.rows_per_second} for arm in arms},
            "truth": truth,
            "differences": [vars(d) for d in differences],
            "champion": {"arm": best.name, "name": config.name, "version": version, "hash": best.bundle.hash},
            "serving": served,
            "report": str(path),
            "seconds": seconds,
        }

    @contextmanager
    def _step(self, what: str) -> Iterator[None]:
        self.step += 1
        title = Text.assemble(
            (f"{self.step}/{len(STEPS)} ", "bold cyan"), (STEPS[self.step - 1], "bold"), f"  {what}"
        )
        self.screen.print()
        self.screen.print(title, soft_wrap=True)
        begin = time.perf_counter()
        yield
        self._say(f"[dim]{time.perf_counter() - begin:.1f} s[/]")

    def _say(self, line: str) -> None:
        self.screen.print(f"    {line}", soft_wrap=True)

    def _arm(self, raw: RawData, data: EncodedData, model: str, slot: str, gate: str) -> Arm:
        tree = {**self.base, "model": {"name": model, "gates": {slot: gate}}}
        config = parse_config(tree, "demo")
        run_dir = self.out / "arms" / f"{model}-{gate}-{_key(config, data)}"
        if not (run_dir / RESULT).exists():
            self._say(f"[bold]{model}[/], gate {gate} in slot {slot}")
            result = train(config, data, run_dir=run_dir, resume=run_dir.exists(), progress=True)
            part = raw.parts.get("test") or raw.parts["all"]
            Bundle.create(
                run_dir / "bundle",
                model=result.model,
                state=data.state,
                config=plain_config(config.public()),
                metrics=result.metrics,
                golden=golden_rows(part.frame, data.state.spec),
                seen=sampled(data.files("train"), data.state.schema()),
                unseen=sampled(data.files("valid"), data.state.schema()),
            )
            kept = {
                "run_id": result.mlflow_run_id,
                "history": result.history,
                "rows_per_second": result.rows_per_second,
            }
            atomic_write(run_dir / RESULT, json.dumps(kept, indent=1))
        kept = json.loads((run_dir / RESULT).read_text(encoding="utf-8"))
        bundle = Bundle.load(run_dir / "bundle")
        return Arm(model, slot, gate, bundle, **kept, test=predict(bundle.model, data, "test"))

    def _compare(self, arms: list[Arm]) -> list[Difference]:
        found = []
        for model, (_, gates) in MODELS.items():
            own = {arm.gate: arm for arm in arms if arm.model == model}
            test = own[gates[0]].test
            predictions = {arm.name: arm.test.probability[None] for arm in own.values()}
            found += compare(test.label, test.user, predictions, control=own[gates[0]].name)
        return found

    def _table(self, arms: list[Arm], truth: dict[str, float]) -> None:
        table = Table(box=None, header_style="bold", pad_edge=False)
        table.add_column("model")
        for column in ("AUC", "logloss", "ECE", "training rows/s"):
            table.add_column(column, justify="right")
        best = max(arm.bundle.metrics["test_auc"] for arm in arms)
        for arm in arms:
            m = arm.bundle.metrics
            style = "bold green" if m["test_auc"] == best else ""
            figures = [f"{m[f'test_{k}']:.5f}" for k in ("auc", "logloss", "ece")]
            table.add_row(arm.name, *figures, f"{arm.rows_per_second:,.0f}", style=style)
        if truth:
            table.add_row("best possible", *(f"{truth[k]:.5f}" for k in ("auc", "logloss", "ece")), "", style="dim")
        self._indented(table)

    def _differences(self, differences: list[Difference]) -> None:
        table = Table(box=None, header_style="bold", pad_edge=False)
        for column in ("gate against none", "metric", "difference", "95 % interval", "verdict"):
            table.add_column(column, justify="left" if column in ("gate against none", "verdict") else "right")
        colours = {"better": "bold green", "worse": "bold red", "noise": "dim"}
        for d in differences:
            interval = f"{d.low:+.5f} to {d.high:+.5f}"
            verdict = f"[{colours[d.verdict]}]{d.verdict}[/]"
            table.add_row(d.challenger, d.metric, f"{d.value:+.5f}", interval, verdict)
        self.screen.print()
        self._indented(table)

    def _indented(self, table: Table) -> None:
        from rich.padding import Padding

        self.screen.print(Padding(table, (0, 0, 0, 4)))

    def _release(self, best: Arm, name: str) -> int:
        known = releases(name, self.uri) if name in model_names(self.uri) else []
        version = next((r.version for r in known if r.bundle_hash == best.bundle.hash), None)
        if version is None:
            version = register(best.bundle.directory, name, self.uri, best.run_id)
        promote(name, version, tracking_uri=self.uri)
        self._say(f"{best.name}: models:/{name}@champion is version {version}, bundle {best.bundle.hash[:12]}")
        return version

    def _serve(self, best: Arm, name: str) -> tuple[tuple[Any, Any], dict[str, float]]:
        golden = best.bundle.golden
        request = {"candidates": [plain_row(row) for row in golden.drop(SCORE).to_dicts()]}
        many = {"candidates": (request["candidates"] * CANDIDATES)[:CANDIDATES]}
        model = f"models:/{name}@champion"
        # Beside the other things of the demo, not where the server of the reader's own keeps its events.
        kept = {"SLUICE_EVENTS_URL": f"sqlite:///{self.out}/events.db", "SLUICE_EVENTS_SPOOL": f"{self.out}/spool"}
        log = self.out / "server.log"
        with running_server(model, tracking_uri=self.uri, log=log, environment=kept) as client:
            reply = client.post("/v1/score", json=request).raise_for_status().json()
            apart = float(np.abs(np.array(reply["scores"]) - golden[SCORE].to_numpy()).max())
            if apart > TOLERANCE:
                raise AssertionError(f"served scores differ from the bundle's by {apart:.1e}")
            taken = []
            for _ in range(REQUESTS):
                begin = time.perf_counter()
                client.post("/v1/score", json=many).raise_for_status()
                taken.append(1000 * (time.perf_counter() - begin))
            sample = client.get("/openapi.json").raise_for_status().json()["paths"]["/v1/score"]["post"]
        p50, p99 = (float(np.percentile(taken, q)) for q in (50, 99))
        self._say(f"{len(golden)} golden rows over HTTP: largest difference from the bundle {apart:.1e}")
        self._say(
            f"{CANDIDATES} candidates a request: {p50:.1f} ms (p50), {p99:.1f} ms (p99) of {REQUESTS} requests"
        )
        shown = (
            sample["requestBody"]["content"]["application/json"]["example"],
            sample["responses"]["200"]["content"]["application/json"]["example"],
        )
        figures = {"largest_difference": apart, "p50_ms": p50, "p99_ms": p99, "candidates": float(CANDIDATES)}
        return shown, figures

    def _report(
        self,
        arms: list[Arm],
        differences: list[Difference],
        truth: dict[str, float],
        sample: tuple[Any, Any],
        data: EncodedData,
        best: Arm,
        version: int,
    ) -> Path:
        shown = [
            ReportArm(
                arm.name,
                arm.bundle.metrics,
                history=arm.history,
                predictions=(arm.test.label, arm.test.probability),
                gates={arm.slot: arm.gate},
                rows_per_second=arm.rows_per_second,
            )
            for arm in arms
        ]
        rows = {f"{split} rows": f"{data.rows(split):,}" for split in ("train", "valid", "test")}
        return write_report(
            self.out / "report.html",
            "Sluice demo: which gate makes the model better",
            shown,
            differences=differences,
            truth_metrics=truth or None,
            serving_sample=sample,
            summary={**rows, "fields": len(data.schema.fields), "champion": f"{best.name}, version {version}"},
            notes=["Each gate is compared with no gate in the same model, on the same rows and the same seed."],
        )


def _key(config: RunConfig, data: EncodedData) -> str:
    """Changes whenever the configuration or the encoded rows do."""
    content = dump_config(config) + data.path.name
    return hashlib.sha256(content.encode()).hexdigest()[:12]
