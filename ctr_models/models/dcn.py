"""DCN, the first deep cross network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from ctr_models.layers.cross import VectorCrossNetwork
from ctr_models.model import register_model
from ctr_models.models.gdcn import GDCN


@register_model("dcn")
class DCN(GDCN):
    """GDCN with one number a layer for its crosses: c_{l+1} = c_0 (w_l . c_l) + b_l + c_l.

    The paper's form is ``parallel``: the cross network beside the MLP. The gate of slot ``cross``, none in the
    paper, masks c_0 (w . c), with c as its context.

    Example:
        >>> from ctr_models import Schema, create_model, example_batch
        >>> schema = Schema.of({"user": 10, "item": 20})
        >>> create_model("dcn", schema)(example_batch(schema, rows=3)).shape
        torch.Size([3])

    Source: arXiv 1708.05123.
    """

    default_gates: ClassVar[Mapping[str, str]] = {"field": "none", "feature": "none", "cross": "none"}
    crossing = VectorCrossNetwork
    source = "arXiv 1708.05123"
