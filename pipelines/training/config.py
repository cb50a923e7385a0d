"""How a model is trained: optimisers, regularisation, stopping, precision, sharding."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

OPERATIONAL = frozenset(
    {"checkpoint_every", "keep_checkpoints", "eval_batch_size", "threads", "sharding", "slices"}
)
"""Keys of ``train`` that don't decide what the weights become."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class OptimizerConfig(_Strict):
    """Optimiser of everything but fused embedding tables."""

    name: Literal["adam", "adagrad", "sgd"] = "adam"
    lr: float = Field(1e-3, gt=0)
    eps: float = Field(1e-8, gt=0)
    l2: float = Field(0.0, ge=0)
    """Adds (l2 / 2) |W|^2 over the dense weights to each step's gradient."""


class EmbeddingTrainConfig(_Strict):
    """How embedding tables are updated.

    ``fused`` touches only the rows of the batch (fbgemm; on CPU SGD, Adagrad and row-wise Adagrad). ``dense``
    keeps a gradient of the whole table and any optimiser, as the published settings do.
    """

    backend: Literal["fused", "dense"] = "fused"
    optimizer: Literal["rowwise_adagrad", "adagrad", "sgd", "adam"] | None = None
    """None: row-wise Adagrad when fused, the main optimiser when dense."""
    lr: float | None = Field(None, gt=0)
    """None: the main learning rate when dense, 0.02 when fused."""
    eps: float = Field(1e-8, gt=0)
    l2: float = Field(0.0, ge=0)
    l2_mode: Literal["whole_table", "touched"] = "whole_table"
    """``whole_table`` decays every row each step (dense backend only). ``touched`` is DIN's mini-batch aware
    form (arXiv 1706.06978): each row of the batch once, by l2 over the value's count in training."""


class PlateauConfig(_Strict):
    """Multiply the learning rate by ``factor`` after ``patience`` evaluations without improvement."""

    factor: float = Field(0.1, gt=0, lt=1)
    patience: int = Field(1, ge=1)
    min_lr: float = Field(1e-6, ge=0)


class StoppingConfig(_Strict):
    """Stop after ``patience`` evaluations without improvement; the best epoch's weights are kept."""

    monitor: Literal["auc", "logloss", "gauc", "hr_10", "ndcg_10"] = "auc"
    """``hr_10`` and ``ndcg_10`` of full ranking exist under recipe ``next_item``, and there nothing else does."""
    patience: int = Field(2, ge=1)
    min_delta: float = Field(1e-6, ge=0)


class AveragingConfig(_Strict):
    """Evaluate and keep an exponential moving average of the weights (arXiv 2411.18704); in one process."""

    decay: float = Field(0.995, gt=0, lt=1)
    """The average looks back over about 1 / (1 - decay) steps; two to four epochs are a good length."""


class ShardingConfig(_Strict):
    """How tables are spread over the ranks of a torchrun job."""

    kind: Literal["auto", "row_wise", "table_wise", "column_wise", "data_parallel"] = "auto"
    """``auto``: TorchRec's planner on GPUs, row-wise on CPU."""
    tables: dict[str, Literal["row_wise", "table_wise", "column_wise", "data_parallel"]] = Field(
        default_factory=dict
    )
    """Exceptions by table name."""
    hbm_gb: float = Field(72.0, gt=0)
    """Memory of one device that the planner may use."""


class TrainConfig(_Strict):
    """All of the above."""

    epochs: int = Field(10, ge=1)
    batch_size: int = Field(4096, ge=1)
    """Rows a step, over all ranks together."""
    optimizer: OptimizerConfig = OptimizerConfig()
    embedding: EmbeddingTrainConfig = EmbeddingTrainConfig()
    plateau: PlateauConfig | None = PlateauConfig()
    stopping: StoppingConfig | None = StoppingConfig()
    averaging: AveragingConfig | None = None
    """None: the last step's weights are evaluated and kept."""
    selection_lr: float | None = Field(None, gt=0)
    """Learning rate of logits that decide: of feature values in slot ``selection``, of OptInter's pairs; None: the
    main one."""
    clip_norm: float | None = Field(10.0, gt=0)
    """Largest norm of the gradient of everything but fused tables."""
    precision: Literal["float32", "bfloat16"] = "float32"
    parts: int | None = Field(None, ge=1)
    """Parts into which the training rows are dealt; each rank reads parts / ranks of them. A step takes the
    same rows for every number of ranks that divides it. None: the number of ranks."""
    window_rows: Annotated[int, Field(ge=1)] = 1_000_000
    """Rows shuffled together; smaller data are shuffled whole."""
    checkpoint_every: int | None = Field(None, ge=1)
    """Steps between checkpoints; None: at the end of each epoch."""
    keep_checkpoints: int = Field(2, ge=1)
    eval_batch_size: int = Field(16384, ge=1)
    threads: int | None = Field(None, ge=1)
    sharding: ShardingConfig = ShardingConfig()
    slices: tuple[str, ...] = ()
    """Categorical columns by whose values metrics are reported separately."""


class RecipeConfig(BaseModel):
    """A recipe by name and its options."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str = "fit"
    options: dict[str, Any] = Field(default_factory=dict)
