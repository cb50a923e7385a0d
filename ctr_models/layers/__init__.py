"""The dense parts of which models are made."""

from ctr_models.layers.cross import CrossNetwork
from ctr_models.layers.fusion import BilinearFusion
from ctr_models.layers.gated_embedding import GatedEmbedding
from ctr_models.layers.mlp import MLP, MLPConfig

__all__ = ["MLP", "BilinearFusion", "CrossNetwork", "GatedEmbedding", "MLPConfig"]
