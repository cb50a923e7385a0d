"""Exits after the layers of a perceptron: an easy row need not pass all of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional as F

from ctr_models.errors import ConfigError
from ctr_models.gates.base import GateShape, GateSpec
from ctr_models.layers.mlp import MLP, linear


class ExitsConfig(BaseModel):
    """What depth is worth."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    cost: float = Field(0.01, ge=0)
    """What passing the whole tower costs a row, in nats of log loss; an exit costs its share of the
    multiplications."""
    supervision: float = Field(0.3, ge=0)
    """Weight of the log loss that every exit pays on every row: an exit that few rows take learns from it."""


@dataclass(frozen=True)
class Passage:
    """How a batch went through a tower of E exits.

    Args:
        logits: of every exit for every row, (B, E); the last exit is the tower's own output.
        on: probability to go on after each exit but the last, (B, E - 1).
    """

    logits: Tensor
    on: Tensor

    def shares(self) -> Tensor:
        """Return the probability that a row leaves at each exit, (B, E); a row sums to 1."""
        one = self.on.new_ones(self.on.shape[0], 1)
        reached = torch.cat([one, self.on.cumprod(1)], dim=1)  # (B, E)
        return reached * torch.cat([1 - self.on, one], dim=1)

    def exits(self) -> Tensor:
        """Return the exit that each row takes, (B,): the first after which going on is less likely than not."""
        return (self.on >= 0.5).long().cumprod(1).sum(1)

    def taken(self) -> Tensor:
        """Return the logit of the exit that each row takes, (B,)."""
        return self.logits.gather(1, self.exits().unsqueeze(1)).squeeze(1)


