"""What `tucker`, `cp` and `depthwise` do alike: find convolutions, choose ranks, make the parts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Protocol

import torch
from torch import Tensor

from fxcompress.errors import UsageError
from fxcompress.rewrite.edits import Declined
from passes._choices.programme import need_scipy
from passes.factorize._kernels.choose import (
    Candidate,
    Ranks,
    cheaper,
    measured,
    shared,
    whole,
)
from passes.factorize._kernels.layers import Kernel, check_full, find_kernels
from passes.factorize._kernels.model import KernelDecision, KernelEntry, Part
from passes.factorize._svd.spectrum import Moments, measure

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.base import Selection
    from fxcompress.pipeline.context import Context
    from passes._budget import CostBudget

__all__ = ["Decomposed", "Method", "decide"]


class Decomposed(Protocol):
    """A convolution's weight as a method sees it."""

    def lost(self, ranks: Ranks) -> float:
        """Return the part of its energy that ranks lose, or a bound of it."""

    def approximate(self, ranks: Ranks) -> Tensor:
        """Return the weight at some ranks, `[out, in, taps]`."""

    def tensors(self, ranks: Ranks) -> Mapping[str, Tensor]:
        """Return the weights of the parts, `<part>.weight`, and what the bias gains, `shift`."""

    def error(self, made: Tensor) -> float:
        """Return the part of the energy that a weight in its place loses."""


class Method(ABC):
    """One way to write a convolution as a chain.

    Attributes:
        name: The pass.
        suffix: What the paths of parts end in.
        unit: What ranks are called.
        selection: Which convolutions.
        budget: What the model may cost.
        measures: Whether the loss under a budget is that of the model's outputs.
        reads_inputs: Whether the moments of inputs are needed.
        calibration: Samples to read.
    """

    name: ClassVar[str]
    suffix: ClassVar[str]
    unit: ClassVar[str]
    selection: Selection
    budget: CostBudget | None = None
    measures: bool = False
    reads_inputs: bool = False
    calibration: int = 1

    @abstractmethod
    def given(self, kernels: Sequence[Kernel]) -> dict[str, Ranks]:
        """Return path -> ranks for the convolutions that are named."""

    @abstractmethod
    def full(self, kernel: Kernel) -> Ranks:
        """Return the ranks from which on outputs are equal."""

    @abstractmethod
    def parts(self, kernel: Kernel, ranks: Ranks) -> tuple[Part, ...]:
        """Return the chain at some ranks."""

    @abstractmethod
    def choices(self, kernel: Kernel) -> tuple[Ranks, ...]:
        """Return the ranks that save weights, from which a budget picks."""

    @abstractmethod
    def decompose(
        self, kernel: Kernel, value: Tensor, moments: Moments | None, context: Context
    ) -> Decomposed:
        """Return the weight as the method sees it."""

    @abstractmethod
    def wanted(self, kernel: Kernel, found: Decomposed | None) -> Ranks | None:
        """Return the ranks that the options ask for; without weights, likely ones."""

    @property
    @abstractmethod
    def asked(self) -> str:
        """What the options ask of every convolution: `rank 3`, or an empty string."""

    @property
    @abstractmethod
    def pending(self) -> bool:
        """Whether the ranks depend on weights or data."""


def decide(program: Program, method: Method, context: Context) -> KernelDecision:
    """Return the decision of a pass on kernels."""
    if method.budget is not None:
        need_scipy(method.name)
    kernels, declined = find_kernels(program, method.selection, method.suffix)
    given = method.given(kernels)
    for kernel in kernels:
        if kernel.name in given:
            check_full(kernel, given[kernel.name], method.full(kernel), method.unit)
    if not kernels:
        return KernelDecision(declined=declined)
    state = program.state()
    if context.planning or any(state[k.layer.weight.tensor].is_meta for k in kernels):
        return _planned(program, method, kernels, given, declined)
    found = _decomposed(program, method, kernels, context)
    scales: dict[str, float] | None = None
    if method.budget is not None:
        candidates = [_candidate(method, kernel, found[kernel.name]) for kernel in kernels]
        scales = dict.fromkeys(found, 1.0)
        if method.measures:
            scales = measured(program, candidates, method.calibration, context)
        ranks = shared(program, candidates, method.budget, given, scales)
    else:
        wanted = {kernel.name: method.wanted(kernel, found[kernel.name]) for kernel in kernels}
        ranks = _worth(method, kernels, wanted, given)
    entries: list[KernelEntry] = []
    arrays: dict[str, Tensor] = {}
    for place, kernel in enumerate(kernels):
        context.progress("making the parts", place + 1, len(kernels))
        chosen = ranks[kernel.name]
        entry, tensors = _made(program, method, kernel, found[kernel.name], chosen)
        if scales is not None and chosen is not None:
            loss = scales[kernel.name] * found[kernel.name].lost(chosen)
            entry = entry.model_copy(update={"loss": loss})
        entries.append(entry)
        arrays |= tensors
    return KernelDecision(
        layers=tuple(entries),
        declined=(*declined, *whole(entries, _reason(method))),
        arrays=arrays,
    )


