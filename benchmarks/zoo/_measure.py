"""What the sweep measures on one model: eager health, capture, and what the Program keeps.

A check passes, fails with a reason, or is skipped because one before it failed. Tolerances: outputs
to 1e-5 of their range; gradients to 1e-4 of the parameter's largest, or 1e-5 of the largest of all
(a key bias has none but rounding); MACs to 0.1 %.
"""

from __future__ import annotations

import re
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ._compare import (
    GradientMismatch,
    Mismatch,
    compare_gradients,
    compare_state,
    compare_values,
    tensors,
)
from ._models import Inputs, ZooModel
from ._results import CHECKS, Result

__all__ = ["measure"]

_FOLDER = re.compile(r"/\S*/(?:site-packages|dist-packages)/")  # says where one machine keeps torch
_BATCH, _OTHER_BATCH = 2, 3
_SEED = 20


def measure(zoo: ZooModel, *, eager_only: bool, progress: Callable[[Result], None]) -> Result:
    """Run every check on one model; `progress` sees the result before each stage begins.

    With `eager_only` the model is built, run and trained in eager, and nothing is captured.
    """
    result = Result(zoo.id, zoo.family, sorted(zoo.tags))
    runner = _Runner(zoo, result)
    stages: dict[str, Callable[[], float | None]] = {"eager": runner.eager}
    if eager_only:
        stages["train"] = runner.eager_train
    else:
        stages |= {name: getattr(runner, name) for name in CHECKS[1:]}
    for name, stage in stages.items():
        result.stage = name
        progress(result)
        check = result.checks[name]
        try:
            check.value = stage()
            check.status = "pass"
        except _Skip as skip:
            check.detail = str(skip)
        except Mismatch as mismatch:
            check.status, check.detail = "fail", str(mismatch)
        except Exception as error:  # a sweep lists whatever a model raises
            check.status, check.detail = "fail", describe(error)
        if check.status == "fail" and name in ("eager", "capture"):
            break
    result.stage = "done"
    return result


class _Skip(Exception):
    """A check that does not apply."""


class _Runner:
    """The checks of one model, in the order of CHECKS: each uses what those before it made."""

    def __init__(self, zoo: ZooModel, result: Result) -> None:
        self.zoo = zoo
        self.result = result
        self.example = zoo.inputs(_BATCH, 0)
        self.other = zoo.inputs(_OTHER_BATCH, 1)

    def eager(self) -> float | None:
        """Build and run; outputs are finite and follow the inputs and the mask."""
        model = self.reference = self.zoo.build()
        self.result.parameters = sum(p.numel() for p in model.parameters())
        first, second = (_evaluate(model, self.zoo.inputs(_OTHER_BATCH, seed)) for seed in (1, 2))
        _require_finite(first)
        _require_finite(second)
        _require_alive(first, second, "between two random inputs")
        args, kwargs = self.other
        if "attention_mask" in kwargs:
            kept = {**kwargs, "attention_mask": torch.ones_like(kwargs["attention_mask"])}
            _require_alive(first, _evaluate(model, (args, kept)), "when the mask is all ones")
        return None

    def eager_train(self) -> float | None:
        """Run a training step at both batch sizes; changes the reference's statistics."""
        for batch, seed in ((_BATCH, 0), (_OTHER_BATCH, 1)):
            _require_finite(_train_step(self.reference, self.zoo.inputs(batch, seed)))
        return None

    def capture(self) -> float | None:
        """Capture with everything that `capture` checks by itself; gives the Program."""
        from fxcompress.ir import capture

        model = self.zoo.build()
        self.keys_before = set(model.state_dict())
        args, kwargs = self.example
        start = time.process_time()
        self.program = capture(model, args, kwargs, dynamic=self.zoo.dynamic)
        self.result.capture_seconds = time.process_time() - start
        self.result.nodes = len(self.program.graph.nodes)
        self.result.notes = [f"{n.kind}: {n.about}: {n.text}" for n in self.program.notes]
        return self.result.capture_seconds

    def equal(self) -> float | None:
        """Outputs equal eager on a second random input with another batch size and padding."""
        self.program.module.eval()
        error = 0.0
        for inputs in (self.other, self.example):
            expected = _evaluate(self.reference, inputs)
            actual = _evaluate(self.program.module, inputs)
            error = max(error, compare_values(expected, actual, "output"))
        return error

    def keys(self) -> float | None:
        """The state dict keys are the original ones, but those the Program lists as unused."""
        unused = [note.about for note in self.program.notes if note.kind == "unused"]
        kept = {k for k in self.keys_before if not any(_below(k, path) for path in unused)}
        actual = set(self.program.module.state_dict())
        missing, added = sorted(kept - actual), sorted(actual - self.keys_before)
        if missing or added:
            raise Mismatch(f"{_some(missing)} missing, {_some(added)} added")
        return None

    def train(self) -> float | None:
        """With one seed, a training step gives eager's outputs, gradients and statistics.

        Where outputs are equal and gradients are not, double precision decides: BatchNorm over few
        values amplifies rounding.
        """
        try:
            return _compare_training(self.reference, self.program.module, self.other)
        except GradientMismatch as mismatch:
            reference = self.zoo.build().double()
            program = self.program.copy().module.double()
            program.load_state_dict(dict(reference.named_buffers()), strict=False)  # undo a step
            try:
                error = _compare_training(reference, program, _in_double(self.other))
            except Exception:  # the mismatch in single precision is what a reader can use
                raise mismatch from None
            self.result.checks["train"].detail = f"in double precision only; {mismatch}"
            return error

    def verify(self) -> float | None:
        """`fxcompress.ir.verify` accepts the Program."""
        from fxcompress.ir import verify

        verify(self.program)
        return None

    def macs(self) -> float | None:
        """The cost model's MACs agree with torch's flop counter."""
        try:
            from fxcompress.analysis import cost
        except ImportError as error:
            raise _Skip(f"no cost model: {error}") from error
        counted = _count_flops(self.reference, self.other) // 2
        costs = cost(self.program, dims=_sizes(self.zoo, self.other))
        # The flop counter does not know grouped products.
        macs = costs.macs - sum(node.macs for node in costs.per_node if node.op == "grouped_mm")
        self.result.macs, self.result.counted_macs = macs, counted
        relative = abs(macs - counted) / max(counted, 1)
        if relative > 1e-3:
            raise Mismatch(f"{macs:,} MACs, the flop counter says {counted:,} ({relative:.2%} off)")
        return relative


