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
import torch.nn.functional as F
from torch import Tensor, fx

from fxcompress.ir.naming import node_ids
from fxcompress.ir.ops import op_name
from passes.quantize._scaling.groups import Group, find_groups
from passes.quantize._weight_only.grids import Width, fit
from passes.quantize._weight_only.layers import Weight
from passes.quantize._weight_only.statistics import Inputs

if TYPE_CHECKING:
    from fxcompress.ir import Program

__all__ = ["Scaling", "find_scalings", "search_scale"]

# α = 0, 1/10, …, 1.
_STEPS: Final = 10
# Rows of each weight on which an α is judged.
_JUDGED: Final = 256
_APART: Final = "what it reads is also read by something that is not scaled with it"


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
    groups, ids = find_groups(program), node_ids(program)
    found: dict[fx.Node, Scaling] = {}
    reasons: dict[fx.Node, str] = {}
    for group in groups.all:
        nodes = tuple(reader.layer.node for reader in group.readers)
        if group.open and _together(group, readers):
            scaling = Scaling(nodes, tuple(part.tensor for part in group.parts))
            found.update(dict.fromkeys(nodes, scaling))
        elif group.open:
            reasons.update(dict.fromkeys(nodes, _APART))
    for node in readers:
        if op_name(node) != "linear":
            reasons[node] = "AWQ scales the inputs of linear layers only"
        elif node not in found and node not in reasons:
            reasons[node] = groups.why_not(node, ids)[0]
    return found, {node: reason for node, reason in reasons.items() if node in readers}


def _together(group: Group, readers: Mapping[fx.Node, Weight]) -> bool:
    """Whether all readers are linear layers to quantise that read one tensor, every channel."""
    alike = all(
        reader.layer.node in readers
        and op_name(reader.layer.node) == "linear"
        and reader.layer.input is group.readers[0].layer.input
        and torch.equal(reader.index.long(), torch.arange(len(group.free)))
        for reader in group.readers
    )
    return alike and bool(group.free.all()) and all(part.dim == 0 for part in group.parts)


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
    columns = len(factors)
    missing = rows.shape[1:].numel() - columns
    by_group = F.pad(factors, (0, missing), value=1.0).reshape(rows.shape[1:])
    scaled = rows * by_group
    grid = fit(scaled, width, "minmax")
    difference = ((grid.rounded(scaled) - scaled) / by_group).flatten(1)[:, :columns]
    return float(((difference @ hessian) * difference).sum())
