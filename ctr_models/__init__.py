"""CTR models with swappable gates.

Example:
    >>> import torch
    >>> from ctr_models import Schema, create_model, example_batch
    >>> features = Schema.of({"user": 1000, "item": 500, "hour": 26}, dense=["price"], dim=16)
    >>> model = create_model("gdcn", features, gates={"cross": "sigmoid"})
    >>> model(example_batch(features, rows=8)).shape
    torch.Size([8])
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ctr_models.batch import Batch, EncodedRows, Ragged
    from ctr_models.candidates import Candidates, takes_candidates
    from ctr_models.embeddings import Embedded, FeatureEmbedding
    from ctr_models.example import example_batch, example_candidates, example_rows
    from ctr_models.gates import GATES, Gate, GateConfig, GateShape, GateSpec, register_gate
    from ctr_models.model import MODELS, CTRModel, ModelConfig, ModelSpec, create_model, register_model
    from ctr_models.schema import DenseField, IdField, Schema

__all__ = [
    "GATES",
    "MODELS",
    "Batch",
    "CTRModel",
    "Candidates",
    "DenseField",
    "Embedded",
    "EncodedRows",
    "FeatureEmbedding",
    "Gate",
    "GateConfig",
    "GateShape",
    "GateSpec",
    "IdField",
    "ModelConfig",
    "ModelSpec",
    "Ragged",
    "Schema",
    "create_model",
    "example_batch",
    "example_candidates",
    "example_rows",
    "register_gate",
    "register_model",
    "takes_candidates",
]

_PARTS = ("schema", "batch", "candidates", "embeddings", "example", "gates", "model")

if not TYPE_CHECKING:  # it would hide a misspelt name from type checkers

    def __getattr__(name: str) -> Any:
        """Import what a public name needs when it is asked for: errors alone need no torch, which takes seconds."""
        if name in __all__:
            for part in _PARTS:
                found = vars(import_module(f"{__name__}.{part}"))
                if name in found:
                    globals()[name] = found[name]
                    return found[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
