"""The gate without an activation: a product."""

from __future__ import annotations

import torch

from ctr_models.gates.base import register_gate
from ctr_models.gates.glu import GLUGate


@register_gate("simple")
class SimpleGate(GLUGate):
    """mask = W c + b: with ``context: self`` a product of two linear maps, x * (W x + b), as in a cross layer.

    The published gate multiplies the two halves of a layer's output; here x is one and W c + b the other. See
    :class:`ctr_models.gates.glu.GLUGate`.

    Example:
        >>> from ctr_models.gates import GateShape, GateSpec
        >>> spec = GateSpec.parse({"name": "simple", "start": "identity"})
        >>> spec.build(GateShape(slot="feature", width=3))(torch.ones(1, 3))
        tensor([[1., 1., 1.]], grad_fn=<AddmmBackward0>)

    Source: NAFNet, arXiv 2204.04676; in EDiffSR, arXiv 2310.19288.
    """

    source = "arXiv 2204.04676"
    activation = torch.positive
    one = 1.0
