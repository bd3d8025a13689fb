"""Low-rank adapters in a graph: find them, and merge them into the weights that they adapt.

    y = layer(x) + s · B(A(dropout(x)))

`A` and `B` are ordinary layers beside the layer: `fc_lora.A`, `fc_lora.B`. With a magnitude m
(DoRA) the layer reads its weight as an operand, W · ρ with ρ = m / ‖W + s·B·A‖ per output, and the
adapter's result is multiplied by ρ too.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NoReturn, cast

import torch
from torch import Tensor, fx

from fxcompress.errors import PassError, UsageError
from fxcompress.ir.naming import node_ids
from fxcompress.ir.ops import bind, op_name
from fxcompress.nn import own_weight

if TYPE_CHECKING:
    from fxcompress.ir.program import Program
    from fxcompress.rewrite.rewriter import GraphRewriter

__all__ = [
    "ADAPTED",
    "Adapter",
    "adapter_paths",
    "find_adapters",
    "merge_adapters",
    "merged_weight",
    "weight_operand",
]

ADAPTED: Final = frozenset({"linear", "conv1d", "conv2d", "conv3d", "embedding", "addmm"})
_NAME: Final = re.compile(r".*_lora(_\d+)?$")


@dataclass(frozen=True)
class Adapter:
    """A low-rank adapter of one layer, which may be called several times.

    Attributes:
        path: What holds it: `A`, `B`, perhaps `dropout` and `magnitude` are below.
        layer: The path of the layer.
        op: The layer's op: linear, conv1d to conv3d, embedding, or addmm with a weight `[in, out]`.
        weight: The name of the layer's weight.
        scale: s, which multiplies B·A.
        rank: Rows of A.
        magnitude: The name of m, or None.
        through: What stands between the weight and the layer (a mask, a quantizer), or empty: such
            a weight cannot take the adapter in.
        calls: `(layer's node, node whose result stands for the layer's now)`.
    """

    path: str
    layer: str
    op: str
    weight: str
    scale: float
    rank: int
    magnitude: str | None
    through: str
    calls: tuple[tuple[fx.Node, fx.Node], ...]


def adapter_paths(program: Program) -> list[str]:
    """Return the paths of all adapters, in graph order."""
    called = [str(node.target) for node in program.graph.find_nodes(op="call_module")]
    paths = [name.removesuffix(".A") for name in called if name.endswith(".A")]
    return [p for p in dict.fromkeys(paths) if _NAME.match(p) and f"{p}.B" in called]


def find_adapters(program: Program) -> dict[str, Adapter]:
    """Return path -> adapter, in graph order.

    Raises:
        PassError: What stands around an adapter is not its form any more.
    """
    return {path: _Finder(program, path).adapter() for path in adapter_paths(program)}


def weight_operand(node: fx.Node) -> fx.Node | None:
    """Return the operand that is a layer's weight; None where the module reads its own."""
    found = bind(node).get("mat2" if op_name(node) == "addmm" else "weight")
    return found if isinstance(found, fx.Node) else None


class _Finder:
    def __init__(self, program: Program, path: str) -> None:
        self.program, self.path = program, path
        self.ids = node_ids(program)

    def adapter(self) -> Adapter:
        """Read an adapter off the graph."""
        last = self.program.graph.find_nodes(op="call_module", target=f"{self.path}.B")
        found = [self._call(node) for node in last]
        base, _, scale, rho = found[0]
        state = self.program.state()
        weight, through = self._weight(base, rho)
        magnitude = f"{self.path}.magnitude"
        down = state[f"{self.path}.A.weight"]
        return Adapter(
            path=self.path,
            layer=str(base.target) if base.op == "call_module" else weight.rpartition(".")[0],
            op=op_name(base),
            weight=weight,
            scale=scale,
            rank=int(down.shape[1 if op_name(base) == "embedding" else 0]),
            magnitude=magnitude if magnitude in state else None,
            through=through,
            calls=tuple((layer, total) for layer, total, _, _ in found),
        )

    def _call(self, node: fx.Node) -> tuple[fx.Node, fx.Node, float, fx.Node | None]:
        """Return the layer's node, the sum, s and ρ of one call."""
        scaled = self._only_user(node, "mul")
        scale = [each for each in scaled.args if not isinstance(each, fx.Node)]
        if len(scale) != 1 or not isinstance(scale[0], (int, float)):
            self._refuse(f"{self.ids[scaled]} does not multiply it by a number")
        total, rho = self._only_user(scaled, "add", "mul"), None
        if op_name(total) == "mul":
            rho = next(each for each in total.all_input_nodes if each is not scaled)
            scaled, total = total, self._only_user(total, "add")
        others = [each for each in total.all_input_nodes if each is not scaled]
        if len(others) != 1 or op_name(others[0]) not in ADAPTED:
            self._refuse(f"{self.ids[total]} does not add it to a layer's result")
        return others[0], total, float(scale[0]), rho

    def _only_user(self, node: fx.Node, *ops: str) -> fx.Node:
        users = list(node.users)
        if len(users) != 1 or op_name(users[0]) not in ops:
            read = ", ".join(self.ids[user] for user in users)
            self._refuse(f"{self.ids[node]} is read by {read}")
        return users[0]

    def _weight(self, base: fx.Node, rho: fx.Node | None) -> tuple[str, str]:
        """Return the name of the weight that is adapted, and what it is read through."""
        operand = weight_operand(base)
        if operand is None:
            return f"{base.target}.weight", ""
        if rho is not None and op_name(operand) == "mul":
            operand = cast(fx.Node, operand.args[0])
        through = ""
        while operand.op != "get_attr":
            through = through or self.ids[operand]
            if len(operand.all_input_nodes) != 1:
                self._refuse(f"{self.ids[base]} computes its weight in {through}")
            operand = operand.all_input_nodes[0]
        return str(operand.target), through

    def _refuse(self, reason: str) -> NoReturn:
        _refuse(self.path, reason)


