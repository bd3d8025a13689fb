"""Which weights get few levels, their scales, and why others stay in float."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from fxcompress.errors import NumericsError, UsageError
from fxcompress.ir.ops import op_name
from fxcompress.rewrite.edits import Declined
from passes._paths import free_path, path_beside
from passes.quantize._layers import ends
from passes.quantize._levels.options import LevelWeight
from passes.quantize._rules import LAYERS
from passes.quantize._weight_only.layers import Weight, choose
from passes.quantize.weight_only import WeightOnlyOptions

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from passes.quantize._levels.options import LevelOptions

__all__ = ["Chosen", "choose_levels", "level_weights"]


@dataclass(frozen=True)
class Chosen:
    """The weights to quantise in graph order, refusals, and the ids of nodes."""

    weights: tuple[Weight, ...]
    declined: tuple[Declined, ...]
    ids: Mapping[fx.Node, str]


def choose_levels(program: Program, options: LevelOptions) -> Chosen:
    """Select weights, and decline those that cannot be quantised or are asked to be kept.

    Raises:
        SelectorError: The selection fits no layer, or not as many as expected.
    """
    names = ("targets", "types", "exclude", "expect")
    selection = {name: getattr(options, name) for name in names}
    found = choose(program, WeightOnlyOptions(**selection, bits=2, group=None, symmetric=True))
    layers = [node for node in program.nodes if op_name(node) in LAYERS]
    kept = {
        **(ends(program, layers, first=True) if options.keep_first else {}),
        **(ends(program, layers, first=False) if options.keep_last else {}),
    }
    weights, declined = [], list(found.declined)
    for weight in found.weights:
        reasons = {node: kept[node] for node in weight.readers if node in kept}
        if not reasons:
            weights.append(weight)
        because = tuple(found.ids[node] for node in reasons)
        for node in weight.readers if reasons else ():
            reason = reasons.get(node, f"its weight {weight.tensor} is read by one that is kept")
            declined.append(Declined(node=found.ids[node], reason=reason, because_of=because))
    return Chosen(tuple(weights), tuple(declined), found.ids)


def level_weights(
    program: Program, chosen: Chosen, suffix: str, per: str, scale: Callable[[Tensor], Tensor]
) -> tuple[tuple[LevelWeight, ...], dict[str, Tensor]]:
    """Return the quantizers of the chosen weights, and their scales by path.

    Args:
        program: Holds the weights.
        chosen: What `choose_levels` found.
        suffix: Of the quantizers' names.
        per: `channel` or `tensor`.
        scale: Maps rows `[channels, elements]` to their scales `[channels]`.

    Raises:
        UsageError: There are none.
        NumericsError: A weight holds a NaN or an infinity.
    """
    if not chosen.weights:
        raise UsageError(
            "there is no layer to quantise",
            reason="; ".join(f"{each.node}: {each.reason}" for each in chosen.declined[:3]),
            hint="select other layers, or take this pass out",
        )
    taken = {name for name, _ in program.module.named_modules()} | set(program.state())
    state = program.state()
    entries, scales = [], {}
    for weight in chosen.weights:
        path = free_path(_path(weight, suffix), taken)
        taken.add(path)
        value = _finite(weight.tensor, state[weight.tensor].detach().float())
        rows = weight.rows(value) if per == "channel" else value.reshape(1, -1)
        found = scale(rows)
        entries.append(
            LevelWeight(
                path=path,
                tensor=weight.tensor,
                layers=tuple(chosen.ids[node] for node in weight.readers),
                axis=weight.axis if per == "channel" else None,
                shape=tuple(found.shape) if per == "channel" else (),
                zeros=0 if found.is_meta else int((found == 0).sum()),
            )
        )
        if not found.is_meta:
            scales[path] = found if per == "channel" else found[0]
    return tuple(entries), scales


def _path(weight: Weight, suffix: str) -> str:
    """Return `layer1.0.conv1_weight_fq`: beside the layer, which must stay without children."""
    reader = weight.readers[0]
    if reader.op == "call_module":
        return path_beside(str(reader.target), f"_weight{suffix}")
    return path_beside(weight.tensor, suffix)


def _finite(name: str, value: Tensor) -> Tensor:
    if not value.is_meta and not bool(torch.isfinite(value).all()):
        raise NumericsError(
            f"a NaN or an infinity in {name}",
            hint="check the weights that the model was given",
            where=name,
        )
    return value
