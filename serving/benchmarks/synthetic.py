"""What benchmarks of the server serve and ask for: bundles of untrained models, and requests of random values."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.release.bundle import Bundle

REQUESTS = 16
"""Different requests of each size, sent in turn."""
FRAPPE = dict(
    user=957, item=4082, daytime=7, weekday=7, weekend=2, homework=3, cost=2, weather=9, country=80, city=233
)
FINALMLP = {
    "name": "finalmlp",
    "mlp1": {"hidden": [400], "batch_norm": True},
    "mlp2": {"hidden": [100], "batch_norm": True},
    "heads": 5,
    "gates": {"feature": {"name": "sigmoid2", "context": ["user", "item"], "hidden": [400]}},
}


def requests(bundle: Bundle, candidates: int) -> list[dict[str, Any]]:
    """Return requests of random values: those of the vocabularies, and where there is none, of the golden rows."""
    import numpy as np

    from pipelines.features.spec import Vocabulary
    from pipelines.release.bundle import SCORE
    from serving.scorer import plain_row

    make = np.random.default_rng(0)
    spec, golden = bundle.state.spec, bundle.golden.drop(SCORE)
    values = {name: golden[name].to_list() for name in golden.columns}
    for c in spec.direct:
        if c.kind == "categorical" and c.column in values:
            table = bundle.state.table(c)
            if isinstance(table.encoding, Vocabulary):
                values[c.column] = table.known()[0].to_list()
    role = {(c.name if c.from_log else c.column): c.role for c in spec.direct}

    def draw(wanted: str) -> dict[str, Any]:
        names = [name for name in values if role[name] == wanted]
        return plain_row({name: values[name][make.integers(len(values[name]))] for name in names})

    return [
        {"user": draw("user"), "context": draw("context"), "candidates": [draw("item") for _ in range(candidates)]}
        for _ in range(REQUESTS)
    ]


def bundles(folder: Path) -> list[Path]:
    """Write two bundles of untrained models: FinalMLP of Frappe's fields, GDCN of 26 categories and 13 numbers."""
    large = {f"c{i}": (10, 100, 1_000, 10_000)[i % 4] for i in range(26)}
    roles = {name: "user" if i < 10 else "item" if i < 20 else "context" for i, name in enumerate(large)}
    frappe_roles = {"user": "user", "item": "item", "cost": "item"}
    return [
        _untrained(folder / "frappe", FRAPPE, frappe_roles, 0, 10, FINALMLP),
        _untrained(folder / "large", large, roles, 13, 16, {"name": "gdcn"}),
    ]


def _untrained(
    path: Path, sizes: dict[str, int], roles: dict[str, str], numbers: int, dim: int, model: dict[str, Any]
) -> Path:
    import numpy as np
    import polars as pl
    import torch

    from ctr_models.model import ModelSpec
    from pipelines.features.spec import FeatureSpec
    from pipelines.features.state import FeatureState
    from pipelines.features.transform import encoded_rows, transform
    from pipelines.release.bundle import Bundle
    from pipelines.release.int8 import scores

    make, rows = np.random.default_rng(0), 2 * max(sizes.values())
    log = pl.DataFrame(
        {"label": make.integers(0, 2, rows)}
        | {name: [f"{name}-{value}" for value in make.permutation(rows) % size] for name, size in sizes.items()}
        | {f"n{i}": np.round(make.lognormal(size=rows), 3) for i in range(numbers)}
    )
    columns = [{"name": n, "kind": "categorical", "role": roles.get(n, "context")} for n in sizes]
    columns += [{"name": f"n{i}", "kind": "numeric", "role": "item"} for i in range(numbers)]
    spec = FeatureSpec.model_validate({"label": "label", "dim": dim, "columns": columns})
    state = FeatureState.fit(spec, log.lazy(), source="made")
    torch.manual_seed(0)
    built = ModelSpec.parse(model).build(state.schema())
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    some = encoded_rows(transform(state, log.lazy(), source="made").collect(), state.schema())
    some.label[:] = make.random(rows) < scores(built.eval(), some)  # in this world the model is right
    options: dict[str, Any] = {"config": {"name": path.name}, "metrics": {}, "golden": log.head(32)}
    Bundle.create(path, model=built, state=state, seen=some, **options)
    return path
