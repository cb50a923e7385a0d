"""The operators on which gates stand: the definition of each in plain torch, one file an operator.

A function here is what models call. Faster implementations of the same function may stand behind it; the
plain one stays the definition that they are tested against.
"""

from kernels.bilinear_fusion import bilinear_fusion
from kernels.feature_gate import feature_gate
from kernels.gated_cross import gated_cross

__all__ = ["bilinear_fusion", "feature_gate", "gated_cross"]
