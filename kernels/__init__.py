"""The operators on which gates stand: each in plain torch, which is its definition, and faster, one file each.

Models call these functions and nothing else; :mod:`kernels.dispatch` chooses what runs. ``OPERATORS`` holds them
by name, for tests and benchmarks.
"""

from kernels import dispatch
from kernels.bilinear_fusion import bilinear_fusion
from kernels.feature_gate import feature_gate
from kernels.gated_cross import OPERATOR as _GATED_CROSS
from kernels.gated_cross import gated_cross

OPERATORS: dict[str, dispatch.Operator] = {one.name: one for one in (_GATED_CROSS,)}

__all__ = ["OPERATORS", "bilinear_fusion", "feature_gate", "gated_cross"]
