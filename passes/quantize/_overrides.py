"""Which integers each layer gets: the options for all, and what overrides say of some."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from torch import fx

from fxcompress.errors import SelectorError
from fxcompress.pipeline.base import Options
from fxcompress.pipeline.selectors import Selector

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from passes.quantize._options import ActivationOptions, StaticOptions, WeightOptions

__all__ = ["Formats", "read_overrides"]

OptionsT = TypeVar("OptionsT", bound=Options)


@dataclass(frozen=True)
class Formats:
    """How weights and activations are quantised, node by node.

    Attributes:
        weight: Of all layers without an entry in `weights`.
        activation: Of all kernels without an entry in `activations`.
        weights: Layer -> its weight.
        activations: Kernel -> what it reads.
        kept: Node -> why it stays in float.
        order: Node -> how late the override is that says something of what it reads.
    """

    weight: WeightOptions
    activation: ActivationOptions
    weights: Mapping[fx.Node, WeightOptions] = field(default_factory=dict)
    activations: Mapping[fx.Node, ActivationOptions] = field(default_factory=dict)
    kept: Mapping[fx.Node, str] = field(default_factory=dict)
    order: Mapping[fx.Node, int] = field(default_factory=dict)

    def of_weight(self, layers: Iterable[fx.Node]) -> WeightOptions:
        """Return how the weight of some layers is quantised: as the one that wants most bits."""
        return max((self.weights.get(each, self.weight) for each in layers), key=lambda w: w.bits)

    def of_activation(self, kernels: Iterable[fx.Node]) -> ActivationOptions:
        """Return how a tensor that these kernels read is quantised.

        The kernel that wants most bits decides; among equals the one with the later override.
        """
        ranked = [
            (self.activations.get(each, self.activation), self.order.get(each, -1))
            for each in kernels
        ]
        return (
            max(ranked, key=lambda pair: (pair[0].bits, pair[1]))[0] if ranked else self.activation
        )


def read_overrides(
    program: Program,
    options: StaticOptions,
    layers: list[fx.Node],
    followers: list[fx.Node],
) -> Formats:
    """Return what the options and their overrides say of layers and of what follows them.

    Raises:
        SelectorError: An override fits nothing that it can be for.
    """
    weights: dict[fx.Node, WeightOptions] = {}
    activations: dict[fx.Node, ActivationOptions] = {}
    kept: dict[fx.Node, str] = {}
    order: dict[fx.Node, int] = {}
    for index, each in enumerate(options.overrides):
        candidates = [*layers, *followers]
        nodes = Selector(each.targets, each.types).select(program, candidates)
        if each.weights is not None and not set(nodes) & set(layers):
            raise SelectorError(
                f"overrides[{index}] sets weights of what has none",
                reason="it selects adds, products, concatenations or pools only",
                hint="select a convolution or a linear layer, or drop `weights`",
            )
        for node in nodes:
            if each.weights is not None and node in layers:
                weights[node] = _over(weights.get(node, options.weights), each.weights)
            if each.activations is not None:
                base = activations.get(node, options.activations)
                activations[node], order[node] = _over(base, each.activations), index
            if each.keep is not None:
                kept.pop(node, None)
            if each.keep:
                kept[node] = f"overrides[{index}] keeps it"
    return Formats(options.weights, options.activations, weights, activations, kept, order)


def _over(base: OptionsT, override: Options) -> OptionsT:
    """Return options with what an override says in their place."""
    told = {name: getattr(override, name) for name in type(override).model_fields}
    return base.model_copy(update={name: v for name, v in told.items() if v is not None})
