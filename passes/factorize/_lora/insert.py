"""Put adapters into the graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from fxcompress.errors import PassError
from fxcompress.ir.ops import bind
from fxcompress.nn import take_weight_as_operand
from fxcompress.rewrite.adapters import find_adapters, rows, weight_operand
from passes._paths import scope_beside

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.rewrite import GraphRewriter
    from passes.factorize.lora import LoraDecision, LoraEntry

__all__ = ["check_inserted", "insert"]

_CONVOLUTIONS = {"conv1d": nn.Conv1d, "conv2d": nn.Conv2d, "conv3d": nn.Conv3d}


def insert(rewriter: GraphRewriter, decision: LoraDecision) -> None:
    """Add the adapters' nodes, and freeze what trains no more."""
    for entry in decision.adapters:
        _Adapter(rewriter, entry, decision).insert()
    for name in decision.freeze:
        rewriter.set_trainable(name, trainable=False)


class _Adapter:
    """One adapter on its way into the graph."""

    def __init__(self, rewriter: GraphRewriter, entry: LoraEntry, decision: LoraDecision) -> None:
        self.rewriter, self.entry, self.decision = rewriter, entry, decision
        self.last: fx.Node
        self.scope: tuple[tuple[str, str], ...] = ()
        self.weight: fx.Node

    def insert(self) -> None:
        """Add A, B and what is around them, at every call of the layer."""
        entry, rewriter = self.entry, self.rewriter
        down, up = self._layers()
        modules: dict[str, nn.Module | None] = {"A": down, "B": up}
        if self.decision.dropout and entry.op != "embedding":
            modules["dropout"] = nn.Dropout(self.decision.dropout)
        rho = None
        for name in entry.nodes:
            base = rewriter.node(name)
            self.last, self.scope = base, scope_beside(base)
            x = bind(base)["mat1" if entry.op == "addmm" else "input"]
            if "dropout" in modules:
                x = self._module("dropout", modules, x)
            low = self._module("A", modules, x)
            high = self._module("B", modules, low)
            scaled = self._function(torch.mul, high, entry.scale)
            if self.decision.dora:
                rho = self._ratio(base) if rho is None else rho
                self._weigh(base, rho)
                scaled = self._function(torch.mul, scaled, self._beside(rho, base))
            total = self._function(torch.add, base, scaled)
            rewriter.replace_uses(base, total)

    def _module(self, name: str, modules: dict[str, nn.Module | None], x: Any) -> fx.Node:
        module, modules[name] = modules[name], None
        path = f"{self.entry.path}.{name}"
        self.last = self.rewriter.call_module(path, module, (x,), after=self.last, scope=self.scope)
        return self.last

    def _function(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        self.last = self.rewriter.call_function(
            function, args, kwargs, after=self.last, scope=self.scope
        )
        return self.last

    # -- layers ------------------------------------------------------------------------------------

    def _layers(self) -> tuple[nn.Module, nn.Module]:
        """Return A and B with their first values: B's are 0 unless the decision holds others."""
        entry = self.entry
        weight = self.rewriter.get_tensor(entry.weight)
        with torch.device("meta"):
            down, up = self._shapes(weight)
        for name, module in (("A", down), ("B", up)):
            value = self.decision.arrays.get(f"{entry.path}.{name}.weight")
            shape = module.weight.shape
            if weight.is_meta:
                made = torch.empty(shape, dtype=weight.dtype, device="meta")
            elif value is None:
                made = torch.zeros(shape, dtype=weight.dtype)
            else:
                made = torch.as_tensor(value).to(weight.dtype).reshape(shape).clone()
            module.weight = nn.Parameter(made)
        return down, up

    def _shapes(self, weight: Tensor) -> tuple[Any, Any]:
        entry, rank = self.entry, self.entry.rank
        if entry.op == "embedding":
            layer: Any = self.rewriter.get_module(entry.layer)
            down: nn.Module = nn.Embedding(
                weight.shape[0], rank, padding_idx=layer.padding_idx,
                scale_grad_by_freq=layer.scale_grad_by_freq, sparse=layer.sparse,
            )  # fmt: skip
            return down, nn.Linear(rank, weight.shape[1], bias=False)
        if entry.op == "addmm":
            return nn.Linear(weight.shape[0], rank, bias=False), nn.Linear(
                rank, weight.shape[1], bias=False
            )
        if entry.op == "linear":
            return nn.Linear(weight.shape[1], rank, bias=False), nn.Linear(
                rank, weight.shape[0], bias=False
            )
        layer = self.rewriter.get_module(entry.layer)
        made = _CONVOLUTIONS[entry.op]
        down = made(
            weight.shape[1], rank, layer.kernel_size, layer.stride, layer.padding, layer.dilation,
            bias=False, padding_mode=layer.padding_mode,
        )  # fmt: skip
        return down, made(rank, weight.shape[0], 1, bias=False)

    # -- magnitudes --------------------------------------------------------------------------------

    def _ratio(self, base: fx.Node) -> fx.Node:
        """Add ρ = m / ‖W + s·B·A‖, per output, before a layer's first call."""
        entry, rewriter = self.entry, self.rewriter
        name = f"{entry.path}.magnitude"
        rewriter.add_tensor(name, self._magnitude(), trainable=True)
        made: list[fx.Node] = []

        def add(function: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
            place = {"after": made[-1]} if made else {"before": base}
            node = rewriter.call_function(function, args, kwargs, scope=self.scope, **place)
            made.append(node)
            return node

        def read(tensor: str) -> fx.Node:
            place = {"after": made[-1]} if made else {"before": base}
            made.append(rewriter.get_attr(tensor, scope=self.scope, **place))
            return made[-1]

        weight, down, up, magnitude = (
            read(each)
            for each in (entry.weight, f"{entry.path}.A.weight", f"{entry.path}.B.weight", name)
        )
        self.weight = weight
        if entry.op.startswith("conv"):
            weight, down, up = (add(torch.flatten, each, 1) for each in (weight, down, up))
        if entry.op == "embedding":
            down = add(torch.transpose, down, 0, 1)
        if entry.op in ("embedding", "addmm"):
            weight = add(torch.transpose, weight, 0, 1)
        delta = add(torch.mul, add(torch.matmul, up, down), entry.scale)
        norm = add(torch.linalg.vector_norm, add(torch.add, weight, delta), dim=1)
        return add(torch.div, magnitude, add(torch.detach, norm))

    def _magnitude(self) -> Tensor:
        """Return ‖W‖ per output, or what the decision holds."""
        held = self.decision.arrays.get(f"{self.entry.path}.magnitude")
        weight = self.rewriter.get_tensor(self.entry.weight)
        if weight.is_meta:
            return torch.empty(rows(weight, self.entry.op).shape[0], device="meta")
        if held is not None:
            return torch.as_tensor(held).to(weight.dtype).reshape(-1)
        whole = rows(weight, self.entry.op)
        # The sum that the graph takes at the start, so that ρ is exactly 1.
        norm: Tensor = torch.linalg.vector_norm(whole + torch.zeros_like(whole), dim=1)
        return norm

    def _weigh(self, base: fx.Node, rho: fx.Node) -> None:
        """Let the layer read W · ρ."""
        entry, rewriter = self.entry, self.rewriter
        operand = weight_operand(base)
        weight = operand or self.weight
        factor = rho
        if entry.op not in ("embedding", "addmm"):
            dims = len(rewriter.get_tensor(entry.weight).shape)
            factor = rewriter.call_function(
                torch.reshape, (rho, (-1,) + (1,) * (dims - 1)), before=base, scope=self.scope
            )
        product = rewriter.call_function(torch.mul, (weight, factor), before=base, scope=self.scope)
        if base.op == "call_module":
            path = str(base.target)
            if operand is None:
                module = rewriter.get_module(path)
                if not type(module).__name__.startswith("Operand"):
                    rewriter.set_module(path, take_weight_as_operand(module))
            rewriter.set_args(base, (base.args[0], product), {})
        else:
            rewriter.replace_uses(weight, product, only=lambda user: user is base)

    def _beside(self, rho: fx.Node, base: fx.Node) -> fx.Node:
        """Return ρ in a shape that multiplies the layer's result."""
        if not self.entry.op.startswith("conv"):
            return rho
        dims = len(self.rewriter.get_tensor(self.entry.weight).shape) - 2
        return self._function(torch.reshape, rho, (-1,) + (1,) * dims)


def check_inserted(after: Program, decision: LoraDecision) -> None:
    """Check that merging finds every adapter, and that nothing trains that should not.

    Raises:
        PassError: It does not, or something does.
    """
    found = find_adapters(after)
    for entry in decision.adapters:
        adapter = found.get(entry.path)
        if adapter is None or (adapter.layer, adapter.rank) != (entry.layer, entry.rank):
            raise PassError(f"the adapter of {entry.layer} is not there", where=entry.path)
    trains = sum(p.numel() for p in after.module.parameters() if p.requires_grad)
    if trains != decision.trained:
        raise PassError(
            f"{trains:,} parameters train", reason=f"the decision says {decision.trained:,}"
        )
