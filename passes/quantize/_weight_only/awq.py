"""AWQ: scale input channels up before rounding where their inputs are large.

For layers that read one tensor x `[…, channels]`, W x = (W · s)(x / s) with s above 0 for each
channel. The division goes into what makes x: the weight of a norm, or the rows of the linear layer
before it. With s = (mean|x|)^α, α from a search over [0, 1], the rounding error of Q(W · s) is the
smallest at the output (Lin et al., 2024, arXiv:2306.00978, eq. 4 and 5).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, fx

from fxcompress.ir.ops import bind, module_of, op_name
from passes._layers.operands import canonical
from passes.quantize._weight_only.grids import Width, fit
from passes.quantize._weight_only.layers import Weight, readers_of
from passes.quantize._weight_only.statistics import Inputs

if TYPE_CHECKING:
    from fxcompress.ir import Program

__all__ = ["Scaling", "find_scalings", "search_scale"]

# α = 0, 1/10, …, 1.
_STEPS: Final = 10
# Rows of each weight on which an α is judged.
_JUDGED: Final = 256
# f(x / s) = f(x) / s for s above 0.
_HOMOGENEOUS: Final = frozenset({"relu", "leaky_relu", "dropout", "identity", "contiguous"})
_NORMS: Final = frozenset({"layer_norm", "rms_norm"})
_SIZES: Final = frozenset({"size", "dim", "numel"})


@dataclass
class Scaling:
    """Layers that read one tensor, and the parameters that make it.

    Attributes:
        layers: Linear layers, in graph order.
        divided: Parameters whose first dimension is divided by the factors.
        factors: One for each channel, above 0; None until searched.
    """

    layers: tuple[fx.Node, ...]
    divided: tuple[str, ...]
    factors: Tensor | None = None


def find_scalings(
    program: Program, readers: Mapping[fx.Node, Weight]
) -> tuple[dict[fx.Node, Scaling], dict[fx.Node, str]]:
    """Return the scaling of each layer that can have one, and why the others cannot."""
    found: dict[fx.Node, Scaling] = {}
    reasons: dict[fx.Node, str] = {}
    everybody = readers_of(program)
    for node in readers:
        if node in found or node in reasons:
            continue
        if op_name(node) != "linear":
            reasons[node] = "AWQ scales the inputs of linear layers only"
            continue
        source = bind(node)["input"]
        users = [user for user in source.users if op_name(user) not in _SIZES]
        divided = _divided(program, source, everybody)
        others = [
            user
            for user in users
            if user not in readers or op_name(user) != "linear" or len(readers[user].readers) > 1
        ]
        if others:
            reasons[node] = "what it reads is also read by something that is not scaled with it"
        elif isinstance(divided, str):
            reasons[node] = divided
        else:
            scaling = Scaling(tuple(users), divided)
            found.update(dict.fromkeys(users, scaling))
    return found, reasons


def search_scale(weights: Sequence[tuple[Width, Tensor]], inputs: Inputs) -> Tensor:
    """Return the factors with the least output error of all weights together, `[channels]`.

    Args:
        weights: Integers and values `[rows, groups, elements]` of each weight.
        inputs: Of these layers.
    """
    hessian, mean = inputs.hessian[0], inputs.mean[0].float()
    judged = [(width, rows[:: max(1, len(rows) // _JUDGED)]) for width, rows in weights]
    best, least = torch.ones_like(mean), float("inf")
    for step in range(_STEPS + 1):
        factors = _factors(mean, step / _STEPS)
        error = sum(_output_error(width, rows, factors, hessian) for width, rows in judged)
        if error < least:
            best, least = factors, error
    return best


def _factors(mean: Tensor, alpha: float) -> Tensor:
    """Return mean^α, normalised to a geometric middle of 1; 1 for channels that are always 0."""
    alive = mean > 0
    if alpha == 0 or not bool(alive.any()):
        return torch.ones_like(mean)
    raised = mean.clamp_min(float(mean[alive].max()) * 1e-4).pow(alpha)
    middle = (raised[alive].max() * raised[alive].min()).sqrt()
    return torch.where(alive, raised / middle, 1.0)


def _output_error(width: Width, rows: Tensor, factors: Tensor, hessian: Tensor) -> float:
    by_group = factors.reshape(rows.shape[1:])
    scaled = rows * by_group
    grid = fit(scaled, width, "minmax")
    difference = ((grid.rounded(scaled) - scaled) / by_group).flatten(1)
    return float(((difference @ hessian) * difference).sum())


def _divided(
    program: Program, node: fx.Node, everybody: Mapping[str, list[fx.Node]]
) -> tuple[str, ...] | str:
    """Return the parameters that scale a node's channels exactly, or why there are none."""
    while op_name(node) in _HOMOGENEOUS and len(_real_users(node.args[0])) == 1:
        node = node.args[0]  # type: ignore[assignment]
    op = op_name(node)
    if op in _NORMS and node.op == "call_module":
        names = _own(program, node, everybody)
        return names or f"{node.target} has no weight of its own that could take the scale"
    if op == "linear":
        return _of_linear(program, node, everybody) or f"{node.target} shares its weight"
    if op == "mul":
        for each in node.args:
            names = _of_factor(program, node, each, everybody)
            if names:
                return names
    return f"the {op} that makes its inputs has no weight that could take the scale"


def _of_factor(
    program: Program, product: fx.Node, operand: object, everybody: Mapping[str, list[fx.Node]]
) -> tuple[str, ...]:
    """Return the parameters of one operand of a product that alone scale the product."""
    if not isinstance(operand, fx.Node):
        return ()
    shape = product.meta["val"].shape
    if op_name(operand) == "param":
        tensor = canonical(program, str(operand.target))
        alone = everybody.get(tensor) == [product]
        return (tensor,) if alone and tuple(operand.meta["val"].shape) == (shape[-1],) else ()
    alone = _real_users(operand) == [product] and operand.meta["val"].dim() == len(shape)
    if op_name(operand) == "linear" and alone and operand.meta["val"].shape[-1] == shape[-1]:
        return _of_linear(program, operand, everybody)
    return ()


def _of_linear(
    program: Program, node: fx.Node, everybody: Mapping[str, list[fx.Node]]
) -> tuple[str, ...]:
    return _own(program, node, everybody) if node.op == "call_module" else ()


def _own(
    program: Program, node: fx.Node, everybody: Mapping[str, list[fx.Node]]
) -> tuple[str, ...]:
    """Return the weight and bias of a module that this one node reads; none if it has operands."""
    if len(node.all_input_nodes) > 1 or getattr(module_of(node), "weight", None) is None:
        return ()
    names = [
        canonical(program, f"{node.target}.{n}") for n, _ in module_of(node).named_parameters()
    ]
    alone = all(everybody.get(name) == [node] for name in names)
    return tuple(names) if alone else ()


def _real_users(node: object) -> list[fx.Node]:
    assert isinstance(node, fx.Node), "an activation is a node"
    return [user for user in node.users if op_name(user) not in _SIZES]
