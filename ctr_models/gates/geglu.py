"""The gated linear unit with GELU."""

from __future__ import annotations

from torch.nn import functional as F

from ctr_models.gates.base import register_gate
from ctr_models.gates.glu import GLUGate


@register_gate("geglu")
class GeGLUGate(GLUGate):
    """mask = GELU(W c + b), where GELU(z) = z P(N(0, 1) < z); see :class:`ctr_models.gates.glu.GLUGate`.

    Example:
        >>> import torch
        >>> from ctr_models.gates import GateShape, GateSpec
        >>> spec = GateSpec.parse({"name": "geglu", "start": "identity"})
        >>> spec.build(GateShape(slot="feature", width=3))(torch.ones(1, 3))
        tensor([[1.0000, 1.0000, 1.0000]], grad_fn=<GeluBackward0>)

    Source: GLU Variants Improve Transformer, arXiv 2002.05202; in place of attention, arXiv 2405.15953.
    """

    source = "arXiv 2002.05202"
    activation = F.gelu
    one = 1.1444507183528787
