"""The layers that can take an adapter, by path."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import fx, nn

from fxcompress.ir.naming import node_ids
from fxcompress.ir.ops import op_name
from fxcompress.pipeline.selectors import Candidate, public_class
from fxcompress.rewrite.adapters import ADAPTED, adapter_paths, weight_operand

if TYPE_CHECKING:
    from fxcompress.ir import Program

__all__ = ["Layer", "layers_of", "refusal"]


@dataclass
class Layer:
    """A layer with a weight: its path, op and class, the weight's name, and its calls."""

    path: str
    op: str
    cls: str
    weight: str
    module: nn.Module | None
    nodes: list[str] = field(default_factory=list)
    reads: str = ""

    @property
    def candidate(self) -> Candidate:
        """How selectors see it."""
        return Candidate(self.path, self.op, self.cls)


def layers_of(program: Program) -> list[Layer]:
    """Return the layers with a weight of their own, in graph order; adapters' own are left out."""
    adapters = tuple(f"{path}." for path in adapter_paths(program))
    found: dict[str, Layer] = {}
    for node, name in node_ids(program).items():
        if op_name(node) not in ADAPTED:
            continue
        layer = _layer(program, node)
        if layer is not None and not layer.path.startswith(adapters or ("\0",)):
            found.setdefault(layer.path, layer).nodes.append(name)
    return list(found.values())


def _layer(program: Program, node: fx.Node) -> Layer | None:
    op = op_name(node)
    operand = weight_operand(node)
    if node.op == "call_module":
        path = str(node.target)
        module = program.module.get_submodule(path)
        through = "" if operand is None or operand.op == "get_attr" else op_name(operand)
        cls = public_class(type(module))
        return Layer(path, op, cls, f"{path}.weight", module, reads=through)
    if operand is None or operand.op != "get_attr":
        return None
    weight = str(operand.target)
    owner, _, leaf = weight.rpartition(".")
    scope = node.meta.get("scope", ())
    cls = scope[-1][1] if scope and scope[-1][0] == owner else ""
    return Layer(owner if leaf == "weight" and owner else weight, op, cls, weight, None)


def refusal(program: Program, layer: Layer, *, dora: bool, adapted: Iterable[str]) -> str:
    """Return why a layer takes no adapter, or an empty string."""
    module, weight = layer.module, program.state()[layer.weight]
    if layer.path in adapted:
        return "it has an adapter"
    if getattr(module, "groups", 1) != 1:
        return f"it is a convolution in {getattr(module, 'groups', 1)} groups"
    if getattr(module, "max_norm", None) is not None:
        return "an embedding with max_norm changes its weight when it is called"
    if not weight.is_floating_point():
        return f"its weight holds {weight.dtype}"
    if weight.dim() < 2:
        return "its weight is a vector"
    if layer.module is None and layer.op not in ("linear", "addmm"):
        return "it is a function, not a layer"
    if dora and layer.reads:
        return f"DoRA needs its weight, and it reads it through {layer.reads}"
    if dora and not weight.is_meta and bool((_norms(weight, layer.op) == 0).any()):
        return "a row of its weight is zero, which has no direction"
    return ""


def _norms(weight: torch.Tensor, op: str) -> torch.Tensor:
    from fxcompress.rewrite.adapters import rows

    norms: torch.Tensor = torch.linalg.vector_norm(rows(weight.detach().float(), op), dim=1)
    return norms
