"""SASRec."""

from __future__ import annotations

from ctr_models.layers.sequence_encoder import SASRecEncoderConfig
from ctr_models.model import register_model
from ctr_models.next_item import NextItemConfig, NextItemModel


class SASRecConfig(NextItemConfig):
    """Settings of ``sasrec``."""

    encoder: SASRecEncoderConfig = SASRecEncoderConfig()


@register_model("sasrec")
class SASRec(NextItemModel):
    """Ranks items by causal self-attention over the history; see :class:`ctr_models.next_item.NextItemModel`.

    As a CTR model it is trained on clicks, with a linear term of all fields beside the history. Recipe
    ``next_item`` trains it, without that term, by full-softmax cross-entropy at every place of a history.

    Differences from the official code: softmax over all items instead of one sampled negative; queries, keys and
    values without biases (a key's changes no softmax); no padding.

    Raises:
        ConfigError: no history shares the table of its target; the heads don't divide the dimension.

    Example:
        >>> from ctr_models import IdField, Schema, create_model, example_batch
        >>> item = IdField(name="item", rows=20)
        >>> clicks = IdField(name="clicks", rows=20, table="item", kind="sequence", target="item", max_length=9)
        >>> schema = Schema(sparse=(item,), sequences=(clicks,))
        >>> create_model("sasrec", schema)(example_batch(schema, rows=3)).shape
        torch.Size([3])

    Source: arXiv 1808.09781.
    """

    Config = SASRecConfig
    source = "arXiv 1808.09781"
