"""The decision of `quantize.dynamic`: quantizers of weights, activations and matrices."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import fx

from fxcompress.errors import UsageError
from fxcompress.ir.ops import op_name
from passes._paths import free_path, path_beside
from passes.quantize._dynamic.layers import (
    Layers,
    activation_of,
    choose,
    is_recurrent,
    matrix_names,
    weight_operand,
)
from passes.quantize._masked import unmasked
from passes.quantize._rules import CONVOLUTIONS
from passes.quantize._weights import channel_axis, weight_scales
from passes.quantize.dynamic import DynamicDecision, DynamicEntry, RecurrentEntry
from passes.quantize.static import WeightEntry

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from passes.quantize.dynamic import DynamicOptions

__all__ = ["decide"]


def decide(program: Program, options: DynamicOptions) -> DynamicDecision:
    """Return the decision of `quantize.dynamic`."""
    layers = choose(program, options)
    if not layers.chosen:
        left = [each for each in layers.declined if each.reason != "it is not selected"]
        raise UsageError(
            "there is no layer to quantise",
            reason="; ".join(f"{each.node}: {each.reason}" for each in left[:3]),
            hint="select other layers, or take this pass out",
        )
    return _Deciding(program, layers, options).run()


class _Deciding:
    def __init__(self, program: Program, layers: Layers, options: DynamicOptions) -> None:
        self.layers, self.options, self.ids = layers, options, layers.ids
        self.state = program.state()
        self.program = program
        self.taken = {name for name, _ in program.module.named_modules()} | set(self.state)

    def run(self) -> DynamicDecision:
        plain = [node for node in self.layers.chosen if not is_recurrent(node)]
        weights = self._weights(plain)
        recurrent = self._recurrent()
        entries = [*weights, *(each for layer in recurrent for each in layer.weights)]
        meta = [each for each in entries if self.state[each.tensor].is_meta]
        known = [each for each in entries if each not in meta]
        return DynamicDecision(
            weights=weights,
            activations=self._activations(plain),
            recurrent=recurrent,
            declined=self.layers.declined,
            pending=tuple(
                f"{each.path}.scale: known once the weights have values" for each in meta
            ),
            arrays=weight_scales(self.program, known, self.options.weights, lambda _: None),
        )

    def _weights(self, nodes: list[fx.Node]) -> tuple[WeightEntry, ...]:
        readers: dict[str, list[fx.Node]] = {}
        for node in nodes:
            source = weight_operand(node)
            own = f"{node.target}.weight" if source is None else str(unmasked(source).target)
            readers.setdefault(own, []).append(node)
        entries = []
        for tensor, group in readers.items():
            first = group[0]
            path = path_beside(tensor, "_fq")
            if first.op == "call_module":
                # Beside the layer, which must stay without children.
                path = path_beside(str(first.target), "_weight_fq")
            axis = 1 if op_name(first) == "addmm" else channel_axis(first)
            entries.append(self._weight(path, tensor, axis, group))
        return tuple(entries)

    def _weight(
        self, path: str, tensor: str, axis: int | None, readers: list[fx.Node]
    ) -> WeightEntry:
        axis = axis if self.options.weights.per == "channel" else None
        return WeightEntry(
            path=self._free(path),
            tensor=tensor,
            layers=tuple(self.ids[node] for node in readers),
            bits=self.options.weights.bits,
            axis=axis,
            shape=() if axis is None else (self.state[tensor].shape[axis],),
        )

    def _activations(self, nodes: list[fx.Node]) -> tuple[DynamicEntry, ...]:
        chosen = self.options.activations
        readers: dict[tuple[fx.Node, str], list[fx.Node]] = {}
        for node in nodes:
            # The last dimension of what a convolution reads is a place, not a vector.
            per = "tensor" if op_name(node) in CONVOLUTIONS else chosen.per
            readers.setdefault((activation_of(node), per), []).append(node)
        return tuple(
            DynamicEntry(
                path=self._free(path_beside(self.ids[source], "_dq")),
                node=self.ids[source],
                layers=tuple(self.ids[node] for node in group),
                bits=chosen.bits,
                per="token" if per == "token" else "tensor",
                symmetric=chosen.symmetric,
            )
            for (source, per), group in readers.items()
        )

    def _recurrent(self) -> tuple[RecurrentEntry, ...]:
        calls: dict[str, list[fx.Node]] = {}
        for node in self.layers.chosen:
            if is_recurrent(node):
                calls.setdefault(str(node.target), []).append(node)
        return tuple(
            RecurrentEntry(
                path=path,
                layers=tuple(self.ids[node] for node in nodes),
                bits=self.options.activations.bits,
                weights=tuple(
                    self._weight(path_beside(path, f"_{name}_fq"), f"{path}.{name}", 0, nodes)
                    for name in matrix_names(nodes[0])
                ),
            )
            for path, nodes in calls.items()
        )

    def _free(self, path: str) -> str:
        path = free_path(path, self.taken)
        self.taken.add(path)
        return path
