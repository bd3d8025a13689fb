"""Run every Program of a pipeline on the same inputs, and compare what comes out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch

from fxcompress.analysis import OutputComparison, compare, shaken
from fxcompress.errors import NumericsError, PassError
from fxcompress.ir import node_ids
from fxcompress.pipeline._longer import Outputs, Types, cut, lengthened, output_types
from fxcompress.pipeline._probes import Leaves, first_bad, has_bad, probes, run

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context

__all__ = ["Measured", "Probing"]

# max |Δ| / range(y) that rounding explains: a few thousand roundings of the outputs' precision.
TOLERANCES = {
    torch.float64: 1e-10,
    torch.float32: 5e-5,
    torch.float16: 1e-2,
    torch.bfloat16: 8e-2,
}
SAMPLES = 8
"""How many samples of real data are a probe."""
# One may by chance send no value to the other side of a quantizer's tie.
_SHAKES = 4


@dataclass(frozen=True)
class Measured:
    """What a Program's outputs are like.

    Attributes:
        to_previous: Difference to the Program before it, on real data where there is any.
        to_original: Difference to the original, likewise.
        worst: max |Δ| / range(y) to the Program before it, on all probes.
        tolerance: What rounding may do to that.
        probes: How many inputs were compared.
        on: What `to_previous` and `to_original` were measured on.
    """

    to_previous: OutputComparison
    to_original: OutputComparison
    worst: float
    tolerance: float
    probes: int
    on: Literal["data", "random inputs"]


@dataclass
class Probing:
    """Outputs of the original and of the last Program on fixed probes.

    Random inputs show whether an exact pass is exact, anywhere; how much an approximate one costs
    is told by real data, since it was calibrated for that. Only outputs are kept, so that no
    Program has to stay in memory to be compared with.
    """

    inputs: tuple[Leaves, ...]
    real: int
    types: Types
    original: Outputs
    previous: Outputs

    @staticmethod
    def of(program: Program, context: Context) -> Probing:
        """Run the original on a batch of the data, if there is any, and on random inputs.

        Raises:
            DataError: The data cannot be read.
            NumericsError: The outputs hold a NaN; the first node that does is named.
        """
        data = _from_data(program, context)
        inputs = (*data, *probes(program, context.seed))
        outputs = tuple(run(program, leaves) for leaves in inputs)
        for leaves, output in zip(inputs, outputs, strict=True):
            if has_bad(output, infinite=False):
                raise _numerics(program, leaves, infinite=False)
        return Probing(inputs, len(data), output_types(program), outputs, outputs)

    def measure(self, program: Program) -> Measured:
        """Run a Program on the probes, and compare; the next one is compared with it.

        Where a sequence became longer by a number, its last places are those of before.

        Raises:
            NumericsError: A NaN appeared, or an infinity where there was none.
            PassError: The outputs have other shapes.
        """
        outputs = tuple(
            self._run(program, leaves, before)
            for leaves, before in zip(self.inputs, self.previous, strict=True)
        )
        judged = slice(0, self.real or None)
        longer = lengthened(self.types, output_types(program))
        as_before, as_first = (
            cut(outputs, like, longer) for like in (self.previous, self.original)
        )
        try:
            measured = Measured(
                to_previous=compare(self.previous[judged], as_before[judged]),
                to_original=compare(self.original[judged], as_first[judged]),
                worst=compare(self.previous, as_before).relative,
                tolerance=_tolerance(self.previous),
                probes=len(self.inputs),
                on="data" if self.real else "random inputs",
            )
        except ValueError as error:
            raise PassError("the outputs have another structure", reason=str(error)) from error
        self.previous = outputs
        return measured

    def rounding(self, program: Program, seed: int) -> float:
        """Return max |Δ| / range(y) when every weight is off by one unit in its last place.

        A deep model with large activations amplifies rounding beyond what most models do.
        """
        plain = [run(program, leaves) for leaves in self.inputs]
        most = 0.0
        for shake in range(_SHAKES):
            moved = replace(program, module=shaken(program.module, _SHAKES * seed + shake))
            for before, leaves in zip(plain, self.inputs, strict=True):
                most = max(most, compare(before, run(moved, leaves)).relative)
        return most

    def _run(
        self, program: Program, leaves: Leaves, before: tuple[object, ...]
    ) -> tuple[object, ...]:
        output = run(program, leaves)
        infinite = not has_bad(before, infinite=True)
        if has_bad(output, infinite=infinite):
            raise _numerics(program, leaves, infinite=infinite)
        return output


def _from_data(program: Program, context: Context) -> tuple[Leaves, ...]:
    """Return the first samples of a split as a probe: `eval`, `calibration`, or another one."""
    names = sorted(context.data, key=lambda name: (name != "eval", name != "calibration", name))
    for batch, _ in context.labelled(names[0]) if names else ():
        leaves = program.signature.leaves_of(batch)
        leading = {leaf.shape[0] for leaf in leaves if leaf.dim()}
        if len(leading) == 1:
            leaves = [leaf[: _samples(program)] if leaf.dim() else leaf for leaf in leaves]
        return (tuple(leaves),) if _fits(program, leaves) else ()
    return ()


def _samples(program: Program) -> int:
    """Return how many samples the Program takes at once: a static batch, or a few."""
    first = (spec.shape[0] for spec in program.signature.inputs if spec.shape)
    return min((size for size in first if isinstance(size, int)), default=SAMPLES)


def _fits(program: Program, leaves: Iterable[torch.Tensor]) -> bool:
    """Whether every static size and dtype is as captured, and dynamic ones agree."""
    sizes: dict[str, int] = {}
    for spec, leaf in zip(program.signature.inputs, leaves, strict=True):
        if leaf.dtype != spec.dtype or leaf.dim() != len(spec.shape):
            return False
        for expected, actual in zip(spec.shape, leaf.shape, strict=True):
            known = sizes.setdefault(expected, actual) if isinstance(expected, str) else expected
            if known != actual:
                return False
    return True


def _tolerance(outputs: object) -> float:
    kinds = {each.dtype for each in _tensors(outputs) if each.is_floating_point()}
    return max((TOLERANCES.get(kind, 1e-1) for kind in kinds), default=0.0)


def _tensors(value: object) -> Iterable[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _tensors(each)


def _numerics(program: Program, leaves: Leaves, *, infinite: bool) -> NumericsError:
    node = first_bad(program, leaves, infinite=infinite)
    where = "the output" if node is None else node_ids(program)[node]
    return NumericsError(
        f"the output of {where} holds values that are no finite numbers",
        reason="every weight is finite, so the computation overflows or divides by zero",
        hint="a wider dtype for this node, or weights in a smaller range",
        where=where,
    )
