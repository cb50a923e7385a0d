"""The operators on which gates stand: each in plain torch, which is its definition, and faster, one file each.

Models call these functions and nothing else; :mod:`kernels.dispatch` chooses what runs. ``OPERATORS`` holds them
by name, for tests and benchmarks.
"""

from kernels import dispatch
from kernels.activated_linear import OPERATOR as _ACTIVATED_LINEAR
from kernels.activated_linear import activated_linear
from kernels.bilinear_fusion import OPERATOR as _BILINEAR_FUSION
from kernels.bilinear_fusion import bilinear_fusion
from kernels.cross_network import OPERATOR as _CROSS_NETWORK
from kernels.cross_network import cross_network
from kernels.expert_mixture import OPERATOR as _EXPERT_MIXTURE
from kernels.expert_mixture import expert_layer, expert_mixture
from kernels.feature_gate import OPERATOR as _FEATURE_GATE
from kernels.feature_gate import feature_gate
from kernels.gated_cross import OPERATOR as _GATED_CROSS
from kernels.gated_cross import gated_cross
from kernels.gated_embedding import OPERATOR as _GATED_EMBEDDING
from kernels.gated_embedding import gated_embedding
from kernels.jagged_pool import OPERATOR as _JAGGED_POOL
from kernels.jagged_pool import jagged_pool
from kernels.linear_attention import OPERATOR as _LINEAR_ATTENTION
from kernels.linear_attention import linear_attention
from kernels.linear_state import OPERATOR as _LINEAR_STATE
from kernels.linear_state import linear_state
from kernels.moments import moments
from kernels.scores import OPERATOR as _SCORES
from kernels.scores import shared_linear
from kernels.target_attention import ActivatedLayer, target_attention
from kernels.target_layer import OPERATOR as _TARGET_LAYER
from kernels.target_layer import target_layer

OPERATORS: dict[str, dispatch.Operator] = {
    one.name: one
    for one in (
        _ACTIVATED_LINEAR,
        _BILINEAR_FUSION,
        _CROSS_NETWORK,
        _EXPERT_MIXTURE,
        _FEATURE_GATE,
        _GATED_CROSS,
        _GATED_EMBEDDING,
        _JAGGED_POOL,
        _LINEAR_ATTENTION,
        _LINEAR_STATE,
        _SCORES,
        _TARGET_LAYER,
    )
}

__all__ = [
    "OPERATORS",
    "ActivatedLayer",
    "activated_linear",
    "bilinear_fusion",
    "cross_network",
    "expert_layer",
    "expert_mixture",
    "feature_gate",
    "gated_cross",
    "gated_embedding",
    "jagged_pool",
    "linear_attention",
    "linear_state",
    "moments",
    "shared_linear",
    "target_attention",
    "target_layer",
]
