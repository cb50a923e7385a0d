"""Embeddings: every table of a model lives here, in TorchRec collections, so that every model shards."""

from ctr_models.embeddings.feature_embedding import Embedded, FeatureEmbedding

__all__ = ["Embedded", "FeatureEmbedding"]
