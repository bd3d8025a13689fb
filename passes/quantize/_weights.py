"""Quantizers of weights: where they go, and their scales."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from fxcompress.errors import NumericsError
from fxcompress.ir.ops import bind, module_of, op_name
from fxcompress.nn import FloatQuantize, affine_parameters
from passes._paths import free_path, path_beside
from passes.quantize._build import weight_quantizer
from passes.quantize._masked import unmasked
from passes.quantize._search import mse_weight_range
from passes.quantize.static import WeightEntry

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from passes.quantize._options import WeightOptions
    from passes.quantize._overrides import Formats
    from passes.quantize._targets import Numbers

__all__ = ["channel_axis", "weight_entries", "weight_scales"]

# Room for the sum of products in an int32 accumulator beside the bias.
_BIAS_LIMIT = 2.0**30


def weight_entries(
    program: Program,
    layers: Iterable[fx.Node],
    options: WeightOptions,
    ids: Mapping[fx.Node, str],
    taken: set[str],
    formats: Formats | None = None,
    dtype: Numbers = "int",
) -> tuple[WeightEntry, ...]:
    """Return one quantizer per weight, in graph order; calls of one weight share it.

    `formats` says which layers have weights of their own kind.
    """
    groups: dict[str, list[fx.Node]] = {}
    for node in layers:
        groups.setdefault(_tensor_name(node), []).append(node)
    entries = []
    state = program.state()
    for tensor, nodes in groups.items():
        chosen = options if formats is None else formats.of_weight(nodes)
        axis = channel_axis(nodes[0]) if chosen.per == "channel" else None
        path = free_path(_path(nodes[0], tensor), taken)
        taken.add(path)
        entries.append(
            WeightEntry(
                path=path,
                tensor=tensor,
                layers=tuple(ids[node] for node in nodes),
                bits=chosen.bits,
                axis=axis,
                shape=() if axis is None else (state[tensor].shape[axis],),
                observer=None if chosen.observer == options.observer else chosen.observer,
                dtype=dtype,
            )
        )
    return tuple(entries)


def _path(node: fx.Node, tensor: str) -> str:
    """Return `layer1.0.conv1_weight_fq`: beside the layer, which must stay without children."""
    if node.op == "call_module":
        return path_beside(str(node.target), "_weight_fq")
    return path_beside(tensor, "_fq")


def _tensor_name(node: fx.Node) -> str:
    if node.op == "call_module":
        return f"{node.target}.weight"
    return str(unmasked(bind(node)["weight"]).target)


def channel_axis(node: fx.Node) -> int | None:
    """Return the weight's dimension of output channels, if it is one dimension."""
    if not op_name(node).startswith("conv_transpose"):
        return 0
    groups = module_of(node).groups if node.op == "call_module" else bind(node).get("groups", 1)
    return 1 if groups == 1 else None


def weight_scales(
    program: Program,
    entries: Iterable[WeightEntry],
    options: WeightOptions,
    input_scale: Callable[[str], float | None],
    folded: Mapping[str, tuple[Tensor, Tensor]] | None = None,
) -> dict[str, Tensor]:
    """Return the scale of each entry by its path, float32 of the entry's shape.

    Args:
        program: Holds the weights.
        entries: The quantizers.
        options: How ranges are found, where an entry does not say.
        input_scale: Layer id -> the scale of the activation it reads, where known.
        folded: Tensor name -> weight and bias with the batch norm that is trained with it.

    Raises:
        NumericsError: A weight holds a NaN or an infinity.
    """
    state = program.state()
    scales = {}
    for entry in entries:
        weight, bias = (folded or {}).get(entry.tensor) or _own(state, entry.tensor)
        weight = weight.detach().float()
        fake = weight_quantizer(entry)
        rows = _rows(weight, entry.axis)
        low, high = rows.aminmax(dim=1)
        if not bool(torch.isfinite(torch.stack((low, high))).all()):
            raise NumericsError(
                f"a NaN or an infinity in {entry.tensor}",
                hint="check the weights that the model was given",
                where=entry.tensor,
            )
        observer = entry.observer or options.observer
        if observer == "mse":
            low, high = mse_weight_range(rows, fake)
        if isinstance(fake, FloatQuantize):
            scales[entry.path] = fake.fit(torch.maximum(-low, high)).scale
            continue
        scale, _ = affine_parameters(low, high, qmin=fake.qmin, qmax=fake.qmax, symmetric=True)
        for layer in entry.layers:
            scale = _room_for_bias(scale, bias, input_scale(layer))
        scales[entry.path] = scale.reshape(entry.shape)
    return scales


def _own(state: Mapping[str, Tensor], tensor: str) -> tuple[Tensor, Tensor | None]:
    return state[tensor], state.get(f"{tensor.removesuffix('weight')}bias")


def _rows(weight: Tensor, axis: int | None) -> Tensor:
    return weight.reshape(1, -1) if axis is None else weight.movedim(axis, 0).flatten(1)


def _room_for_bias(scale: Tensor, bias: Tensor | None, input_scale: float | None) -> Tensor:
    """Raise scales with which the bias, as integers at s_x·s_w, would overflow int32."""
    if bias is None or input_scale is None:
        return scale
    least = bias.detach().float().abs() / (input_scale * _BIAS_LIMIT)
    return torch.maximum(scale, least if scale.numel() == bias.numel() else least.max())
