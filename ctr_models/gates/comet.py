"""The sparse gate without a sort: k trees that each lead a row to one expert."""

from __future__ import annotations

import torch
from pydantic import Field
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from ctr_models.errors import ConfigError
from ctr_models.gates.base import Gate, GateConfig, GateShape, register_gate

SEARCH_TEMPERATURES = (0.05, 0.001)
SINKHORN_ROUNDS = 20


class CometConfig(GateConfig):
    """Settings of gate ``comet``."""

    k: int = Field(2, ge=1)
    """Trees, and the number of experts that a row uses once every node has made up its mind."""
    band: float = Field(1.0, gt=0)
    """Width of the range in which a node is undecided."""
    entropy: float = Field(0.01, ge=0)
    """Weight of the trees' entropy, which drives nodes out of their band."""
    local_search: float = Field(0.0, ge=0, lt=1)
    """Share of the training in which the order of the experts at the leaves is searched; 0 leaves it as it is."""
    permutation_entropy: float = Field(1e-4, ge=0)
    """Weight of the entropy of the order while it is searched."""


@register_gate("comet")
class CometGate(Gate):
    """weights_e = sum_t softmax_{t, e}(a_te(x) + log p_te(x)), over k trees t with an expert e at each leaf.

    p_te is the product along the way to the leaf of s(w x + b) where it turns left and 1 - s(w x + b) where it
    turns right, with the smooth step s(u) = 0 below -band / 2, 1 above band / 2, and
    1/2 + 3 u / (2 band) - 2 u^3 / band^3 between; a_te is linear in x. A leaf that a tree has decided against has
    p = 0 and weight 0 exactly, so that at most k experts are left when all nodes have decided. The penalty is
    entropy times the mean over rows of the sum over trees of -sum_e p_te log p_te. Any K from 2 fits: the nodes
    stand as in a heap, K - 1 inner ones and K leaves.

    With ``local_search`` (COMET+) the experts' places at the leaves are learned for the first share of training:
    weights P, with P = Sinkhorn(M / temperature) for a learned (K, K) matrix M under a falling temperature, and a
    penalty on the entropy of P. Then, and always in evaluation, P is the nearest permutation.
    Difference from the official code: it begins the search at temperature 1e-3, where 8 to 16 experts leave more
    than half of M's gradients below 1e-6; here the temperature falls from 0.05 to 0.001.

    Args:
        config: see :class:`CometConfig`.
        shape: ``choices`` is K.

    Raises:
        ConfigError: fewer than two experts.

    Example:
        >>> from ctr_models.gates import GateShape, GateSpec
        >>> spec = GateSpec.parse({"name": "comet", "start": "identity"})
        >>> spec.build(GateShape(slot="expert", width=3, choices=5))(torch.randn(1, 3))
        tensor([[0.2000, 0.2000, 0.2000, 0.2000, 0.2000]], grad_fn=<SumBackward1>)

    Source: COMET, arXiv 2306.02824; smooth step: arXiv 2002.07772.
    """

    slots = frozenset({"expert"})
    Config = CometConfig
    config: CometConfig
    source = "arXiv 2306.02824"
    way: Tensor
    turns_left: Tensor
    on_way: Tensor
    temperature: Tensor
    permutation: Tensor

    def __init__(self, config: CometConfig, shape: GateShape) -> None:
        super().__init__(config, shape)
        k, experts = config.k, shape.choices
        if experts < 2:
            raise ConfigError(
                f"a tree can't choose among {experts} experts",
                where=f"model.gates.{shape.slot}",
                remedy="give the model at least 2",
            )
        self.nodes = nn.Linear(shape.width, k * (experts - 1))
        self.leaves = nn.Linear(shape.width, k * experts)
        for layer, size in ((self.nodes, config.band / 100), (self.leaves, 0.05)):
            nn.init.uniform_(layer.weight, -size, size)
            nn.init.uniform_(layer.bias, -size, size)
        way, turns_left, on_way = ways_to_leaves(experts)
        self.register_buffer("way", way, persistent=False)
        self.register_buffer("turns_left", turns_left, persistent=False)
        self.register_buffer("on_way", on_way, persistent=False)
        if config.start == "identity":
            for parameter in (self.nodes.weight, self.nodes.bias, self.leaves.weight):
                nn.init.zeros_(parameter)
            depth = on_way.sum(0) * torch.log(torch.tensor(2.0))  # every node leads either way by half
            self.leaves.bias.data = depth.repeat(k)
        self.order: nn.Parameter | None = None
        if config.local_search:
            self.order = nn.Parameter(torch.empty(experts, experts).uniform_(-0.05, 0.05))
            self.register_buffer("temperature", torch.tensor(SEARCH_TEMPERATURES[0]))
            self.register_buffer("permutation", nearest_permutation(self.order))
        self.searching = config.local_search > 0
        self.uncertainty: Tensor | None = None

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the weights, (B, K)."""
        k, experts = self.config.k, self.shape.choices
        left = smooth_step(self.nodes(x).unflatten(1, (k, experts - 1)), self.config.band)  # (B, k, K - 1)
        p = torch.ones_like(left[..., :1])
        for way, turns_left, on_way in zip(self.way, self.turns_left, self.on_way, strict=True):
            here = left[..., way]  # (B, k, K), of each leaf its node at this depth
            p = p * torch.where(on_way, torch.where(turns_left, here, 1 - here), 1)
        a = self.leaves(x).unflatten(1, (k, experts))
        reached = p > 0
        logits = torch.where(reached, a + torch.where(reached, p, 1).log(), -torch.inf)
        weights = logits.flatten(1).softmax(-1).unflatten(1, (k, experts)).sum(1)  # (B, K)
        order = None
        if self.order is not None:
            soft = self.training and self.searching
            order = sinkhorn(self.order / self.temperature) if soft else self.permutation
            weights = weights @ order.to(weights.dtype)
        if self.training:
            self.uncertainty = self.config.entropy * entropy(p.float()).sum(1).mean()
            if order is not None and order is not self.permutation:
                both = entropy(order).sum() + entropy(order.mT).sum()
                self.uncertainty = self.uncertainty + self.config.permutation_entropy * both
        return weights

    @torch.no_grad()
    def anneal(self, done: float) -> None:
        """Search the order for ``local_search`` of the training, then fix it."""
        if self.order is None:
            return
        self.searching = done < self.config.local_search
        if self.searching:
            first, last = SEARCH_TEMPERATURES
            self.temperature.fill_(first * (last / first) ** (done / self.config.local_search))
            self.permutation.copy_(nearest_permutation(self.order))

    def penalty(self) -> Tensor:
        """Return the price of the last training batch's entropy; 0 if it was asked for already."""
        uncertainty, self.uncertainty = self.uncertainty, None
        return torch.zeros(()) if uncertainty is None else uncertainty


