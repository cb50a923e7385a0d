from __future__ import annotations

from pathlib import Path

import torch

from ctr_models import Schema, create_model, example_batch
from ctr_models.export import export, tensors

SCHEMA = Schema.of({"user": 12, "item": 9}, dense=["price"], dim=4)


def test_an_exported_program_survives_a_file(tmp_path: Path) -> None:
    model, batch = create_model("gdcn", SCHEMA, embedding_std=0.5).eval(), example_batch(SCHEMA, rows=5)
    torch.export.save(export(model), tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2").module()
    torch.testing.assert_close(program(*tensors(batch)), model(batch))


def test_the_model_keeps_its_mode() -> None:
    model = create_model("dnn", SCHEMA).train()
    export(model)
    assert model.training
