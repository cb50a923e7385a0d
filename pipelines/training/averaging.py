"""The average of the weights along training, which is what gets evaluated and released."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """An exponential moving average of a model's weights and batch statistics.

    a <- a + (1 - d_n) (w - a) after step n, d_n = min(decay, (1 + n) / (10 + n)), so that the start is soon
    forgotten. A constant learning rate keeps weights moving around a minimum; their average lies inside.

    Args:
        model: in one process; its tensors are read after each step.
        decay: of the average, below 1; it looks back over about 1 / (1 - decay) steps.

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> average = WeightAverage(layer, decay=0.5)
        >>> before = layer.weight.detach().clone()
        >>> with torch.no_grad():
        ...     _ = layer.weight.add_(1.0)
        >>> average.update()
        >>> with average.in_place():
        ...     print(round((layer.weight - before).item(), 4))
        0.8182
        >>> round((layer.weight - before).item(), 4)
        1.0

    Source: arXiv 2411.18704.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay = decay
        own = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
        self._names, self._weights = list(own), list(own.values())
        self._averages = [tensor.clone() for tensor in self._weights]
        self._steps = torch.zeros((), dtype=torch.int64)

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights of one more step into the average."""
        self._steps += 1
        n = int(self._steps)
        torch._foreach_lerp_(self._averages, self._weights, 1 - min(self._decay, (1 + n) / (10 + n)))

    @contextmanager
    @torch.no_grad()
    def in_place(self) -> Iterator[None]:
        """Let the model carry the average, and its own weights again afterwards."""
        held = [tensor.clone() for tensor in self._weights]
        torch._foreach_copy_(self._weights, self._averages)
        try:
            yield
        finally:
            torch._foreach_copy_(self._weights, held)

    def state(self) -> dict[str, Tensor]:
        """Return what a checkpoint must hold; the tensors alias the average's own."""
        return {"steps": self._steps, **dict(zip(self._names, self._averages, strict=True))}
