from __future__ import annotations

import pytest
import torch

from ctr_models import FeatureEmbedding, GateSpec, Schema, example_batch
from ctr_models.errors import ConfigError
from ctr_models.gates.context import GateContext, stream_spec
from ctr_models.schema import IdField

SCHEMA = Schema(
    sparse=(
        IdField(name="user", rows=9, dim=4, role="user"),
        IdField(name="item", rows=7, dim=4, role="item"),
        IdField(name="hour", rows=5, dim=4),
    ),
    sequences=(IdField(name="history", rows=7, dim=4, table="item", kind="sequence", role="user", max_length=3),),
)


def context(word: object, **options: object) -> GateContext:
    gate = GateSpec.parse({"name": "sigmoid2", "context": word, **options})
    return GateContext(SCHEMA, gate, embedding=FeatureEmbedding(SCHEMA), std=0.1, prefix="c_")


@pytest.mark.parametrize(
    ("word", "names"),
    [
        ("learned", ()),
        ("self", ()),
        ("user", ("user",)),
        ("item+hour", ("item", "hour")),
        ("context+user", ("hour", "user")),
        ("user+user", ("user",)),
        ("history", ("history",)),
    ],
)
def test_words_name_fields(word: str, names: tuple[str, ...]) -> None:
    found, batch = context(word), example_batch(SCHEMA, rows=3)
    assert found.names == names
    assert found.width == 4 * len(names)
    given = found(batch, FeatureEmbedding(SCHEMA)(batch))
    assert (None if given is None else given.shape) == (torch.Size([3, found.width]) if names else None)


def test_a_list_has_one_entry_a_stream() -> None:
    spec = GateSpec.parse({"name": "sigmoid2", "context": ["user", "item"], "hidden": [4]})
    assert [stream_spec(spec, s, 2).options["context"] for s in (0, 1)] == ["user", "item"]
    assert stream_spec(spec, 0, 2).options["hidden"] == [4]
    with pytest.raises(ConfigError, match=r"2 entries, the model has 3 streams.*context: user\+item"):
        stream_spec(spec, 0, 3)


def test_one_word_serves_all_streams() -> None:
    spec = GateSpec.parse({"name": "sigmoid2", "context": "user"})
    assert stream_spec(spec, 1, 2) is spec
    plain = GateSpec(name="none")
    assert stream_spec(plain, 1, 2) is plain
