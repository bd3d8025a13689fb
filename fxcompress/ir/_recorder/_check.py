"""Compare a Program with its model: evaluation, and one seeded training step with gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from fxcompress.errors import CaptureError
from fxcompress.ir._copying import copy_module, copy_tree
from fxcompress.ir._recorder._inputs import BoundCall
from fxcompress.ir._recorder._record import untouched_random_state
from fxcompress.ir.program import Program

__all__ = ["check_evaluation", "check_training", "output_difference"]

# Of the largest magnitude of the tensor. The same kernels run on both sides; only a fused
# attention against one spelled out leaves a rounding difference.
_TOLERANCE: Final = {torch.float64: 1e-6, torch.float32: 1e-4}
_HALF_TOLERANCE: Final = 3e-2
# Gradients pass through every layer twice.
_GRADIENT_SLACK: Final = 10.0
# Elements of one gradient that are compared.
_SAMPLES: Final = 2**16


def check_evaluation(
    program: Program, model: nn.Module, call: BoundCall, inputs: Sequence[torch.Tensor]
) -> bool:
    """Run both on `inputs` in evaluation mode and compare.

    Returns False where the model itself cannot run on them.

    Raises:
        CaptureError: The outputs differ; the message names the first module that does.
    """
    twin = _twin(model).eval()
    args, kwargs = call.rebuild([t.clone() for t in inputs])
    with untouched_random_state(), torch.no_grad():
        try:
            torch.manual_seed(0)
            expected = _leaves(twin(*args, **kwargs))
        except Exception:
            return False
        captured = _program_twin(program).eval()
        torch.manual_seed(0)
        args, kwargs = call.rebuild([t.clone() for t in inputs])
        got = _leaves(_run(captured, args, kwargs, program))
    problem = _difference(expected, got)
    if problem:
        raise CaptureError(
            f"the captured graph computes something else than {type(model).__name__}: {problem}",
            reason=_first_difference(program, model, call, inputs),
            hint='mark the module as opaque (opaque=["…"]), or use tracer="export"',
        )
    return True


def _run(module: nn.Module, args: Any, kwargs: Any, program: Program) -> Any:
    try:
        return module(*args, **kwargs)
    except Exception as error:
        raise CaptureError(
            f"the captured graph of {program.name} does not run on other sizes or values",
            reason=f"{type(error).__name__}: {str(error).strip().splitlines()[0]}",
            hint='declare the size static, mark the module as opaque, or use tracer="export"',
        ) from error


def check_training(
    program: Program, model: nn.Module, call: BoundCall, inputs: Sequence[torch.Tensor]
) -> str:
    """Run one seeded training step of both and say what differs; empty if nothing does.

    Outputs, gradients of every parameter and buffers are compared. Neither is changed.
    """
    twin, captured = _twin(model).train(), _program_twin(program).train()
    with untouched_random_state(), torch.enable_grad():
        args, kwargs = call.rebuild([t.clone() for t in inputs])
        try:
            torch.manual_seed(0)
            expected = _leaves(twin(*args, **kwargs))
            wanted = _gradients(twin, expected)
        except Exception:
            return ""
        args, kwargs = call.rebuild([t.clone() for t in inputs])
        try:
            torch.manual_seed(0)
            got = _leaves(captured(*args, **kwargs))
            gradients = _gradients(captured, got)
        except Exception as error:
            return f"the graph does not run: {type(error).__name__}: {error}"
    problem = _difference(expected, got)
    if problem:
        return f"outputs: {problem}"
    # A gradient that is zero but for rounding is compared with what gradients reach elsewhere.
    reached = [float(g.abs().max()) for g in wanted.values() if g is not None and g.numel()]
    floor = 1e-2 * max(reached, default=0.0)
    for name, parameter in captured.named_parameters():
        key = id(parameter)
        problem = _difference([wanted.get(key)], [gradients.get(key)], _GRADIENT_SLACK, floor)
        if problem:
            return f"gradient of {name}: {problem}"
    buffers = dict(twin.named_buffers())
    for name, buffer in captured.named_buffers():
        problem = _difference([buffers[name]], [buffer]) if name in buffers else ""
        if problem:
            return f"buffer {name}: {problem}"
    return ""


def output_difference(expected: Any, got: Any) -> str:
    """Return how two outputs differ, empty if they do not."""
    return _difference(_leaves(expected), _leaves(got))


def _twin(model: nn.Module) -> nn.Module:
    buffers = {id(b): b.clone() for b in model.buffers()}
    return copy_tree(model, buffers)


def _program_twin(program: Program) -> fx.GraphModule:
    copied = copy_module(program.module)
    for module in copied.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.clone()
    return copied


def _leaves(output: Any) -> list[Any]:
    return pytree.tree_leaves(output)


def _gradients(module: nn.Module, outputs: list[Any]) -> dict[int, torch.Tensor | None]:
    # By identity: the two share their parameters, and a tied one may go by another name.
    named = {id(p): p for p in module.parameters() if p.requires_grad}
    loss = sum(
        (o.float() * torch.linspace(-1, 1, o.numel(), device=o.device).reshape(o.shape)).sum()
        for o in outputs
        if isinstance(o, torch.Tensor) and o.is_floating_point() and o.requires_grad
    )
    if not isinstance(loss, torch.Tensor) or not named:
        return {}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {key: None if g is None else _sample(g) for key, g in zip(named, found, strict=True)}


def _sample(gradient: torch.Tensor) -> torch.Tensor:
    """Return a gradient, or evenly spread elements of a large one.

    Both sides' whole gradients would be twice the model's memory.
    """
    step = gradient.numel() // _SAMPLES
    # An odd step does not keep to one column of a matrix whose width is even.
    return gradient if step < 2 else gradient.flatten()[:: step | 1].clone()


def _difference(
    expected: Sequence[Any], got: Sequence[Any], slack: float = 1.0, floor: float = 1e-6
) -> str:
    if len(expected) != len(got):
        return f"{len(got)} values instead of {len(expected)}"
    for index, (want, have) in enumerate(zip(expected, got, strict=True)):
        text = _leaf_difference(want, have, slack, floor)
        if text:
            return f"output {index}: {text}" if len(expected) > 1 else text
    return ""


def _leaf_difference(want: Any, have: Any, slack: float, floor: float) -> str:
    if not isinstance(want, torch.Tensor) or not isinstance(have, torch.Tensor):
        if isinstance(want, torch.Tensor) is not isinstance(have, torch.Tensor):
            present = want if isinstance(want, torch.Tensor) else have
            return "" if not bool(present.any()) else "a tensor on one side only"
        return ""
    if want.shape != have.shape or want.dtype != have.dtype:
        return f"{have.dtype} {tuple(have.shape)} instead of {want.dtype} {tuple(want.shape)}"
    if not want.numel():
        return ""
    if not want.is_floating_point() and not want.is_complex():
        return "" if torch.equal(want, have) else "other integers"
    finite = torch.nan_to_num(want.detach().abs(), nan=0.0, posinf=0.0, neginf=0.0)
    scale = max(float(finite.max()), floor, 1e-6)
    error = torch.nan_to_num((want - have).detach().abs(), nan=0.0, posinf=0.0, neginf=0.0)
    tolerance = _TOLERANCE.get(want.dtype, _HALF_TOLERANCE) * slack
    if bool((want.isnan() != have.isnan()).any()):
        return "NaN on one side only"
    worst = float(error.max())
    return f"off by {worst:.3g} where values reach {scale:.3g}" if worst > tolerance * scale else ""


def _first_difference(
    program: Program, model: nn.Module, call: BoundCall, inputs: Sequence[torch.Tensor]
) -> str:
    """Return which leaf module first gets another input or gives another output."""
    outputs: dict[str, list[Any]] = {}
    twin = _twin(model).eval()
    wanted = {str(n.target) for n in program.nodes if n.op == "call_module"}
    for path, module in twin.named_modules():
        if path in wanted:

            def keep(_m: nn.Module, _a: Any, out: Any, path: str = path) -> None:
                outputs.setdefault(path, []).append(pytree.tree_map(_snapshot, out))

            module.register_forward_hook(keep)
    args, kwargs = call.rebuild([t.clone() for t in inputs])
    watcher = _Watcher(_program_twin(program).eval(), outputs)
    with untouched_random_state(), torch.no_grad(), contextlib.suppress(Exception):
        torch.manual_seed(0)
        twin(*args, **kwargs)
        torch.manual_seed(0)
        args, kwargs = call.rebuild([t.clone() for t in inputs])
        watcher.run(*program.signature.flatten(args, kwargs), enable_io_processing=False)
    return watcher.found or "every module agrees; the difference arises in calls outside modules"


def _snapshot(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


class _Watcher(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, outputs: dict[str, list[Any]]) -> None:
        super().__init__(module)
        self.outputs, self.found = outputs, ""

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        expected = self.outputs.get(str(n.target), []) if n.op == "call_module" else []
        if expected and not self.found:
            problem = _difference(_leaves(expected.pop(0)), _leaves(result))
            if problem:
                self.found = (
                    f"{n.target} ({n.meta.get('source')}) is the first to differ: {problem}"
                )
        return result
