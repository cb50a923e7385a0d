from __future__ import annotations

from pathlib import Path

import pytest

import pipelines.training
from ctr_models import Schema
from pipelines.config import load_config
from pipelines.datasets.frappe import SPEC
from pipelines.training.optimizers import table_settings

FOLDER = Path(pipelines.training.__file__).parent / "published"
FILES = sorted(FOLDER.glob("*/*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda f: f"{f.parent.name}-{f.stem}")
def test_every_file_is_a_valid_configuration(file):
    config = load_config(file)
    assert config.train.embedding.backend == "dense"
    assert table_settings(config.train)[0] == "adam"
    assert config.train.batch_size == 4096


def test_both_data_sets_are_there():
    names = {f"{f.parent.name}/{f.stem}" for f in FILES}
    assert {f"frappe_x1/{m}" for m in ("finalmlp", "gdcn_p", "dcnv2", "dnn")} <= names
    assert {f"movielens_1m/{m}" for m in ("finalmlp", "gdcn_p", "dcnv2")} <= names


def test_finalmlp_on_frappe_has_the_published_number_of_parameters():
    """253,392 by the authors' log. Ours has one row more a table (missing beside out-of-vocabulary), plus heads."""
    rows = {"user": 957, "item": 4082, "daytime": 7, "weekday": 7, "isweekend": 2, "homework": 3}
    rows |= {"cost": 2, "weather": 9, "country": 80, "city": 233}
    roles = {c.name: c.role for c in SPEC.columns}
    config = load_config(FOLDER / "frappe_x1" / "finalmlp.yaml")
    model = config.model.build(Schema.of({n: rows[n] + 2 for n in roles}, dim=10, roles=roles))
    count = sum(p.numel() for p in model.parameters())
    assert abs(count - 253_392) < 1500
