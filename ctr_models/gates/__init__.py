"""The gates, one file each. Importing this package registers them.

A gate of your own takes ten lines, and fits every slot that it lists:

    >>> import torch
    >>> from ctr_models import Schema, create_model, example_batch
    >>> from ctr_models.gates import Gate, register_gate
    >>> @register_gate("free")
    ... class FreeGate(Gate):
    ...     '''mask = 2 sigmoid(v), one free value a coordinate; 1 at the start.'''
    ...     slots, bound = frozenset({"feature"}), 2.0
    ...     def __init__(self, config, shape):
    ...         super().__init__(config, shape)
    ...         self.v = torch.nn.Parameter(torch.zeros(1, shape.width))
    ...     def forward(self, x, context=None):
    ...         return 2 * torch.sigmoid(self.v)
    >>> schema = Schema.of({"user": 10, "item": 20})
    >>> model = create_model("dnn", schema, gates={"feature": "free"})
    >>> model(example_batch(schema, rows=3)).shape
    torch.Size([3])
    >>> model.telemetry(example_batch(schema, rows=3))["inputs.feature_gates.0"]["mean"]
    1.0
"""

from ctr_models.gates.adaptive_depth import AdaptiveDepthGate
from ctr_models.gates.annealed import AnnealedGate
from ctr_models.gates.attention_weighted import AttentionWeightedGate
from ctr_models.gates.base import GATES, SLOTS, Gate, GateConfig, GateShape, GateSpec, Slot, register_gate
from ctr_models.gates.clipped_softmax import ClippedSoftmaxGate
from ctr_models.gates.comet import CometGate
from ctr_models.gates.context import ContextConfig
from ctr_models.gates.cross_stream import CrossStreamGate
from ctr_models.gates.geglu import GeGLUGate
from ctr_models.gates.gumbel import GumbelGate
from ctr_models.gates.hard_concrete import HardConcreteGate
from ctr_models.gates.linear_attention import LinearAttentionGate
from ctr_models.gates.mixer import MixerGate
from ctr_models.gates.noisy_topk import NoisyTopKGate
from ctr_models.gates.none import NoGate
from ctr_models.gates.recency import RecencyGate
from ctr_models.gates.recursive import RecursiveGate
from ctr_models.gates.sdpa_head import SDPAHeadGate
from ctr_models.gates.selection import SelectionGate
from ctr_models.gates.sigmoid import SigmoidGate
from ctr_models.gates.sigmoid2 import Sigmoid2Gate
from ctr_models.gates.simple import SimpleGate
from ctr_models.gates.softmax import SoftmaxGate
from ctr_models.gates.squeeze_excite import SqueezeExciteGate
from ctr_models.gates.swiglu import SwiGLUGate
from ctr_models.gates.temperature import TemperatureGate
from ctr_models.gates.topk import TopKGate

__all__ = [
    "GATES",
    "SLOTS",
    "AdaptiveDepthGate",
    "AnnealedGate",
    "AttentionWeightedGate",
    "ClippedSoftmaxGate",
    "CometGate",
    "ContextConfig",
    "CrossStreamGate",
    "Gate",
    "GateConfig",
    "GateShape",
    "GateSpec",
    "GeGLUGate",
    "GumbelGate",
    "HardConcreteGate",
    "LinearAttentionGate",
    "MixerGate",
    "NoGate",
    "NoisyTopKGate",
    "RecencyGate",
    "RecursiveGate",
    "SDPAHeadGate",
    "SelectionGate",
    "Sigmoid2Gate",
    "SigmoidGate",
    "SimpleGate",
    "Slot",
    "SoftmaxGate",
    "SqueezeExciteGate",
    "SwiGLUGate",
    "TemperatureGate",
    "TopKGate",
    "register_gate",
]
