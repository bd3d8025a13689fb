"""Write early exits as branches: what comes after an exit is computed only if a sample needs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, fx, nn

from fxcompress.emit._plain import plain_program
from fxcompress.errors import EmitError
from fxcompress.ir.naming import node_ids
from fxcompress.ir.ops import module_of, op_name
from fxcompress.ir.program import Program
from fxcompress.nn import Exit
from fxcompress.rewrite.later import Entangled, Later, check_samples, later_of, sample_dims

__all__ = [
    "Batch",
    "batch_of",
    "check_each",
    "eager_module",
    "exits_in",
    "later_graph",
    "write_branches",
]

Batch = Literal["each", "together"]


def eager_module(program: Program) -> nn.Module:
    """Return a Program as a module for eager PyTorch, in eval mode, that stops at early exits.

    It is called as the emitted formats are: with plain containers. It shares the Program's tensors.

    Raises:
        EmitError: Samples should leave the batch one by one, and cannot.
    """
    plain = plain_program(program)
    write_branches(plain.module)
    return plain.module


def write_branches(module: fx.GraphModule, batch: Batch | None = None) -> int:
    """Put all that only the later answer of an exit needs into a branch; return how many there are.

    A branch is not run where no sample needs it. With `batch: each` it runs on those that do.

    Args:
        module: A private graph.
        batch: In place of what the exits say.

    Raises:
        EmitError: Samples should leave the batch one by one, and cannot.
    """
    # The earliest exit's branch holds all others, so the latest is written first.
    chosen = exits_in(module)
    each = (batch or batch_of(module)) == "each"
    if each:
        for node in reversed(chosen):
            check_each(later_of(node))
    for node in chosen:
        _write(module, later_of(node), each=each)
    module.graph.eliminate_dead_code()
    module.recompile()
    return len(chosen)


def exits_in(module: fx.GraphModule) -> list[fx.Node]:
    """Return the exits of a graph, the latest first."""
    return [node for node in module.graph.nodes if op_name(node) == "exit"]


def batch_of(module: fx.GraphModule) -> Batch | None:
    """Return what the exits of a graph do with a batch; None where there are none."""
    chosen = exits_in(module)
    return cast(Exit, module_of(chosen[0])).batch if chosen else None


def check_each(later: Later) -> None:
    """Check that samples can leave the batch one by one.

    Raises:
        EmitError: They cannot.
    """
    try:
        check_samples(later)
    except Entangled as error:
        raise EmitError(
            "samples cannot leave the batch one by one",
            reason=error.reason,
            hint="use `batch: together` in `depth.exit_when`",
            where=node_ids(later.choice.graph)[error.node],
        ) from error


class _Branch(nn.Module):
    """An exit whose later answer is a graph of its own.

    Args:
        choice: The exit.
        later: What follows it.
        dims: For each operand of `later`, the dimension that samples stand in; None for one that
            holds none. Without `dims` all samples go on together.
    """

    def __init__(
        self, choice: Exit, later: fx.GraphModule, dims: tuple[int | None, ...] | None
    ) -> None:
        super().__init__()
        self.choice, self.later, self.dims = choice, later, dims

    def forward(self, early: Tensor, *operands: Tensor) -> Tensor:
        sure = self.choice.sure(early)
        if torch.compiler.is_exporting():
            return self._exported(sure, early, operands)
        # Run as it is, `torch.cond` would compile itself first.
        stopped = int(sure.sum())
        if stopped == len(sure):
            return early
        if stopped == 0:
            found: Tensor = self.later(*operands)
            return found
        return self._mixed(sure, early, operands)

    def _mixed(self, sure: Tensor, early: Tensor, operands: Sequence[Tensor]) -> Tensor:
        if self.dims is None:
            return torch.where(sure.unsqueeze(-1), early, self.later(*operands))
        rows = torch.nonzero(~sure).squeeze(1)
        if torch.compiler.is_exporting():
            # Else this is not run; operators that ask whether there are values need to know.
            cast(Callable[..., None], torch._check)(rows.shape[0] > 0)
        kept = [
            each if dim is None else each.index_select(dim, rows)
            for each, dim in zip(operands, self.dims, strict=True)
        ]
        return early.index_copy(0, rows, self.later(*kept))

    def _exported(self, sure: Tensor, early: Tensor, operands: Sequence[Tensor]) -> Tensor:
        def stop(early: Tensor, sure: Tensor, *operands: Tensor) -> Tensor:
            return early.clone(memory_format=torch.contiguous_format)

        def go_on(early: Tensor, sure: Tensor, *operands: Tensor) -> Tensor:
            return self._mixed(sure, early, operands).contiguous()

        if self.dims is not None:
            # Strides of what was gathered would be read as numbers, which ONNX does not have.
            operands = [each.clone(memory_format=torch.contiguous_format) for each in operands]
        branch = cast(Callable[..., Tensor], torch.cond)
        return branch(sure.all(), stop, go_on, (early, sure, *operands))


def _write(module: fx.GraphModule, later: Later, *, each: bool) -> None:
    node = later.choice
    if not any(isinstance(inner.meta.get("val"), Tensor) for inner in later.nodes):
        return
    dims = sample_dims(later) if each else None
    path = f"{node.target}_branch".replace(".", "_")
    branch = _Branch(cast(Exit, module_of(node)), later_graph(module, later), dims)
    module.add_module(path, branch)
    with module.graph.inserting_before(node):
        made = module.graph.call_module(path, (later.early, *later.operands))
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made)
    for old in (node, *reversed(later.nodes)):
        module.graph.erase_node(old)


def later_graph(module: fx.GraphModule, later: Later) -> fx.GraphModule:
    """Return what follows an exit as a graph of its operands, sharing the modules of the whole."""
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    for place, node in enumerate(later.operands):
        made[node] = graph.placeholder(f"operand_{place}")
        made[node].meta = dict(node.meta)

    def copied(node: fx.Node) -> fx.Node:
        # Sizes are read again inside, and parameters too: a branch takes tensors alone.
        if node in made:
            return made[node]
        if node in later.sizes:
            tensor, dim = later.sizes[node]
            made[node] = graph.call_method("size", (made[tensor], dim))
            made[node].meta = dict(node.meta)
            return made[node]
        for each in node.all_input_nodes:
            copied(each)
        made[node] = graph.node_copy(node, made.__getitem__)
        return made[node]

    for node in later.nodes:
        copied(node)
    graph.output(made[later.answer])
    return fx.GraphModule(_used(module, graph), graph)


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
