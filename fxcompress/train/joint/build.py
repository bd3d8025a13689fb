"""join(): one graph of a student, its frozen teacher, projectors and losses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fxcompress.ir import Program, propagate
from fxcompress.ir._copying import assemble, copy_module
from fxcompress.train.joint._losses import LossNode, path_of
from fxcompress.train.joint.projectors import Fitting, projector

__all__ = ["Builder", "Fitted", "Names", "Side"]

Scope = tuple[tuple[str, str], ...]
_EXTRA: Final = ("batch", "target", "progress")


@dataclass(frozen=True)
class Names:
    """Where the parts of a joint graph are: names that the student does not use."""

    teacher: str
    projectors: str
    losses: str

    @staticmethod
    def beside(student: Program) -> Names:
        """Return names that are free in a Program."""
        taken = {*student.module._modules, *student.module._parameters, *student.module._buffers}

        def free(name: str) -> str:
            while name in taken:
                name += "_"
            return name

        return Names(free("teacher"), free("projectors"), free("losses"))


@dataclass(frozen=True)
class Side:
    """One model inside the joint graph.

    Attributes:
        nodes: Node of its Program -> node of the joint graph.
        leaves: Its flat outputs.
    """

    nodes: Mapping[fx.Node, fx.Node]
    leaves: tuple[Any, ...]


class Frozen(nn.Module):
    """The teacher's modules: in evaluation mode whatever the rest does, without gradients."""

    def train(self, mode: bool = True) -> Frozen:
        """Stay in evaluation mode."""
        return super().train(False)


