"""Quantised layers whose biases can be corrected."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from torch import Tensor, fx

from fxcompress.ir.ops import bind, module_of, op_name
from fxcompress.nn import FakeQuantize
from fxcompress.pipeline.selectors import Selector
from fxcompress.rewrite.edits import Declined
from passes._layers.operands import canonical
from passes.quantize._rules import CONVOLUTIONS, LAYERS
from passes.quantize._scaling.entries import Shifted
from passes.quantize._scaling.layers import readers_of

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from passes.quantize.bias_correct import BiasCorrectOptions

__all__ = ["QUANTIZERS", "Target", "find_targets"]

QUANTIZERS: Final = frozenset({"fake_quant", "dynamic_quant", "float_quant"})
# As quantize.static: room for the sum of products in an int32 accumulator beside the bias.
_BIAS_LIMIT: Final = 2.0**30


@dataclass(frozen=True)
class Target:
    """A quantised layer: its bias, and how large that may become.

    Attributes:
        node: The layer, in the quantised program.
        id: Its id.
        bias: Name of its bias.
        new: It has none yet.
        channels: How many outputs it has.
        dim: Dimension of activations with them, from the end.
        limit: The largest |bias|, `[channels]` or one for all; None where nothing limits it.
    """

    node: fx.Node
    id: str
    bias: str
    new: bool
    channels: int
    dim: int
    limit: Tensor | None

    @property
    def entry(self) -> Shifted:
        """The change of its bias, as a decision says it."""
        return Shifted(tensor=self.bias, channels=self.channels, new=self.new)


def find_targets(
    program: Program, options: BiasCorrectOptions, ids: Mapping[fx.Node, str]
) -> tuple[list[Target], list[Declined]]:
    """Return the selected layers whose bias can be corrected, and why others cannot.

    Raises:
        SelectorError: The selection fits no layer, or not as many as expected.
    """
    candidates = [node for node in program.nodes if op_name(node) in LAYERS]
    selected = set(Selector.of(options).select(program, candidates)) if candidates else set()
    readers = readers_of(program)
    targets, declined = [], []
    for node in candidates:
        reason = _obstacle(program, node, readers) if node in selected else "it is not selected"
        if reason is None:
            targets.append(_target(program, node, ids[node]))
        else:
            declined.append(Declined(node=ids[node], reason=reason))
    return targets, declined


def _obstacle(program: Program, node: fx.Node, readers: Mapping[str, list[fx.Node]]) -> str | None:
    weight = bind(node).get("weight")
    if not isinstance(weight, fx.Node) or op_name(weight) not in QUANTIZERS:
        return "its weight is not quantised"
    if node.op != "call_module":
        return "it is a function call, whose bias is an operand"
    calls = list(node.graph.find_nodes(op="call_module", target=str(node.target)))
    if len(calls) > 1:
        return f"its module is called {len(calls)} times, with one bias"
    if getattr(module_of(node), "bias", None) is not None:
        bias = canonical(program, f"{node.target}.bias")
        if readers.get(bias) != [node]:
            return f"its bias {bias} is read elsewhere, too"
    return None


def _target(program: Program, node: fx.Node, name: str) -> Target:
    module: Any = module_of(node)
    own = f"{node.target}.bias"
    op = op_name(node)
    channels = module.out_channels if op in CONVOLUTIONS else module.out_features
    return Target(
        node=node,
        id=name,
        bias=own if module.bias is None else canonical(program, own),
        new=module.bias is None,
        channels=int(channels),
        dim=-1 - int(op[-2]) if op in CONVOLUTIONS else -1,
        limit=_limit(node),
    )


def _limit(node: fx.Node) -> Tensor | None:
    """Return s_x·s_w·2^30, where the layer reads an activation with a fixed scale."""
    bound = bind(node)
    read, weight = bound["input"], bound["weight"]
    fakes = [module_of(each) for each in (read, weight) if op_name(each) == "fake_quant"]
    if len(fakes) != 2:
        return None
    x, w = fakes
    if not (isinstance(x, FakeQuantize) and isinstance(w, FakeQuantize)) or w.scale.dim() > 1:
        return None
    return x.scale.detach().double() * w.scale.detach().double() * _BIAS_LIMIT
