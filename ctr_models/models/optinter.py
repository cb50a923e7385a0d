"""OptInter."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ctr_models.batch import Batch
from ctr_models.embeddings import FeatureEmbedding
from ctr_models.errors import ConfigError, nearest
from ctr_models.gates.base import GateShape, GateSpec
from ctr_models.layers.gated_embedding import GatedEmbedding
from ctr_models.layers.mlp import MLP, MLPConfig
from ctr_models.model import CTRModel, ModelConfig, register_model
from ctr_models.schema import IdField, Schema

Treatment = Literal["memorise", "factorise", "nothing"]
TREATMENTS: tuple[Treatment, ...] = ("memorise", "factorise", "nothing")
Pair = tuple[str, str]
NOT_OFFERED = -1e6
"""Logit of a treatment that a pair can't have: no noise lifts it, and no temperature makes it infinite."""


class OptInterConfig(ModelConfig):
    """Settings of ``optinter``. Without ``memorise`` and ``factorise`` the model searches."""

    mlp: MLPConfig = MLPConfig()
    pair_dim: int = Field(8, ge=1)
    """Dimension of the pairs' own tables; fused tables need a multiple of 4."""
    pair_std: float = Field(0.1, gt=0)
    """Standard deviation of the factors at the start; its square is that of the memorised vectors."""
    memorise: tuple[Pair, ...] | None = None
    """Pairs of fields whose cross the schema holds: each combination has a vector of its own."""
    factorise: tuple[Pair, ...] | None = None
    """Pairs of fields whose vectors are multiplied. Pairs named in neither list do not interact."""

    @model_validator(mode="after")
    def _each_once(self) -> OptInterConfig:
        seen: set[frozenset[str]] = set()
        for pair in (*(self.memorise or ()), *(self.factorise or ())):
            if pair[0] == pair[1]:
                raise ValueError(f"the pair {list(pair)} is one field; name two")
            if frozenset(pair) in seen:
                raise ValueError(f"the pair {list(pair)} appears twice; keep one treatment of it")
            seen.add(frozenset(pair))
        return self

    @property
    def searches(self) -> bool:
        """Whether the treatments are still to be found."""
        return self.memorise is None and self.factorise is None


