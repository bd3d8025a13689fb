"""Run a Program on calibration data and hand each layer's inputs on, without keeping them.

`stream` runs batch after batch: it holds one batch's activations, and every layer sees the inputs
that the dense model gives it. `advance` runs node after node on all batches, so that a layer sees
what the layers before it give once they are pruned; it holds the activations of all samples that
are still to be read at one place of the model.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fxcompress.errors import DataError
from fxcompress.pipeline.context import Batch

if TYPE_CHECKING:
    from fxcompress.ir import Program

__all__ = ["advance", "stream"]

Env = Mapping[fx.Node, Any]
Watcher = Callable[[fx.Node, Env], None]


class _Runner(fx.Interpreter):
    """Shows the values that a node is about to read."""

    def __init__(self, module: fx.GraphModule, watched: Iterable[fx.Node], see: Watcher) -> None:
        super().__init__(module)
        self.watched, self.see = frozenset(watched), see

    def run_node(self, n: fx.Node) -> Any:
        if n in self.watched:
            self.see(n, self.env)
        return super().run_node(n)


def stream(
    program: Program, batches: Iterable[Batch], watched: Iterable[fx.Node], see: Watcher
) -> None:
    """Run a Program on each batch in eval mode; before each watched node, `see(node, values)`.

    Args:
        program: A private copy: it is put into eval mode.
        batches: What to run it on.
        watched: Its nodes.
        see: Told of each call, with the values that are alive.

    Raises:
        DataError: There are no batches.
    """
    program.module.eval()
    runner = _Runner(program.module, watched, see)
    with torch.no_grad():
        for leaves in _leaves(program, batches):
            runner.run(*leaves, enable_io_processing=False)


def advance(
    program: Program,
    batches: Iterable[Batch],
    watched: Iterable[fx.Node],
    see: Watcher,
    after_inputs: Callable[[fx.Node], None],
) -> None:
    """Run a Program node by node on all batches; `after_inputs(node)` may change its weights.

    Args:
        program: A private copy: it is put into eval mode.
        batches: What to run it on.
        watched: Its nodes.
        see: Told of each call of a watched node on each batch.
        after_inputs: Called when a watched node's inputs were seen on all batches and before it
            is computed.

    Raises:
        DataError: There are no batches.
    """
    program.module.eval()
    runner = fx.Interpreter(program.module)
    watched = frozenset(watched)
    constants = _constants(program, watched)
    with torch.no_grad():
        given = list(_leaves(program, batches))
        envs: list[dict[fx.Node, Any]] = [{} for _ in given]
        inputs = [iter(leaves) for leaves in given]
        for node in program.nodes:
            if node.op == "output" or node in constants:
                continue
            if node in watched:
                fixed = _computed(runner, node, constants)
                for env in envs:
                    see(node, ChainMap(env, fixed))
                after_inputs(node)
            fixed = _computed(runner, node, constants)
            dead = runner.user_to_last_uses.get(node, ())
            for env, args in zip(envs, inputs, strict=True):
                runner.env, runner.args_iter = {**env, **fixed}, args
                env[node] = runner.run_node(node)
                for each in dead:
                    env.pop(each, None)


def _constants(program: Program, watched: Collection[fx.Node]) -> frozenset[fx.Node]:
    """Return what depends on no input: weights on their way to a layer change with the weights."""
    variable: set[fx.Node] = set()
    for node in program.nodes:
        known = node.op == "placeholder" or node in watched
        if known or any(each in variable for each in node.all_input_nodes):
            variable.add(node)
    return frozenset(node for node in program.nodes if node not in variable)


def _computed(
    runner: fx.Interpreter, node: fx.Node, constants: Collection[fx.Node]
) -> dict[fx.Node, Any]:
    """Return the constants that a node reads, computed from the weights as they are now."""
    found: dict[fx.Node, Any] = {}

    def compute(constant: fx.Node) -> None:
        if constant in found or constant not in constants:
            return
        for each in constant.all_input_nodes:
            compute(each)
        runner.env = found
        found[constant] = runner.run_node(constant)

    for each in node.all_input_nodes:
        compute(each)
    return found


def _leaves(program: Program, batches: Iterable[Batch]) -> Iterator[list[Any]]:
    """Yield the tensors of each batch in the order of the inputs."""
    count = 0
    for batch in batches:
        yield program.signature.leaves_of(batch)
        count += 1
    if count == 0:
        raise DataError("there is no calibration data", hint="name a split called calibration")