@dataclass
class Builder:
    """A joint graph under construction. The student's modules and tensors are shared, not copied.

    Attributes:
        student: Whose modules run in the joint graph.
        names: Where the parts are.
        root: The module that holds them.
        graph: The graph so far.
        inputs: The student's placeholders by name, then `batch`, `target` and `progress`.
    """

    student: Program
    names: Names = field(init=False)
    root: fx.GraphModule = field(init=False)
    graph: fx.Graph = field(init=False)
    inputs: dict[str, fx.Node] = field(init=False)
    ours: Side = field(init=False)

    def __post_init__(self) -> None:
        self.names = Names.beside(self.student)
        module = self.student.module
        self.root = assemble(module, fx.Graph(), f"{module.__class__.__name__}Joint")
        self.graph = self.root.graph
        self.inputs = {}
        nodes: dict[fx.Node, fx.Node] = {}
        for node in self.student.graph.find_nodes(op="placeholder"):
            nodes[node] = self.inputs[str(node.target)] = self._copied(node, nodes)
        for name in _EXTRA:
            holder = self.graph.placeholder(name)
            holder.meta["val"] = None
            self.inputs[name] = holder
        self.ours = self._filled(self.student, nodes)

    def _filled(self, program: Program, nodes: dict[fx.Node, fx.Node]) -> Side:
        leaves: tuple[Any, ...] = ()
        for node in program.nodes:
            if node.op == "output":
                leaves = tuple(_flat(fx.map_arg(node.args[0], nodes.__getitem__)))
            elif node not in nodes:
                nodes[node] = self._copied(node, nodes)
        return Side(nodes, leaves)

    def _copied(self, node: fx.Node, nodes: Mapping[fx.Node, fx.Node]) -> fx.Node:
        made = self.graph.node_copy(node, nodes.__getitem__)
        made.meta = dict(node.meta)
        return made

    def teach(self, teacher: Program) -> Side:
        """Add a teacher that takes the same inputs: modules copied, tensors shared and frozen.

        Raises:
            VerifyError: It does not work on the student's sizes.
        """
        prefix = self.names.teacher
        self.root.add_module(prefix, _frozen(teacher))
        nodes: dict[fx.Node, fx.Node] = {}
        for node in teacher.graph.find_nodes(op="placeholder"):
            nodes[node] = self.inputs[str(node.target)]
        side = self._filled(teacher, nodes)
        own = [made for node, made in nodes.items() if node.op != "placeholder"]
        for made in own:
            if made.op in ("call_module", "get_attr"):
                made.target = f"{prefix}.{made.target}"
            scope: Scope = made.meta.get("scope", ())
            made.meta["scope"] = ((prefix, teacher.name), *((f"{prefix}.{p}", c) for p, c in scope))
            made.meta.pop("val", None)
        propagate(self.program(), own)
        return side

    def fit(self, name: str, tap: fx.Node, like: fx.Node | None, fit: Fitting, seed: int) -> Fitted:
        """Add what brings a tap to its teacher's shape, and return its nodes."""
        new: list[fx.Node] = []
        resized = projected = tap
        if fit.resize and like is not None:
            resized = projected = self._resized(tap, like, fit, new)
        if fit.project:
            layers = projector(fit, name, seed, _example(self.student))
            holder = self.root.get_submodule(self._folder(self.names.projectors))
            holder.add_module(name, layers[0] if len(layers) == 1 else nn.Sequential(*layers))
            path = f"{self.names.projectors}.{name}"
            for place in range(len(layers)):
                target = path if len(layers) == 1 else f"{path}.{place}"
                projected = self._node("call_module", target, (projected,), new)
        if new:
            propagate(self.program(), new)
        return Fitted(resized, projected)

    def _resized(self, tap: fx.Node, like: fx.Node, fit: Fitting, new: list[fx.Node]) -> fx.Node:
        """Pool or interpolate places; they stand last while that is done."""
        shape = like.meta["val"].shape
        sizes = tuple(
            shape[dim]
            if isinstance(shape[dim], int)
            else self._node("call_method", "size", (like, dim), new)
            for dim in fit.places
        )
        channels_last = fit.width == fit.rank - 1
        node = self._node("call_method", "movedim", (tap, -1, 1), new) if channels_last else tap
        if fit.resize == "pool":
            pool = F.adaptive_avg_pool1d if len(sizes) == 1 else F.adaptive_avg_pool2d
            node = self._node("call_function", pool, (node, sizes), new)
        else:
            mode = "linear" if len(sizes) == 1 else "bilinear"
            told = {"mode": mode, "align_corners": False}
            node = self._node("call_function", F.interpolate, (node, sizes), new, told)
        return self._node("call_method", "movedim", (node, 1, -1), new) if channels_last else node

    def add_loss(self, loss: LossNode, arguments: Mapping[str, Any]) -> fx.Node:
        """Add a loss; its type is a sum and a count."""
        folder = self._folder(self.names.losses)
        path = path_of(loss.term)
        self.root.get_submodule(folder).add_module(path, loss)
        node = self._node("call_module", f"{folder}.{path}", (), [], arguments)
        with self.student.fake_mode:
            node.meta["val"] = (torch.empty(()), torch.empty(()))
        return node

    def finish(self, outputs: Sequence[Any]) -> Program:
        """Close the graph, drop what nothing reads, and return it."""
        self.graph.output(tuple(outputs))
        kept = set(self.ours.nodes.values())
        for node in reversed(self.graph.nodes):
            if not node.users and node.op not in ("placeholder", "output") and node not in kept:
                self.graph.erase_node(node)
        self.root.recompile()
        return self.program()

    def program(self) -> Program:
        """Return what there is so far, with the student's sizes."""
        return replace(self.student, module=self.root, name=f"{self.student.name} joined")

    def _folder(self, name: str) -> str:
        if name not in self.root._modules:
            self.root.add_module(name, nn.Module())
        return name

    def _node(
        self,
        op: str,
        target: Any,
        args: tuple[Any, ...],
        new: list[fx.Node],
        kwargs: Mapping[str, Any] | None = None,
    ) -> fx.Node:
        node = self.graph.create_node(op, target, args, dict(kwargs or {}))
        node.meta["scope"] = ()
        new.append(node)
        return node


@dataclass(frozen=True)
class Fitted:
    """A tap as losses read it: resized, and projected as well."""

    resized: fx.Node
    projected: fx.Node


def _flat(leaves: Any) -> Sequence[Any]:
    assert isinstance(leaves, (tuple, list)), "a Program's output is one flat tuple"
    return leaves


def _example(program: Program) -> Tensor:
    floating = (t for t in program.state().values() if t.is_floating_point())
    return next(floating, torch.empty(()))


def _frozen(teacher: Program) -> Frozen:
    """Return the teacher's modules under one module, with its tensors and no gradients."""
    source, holder = copy_module(teacher.module), Frozen()
    holder._modules.update(source._modules)
    holder._parameters.update(source._parameters)
    holder._buffers.update(source._buffers)
    holder._non_persistent_buffers_set = set(source._non_persistent_buffers_set)
    known: dict[int, nn.Parameter] = {}
    for module, name, parameter in _parameters_of(holder):
        if id(parameter) not in known:
            known[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
        module._parameters[name] = known[id(parameter)]
    for module in holder.modules():
        if isinstance(module, nn.RNNBase):
            # Recurrent modules keep a second list of their weights.
            module._flat_weights = [getattr(module, n, None) for n in module._flat_weights_names]
    return holder.train(False)


def _parameters_of(root: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    for module in root.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                yield module, name, parameter
