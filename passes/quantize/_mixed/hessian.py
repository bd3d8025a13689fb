"""Sensitivity by the trace of a Hessian, without labels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxcompress.errors import NumericsError
from fxcompress.pipeline.context import Batch
from fxcompress.train.programs import training_copy
from passes.quantize._mixed.candidates import Candidate
from passes.quantize.mixed import FLOAT

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context

__all__ = ["hessian_losses", "mean_traces"]


def hessian_losses(
    program: Program,
    candidates: Sequence[Candidate],
    batches: Iterable[Batch],
    context: Context,
    probes: int,
) -> list[list[float]]:
    """Return tr(H) / n · ‖W̃ − W‖² for each weight at each of its choices; 0 in float."""
    means = mean_traces(program, [each.tensor for each in candidates], batches, context, probes)
    state = program.state()
    return [
        [
            0.0 if bits == FLOAT else means[each.tensor] * _distance(each, bits, state)
            for bits in each.choices
        ]
        for each in candidates
    ]


def _distance(candidate: Candidate, bits: int, state: Mapping[str, Tensor]) -> float:
    difference = candidate.rounded(bits).double() - state[candidate.tensor].detach().double()
    return float(difference.square().sum())


def mean_traces(
    program: Program,
    tensors: Sequence[str],
    batches: Iterable[Batch],
    context: Context,
    probes: int,
) -> dict[str, float]:
    """Return the mean of the diagonal of each weight's Hessian.

    The loss is ½ Σ‖f̃(x) − f(x)‖² / Σ‖f(x)‖² over all samples, whose Hessian at the weights as they
    are is Σ JᵀJ / Σ‖f‖². With random signs v on the outputs E‖Jᵀv‖² = tr JᵀJ (Hutchinson, 1989),
    so that one backward pass serves all weights, and no second derivative is needed. Signs of
    different samples are independent, so that their products cancel in the mean.

    Raises:
        NumericsError: A gradient is not finite.
    """
    module = training_copy(program)
    module.eval()
    named = dict(module.named_parameters(remove_duplicate=False))
    weights = {name: named[name].requires_grad_() for name in tensors}
    for name, each in named.items():
        each.requires_grad_(any(each is weight for weight in weights.values()) or name in weights)
    sums = dict.fromkeys(tensors, 0.0)
    signal = 0.0
    generator = torch.Generator().manual_seed(context.seed)
    for index, batch in enumerate(batches):
        outputs = _outputs(program, module, batch)
        signal += sum(float(each.detach().double().square().sum()) for each in outputs)
        for probe in range(probes):
            signs = [
                (torch.randint(0, 2, each.shape, generator=generator) * 2 - 1).to(each)
                for each in outputs
            ]
            grads = torch.autograd.grad(
                outputs,
                list(weights.values()),
                signs,
                retain_graph=probe + 1 < probes,
                allow_unused=True,
            )
            for name, grad in zip(weights, grads, strict=True):
                if grad is not None:
                    sums[name] += float(grad.double().square().sum()) / probes
        context.progress("Hessian traces, batch", index + 1, None)
    for name, value in sums.items():
        if not torch.isfinite(torch.tensor(value)):
            raise NumericsError(f"the gradient of {name} is not finite", where=name)
    return {name: sums[name] / weights[name].numel() / max(signal, 1e-300) for name in tensors}


def _outputs(program: Program, module: fx.GraphModule, batch: Batch) -> list[Tensor]:
    leaves: list[Any] = program.signature.leaves_of(batch)
    with torch.enable_grad():
        found = fx.Interpreter(module).run(*leaves, enable_io_processing=False)
    tensors = [each for each in pytree.tree_leaves(found) if isinstance(each, Tensor)]
    return [each for each in tensors if each.requires_grad]
