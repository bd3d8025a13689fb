"""Write early exits as branches: what comes after an exit is computed only if a sample needs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from fxcompress.emit._plain import plain_program
from fxcompress.ir.ops import module_of, op_name
from fxcompress.ir.program import Program
from fxcompress.nn import Exit

__all__ = ["eager_module", "write_branches"]


def eager_module(program: Program) -> nn.Module:
    """Return a Program as a module for eager PyTorch, in eval mode, that stops at early exits.

    It is called as the emitted formats are: with plain containers. It shares the Program's tensors.
    """
    plain = plain_program(program)
    write_branches(plain.module)
    return plain.module


def write_branches(module: fx.GraphModule) -> int:
    """Put all that only the later answer of an exit needs into a branch; return how many there are.

    `module` is a private graph. The condition is that all samples of the batch may stop; those
    that may get the early answer in any case, so that results are those of the flat graph.
    """
    # The earliest exit's branch holds all others, so the latest is written first.
    chosen = [node for node in module.graph.nodes if op_name(node) == "exit"]
    for node in chosen:
        _write(module, node)
    module.graph.eliminate_dead_code()
    module.recompile()
    return len(chosen)


class _Branch(nn.Module):
    """An exit whose later answer is a graph of its own."""

    def __init__(self, choice: Exit, later: fx.GraphModule) -> None:
        super().__init__()
        self.choice, self.later = choice, later

    def forward(self, early: Tensor, *operands: Tensor) -> Tensor:
        sure = self.choice.sure(early)
        if not torch.compiler.is_exporting():
            # Run as it is, `torch.cond` would compile itself first.
            if bool(sure.all()):
                return early
            return torch.where(sure.unsqueeze(-1), early, self.later(*operands))

        def stop(early: Tensor, sure: Tensor, *operands: Tensor) -> Tensor:
            return early.clone(memory_format=torch.contiguous_format)

        def go_on(early: Tensor, sure: Tensor, *operands: Tensor) -> Tensor:
            found = torch.where(sure.unsqueeze(-1), early, self.later(*operands))
            return found.contiguous()

        branch = cast(Callable[..., Tensor], torch.cond)
        return branch(sure.all(), stop, go_on, (early, sure, *operands))


def _write(module: fx.GraphModule, node: fx.Node) -> None:
    early, late = cast(Sequence[fx.Node], node.args)
    region = _only_for(late, node)
    if not any(isinstance(each.meta.get("val"), Tensor) for each in region):
        return
    order = [each for each in module.graph.nodes if each in region]
    operands = _operands(order)
    later = _graph(module, order, operands, late)
    path = f"{node.target}_branch".replace(".", "_")
    module.add_module(path, _Branch(cast(Exit, module_of(node)), later))
    with module.graph.inserting_before(node):
        made = module.graph.call_module(path, (early, *operands))
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made)
    for each in (node, *reversed(order)):
        module.graph.erase_node(each)


def _only_for(late: fx.Node, choice: fx.Node) -> set[fx.Node]:
    """Return what is computed for the later answer alone."""
    found: set[fx.Node] = set()
    pending = [late]
    while pending:
        node = pending.pop()
        if node in found or node.op in ("placeholder", "output"):
            continue
        if all(user in found or (user is choice and node is late) for user in node.users):
            found.add(node)
            # An operand that has other users inside comes again through the last of them.
            pending.extend(node.all_input_nodes)
    return found


def _operands(order: Sequence[fx.Node]) -> list[fx.Node]:
    """Return the tensors from outside that a region reads, also for the sizes it reads."""
    inside, found = set(order), dict[fx.Node, None]()

    def need(node: fx.Node) -> None:
        if node in inside or node.op == "get_attr":
            return
        if isinstance(node.meta.get("val"), Tensor):
            found[node] = None
        else:
            for each in node.all_input_nodes:
                need(each)

    for node in order:
        for each in node.all_input_nodes:
            need(each)
    return list(found)


def _graph(
    module: fx.GraphModule, order: Sequence[fx.Node], operands: Sequence[fx.Node], late: fx.Node
) -> fx.GraphModule:
    """Return a region as a graph that shares the modules of the whole."""
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    for place, node in enumerate(operands):
        made[node] = graph.placeholder(f"operand_{place}")
        made[node].meta = dict(node.meta)

    def copied(node: fx.Node) -> fx.Node:
        # Sizes are read again inside, and parameters too: a branch takes tensors alone.
        if node not in made:
            for each in node.all_input_nodes:
                copied(each)
            made[node] = graph.node_copy(node, made.__getitem__)
        return made[node]

    for node in order:
        copied(node)
    graph.output(made[late])
    used = _used(module, graph)
    return fx.GraphModule(used, graph)


def _used(module: fx.GraphModule, graph: fx.Graph) -> nn.Module:
    """Return a root with the modules and tensors that a graph names."""
    root = nn.Module()
    names: Mapping[str, Any] = {
        str(node.target): node for node in graph.nodes if node.op in ("call_module", "get_attr")
    }
    for name in names:
        holder, leaf = root, name
        while "." in leaf:
            part, _, leaf = leaf.partition(".")
            if part not in holder._modules:
                holder.add_module(part, nn.Module())
            holder = cast(nn.Module, holder._modules[part])
        _place(holder, leaf, _attribute(module, name))
    return root


def _place(holder: nn.Module, leaf: str, value: Any) -> None:
    if isinstance(value, nn.Parameter):
        holder.register_parameter(leaf, value)
    elif isinstance(value, nn.Module):
        holder.add_module(leaf, value)
    else:
        holder.register_buffer(leaf, value)


def _attribute(module: nn.Module, name: str) -> Any:
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part)
    return found
