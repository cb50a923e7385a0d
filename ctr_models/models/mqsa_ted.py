"""MQSA-TED."""

from __future__ import annotations

from ctr_models.layers.sequence_encoder import MQSAEncoderConfig
from ctr_models.model import register_model
from ctr_models.next_item import NextItemConfig, NextItemModel


class MQSATEDConfig(NextItemConfig):
    """Settings of ``mqsa_ted``."""

    encoder: MQSAEncoderConfig = MQSAEncoderConfig()


@register_model("mqsa_ted")
class MQSATED(NextItemModel):
    """Ranks items by self-attention with short and long queries; see :class:`ctr_models.next_item.NextItemModel`.

    MQSA is the model: alpha * (queries of one behaviour) + (1 - alpha) * (queries that are means of the last few).
    TED, the distillation of transition counts into the items' vectors, is a loss in training: option
    ``distillation`` of recipe ``next_item``.

    Differences from the official code stand in docs/models/mqsa_ted.md.

    Raises:
        ConfigError: no history shares the table of its target; the heads don't divide the dimension.

    Example:
        >>> from ctr_models import IdField, Schema, create_model, example_batch
        >>> item = IdField(name="item", rows=20)
        >>> clicks = IdField(name="clicks", rows=20, table="item", kind="sequence", target="item", max_length=9)
        >>> schema = Schema(sparse=(item,), sequences=(clicks,))
        >>> create_model("mqsa_ted", schema)(example_batch(schema, rows=3)).shape
        torch.Size([3])

    Source: arXiv 2311.01056.
    """

    Config = MQSATEDConfig
    source = "arXiv 2311.01056"