def smooth_step(u: Tensor, band: float) -> Tensor:
    """Return 0 below -band / 2, 1 above band / 2, and the cubic between that joins them smoothly.

    Example:
        >>> smooth_step(torch.tensor([-2.0, -0.5, 0.0, 0.25, 0.5]), 1.0)
        tensor([0.0000, 0.0000, 0.5000, 0.8438, 1.0000])
    """
    v = (u / band).clamp(-0.5, 0.5)
    return 0.5 + v * (1.5 - 2 * v * v)


def entropy(p: Tensor) -> Tensor:
    """Return -sum p log p of the last dimension, with a gradient at 0."""
    return -(p * (p + 1e-6).log()).sum(-1)


def ways_to_leaves(leaves: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the ways up a heap-shaped tree: the nodes, whether they turn left, and whether they are there.

    Each is (depth, leaves). Leaves differ in depth by one at most, and the last mask is False for the higher ones.

    Example:
        >>> way, turns_left, on_way = ways_to_leaves(3)  # the root, node 0, leads to a leaf and to node 1
        >>> way.tolist(), turns_left.int().tolist(), on_way.int().tolist()
        ([[0, 1, 1], [0, 0, 0]], [[0, 1, 0], [0, 1, 1]], [[1, 1, 1], [0, 1, 1]])
    """
    ways: list[list[tuple[int, bool]]] = []
    for leaf in range(leaves):
        node, way = leaves - 1 + leaf, []
        while node:
            parent = (node - 1) // 2
            way.append((parent, node == 2 * parent + 1))
            node = parent
        ways.append(way)
    depth = max(len(way) for way in ways)
    node_of = torch.tensor([[w[d][0] if d < len(w) else 0 for w in ways] for d in range(depth)])
    turns_left = torch.tensor([[d < len(w) and w[d][1] for w in ways] for d in range(depth)])
    on_way = torch.tensor([[d < len(w) for w in ways] for d in range(depth)])
    return node_of, turns_left, on_way


def sinkhorn(logits: Tensor) -> Tensor:
    """Return exp(logits) with columns and rows normalised in turn, (K, K): rows add up to 1, columns nearly."""
    for _ in range(SINKHORN_ROUNDS):
        logits = logits - logits.logsumexp(0, keepdim=True)
        logits = logits - logits.logsumexp(1, keepdim=True)
    return logits.exp()


def nearest_permutation(order: Tensor) -> Tensor:
    """Return the permutation matrix P with the largest sum of P * order.

    Example:
        >>> nearest_permutation(torch.tensor([[0.9, 0.8], [0.7, 0.1]]))
        tensor([[0., 1.],
                [1., 0.]])
    """
    _, columns = linear_sum_assignment(order.detach().float().cpu().numpy(), maximize=True)
    return torch.eye(order.shape[1], device=order.device)[torch.as_tensor(columns, device=order.device)]