@register_model("optinter")
class OptInter(CTRModel):
    """logit = MLP([e, b_1 .. b_P]): each pair of fields is memorised, factorised, or left alone.

    b_{ij} = p^m E[(x_i, x_j)] + p^f v_i * v_j + p^0 0, where E is the table of the cross of i and j, and v are
    vectors of a second embedding, apart from e. The weights p of each pair come from the gate in slot
    ``interaction``: gate(logits), one learned logit a pair and treatment; with gate ``none`` their softmax.

    Memorising is on offer for pairs whose cross the schema holds; other pairs choose between two. Given
    ``memorise`` and ``factorise``, as recipe ``optinter`` gives them after its search, each pair has its one
    treatment with weight 1; the gate, its logits, pairs without a treatment and tables that none needs are not
    there. Crosses of three or more fields stand in e and in no pair. Numbers, lists and histories are factorised
    like categories, by their one vector a row.

    Differences from the official code: Gumbel noise, which its search leaves out, is the default; pairs that don't
    interact take no columns of the MLP; factors and memorised vectors start on one scale, the same in search and
    retraining; hidden layers may be batch normalised, not layer normalised.

    Raises:
        ConfigError: fewer than two fields, or a pair that can't be had, naming the remedy.

    Example:
        >>> from ctr_models import create_model, example_batch
        >>> cross = IdField(name="user_x_item", rows=50, of=("user", "item"))
        >>> schema = Schema(sparse=(*Schema.of({"user": 10, "item": 20, "hour": 24}).sparse, cross))
        >>> model = create_model("optinter", schema)
        >>> model(example_batch(schema, rows=3)).shape, model.choices()[("user", "hour")]["memorise"]
        (torch.Size([3]), 0.0)
        >>> picked = create_model("optinter", schema, memorise=[["user", "item"]], factorise=[["item", "hour"]])
        >>> picked.mlp[0].in_features  # three fields of 16, two pairs of 8
        64

    Source: arXiv 2108.01265.
    """

    Config = OptInterConfig
    config: OptInterConfig
    default_gates: ClassVar[Mapping[str, str]] = {"field": "none", "feature": "none", "interaction": "gumbel"}
    source = "arXiv 2108.01265"
    deciders = ("logits",)

    def __init__(self, config: OptInterConfig, schema: Schema, gates: Mapping[str, GateSpec]) -> None:
        super().__init__(config, schema, gates)
        crosses = pair_crosses(schema)
        plain = [f.name for f in schema.fields if f.name not in crosses.values()]
        paired = [f.name for f in schema.fields if not (isinstance(f, IdField) and f.of)]
        if len(paired) < 2:
            raise ConfigError(
                "optinter needs two fields or more", where="model", remedy="add a feature, or use dnn"
            )
        if config.searches:
            factorised: list[Pair] = list(combinations(paired, 2))
            memorised = [p for p in factorised if frozenset(p) in crosses]
            self.pairs = factorised
        else:
            memorised, factorised = list(config.memorise or ()), list(config.factorise or ())
            _check_pairs(memorised, factorised, paired, crosses)
            self.pairs = [*memorised, *factorised]

        self.inputs = GatedEmbedding(schema, gates, std=config.embedding_std, fields=plain)
        own = schema.with_dim(config.pair_dim)
        self.factors = self.memory = None
        if factorised:
            names = set().union(*factorised)
            self.factors = FeatureEmbedding(own, std=config.pair_std, prefix="factor_", fields=names)
            place = {name: i for i, name in enumerate(self.factors.names)}
            for side in (0, 1):
                self.register_buffer(f"_side{side}", torch.tensor([place[p[side]] for p in factorised]), False)
        if memorised:
            fields = [crosses[frozenset(p)] for p in memorised]
            self.memory = FeatureEmbedding(own, std=config.pair_std**2, prefix="memory_", fields=fields)
            order = [self.memory.names.index(name) for name in fields]
            self.register_buffer("_memorised", torch.tensor(order), False)
        self.logits = self.gate = None
        if config.searches:
            offered = torch.tensor([[p in set(memorised), True, True] for p in self.pairs])
            self.register_buffer("_offered", offered, False)
            self.register_buffer("_pair_of", torch.tensor([self.pairs.index(p) for p in memorised]).long(), False)
            self.logits = nn.Parameter(torch.zeros(len(self.pairs), len(TREATMENTS)))
            shape = GateShape(slot="interaction", width=len(TREATMENTS), choices=len(TREATMENTS))
            self.gate = gates["interaction"].build(shape)
        self.mlp = MLP(self.inputs.width + len(self.pairs) * config.pair_dim, config.mlp, outputs=1)

    def forward(self, batch: Batch) -> Tensor:
        """Return logits, (B,)."""
        (e,) = self.inputs(batch)  # (B, D)
        return self.mlp(torch.cat([e, *self._interactions(batch)], dim=1)).squeeze(1)

    def _interactions(self, batch: Batch) -> list[Tensor]:
        products = memorised = None
        if self.factors is not None:
            v = self.factors(batch).stacked()  # (B, F, d)
            products = v.index_select(1, self._side0) * v.index_select(1, self._side1)  # (B, P, d)
        if self.memory is not None:
            memorised = self.memory(batch).stacked().index_select(1, self._memorised)  # (B, M, d)
        if self.gate is None:
            return [part.flatten(1) for part in (memorised, products) if part is not None]
        assert products is not None
        weights = self.weights().unsqueeze(2)  # (P, 3, 1)
        mixed = weights[:, 1] * products
        if memorised is not None:
            share = weights[:, 0].index_select(0, self._pair_of)
            mixed = mixed.index_add(1, self._pair_of, (share * memorised).to(mixed.dtype))
        return [mixed.flatten(1)]

    def weights(self) -> Tensor:
        """Return each pair's weights of memorising, factorising and nothing, (P, 3); a search's only."""
        assert self.gate is not None
        assert self.logits is not None
        return self.gate(self.logits.masked_fill(~self._offered, NOT_OFFERED))

    @torch.no_grad()
    def choices(self) -> dict[Pair, dict[Treatment, float]]:
        """Return, pair by pair, each treatment's share by the logits alone; 1 for the one treatment of a pair."""
        if self.logits is None:
            memorised = set(self.config.memorise or ())
            return {
                p: {t: float(t == ("memorise" if p in memorised else "factorise")) for t in TREATMENTS}
                for p in self.pairs
            }
        shares = self.logits.masked_fill(~self._offered, NOT_OFFERED).softmax(1)
        return {
            pair: dict(zip(TREATMENTS, row, strict=True))
            for pair, row in zip(self.pairs, shares.tolist(), strict=True)
        }

    @torch.no_grad()
    def pick(self, treatments: Mapping[Pair, Treatment]) -> None:
        """Give each pair one treatment with weight 1; the search's weights stay."""
        assert self.logits is not None
        taken = torch.tensor([[treatments[pair] == one for one in TREATMENTS] for pair in self.pairs])
        self.logits.copy_(torch.where(taken, 0.0, NOT_OFFERED))


def pair_crosses(schema: Schema) -> dict[frozenset[str], str]:
    """Return the crosses of two fields, by the pair.

    Example:
        >>> cross = IdField(name="both", rows=9, of=("user", "item"))
        >>> schema = Schema(sparse=(*Schema.of({"user": 10, "item": 20}).sparse, cross))
        >>> pair_crosses(schema)[frozenset({"item", "user"})]
        'both'
    """
    return {frozenset(f.of): f.name for f in schema.sparse if len(f.of) == 2}


def _check_pairs(
    memorised: list[Pair], factorised: list[Pair], paired: list[str], crosses: Mapping[frozenset[str], str]
) -> None:
    for key, pairs in (("memorise", memorised), ("factorise", factorised)):
        for pair in pairs:
            for name in pair:
                if name not in paired:
                    raise ConfigError(
                        f"{name!r} is no field that can be paired",
                        where=f"model.{key}",
                        remedy=nearest(name, paired),
                    )
    for left, right in memorised:
        if frozenset((left, right)) not in crosses:
            raise ConfigError(
                f"no column is the cross of {left!r} and {right!r}",
                where="model.memorise",
                remedy=f"add {{name: {left}_x_{right}, kind: cross, of: [{left}, {right}]}} to features.columns",
            )
