"""How a Program is called: the names, trees and sizes of its inputs and outputs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

__all__ = ["Dim", "Parameter", "Signature", "TensorInput"]


@dataclass(frozen=True)
class Dim:
    """A dynamic size: its name in specs and texts, and the range it was captured for.

    `symbol` is the name of the sympy symbol that stands for it in `meta["val"]` shapes.
    `example` is the size it had when the model was captured.
    """

    name: str
    symbol: str
    example: int
    minimum: int = 2
    maximum: int | None = None


@dataclass(frozen=True)
class TensorInput:
    """One tensor leaf of the inputs: a placeholder of the graph.

    `shape` holds an int for a fixed size and a `Dim` name for a dynamic one.
    `path` says where the leaf sits in its parameter: `("pixel", 0)`, or empty for the value itself.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int | str, ...]
    parameter: str
    path: tuple[str | int, ...] = ()

    def size(self, dims: Mapping[str, int]) -> tuple[int, ...]:
        """Return the shape with its dynamic sizes filled in."""
        return tuple(dims[s] if isinstance(s, str) else s for s in self.shape)


@dataclass(frozen=True)
class Parameter:
    """One parameter of `forward`: its name, how it may be given, and the tree of its value.

    `kind` is `inspect.Parameter.kind.name`. `tree` is the pytree of the value; `leaves` names the
    placeholder of each tensor leaf and holds `None` where the leaf is the constant in `constants`.
    """

    name: str
    kind: str
    tree: pytree.TreeSpec
    leaves: tuple[str | None, ...]
    constants: tuple[Any, ...]


@dataclass(frozen=True)
class Signature:
    """The call of the original `forward`: parameters in order, tensor inputs, the output's tree."""

    parameters: tuple[Parameter, ...]
    inputs: tuple[TensorInput, ...]
    output: pytree.TreeSpec

    @property
    def is_flat(self) -> bool:
        """Whether every parameter is one tensor, so placeholders are the parameters."""
        return all(p.tree.is_leaf() and p.leaves[0] is not None for p in self.parameters)

    def input(self, name: str) -> TensorInput:
        """Return the tensor input called `name`.

        Raises:
            KeyError: There is none of that name.
        """
        for tensor in self.inputs:
            if tensor.name == name:
                return tensor
        raise KeyError(name)

    def flatten(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
        """Return the tensor leaves of a call, in placeholder order.

        Raises:
            ModelError: An argument is missing, unknown, or of another structure than captured.
        """
        from fxcompress.ir._calling import flatten_call

        return flatten_call(self, args, kwargs)

    def leaves_of(self, batch: Sequence[Any] | Mapping[str, Any]) -> list[torch.Tensor]:
        """Return the tensor leaves of a batch: positional arguments, or arguments by name.

        Raises:
            ModelError: As `flatten`.
        """
        args, kwargs = ((), batch) if isinstance(batch, Mapping) else (tuple(batch), {})
        return self.flatten(args, kwargs)

    def unflatten(self, leaves: Sequence[Any]) -> Any:
        """Return the flat outputs of the graph in the original's structure."""
        return pytree.tree_unflatten(list(leaves), self.output)
