"""What scoring gains where the candidates of a user share its part: rows a second of both ways, model by model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ctr_models import Candidates, IdField, Ragged, Schema, create_model, example_rows
from pipelines.benchmarks.measure import timed
from pipelines.benchmarks.report import BenchReport

if TYPE_CHECKING:
    from pipelines.benchmarks.kernel_ratios import Setting

CANDIDATES = 500
"""Of the one user of a request."""
TOWER = {"hidden": [256, 128, 64]}
"""Of a ranking model that has to answer while a page loads."""


@dataclass(frozen=True)
class Measured:
    """A model whose two ways are timed.

    Args:
        figure: its figures' name.
        model: registered name.
        options: of the model, where they are not its defaults.
        frappe: on fields as Frappe's, where they are not the shop's.
        bar: whether it counts for ``ratio_scores``.
    """

    figure: str
    model: str
    options: dict[str, Any] = field(default_factory=dict)
    frappe: bool = False
    bar: bool = False


MEASURED = (
    Measured("dnn", "dnn", {"mlp": TOWER}, bar=True),
    Measured("deepfm", "deepfm", {"mlp": TOWER}, bar=True),
    Measured("finalmlp", "finalmlp", bar=True),
    Measured("dnn_400_400_400", "dnn"),
    Measured("dcnv2", "dcnv2"),
    Measured("frappe_dnn", "dnn", {"mlp": TOWER}, frappe=True),
    Measured("frappe_finalmlp", "finalmlp", frappe=True),
)
FIGURES = (
    "ratio_scores",
    *(f"ratio_scores_{one.figure}" for one in MEASURED),
    *(f"{way}_{one.figure}_rows_per_second" for way in ("scores", "plain") for one in MEASURED),
)


def shop() -> Schema:
    """Return a shop's fields: 40 of user and context, 8 of the item, histories of 50 items and 50 categories."""
    users = [IdField(name=f"user_{place}", rows=10_000, role="user") for place in range(30)]
    context = [IdField(name=f"context_{place}", rows=1_000) for place in range(10)]
    items = [IdField(name=name, rows=10_000, role="item") for name in ("item", "category")]
    items += [IdField(name=f"item_{place}", rows=1_000, role="item") for place in range(6)]
    past = {"rows": 10_000, "kind": "sequence", "max_length": 50, "role": "user"}
    histories = [IdField(name=f"past_{n}", table=n, target=n, **past) for n in ("item", "category")]  # type: ignore[arg-type]
    return Schema(sparse=(*users, *context, *items), sequences=tuple(histories))


def frappe() -> Schema:
    """Return the ten fields of Frappe, of which two are the app's: itself and whether it costs."""
    from pipelines.benchmarks.kernel_ratios import FRAPPE

    names = ("user", "item", "daytime", "weekday", "weekend", "homework", "cost", "weather", "country", "city")
    sizes = dict(zip(names, FRAPPE, strict=True))
    return Schema.of(sizes, dim=10, roles={"user": "user", "item": "item", "cost": "item"})


def request(schema: Schema, *, candidates: int) -> Candidates:
    """Return a user with histories of full length, and its candidates; random ids."""
    item = {f.name for f in schema.fields if f.role == "item"}
    shared, own = schema.only({f.name for f in schema.fields} - item), schema.only(item)
    random = np.random.default_rng(0)
    histories = {
        f.name: Ragged(random.integers(0, f.rows, f.max_length, dtype=np.int32), np.array([0, f.max_length]))
        for f in shared.sequences
    }
    user = replace(example_rows(shared, rows=1), ragged=histories)
    return Candidates.of(user, example_rows(own, rows=candidates, seed=1))


def scores(report: BenchReport, setting: Setting) -> None:
    """Score the candidates of a user by ``scores``, against one forward of rows that repeat the user's columns."""
    device, ratios = torch.device(setting.device), []
    for one in MEASURED:
        schema = frappe() if one.frappe else shop()
        torch.manual_seed(0)
        model = create_model(one.model, schema, **one.options).eval().to(device)
        candidates = request(schema, candidates=CANDIDATES).to(device)
        batch = candidates.joined(schema)
        with torch.inference_mode():
            ways: dict[str, Callable[[], Any]] = {
                "ours": partial(model.scores, candidates),
                "usual": partial(model, batch),
            }
            seconds = timed(ways, setting.rounds, setting.device)
        ratio = seconds["usual"] / seconds["ours"]
        ratios += [ratio] if one.bar else []
        report.figures[f"ratio_scores_{one.figure}"] = ratio
        report.figures[f"scores_{one.figure}_rows_per_second"] = CANDIDATES / seconds["ours"]
        report.figures[f"plain_{one.figure}_rows_per_second"] = CANDIDATES / seconds["usual"]
        report.row("scores", one.figure, f"{CANDIDATES} candidates", "ours", seconds["ours"] * 1e3, ratio, "", "")
    report.figures["ratio_scores"] = min(ratios)
    report.note(
        "scores: one user; eager is one forward of plain rows; 40 fields of user and context, 8 of the item, "
        "histories of 50 items and 50 categories, 16 numbers each; towers 256, 128, 64, FinalMLP's 400; "
        f"ratio_scores is the least of {', '.join(one.figure for one in MEASURED if one.bar)}"
    )
