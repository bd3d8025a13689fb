"""One pass on one model of the zoo: what it did, and whether what it promised holds."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

import fxcompress as fxc
from benchmarks.rewrites._rows import Row
from benchmarks.zoo._compare import tensors
from benchmarks.zoo._measure import describe
from benchmarks.zoo._models import Inputs
from fxcompress.errors import FxCompressError, PassError, SelectorError, VerifyError
from fxcompress.ir import Program
from fxcompress.train import training_copy

__all__ = ["Cell", "cell"]

Status = Literal["equal", "changed", "none", "refused", "wrong", "failed"]
# What rounding may do to an output, ‖a − b‖ / ‖a‖, and to gradients, of the largest one.
_OUTPUT, _GRADIENT = 1e-6, 1e-4
# How often a rewrite may round where the model rounds once: a layer more, and weights anew.
_ROUNDINGS = 4


@dataclass(frozen=True)
class Cell:
    """What came of a pass on a model.

    Attributes:
        status: `equal` (it rewrote, and outputs and gradients are what they were), `changed` (it
            rewrote, and outputs are finite and others, as they may be), `none` (nothing fits it),
            `refused` (a clear error), `wrong` (it broke its promise) or `failed`.
        text: What was done, or why not.
        error: ‖a − b‖ / ‖a‖ of the output that differs most; None where nothing was compared.
        precision: What `error` was computed in, where outputs must be equal: `single`, `double`
            where the model's own rounding in single precision hides what the rewrite does, or
            `rounding`, in single precision and no more than a few times the model's own.
        gradient: Largest difference of gradients of parameters that were left, of the largest.
        edits: How many edits there were.
    """

    status: Status
    text: str = ""
    error: float | None = None
    precision: str = ""
    gradient: float | None = None
    edits: int = 0

    def document(self) -> dict[str, Any]:
        """Return it for JSON, without what is empty."""
        return {name: value for name, value in asdict(self).items() if value not in ("", None, 0)}


def cell(program: Program, row: Row, example: Inputs, other: Inputs) -> Cell:
    """Run the passes of a row on a program, and judge the last.

    Args:
        program: Of the model.
        row: The passes.
        example: What calibration sees.
        other: Inputs with another batch size and padding, which outputs are compared on.
    """
    args, kwargs = example
    try:
        # A batch is positional arguments or keywords.
        result = fxc.compress(program, list(row.steps), data={"calibration": [kwargs or args]})
    except SelectorError as error:
        return Cell("none", error.what)
    except FxCompressError as error:
        return Cell(_status(error), f"{error.what}: {error.reason}" if error.reason else error.what)
    except Exception as error:  # a sweep lists whatever is raised
        return Cell("failed", describe(error))
    record = result.record.passes[-1]
    if not record.edits:
        reasons = [each.reason for each in record.declined]
        return Cell("none", max(set(reasons), key=reasons.count) if reasons else "")
    try:
        return _judged(program, result.program, row, other, len(record.edits), record.summary)
    except Exception as error:  # likewise
        return Cell("failed", describe(error), edits=len(record.edits))


def _status(error: FxCompressError) -> Status:
    """Return what an error says: a fault of the pass, a way that was refused, or no concern."""
    if isinstance(error, PassError):
        return "none" if "changes nothing" in error.what else "failed"
    return "wrong" if isinstance(error, VerifyError) else "refused"


def _judged(
    before: Program, after: Program, row: Row, other: Inputs, edits: int, summary: tuple[str, ...]
) -> Cell:
    one, two = before.copy().module.eval(), after.copy().module.eval()
    expected, found = _outputs(one, other), _outputs(two, other)
    text = summary[0] if summary else ""
    if list(expected) != list(found) or not all(_finite(value) for value in found.values()):
        return Cell("wrong", "its outputs are others, or not finite", edits=edits)
    error, precision = _apart(expected, found), "single"
    if not row.equal:
        return Cell("changed", text, error, edits=edits)
    gradient = _gradients_differ(one, two, expected, found)
    if error > _OUTPUT:
        wide = _doubled(before, other)
        doubled = _apart(wide, _doubled(after, other))
        if doubled <= _OUTPUT:
            error, precision = doubled, "double"
        elif error <= _ROUNDINGS * _apart(wide, expected):
            precision = "rounding"
    right = error <= _OUTPUT or precision == "rounding"
    status: Status = "equal" if right and gradient <= _GRADIENT else "wrong"
    return Cell(status, text, error, precision, gradient, edits)


def _outputs(module: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    args, kwargs = inputs
    return tensors(module(*args, **kwargs))


@torch.no_grad()
def _doubled(program: Program, inputs: Inputs) -> dict[str, Tensor]:
    """Return the outputs of a program whose tensors and inputs are in double precision."""
    args, kwargs = inputs
    wide = [each.double() if each.is_floating_point() else each for each in args]
    named = {k: each.double() if each.is_floating_point() else each for k, each in kwargs.items()}
    return _outputs(training_copy(program).eval().double(), (tuple(wide), named))


def _apart(expected: dict[str, Tensor], found: dict[str, Tensor]) -> float:
    return max(_difference(expected[name], found[name]) for name in expected)


def _finite(value: Tensor) -> bool:
    return not value.is_floating_point() or bool(value.isfinite().all())


def _difference(expected: Tensor, found: Tensor) -> float:
    if expected.shape != found.shape:
        return float("inf")
    if not expected.is_floating_point():
        return 0.0 if torch.equal(expected, found) else float("inf")
    if not expected.numel():
        return 0.0
    wanted = expected.detach().double()
    return float((wanted - found.detach()).norm() / (wanted.norm() or 1.0))


def _gradients_differ(
    one: nn.Module, two: nn.Module, expected: dict[str, Tensor], found: dict[str, Tensor]
) -> float:
    """Return the largest difference of gradients of the largest, over parameters left as they were.

    A layer that something was folded into has its name still, and another weight.
    """
    for outputs in (expected, found):
        generator = torch.Generator().manual_seed(0)
        total = sum(
            (value * torch.randn(value.shape, generator=generator)).sum()
            for value in outputs.values()
            if value.requires_grad
        )
        if isinstance(total, Tensor):
            total.backward()  # type: ignore[no-untyped-call]
    theirs = dict(two.named_parameters())
    both = [
        (each.grad, theirs[name].grad)
        for name, each in one.named_parameters()
        if name in theirs and torch.equal(each, theirs[name])
    ]
    if any((ours is None) != (other is None) for ours, other in both):
        return float("inf")
    pairs = [(a, b) for a, b in both if a is not None and b is not None and a.numel()]
    largest = max((gradient.abs().max().item() for gradient, _ in pairs), default=0.0) or 1.0
    return max((float((a - b).abs().max().item()) / largest for a, b in pairs), default=0.0)