def _evaluate(model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    args, kwargs = inputs
    model.eval()
    with torch.no_grad():
        return tensors(model(*args, **kwargs))


def _train_step(model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """Run forward and backward in train mode; the loss weighs every output element at random."""
    args, kwargs = inputs
    model.train()
    model.zero_grad(set_to_none=True)
    torch.manual_seed(_SEED)
    outputs = tensors(model(*args, **kwargs))
    generator = torch.Generator().manual_seed(_SEED)
    losses = [
        (value * torch.randn(value.shape, generator=generator, dtype=value.dtype)).mean()
        for value in outputs.values()
        if value.requires_grad
    ]
    torch.autograd.backward(torch.stack([loss.float() for loss in losses]).sum())
    return {name: value.detach() for name, value in outputs.items()}


def _compare_training(reference: nn.Module, program: nn.Module, inputs: Inputs) -> float:
    expected = _train_step(reference, inputs)
    actual = _train_step(program, inputs)
    _require_finite(expected)
    error = compare_values(expected, actual, "train output")
    compare_gradients(reference, program)
    compare_state(reference, program)
    return error


def _in_double(inputs: Inputs) -> Inputs:
    def convert(value: Any) -> Any:
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.double() if floating else value

    args, kwargs = inputs
    return tuple(map(convert, args)), {name: convert(value) for name, value in kwargs.items()}


def _require_finite(values: dict[str, Tensor]) -> None:
    if not values:
        raise Mismatch("the model returns no tensor")
    for name, value in values.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise Mismatch(f"{name} holds values that are not finite")


def _require_alive(first: dict[str, Tensor], second: dict[str, Tensor], when: str) -> None:
    """Reject a model whose output hardly depends on its input: it would hide every error."""
    for name, value in first.items():
        other = second[name]
        if not value.is_floating_point() or value.shape != other.shape or value.numel() < 2:
            continue
        moved = (value - other).abs().max() / value.abs().max().clamp_min(1e-30)
        if moved > 1e-2:
            return
    raise Mismatch(f"no output moves by 1 % {when}")


def _count_flops(model: nn.Module, inputs: Inputs) -> int:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    # Fused kernels of attention and LSTM on a CPU have no formula in the counter; plain forms have.
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    # Without gradients, the counter's hooks fail on a parameter that is passed to a module.
    trainable = [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), torch.backends.mkldnn.flags(enabled=False), counter:
            _evaluate(model, inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for parameter in trainable:
            parameter.requires_grad_(True)
    return int(counter.get_total_flops())


def _sizes(zoo: ZooModel, inputs: Inputs) -> dict[str, int]:
    args, kwargs = inputs
    if zoo.dynamic == "batch":
        return {"batch": next(tensor.shape[0] for tensor in args)}
    return {
        dim: kwargs[name].shape[axis]
        for name, axes in zoo.dynamic.items()
        for axis, dim in axes.items()
    }


def _below(key: str, path: str) -> bool:
    return key == path or key.startswith(f"{path}.")


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:4])
    return f"{len(names)} ({shown}{', …' if len(names) > 4 else ''})" if names else "none"


def describe(error: BaseException) -> str:
    """Say an exception on one line, with the last place of the traceback inside fxcompress."""
    text = _FOLDER.sub("", " ".join(str(error).split()))
    place = next(_places(error), "")
    return f"{type(error).__name__}: {text[:600]}{place}"


def _places(error: BaseException) -> Iterator[str]:
    frames = traceback.extract_tb(error.__traceback__)
    for frame in reversed(frames):
        if "/fxcompress/" in frame.filename or "/torch/" not in frame.filename:
            name = "/".join(frame.filename.rsplit("/", 3)[1:])
            yield f" [{name}:{frame.lineno} {frame.name}]"