def _decomposed(
    program: Program, method: Method, kernels: Sequence[Kernel], context: Context
) -> dict[str, Decomposed]:
    moments: dict[str, Moments] = {}
    if method.reads_inputs:
        batches = context.samples("calibration", method.calibration)
        moments = measure(program, [kernel.layer for kernel in kernels], batches)
    state = program.state()
    found = {}
    for place, kernel in enumerate(kernels):
        context.progress("decomposing weights", place + 1, len(kernels))
        value = state[kernel.layer.weight.tensor]
        found[kernel.name] = method.decompose(kernel, value, moments.get(kernel.name), context)
    return found


def _made(
    program: Program, method: Method, kernel: Kernel, found: Decomposed, ranks: Ranks | None
) -> tuple[KernelEntry, dict[str, Tensor]]:
    """Return what a decision says of a convolution, and the tensors of its parts."""
    full = method.full(kernel)
    if ranks is None:
        return kernel.entry(full), {}
    state, parts = program.state(), method.parts(kernel, ranks)
    dtype = state[kernel.layer.weight.tensor].dtype
    tensors = dict(found.tensors(ranks))
    shift = tensors.pop("shift", None)
    arrays = {f"{kernel.path}.{k}": v.to(dtype).contiguous() for k, v in tensors.items()}
    if shift is not None and kernel.layer.bias is not None:
        bias = state[kernel.layer.bias].detach().cpu()
        arrays[f"{kernel.path}.{parts[-1].name}.bias"] = (bias.double() + shift).to(bias.dtype)
    error = max(0.0, found.error(found.approximate(ranks)))
    return kernel.entry(full, ranks=ranks, parts=parts, error=error), arrays


def _candidate(method: Method, kernel: Kernel, found: Decomposed) -> Candidate:
    parts = partial(method.parts, kernel)
    return Candidate(kernel, method.choices(kernel), parts, found.lost, found.approximate)


def _worth(
    method: Method,
    kernels: Sequence[Kernel],
    wanted: Mapping[str, Ranks | None],
    given: Mapping[str, Ranks],
) -> dict[str, Ranks | None]:
    """Return path -> ranks where they save weights, or were asked for by name.

    Raises:
        UsageError: What is asked of all saves weights nowhere.
    """
    found: dict[str, Ranks | None] = {}
    for kernel in kernels:
        ranks, named = wanted[kernel.name], given.get(kernel.name)
        if ranks is not None and not _fits(method, kernel, ranks):
            ranks = None
        found[kernel.name] = named or ranks
    if method.asked and not any(found.values()):
        best = max(kernels, key=lambda kernel: kernel.parameters)
        choices, full = method.choices(best), method.full(best)
        most = ", ".join(map(str, choices[-1])) if choices else "none"
        raise UsageError(
            f"{method.asked} saves parameters in no convolution",
            reason=f"{best.name} is {best.outputs} x {best.inputs} x {best.taps} (out, in, taps): "
            f"its full rank is {', '.join(map(str, full))}, and up to {most} saves some",
            hint="give a lower number",
        )
    return found


def _fits(method: Method, kernel: Kernel, ranks: Ranks) -> bool:
    fits = all(rank <= most for rank, most in zip(ranks, method.full(kernel), strict=True))
    return fits and cheaper(kernel, method.parts(kernel, ranks))


def _planned(
    program: Program,
    method: Method,
    kernels: Sequence[Kernel],
    given: Mapping[str, Ranks],
    declined: Sequence[Declined],
) -> KernelDecision:
    """Return ranks as far as no weights are needed; for the rest, likely ones."""
    if method.budget is not None:
        candidates = [
            Candidate(
                kernel,
                method.choices(kernel),
                partial(method.parts, kernel),
                _falling(method.full(kernel)),
                _nothing,
            )
            for kernel in kernels
        ]
        ones = {kernel.name: 1.0 for kernel in kernels}
        ranks = shared(program, candidates, method.budget, given, ones)
    else:
        wanted = {kernel.name: method.wanted(kernel, None) for kernel in kernels}
        ranks = _worth(method, kernels, wanted, given)
    data = method.reads_inputs or (method.budget is not None and method.measures)
    when = "calibration" if data else "decomposing the weights"
    pending = tuple(
        f"{kernel.name}: {method.unit} known after {when}"
        for kernel in kernels
        if (method.pending or method.budget is not None) and kernel.name not in given
    )
    entries = []
    for kernel in kernels:
        chosen = ranks[kernel.name]
        more = {} if chosen is None else {"ranks": chosen, "parts": method.parts(kernel, chosen)}
        entries.append(kernel.entry(method.full(kernel), **more))
    return KernelDecision(
        layers=tuple(entries),
        declined=(*declined, *whole(entries, _reason(method))),
        pending=pending,
    )


def _falling(full: Ranks) -> Callable[[Ranks], float]:
    """Return losses as if energies fell in a straight line to 0."""
    return lambda ranks: sum((1 - r / most) ** 2 for r, most in zip(ranks, full, strict=True))


def _nothing(ranks: Ranks) -> Tensor:
    return torch.empty(0)


def _reason(method: Method) -> str:
    if method.budget is not None:
        return "it stays whole: that is the best use of the budget"
    if method.asked or method.pending:
        return f"{method.asked or 'the energy that must be kept'} saves none of its {{weights}}"
    return f"no {method.unit} is given for it"
