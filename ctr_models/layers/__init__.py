"""The dense parts of which models are made."""

from ctr_models.layers.attention import SelfAttention
from ctr_models.layers.cross import CrossNetwork, VectorCrossNetwork
from ctr_models.layers.exits import Exits, ExitsConfig, Passage
from ctr_models.layers.experts import Experts
from ctr_models.layers.fusion import BilinearFusion
from ctr_models.layers.gated_embedding import GatedEmbedding
from ctr_models.layers.mlp import MLP, MLPConfig
from ctr_models.layers.products import InnerProducts, pairwise

__all__ = [
    "MLP",
    "BilinearFusion",
    "CrossNetwork",
    "Exits",
    "ExitsConfig",
    "Experts",
    "GatedEmbedding",
    "InnerProducts",
    "MLPConfig",
    "Passage",
    "SelfAttention",
    "VectorCrossNetwork",
    "pairwise",
]
