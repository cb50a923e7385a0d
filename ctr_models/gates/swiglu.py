"""The gated linear unit with SiLU."""

from __future__ import annotations

from torch.nn import functional as F

from ctr_models.gates.base import register_gate
from ctr_models.gates.glu import GLUGate


@register_gate("swiglu")
class SwiGLUGate(GLUGate):
    """mask = SiLU(W c + b), where SiLU(z) = z sigmoid(z); see :class:`ctr_models.gates.glu.GLUGate`.

    Example:
        >>> import torch
        >>> from ctr_models.gates import GateShape, GateSpec
        >>> spec = GateSpec.parse({"name": "swiglu", "start": "identity"})
        >>> spec.build(GateShape(slot="feature", width=3))(torch.ones(1, 3))
        tensor([[1., 1., 1.]], grad_fn=<SiluBackward0>)

    Source: GLU Variants Improve Transformer, arXiv 2002.05202; in place of attention, arXiv 2405.15953.
    """

    source = "arXiv 2002.05202"
    activation = F.silu
    one = 1.2784645427610738