class Exits(nn.Module):
    """Heads behind all layers of a perceptron but the last, and gates of slot ``depth`` that send rows on.

        loss = mean over rows of sum_l P_l (CE_l + cost c_l)  +  supervision * mean over rows and exits of CE_l,

    where P_l is the probability to leave at exit l, CE_l the log loss there and c_l the share of the tower's
    multiplications done by then. A head thus learns on the rows that will use it: trained on all rows and
    thresholded afterwards, it would be overconfident on those. Gates see the layer and the doubt of its exit,
    the binary entropy of its prediction in bits; no gradient goes from them into either.

    When it predicts, a row leaves at the first exit whose gate says so with more than 1/2.

    Args:
        tower: a perceptron with one output; stays with the model, which keeps its weights under their names.
        gate: the gate of every exit.
        config: the price of depth.

    Raises:
        ConfigError: the tower has one hidden layer, after which there is nothing to skip.

    Example:
        >>> from ctr_models.layers import MLP, MLPConfig
        >>> tower = MLP(8, MLPConfig(hidden=(16, 16, 4)), outputs=1)
        >>> exits = Exits(tower, GateSpec(name="adaptive_depth"), ExitsConfig())
        >>> exits(tower, torch.randn(5, 8)).logits.shape
        torch.Size([5, 3])
        >>> [round(c, 2) for c in exits.costs]
        [0.32, 0.88, 1.0]

    Source: JEI-DNN, arXiv 2310.09163.
    """

    def __init__(self, tower: MLP, gate: GateSpec, config: ExitsConfig) -> None:
        super().__init__()
        self.config = config
        layers = [m for m in tower if isinstance(m, nn.Linear)]
        widths = [m.out_features for m in layers[:-1]]
        if len(widths) < 2:
            raise ConfigError(
                "a tower of one hidden layer has no depth to adapt",
                where="model.mlp.hidden",
                remedy="give it two or more, or gate none in slot depth",
            )
        self.heads = nn.ModuleList(linear(width, 1) for width in widths[:-1])
        self.gates = nn.ModuleList(
            gate.build(GateShape(slot="depth", width=width, context=1, depth=depth))
            for depth, width in enumerate(widths[:-1])
        )
        work = [m.in_features * m.out_features for m in layers[:-1]]
        ends = [work_done + width for work_done, width in zip(accumulate(work), widths, strict=True)]
        self.costs = [end / ends[-1] for end in ends]

    def forward(self, tower: MLP, x: Tensor) -> Passage:
        """Pass all layers, and every exit, (B, D)."""
        logits, on = [], []
        *hidden, last = _blocks(tower)
        for depth, block in enumerate(hidden):
            x = _through(block, x)
            if depth < len(self.heads):
                logit, go = self._leave(depth, x)
                logits.append(logit)
                on.append(go)
        return Passage(torch.cat([*logits, _through(last, x)], dim=1), torch.cat(on, dim=1))

    def early(self, tower: MLP, x: Tensor) -> Tensor:
        """Return the logits of the exits that rows take, (B,), each layer being computed for those left in it.

        The same as ``forward(tower, x).taken()`` in evaluation mode, with less work.
        """
        rows, found, order = torch.arange(x.shape[0], device=x.device), [], []
        *hidden, last = _blocks(tower)
        for depth, block in enumerate(hidden):
            x = _through(block, x)
            if depth < len(self.heads):
                logit, go = self._leave(depth, x)
                stay = (go >= 0.5).squeeze(1)
                found.append(logit[~stay])
                order.append(rows[~stay])
                x, rows = x[stay], rows[stay]
                if not len(rows):
                    break
        else:
            found.append(_through(last, x))
            order.append(rows)
        return torch.cat(found)[torch.cat(order).argsort()].squeeze(1)

    def loss(self, passage: Passage, label: Tensor) -> Tensor:
        """Return the loss above, a scalar.

        Args:
            passage: of a batch.
            label: (B,), 0 or 1.
        """
        logits = passage.logits.float()
        losses = F.binary_cross_entropy_with_logits(
            logits, label.unsqueeze(1).expand_as(logits), reduction="none"
        )  # (B, E)
        price = losses + self.config.cost * losses.new_tensor(self.costs)
        return (passage.shares().float() * price).sum(1).mean() + self.config.supervision * losses.mean()

    @torch.no_grad()
    def report(self, passage: Passage, label: Tensor) -> dict[str, dict[str, float]]:
        """Tell how many rows leave where, and how well each exit is calibrated.

        Args:
            passage: of a batch, in evaluation mode.
            label: (B,), 0 or 1.

        Returns:
            ``total``: ``cost``, the mean share of the tower's multiplications. Then by the number of the exit:
            ``share`` of the rows that leave there; ``predicted`` and ``observed`` click rate and ``ece`` of
            these rows, if there are any; ``ece_all`` of the same exit on all rows. An exit fit for all rows and
            bad on its own ones is what choosing by confidence leads to.
        """
        taken, p = passage.exits(), torch.sigmoid(passage.logits.float())
        told = {"total": {"cost": float(taken.new_tensor(self.costs, dtype=torch.float32)[taken].mean())}}
        for exit_ in range(p.shape[1]):
            here = taken == exit_
            one = {"share": float(here.float().mean()), "ece_all": _ece(p[:, exit_], label)}
            if here.any():
                mine, clicks = p[here, exit_], label[here]
                one |= {
                    "predicted": float(mine.mean()),
                    "observed": float(clicks.mean()),
                    "ece": _ece(mine, clicks),
                }
            told[str(exit_)] = one
        return told

    def _leave(self, depth: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logit of an exit and the probability to go on behind it, (B, 1) each."""
        logit = self.heads[depth](x)
        z = logit.detach()
        doubt = (F.softplus(z) - z * torch.sigmoid(z)) / math.log(2)
        return logit, self.gates[depth](x.detach(), doubt).expand_as(logit)


def _blocks(tower: MLP) -> list[list[nn.Module]]:
    """Cut a perceptron before each of its Linears."""
    blocks: list[list[nn.Module]] = []
    for layer in tower:
        if isinstance(layer, nn.Linear):
            blocks.append([])
        blocks[-1].append(layer)
    return blocks


def _through(block: list[nn.Module], x: Tensor) -> Tensor:
    for layer in block:
        x = layer(x)
    return x


def _ece(p: Tensor, label: Tensor, bins: int = 10) -> float:
    """Expected calibration error over bins of equal numbers of rows."""
    return sum(float((p[b] - label[b]).sum().abs()) for b in p.argsort().chunk(bins)) / len(p)
