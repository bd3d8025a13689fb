"""What a model of the zoo is: how to build it, what to feed it, which sizes are dynamic."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

__all__ = ["Dynamic", "Inputs", "ZooModel", "image_inputs", "randomise"]

Inputs: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]
Dynamic: TypeAlias = Literal["batch"] | Mapping[str, Mapping[int, str]]


@dataclass(frozen=True)
class ZooModel:
    """One model of the zoo.

    `build` gives the model in eval mode with random weights. `inputs(batch, seed)` gives positional
    and keyword arguments; seed 0 is what capture sees (its attention mask is all ones), any other
    seed has padding and, where the sequence is dynamic, another length per batch size. `dynamic` is
    the argument of the same name of `fxcompress.ir.capture`.
    """

    source: Literal["torchvision", "timm", "huggingface"]
    name: str
    family: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int, int], Inputs]
    dynamic: Dynamic = "batch"
    tags: frozenset[str] = frozenset()

    @property
    def id(self) -> str:
        """The name that the sweep's `--only` selects by, such as `timm/levit_128s`."""
        return f"{self.source}/{self.name}"


def image_inputs(size: int, channels: int = 3) -> Callable[[int, int], Inputs]:
    """Feed one image batch `[batch, channels, size, size]`, drawn from a unit normal."""

    def inputs(batch: int, seed: int) -> Inputs:
        generator = torch.Generator().manual_seed(1000 + seed)
        return (torch.randn(batch, channels, size, size, generator=generator),), {}

    return inputs


def randomise(model: nn.Module, example: Inputs) -> nn.Module:
    """Give every parameter and normalisation statistic a value that shows in the output; in place.

    Initialisers hide mistakes: a zero gamma or layer scale silences its branch, a standard
    deviation of 0.02 makes attention uniform whatever the mask says, and unit statistics make a
    lost BatchNorm invisible and let a deep network fade to its biases. Constant tensors get noise,
    weights of linear and convolution layers that are too small get the standard deviation
    1/sqrt(fan in), and BatchNorm statistics are those of `example`. Returns the model in eval mode.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            weight = getattr(module, "weight", None)
            if (
                isinstance(weight, nn.Parameter)
                and weight.ndim >= 2
                and not isinstance(module, nn.Embedding)
            ):
                _rescale(module, weight)
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                _enlarge_scale(module.weight, generator)
        for parameter in model.parameters():
            _perturb_constant(parameter, generator)
        _settle_statistics(model, example)
    return model.eval()


def _rescale(module: nn.Module, weight: Tensor) -> None:
    fan_in = weight.shape[0] if type(module).__name__ == "Conv1D" else weight[0].numel()
    target = 1.0 / math.sqrt(fan_in)
    deviation = weight.std().item() if weight.numel() > 1 else target
    if 0.0 < deviation < 0.5 * target:
        weight.mul_(target / deviation)


def _enlarge_scale(weight: Tensor | None, generator: torch.Generator) -> None:
    """Replace the small random or zero scales that some models start BatchNorm with."""
    if weight is not None and weight.abs().max() < 0.3:
        weight.copy_(_uniform(weight, 0.5, 1.5, generator))


def _settle_statistics(model: nn.Module, example: Inputs) -> None:
    """Set running means and variances by one forward pass in train mode, with a floor.

    Late layers see few values per channel: a variance by chance near zero would blow up another
    input, so none is below a fifth of its layer's mean.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    args, kwargs = example
    model.train()(*args, **kwargs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        if norm.running_var is not None:
            norm.running_var.clamp_min_(0.2 * norm.running_var.mean())


def _perturb_constant(parameter: Tensor, generator: torch.Generator) -> None:
    if not parameter.is_floating_point() or parameter.numel() == 0:
        return
    low, high = parameter.min(), parameter.max()
    if low != high:
        return
    if abs(low.item()) > 0.1:
        parameter.mul_(_uniform(parameter, 0.8, 1.2, generator))
    else:
        parameter.copy_(_uniform(parameter, -0.3, 0.3, generator))


def _uniform(like: Tensor, low: float, high: float, generator: torch.Generator) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype).uniform_(low, high, generator=generator)
