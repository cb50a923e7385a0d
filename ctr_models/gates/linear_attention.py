"""Gated linear attention over a history: a state of fixed size that forgets what the behaviours tell it to."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from ctr_models.gates.base import GateConfig, GateShape, register_gate
from ctr_models.gates.none import NoGate
from ctr_models.jagged import rows_of
from ctr_models.layers.mlp import linear
from kernels import linear_state


class LinearAttentionConfig(GateConfig):
    """Settings of gate ``linear_attention``."""

    keys: int = Field(0, ge=0)
    """K, width of keys and queries; 0 is that of the values."""
    rank: int = Field(16, ge=1)
    """Width of the bottleneck through which a behaviour decides what is forgotten."""
    calm: float = Field(16.0, gt=0)
    """The forgetting is taken to the power of 1 / ``calm``: above 1, the state starts with a long memory."""


@register_gate("linear_attention")
class LinearAttentionGate(NoGate):
    """pooled = (1 - g) sum_j score_j v_j + g o, where o = q S_T reads the state that the history has left:

        S_t = Diag(a_t) S_{t-1} + k_t u_t',    a_t = sigmoid(W2 W1 v_t + b)^(1 / calm),    S_0 = 0,

    with q = W_q candidate / sqrt(K), k = W_k v, u = W_u v. The state (K, D) does not depend on the candidate nor
    grow with the history, so that it can be kept for a user (:meth:`state`), moved on by new behaviours, and read
    by any number of candidates (:meth:`read`).

    :meth:`pool` never forms it. Only the end of a history is read, and there the recurrence is the sum

        o = sum_t (q . exp(c_t) * k_t) u_t,    c_t = sum over s > t of log a_s,

    which costs O(L K) a history and is exact: no exponent is above 0. g = sigmoid(l) is learned, from 1/2;
    ``start: identity`` takes g = tanh(l) and l = 0.

    Differences from the paper: one head, no norm and no output gate behind it; the model's own attention stays
    beside it.

    Args:
        config: see :class:`LinearAttentionConfig`.
        shape: of slot ``sequence``; candidate and values have the same width.

    Example:
        >>> from ctr_models.gates import GateShape, GateSpec
        >>> gate = GateSpec(name="linear_attention").build(GateShape(slot="sequence", width=4))
        >>> values, candidates = torch.randn(5, 4), torch.randn(2, 4)
        >>> state = gate.state(values[:3], torch.tensor([0, 2, 3]))
        >>> state = gate.state(values[3:], torch.tensor([0, 1, 2]), before=state)
        >>> gate.read(state, candidates).shape
        torch.Size([2, 4])

    Source: Gated Linear Attention, arXiv 2312.06635.
    """

    slots = frozenset({"sequence"})
    Config = LinearAttentionConfig
    config: LinearAttentionConfig
    recalls = True
    source = "arXiv 2312.06635"

    def __init__(self, config: LinearAttentionConfig, shape: GateShape) -> None:
        super().__init__(config, shape)
        keys = config.keys or shape.width
        self.query = linear(shape.width, keys, bias=False)
        self.key = linear(shape.width, keys, bias=False)
        self.value = linear(shape.width, shape.width, bias=False)
        self.forget = nn.Sequential(linear(shape.width, config.rank, bias=False), linear(config.rank, keys))
        self.share_logit = nn.Parameter(torch.zeros(()))

    def share(self) -> Tensor:
        """Return g, the share of what the state gives, a scalar."""
        return torch.tanh(self.share_logit) if self.config.start == "identity" else torch.sigmoid(self.share_logit)

    def kept(self, values: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the end of its history still holds of each behaviour.

        Returns:
            exp(c_t) * k_t of each behaviour, (T, K); and its history, (T,).
        """
        rows = rows_of(offsets, values.shape[0])
        # One running sum over all histories, cut where they end; in doubles, lest a long batch blur a short one.
        sums = self._log_forget(values).double().cumsum(0)  # (T, K)
        ends = sums[offsets[1:][rows] - 1]
        return (ends - sums).to(values.dtype).exp() * self.key(values), rows

    def pool(self, values: Tensor, scores: Tensor, offsets: Tensor, query: Tensor) -> Tensor:
        """Return one vector a history, (B, D)."""
        kept, rows = self.kept(values, offsets)
        read = (self._asked(query)[rows] * kept).sum(1, keepdim=True) * self.value(values)  # (T, D)
        share = self.share()
        return (1 - share) * super().pool(values, scores, offsets, query) + share * super().pool(
            read, torch.ones_like(scores), offsets, query
        )

    def state(self, values: Tensor, offsets: Tensor, *, before: Tensor | None = None) -> Tensor:
        """Return the state at the end of each history, (B, K, D).

        Args:
            values: behaviours of all histories, oldest first, (T, D).
            offsets: where each history begins, and T at the end, (B + 1,).
            before: the state that the histories go on from, (B, K, D); zeros if not given.
        """
        forgotten = self._log_forget(values)
        return linear_state(self.key(values), self.value(values), forgotten, offsets, before, fused=self.fused)

    def read(self, state: Tensor, query: Tensor) -> Tensor:
        """Return o = q S of each candidate, (B, D); a state may serve several, (1, K, D)."""
        return (self._asked(query).unsqueeze(1) @ state).squeeze(1)

    def telemetry(self, mask: Tensor) -> dict[str, float]:
        """Describe g, the share of what the state gives; there is no mask."""
        return super().telemetry(self.share().reshape(1))

    def _log_forget(self, values: Tensor) -> Tensor:
        return F.logsigmoid(self.forget(values)) / self.config.calm

    def _asked(self, query: Tensor) -> Tensor:
        return self.query(query) * self.query.out_features**-0.5