def _refuse(path: str, reason: str) -> NoReturn:
    raise PassError(
        f"the adapter {path} is not in the form that it was inserted in",
        reason=reason,
        hint="merge adapters before what changes the layers around them, such as quantisation",
        where=path,
    )


def rows(weight: Tensor, op: str) -> Tensor:
    """Return a layer's weight as `[out, rest]`."""
    return weight.t() if op in ("embedding", "addmm") else weight.flatten(1)


def _delta(adapter: Adapter, state: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """Return B·A as `[out, rest]`."""
    down = state[f"{adapter.path}.A.weight"].detach().to(dtype)
    up = state[f"{adapter.path}.B.weight"].detach().to(dtype)
    down = down.t() if adapter.op == "embedding" else down.flatten(1)
    return up.flatten(1) @ down


def merged_weight(adapter: Adapter, state: Mapping[str, Tensor]) -> Tensor:
    """Return W + s·B·A, or m · (W + s·B·A) / ‖W + s·B·A‖ per output, in W's shape and dtype.

    It is computed in float32, or in float64 where W is.
    """
    weight = state[adapter.weight].detach()
    dtype = torch.promote_types(weight.dtype, torch.float32)
    total = rows(weight.to(dtype), adapter.op) + adapter.scale * _delta(adapter, state, dtype)
    if adapter.magnitude is not None:
        magnitude = state[adapter.magnitude].detach().to(dtype)
        total = total * (magnitude / torch.linalg.vector_norm(total, dim=1)).unsqueeze(1)
    whole = total.t() if adapter.op in ("embedding", "addmm") else total
    return whole.reshape(weight.shape).to(weight.dtype).contiguous()


def merge_adapters(rewriter: GraphRewriter, paths: Collection[str] | None = None) -> list[str]:
    """Write adapters into the weights and take them out of the graph.

    A weight that is tied to others is untied: they keep the value that they have.

    Args:
        rewriter: Of the Program.
        paths: The adapters; all by default.

    Returns:
        The names of the weights that were tied.

    Raises:
        PassError: What stands around an adapter is not its form any more.
    """
    untied = []
    state = {name: tensor.detach() for name, tensor in rewriter.tree.state().items()}
    for path, adapter in find_adapters(rewriter.program).items():
        if paths is not None and path not in paths:
            continue
        if adapter.through:
            _refuse(path, f"{adapter.layer} reads its weight through {adapter.through}")
        value = merged_weight(adapter, state)
        own = bool(rewriter.tree.find(adapter.layer)) and adapter.calls[0][0].op == "call_module"
        if own:
            # One module object may stand under several names.
            module = rewriter.get_module(adapter.layer)
            module = copy.copy(module) if adapter.magnitude is None else _own(module)
            module.__dict__["_parameters"] = dict(module._parameters)
            rewriter.set_module(adapter.layer, module)
        if len(rewriter.tied(adapter.weight)) > 1:
            rewriter.untie(adapter.weight)
            untied.append(adapter.weight)
        for base, total in adapter.calls:
            rewriter.replace_uses(total, base)
            rewriter.remove(total)
            _give_weight_back(rewriter, adapter, base)
        rewriter.set_tensor(adapter.weight, value)
    return untied


def _own(module: torch.nn.Module) -> torch.nn.Module:
    try:
        return own_weight(module)
    except UsageError:
        return copy.copy(module)


def _give_weight_back(rewriter: GraphRewriter, adapter: Adapter, base: fx.Node) -> None:
    """Let a layer read its weight itself where the magnitude had made it an operand."""
    if adapter.magnitude is None:
        return
    operand = weight_operand(base)
    assert operand is not None, "a layer with a magnitude reads its weight as an operand"
    if base.op == "call_module":
        rewriter.set_args(base, (base.args[0],), {})
    else:
        rewriter.replace_uses(operand, cast(fx.Node, operand.args[0]), only=lambda n: n is base)
