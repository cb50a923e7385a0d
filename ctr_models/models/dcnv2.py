"""DCN-V2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from ctr_models.model import register_model
from ctr_models.models.gdcn import GDCN


@register_model("dcnv2")
class DCNV2(GDCN):
    """GDCN without a gate in its cross layers: c_{l+1} = c_0 * (W_l c_l + b_l) + c_l.

    Example:
        >>> from ctr_models import Schema, create_model, example_batch
        >>> schema = Schema.of({"user": 10, "item": 20})
        >>> create_model("dcnv2", schema)(example_batch(schema, rows=3)).shape
        torch.Size([3])

    Source: arXiv 2008.13535.
    """

    default_gates: ClassVar[Mapping[str, str]] = {"field": "none", "feature": "none", "cross": "none"}
    source = "arXiv 2008.13535"
