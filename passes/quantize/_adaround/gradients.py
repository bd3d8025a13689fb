"""How much each element of a unit's outputs counts for the outputs of the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxcompress.pipeline.context import Batch

if TYPE_CHECKING:
    from fxcompress.ir import Program

__all__ = ["output_gradients"]

Weights = Callable[[Sequence[fx.Node]], list[tuple[Tensor, ...]]]


def output_gradients(
    program: Program, batches: Sequence[Batch], generator: torch.Generator
) -> Weights:
    """Return a function from nodes to the weights of their elements, for each batch.

    The Hessian of ½‖f̃ − f‖² in a value y of the float model is JᵀJ; its diagonal, the mean of
    (Jᵀv)² over random signs v on the model's outputs, is what BRECQ takes the squared gradients of
    its loss for (arXiv:2102.05426, eq. 9). One v is drawn for each batch and node; the weights
    are scaled to a mean of 1.

    Args:
        program: The float model, in eval mode.
        batches: What to run it on.
        generator: Draws the signs.
    """

    def weights(nodes: Sequence[fx.Node]) -> list[tuple[Tensor, ...]]:
        return [_of_batch(program, batch, nodes, generator) for batch in batches]

    return weights


def _of_batch(
    program: Program, batch: Batch, nodes: Sequence[fx.Node], generator: torch.Generator
) -> tuple[Tensor, ...]:
    runner = _Cut(program.module, nodes)
    leaves: list[Any] = program.signature.leaves_of(batch)
    with torch.enable_grad():
        found = runner.run(*leaves, enable_io_processing=False)
        tensors = [each for each in pytree.tree_leaves(found) if isinstance(each, Tensor)]
        outputs = [each for each in tensors if each.requires_grad]
        cuts = [runner.cuts[node] for node in nodes]
        signs = [
            (torch.randint(0, 2, each.shape, generator=generator) * 2 - 1).to(each)
            for each in outputs
        ]
        grads = torch.autograd.grad(outputs, cuts, signs, allow_unused=True)
    squares = [
        torch.zeros_like(cut) if grad is None else grad.float().square()
        for cut, grad in zip(cuts, grads, strict=True)
    ]
    return tuple(each / each.mean().clamp_min(1e-30) for each in squares)


class _Cut(fx.Interpreter):
    """Lets gradients end at some nodes."""

    def __init__(self, module: fx.GraphModule, nodes: Sequence[fx.Node]) -> None:
        super().__init__(module)
        self.nodes = frozenset(nodes)
        self.cuts: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n in self.nodes:
            result = self.cuts[n] = result.detach().requires_grad_()
        return result
