"""Int8 products: a model's linear layers in eight bits, with input ranges that were observed beforehand."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

LEAST = 32
"""Outputs of a layer below which eight bits are not worth the conversion of its inputs."""

_ENGINES = {"x86", "fbgemm"}

Ranges = Mapping[str, tuple[float, float]]
"""By the name of a weight: the least and the greatest input of its products, and zero, which is always exact."""


def supported() -> bool:
    """Return whether torch multiplies in eight bits on this machine."""
    # On its way out of torch, whose newer operator can't be traced: without it there is float32.
    return hasattr(torch, "quantize_per_channel") and not _ENGINES.isdisjoint(
        torch.backends.quantized.supported_engines
    )


@contextmanager
def definitions(model: nn.Module) -> Iterator[None]:
    """Let the model's operators compute their plain definitions while the block lasts.

    A trace knows no other, and int8 products stand where the definitions have linear layers.
    """
    fused = {module: module.fused for module in model.modules() if hasattr(module, "fused")}
    try:
        for module in fused:
            module.fused = False  # type: ignore[assignment]
        yield
    finally:
        for module, was in fused.items():
            module.fused = was


class _Linear(TorchFunctionMode):
    """Sees each product of a batch and a model's weight, of :data:`LEAST` outputs or more."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._names = {
            id(weight): name
            for name, weight in model.named_parameters()
            if weight.dim() == 2 and weight.shape[0] >= LEAST
        }

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Hand products to :meth:`product`, leave all else as it is."""
        kwargs = kwargs or {}
        if function is F.linear and len(args) > 1 and (name := self._names.get(id(args[1]))) is not None:
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            return self.product(name, args[0], args[1], bias)
        return function(*args, **kwargs)

    def product(self, name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return x W' + b."""
        raise NotImplementedError


class Observed(_Linear):
    """Notes the range of the inputs of every linear layer that a model calls while the block lasts.

    Args:
        model: on CPU, in evaluation mode; called within :func:`definitions`.

    Example:
        >>> from ctr_models import Schema, create_model, example_batch
        >>> schema = Schema.of({"user": 10, "item": 20})
        >>> model, batch = create_model("dnn", schema).eval(), example_batch(schema, rows=9)
        >>> with torch.no_grad(), definitions(model), Observed(model) as observed:
        ...     _ = model(batch)
        >>> all(low <= 0 <= high for low, high in observed.ranges.values())
        True
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.ranges: dict[str, tuple[float, float]] = {}

    def product(self, name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Widen the range, and compute as ever."""
        low, high = self.ranges.get(name, (0.0, 0.0))
        least, most = (found.item() for found in x.aminmax())
        self.ranges[name] = (min(low, least), max(high, most))
        return F.linear(x, weight, bias)


class Int8(_Linear):
    """Computes linear layers in eight bits while the block lasts.

    Weights have a scale for each output, :math:`W_{ij} = s_i q_{ij}`, inputs one for all,
    :math:`x = (q - z) \\cdot (high - low) / 255`; what lies outside of its range becomes its end. No range depends
    on the rows at hand, so that a row's score does not depend on those that it is scored with. The scheme is
    that of arXiv:1712.05877, with float32 between the layers.

    Args:
        model: on CPU, in evaluation mode; called within :func:`definitions`. Its weights are copied when the first
            product comes.
        ranges: observed; layers without one are computed as ever.
        holder: a module that gets the packed weights as attributes; a trace demands that.

    Example:
        >>> from ctr_models import Schema, create_model, example_batch
        >>> schema = Schema.of({"user": 10, "item": 20})
        >>> model, batch = create_model("dnn", schema).eval(), example_batch(schema, rows=9)
        >>> with torch.no_grad(), definitions(model):
        ...     with Observed(model) as observed:
        ...         expected = model(batch)
        ...     with Int8(model, observed.ranges):
        ...         found = model(batch)
        >>> bool((found - expected).abs().max() < 1e-3)
        True
    """

    def __init__(self, model: nn.Module, ranges: Ranges, holder: nn.Module | None = None) -> None:
        super().__init__(model)
        self._ranges, self._holder = ranges, holder
        self._packed: dict[str, Any] = {}

    def product(self, name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return x W' + b by int8 arithmetic, float32."""
        if name not in self._ranges:
            return F.linear(x, weight, bias)
        if name not in self._packed:
            self._packed[name] = _pack(weight.detach(), None if bias is None else bias.detach())
            if self._holder is not None:
                setattr(self._holder, f"packed_{len(self._packed)}", self._packed[name])
        low, high = self._ranges[name]
        scale = max(high - low, 1e-12) / 255
        return torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            x, scale, round(-low / scale), self._packed[name]
        )


def _pack(weight: Tensor, bias: Tensor | None) -> Any:
    scales = (weight.abs().amax(dim=1) / 127).clamp(min=1e-12).double()  # (out,)
    zeros = torch.zeros(len(weight), dtype=torch.long)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
        return torch.ops.quantized.linear_prepack(whole, bias)
