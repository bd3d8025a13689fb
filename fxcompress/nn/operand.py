"""Layers of `torch.nn` whose weight is an operand.

In `conv1(x, weight)` the weight comes from the graph: from a FakeQuantize on the parameter
`conv1.weight`, say. The layer stays a `call_module` at its own path, with its own parameters under
their own names (`conv1.weight` is read by a `get_attr` node and stays trainable), so selectors,
state dicts and passes that follow axes see the layer that they know.
"""

from typing import TypeVar, cast

import torch.nn.functional as F
from torch import Tensor, nn

from fxcompress.errors import UsageError

__all__ = [
    "OperandConv1d",
    "OperandConv2d",
    "OperandConv3d",
    "OperandConvTranspose1d",
    "OperandConvTranspose2d",
    "OperandConvTranspose3d",
    "OperandEmbedding",
    "OperandLinear",
    "own_weight",
    "take_weight_as_operand",
]


class OperandConv1d(nn.Conv1d):
    """`nn.Conv1d` with the weight as an operand."""

    def forward(self, input: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        """Convolve `[batch, in, length]` with `[out, in / groups, k]`."""
        return cast(Tensor, self._conv_forward(input, weight, self.bias))


class OperandConv2d(nn.Conv2d):
    """`nn.Conv2d` with the weight as an operand."""

    def forward(self, input: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        """Convolve `[batch, in, height, width]` with `[out, in / groups, k, k]`."""
        return cast(Tensor, self._conv_forward(input, weight, self.bias))


class OperandConv3d(nn.Conv3d):
    """`nn.Conv3d` with the weight as an operand."""

    def forward(self, input: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        """Convolve `[batch, in, depth, height, width]` with `[out, in / groups, k, k, k]`."""
        return cast(Tensor, self._conv_forward(input, weight, self.bias))


class OperandConvTranspose1d(nn.ConvTranspose1d):
    """`nn.ConvTranspose1d` with the weight as an operand."""

    def forward(self, input: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        """Convolve, transposed, with a weight `[in, out / groups, k]`."""
        return F.conv_transpose1d(
            input, weight, self.bias, self.stride, self.padding,  # type: ignore[arg-type]
            self.output_padding, self.groups, self.dilation,
        )  # fmt: skip


class OperandConvTranspose2d(nn.ConvTranspose2d):
    """`nn.ConvTranspose2d` with the weight as an operand."""

    def forward(self, input: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        """Convolve, transposed, with a weight `[in, out / groups, k, k]`."""
        return F.conv_transpose2d(
            input, weight, self.bias, self.stride, self.padding,  # type: ignore[arg-type]
            self.output_padding, self.groups, self.dilation,
        )  # fmt: skip


class OperandConvTranspose3d(nn.ConvTranspose3d):
    """`nn.ConvTranspose3d` with the weight as an operand."""

    def forward(self, input: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        """Convolve, transposed, with a weight `[in, out / groups, k, k, k]`."""
        return F.conv_transpose3d(
            input, weight, self.bias, self.stride, self.padding,  # type: ignore[arg-type]
            self.output_padding, self.groups, self.dilation,
        )  # fmt: skip


class OperandLinear(nn.Linear):
    """`nn.Linear` with the weight as an operand."""

    def forward(self, input: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        """Multiply `[..., in]` by a weight `[out, in]`."""
        return F.linear(input, weight, self.bias)


class OperandEmbedding(nn.Embedding):
    """`nn.Embedding` with the weight as an operand."""

    def forward(self, input: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        """Look rows of `[rows, features]` up: indices `[...]` become `[..., features]`."""
        return F.embedding(input, weight, self.padding_idx)


_OPERAND_FORMS: tuple[tuple[type[nn.Module], type[nn.Module]], ...] = (
    (nn.Conv1d, OperandConv1d),
    (nn.Conv2d, OperandConv2d),
    (nn.Conv3d, OperandConv3d),
    (nn.ConvTranspose1d, OperandConvTranspose1d),
    (nn.ConvTranspose2d, OperandConvTranspose2d),
    (nn.ConvTranspose3d, OperandConvTranspose3d),
    (nn.Embedding, OperandEmbedding),
    (nn.Linear, OperandLinear),
)

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def take_weight_as_operand(layer: nn.Module) -> nn.Module:
    """Return the operand form of a layer, with the same parameter objects and settings.

    Raises:
        UsageError: The layer has no operand form, or changes its weight when it is called.
    """
    if isinstance(layer, nn.Embedding) and layer.max_norm is not None:
        raise UsageError(
            "an embedding with max_norm cannot take its weight as an operand",
            reason="it changes its weight in place when it is called",
        )
    for stock, operand in _OPERAND_FORMS:
        if isinstance(layer, stock):
            return _as(layer, operand)
    names = ", ".join(stock.__name__ for stock, _ in _OPERAND_FORMS)
    raise UsageError(
        f"{type(layer).__name__} cannot take its weight as an operand",
        reason=f"the layers that can are {names}",
    )


def own_weight(layer: nn.Module) -> nn.Module:
    """Return the stock layer of an operand form: it reads its own `weight` again.

    Raises:
        UsageError: The layer is no operand form.
    """
    for stock, operand in _OPERAND_FORMS:
        if type(layer) is operand:
            return _as(layer, stock)
    raise UsageError(f"{type(layer).__name__} does not take its weight as an operand")


def _as(layer: nn.Module, cls: type[ModuleT]) -> ModuleT:
    made = cls.__new__(cls)
    made.__dict__ = {
        key: value.copy() if isinstance(value, (dict, set)) else value
        for key, value in layer.__dict__.items()
    }
    return made
