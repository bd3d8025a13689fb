"""Write early exits as rows: what comes after an exit runs on the samples that go on, if any.

Nothing is a branch here: where no sample goes on, what follows runs on a batch of none. That is for
runtimes in which an operator on nothing costs less than a branch, eager PyTorch's above all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import DimDynamic
from torch.utils import _pytree as pytree

from fxcompress.emit._branches import check_each, exits_in
from fxcompress.emit._plain import PlainProgram
from fxcompress.emit._probes import Leaves
from fxcompress.errors import EmitError
from fxcompress.ir.ops import module_of, op_name
from fxcompress.ir.propagate import DimSource
from fxcompress.nn import Exit
from fxcompress.nn.exits import Undecided
from fxcompress.rewrite.later import Later, later_of, sample_dims

__all__ = ["write_rows"]


def write_rows(plain: PlainProgram, example: Leaves) -> int:
    """Gather for what follows each exit the samples that go on; return how many exits there are.

    Args:
        plain: A private graph, which is changed.
        example: Inputs to check with that the rest of the network takes a batch of none.

    Raises:
        EmitError: Samples cannot leave the batch one by one, or the rest takes no batch of none.
    """
    module = plain.module
    # What comes after the earliest exit holds all others, so the latest is written first.
    chosen = exits_in(module)
    for node in reversed(chosen):
        check_each(later_of(node))
    if chosen:
        # All of them, so that what comes before an exit reads like what comes after it.
        for node in module.graph.nodes:
            _spell_sizes(node)
    for node in chosen:
        _write(module, later_of(node))
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()
    if chosen:
        _check_none(plain, example)
    return len(chosen)


def _check_none(plain: PlainProgram, example: Leaves) -> None:
    """Check that all that follows an exit runs where every sample stops."""
    rows = [each for each in plain.module.modules() if isinstance(each, Undecided)]
    saved = [each.threshold for each in rows]
    # Not called as a module: that would print the error, too.
    run = fx.Interpreter(plain.module)
    try:
        for each in rows:
            each.threshold = float("inf")
        with torch.no_grad():
            run.run(*example, enable_io_processing=False)
    except Exception as error:
        raise EmitError(
            "what comes after an exit does not run on a batch of none",
            reason=f"{type(error).__name__}: {str(error).partition(chr(10))[0]}",
        ) from error
    finally:
        for each, threshold in zip(rows, saved, strict=True):
            each.threshold = threshold


def _write(module: fx.GraphModule, later: Later) -> None:
    choice, early = later.choice, later.early
    if not any(isinstance(inner.meta.get("val"), Tensor) for inner in later.nodes):
        return
    exit_ = cast(Exit, module_of(choice))
    folder = str(choice.target).rpartition(".")[0]
    path = f"{folder}.undecided" if folder else f"{choice.target}_undecided"
    module.add_submodule(path, Undecided(exit_.threshold, exit_.criterion).eval())
    size = _Resized(early)
    with module.graph.inserting_before(choice):
        rows = module.graph.call_module(path, (early,))
        rows.meta = {**choice.meta, "val": size.rows()}
        made = _gathered(module.graph, later, rows)
    for node in later.nodes:
        choice.prepend(node)
    with module.graph.inserting_before(later.nodes[0]):
        _give(module.graph, later, made)
    for node in (*made.values(), *later.nodes):
        node.meta = {**node.meta, "val": size.of(node.meta.get("val"))}
    with module.graph.inserting_before(choice):
        found = module.graph.call_method("index_copy", (early, 0, rows, later.answer))
    found.meta = dict(choice.meta)
    choice.replace_all_uses_with(found)
    module.graph.erase_node(choice)


def _gathered(graph: fx.Graph, later: Later, rows: fx.Node) -> dict[fx.Node, fx.Node]:
    """Return what stands inside for each operand that holds samples."""
    made: dict[fx.Node, fx.Node] = {}
    for node, dim in zip(later.operands, sample_dims(later), strict=True):
        if dim is not None:
            made[node] = graph.call_method("index_select", (node, dim, rows))
            made[node].meta = {**later.choice.meta, "val": node.meta["val"]}
    return made


def _give(graph: fx.Graph, later: Later, made: dict[fx.Node, fx.Node]) -> None:
    """Let the nodes read what was gathered; sizes and the like are found again from it."""
    inside = set(later.nodes)

    def given(node: fx.Node) -> fx.Node:
        if node in made or node in inside:
            return made.get(node, node)
        if node in later.sizes:
            tensor, dim = later.sizes[node]
            if tensor in made:
                made[node] = graph.call_method("size", (made[tensor], dim))
                made[node].meta = dict(node.meta)
        elif node.op not in ("placeholder", "get_attr") and node not in later.operands:
            sources = [given(each) for each in node.all_input_nodes]
            if sources != node.all_input_nodes:
                made[node] = graph.node_copy(node, given)
        return made.get(node, node)

    for node in later.nodes:
        node.args = fx.map_arg(node.args, given)
        node.kwargs = fx.map_arg(node.kwargs, given)


def _spell_sizes(node: fx.Node) -> None:
    """Write the sizes that a reshape leaves open: of no values it cannot find them."""
    if op_name(node) not in ("reshape", "view") or -1 not in _shape_of(node):
        return
    sizes: Sequence[Any] = node.meta["val"].shape
    spelled = tuple(
        size if known == -1 and isinstance(size, int) else known
        for known, size in zip(_shape_of(node), sizes, strict=True)
    )
    node.args = (node.args[0], *(spelled if len(node.args) > 2 else (spelled,)))


def _shape_of(node: fx.Node) -> tuple[Any, ...]:
    """Return the sizes that a reshape is given by place, one after the other or as one argument."""
    given = node.args[1:]
    one = given[0] if len(given) == 1 else given
    return tuple(one) if isinstance(one, (tuple, list)) else (one,)


class _Resized:
    """Gives types the number of samples that go on, in place of all of them.

    Args:
        early: The answer that says how many samples there are.
    """

    def __init__(self, early: fx.Node) -> None:
        value = early.meta["val"]
        self.mode, self.before = value.fake_mode, value.shape[0].node.expr
        self.env = value.shape[0].node.shape_env
        source = DimSource(f"{early.name}_open")
        self.after = self.env.create_symbol(
            2, source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None
        )

    def rows(self) -> Tensor:
        """Return the type of their numbers."""
        with self.mode:
            return torch.empty([self._size(self.after)], dtype=torch.int64)

    def of(self, value: Any) -> Any:
        """Return a type with the new size."""
        return pytree.tree_map(self._one, value)

    def _one(self, leaf: Any) -> Any:
        if isinstance(leaf, torch.SymInt):
            return self._changed(leaf)
        if not isinstance(leaf, Tensor):
            return leaf
        sizes = [self._changed(size) for size in leaf.shape]
        if all(a is b for a, b in zip(sizes, leaf.shape, strict=True)):
            return leaf
        with self.mode:
            return torch.empty(sizes, dtype=leaf.dtype, device=leaf.device)

    def _changed(self, size: Any) -> Any:
        if not isinstance(size, torch.SymInt) or self.before not in size.node.expr.free_symbols:
            return size
        return self._size(size.node.expr.subs(self.before, self.after))

    def _size(self, expression: Any) -> Any:
        return self.env.create_symintnode(expression, hint=None)
