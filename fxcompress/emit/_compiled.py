"""`torch.compile` with inductor's int8 kernels, which it makes only while weights are frozen."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import fx, nn

from fxcompress.emit._export import Exported, export_program
from fxcompress.emit._inductor_dynamic import write_integer_products
from fxcompress.emit._lower import INDUCTOR, Lowered, is_quantized, lower
from fxcompress.emit._plain import plain_program
from fxcompress.emit._probes import Leaves, probes
from fxcompress.ir.program import Program
from fxcompress.nn import DynamicQuantize

__all__ = ["InductorModule", "compile_inductor", "counted", "lowered_export"]

# Counters of inductor -> what they count. Each match becomes one call of a oneDNN kernel.
_KERNELS: Final[Mapping[str, str]] = {
    "qconv_unary_lower_count": "convolutions",
    "qconv2d_binary_lower_count": "convolutions",
    "qlinear_weight_prepack_matcher_count": "linears",
    "woq_matcher_count": "weight_only",
}


class InductorModule(nn.Module):
    """A compiled program; call it as the program, containers plain.

    Each compilation, the first as any later one (another size, `torch._dynamo.reset()`), runs with
    inductor's `freezing`: without it the weights stay arguments, and no int8 kernel is made.

    Attributes:
        kernels: Layers that the compilations so far made int8 kernels of: `convolutions`,
            `linears`, and `weight_only` for those with integer weights alone.
        notes: What lowering and export had to say.
    """

    def __init__(self, module: nn.Module, notes: Sequence[str]) -> None:
        super().__init__()
        self.module = module
        self.notes = tuple(notes)
        self.kernels: Counter[str] = Counter()
        self._compiled = torch.compile(module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute without gradients."""
        with torch.no_grad(), _frozen(), counted(self.kernels):
            return self._compiled(*args, **kwargs)


def compile_inductor(
    program: Program,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
) -> InductorModule:
    """Lower a program to inductor's int8 patterns and compile it.

    Args:
        program: What to compile; it is not changed.
        example_inputs: One batch to compile for at once: a tuple of positional or a mapping of
            keyword arguments. The first call compiles otherwise.

    Raises:
        EmitError: torch.export refuses the graph.
    """
    leaves = probes(program, example_inputs, seed=0)[0]
    exported, lowered = lowered_export(program, leaves)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = exported.program.module()
    # It checks sizes on every call, at 100 µs and more; dynamo's guards see them too.
    module._forward_pre_hooks.clear()
    module._forward_pre_hooks_with_kwargs.clear()
    compiled = InductorModule(module, [*lowered.notes, *exported.notes])
    if isinstance(example_inputs, Mapping):
        compiled(**example_inputs)
    elif example_inputs is not None:
        compiled(*example_inputs)
    return compiled


def lowered_export(program: Program, leaves: Leaves) -> tuple[Exported, Lowered]:
    """Return the program with unsigned quantize/dequantize pairs, exported.

    Raises:
        EmitError: torch.export refuses the graph.
    """
    plain = plain_program(program)
    lowered = Lowered()
    if is_quantized(plain.module):
        products = write_integer_products(plain.module)
        lowered = lower(plain.module, "decomposed", INDUCTOR)
        lowered.linears += products
        left = sum(isinstance(each, DynamicQuantize) for each in plain.module.modules())
        if left:
            lowered.notes.append(
                f"{left} activations that are rounded at run time are computed in float: there "
                "is an int8 kernel for linear layers alone"
            )
    exported = export_program(plain, program.dims, leaves)
    _drop_checks(exported.program.graph)
    return exported, lowered


def _drop_checks(graph: fx.Graph) -> None:
    """Drop checks of types: a value with a second reader matches no pattern."""
    for node in graph.find_nodes(
        op="call_function", target=torch.ops.aten._assert_tensor_metadata.default
    ):
        graph.erase_node(node)


@contextmanager
def _frozen() -> Iterator[None]:
    """Let whatever is compiled meanwhile freeze weights.

    Dynamo asks for it too, so that an option of `torch.compile`, which inductor alone sees, is not
    enough; and `config.patch` would cost each call 50 µs.
    """
    from torch._inductor import config

    before = config.freezing
    config.freezing = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        config.freezing = before


@contextmanager
def counted(kernels: Counter[str]) -> Iterator[None]:
    """Add to `kernels` what inductor makes of int8 kernels meanwhile."""
    from torch._dynamo.utils import counters

    before = dict(counters["inductor"])
    try:
        yield
    finally:
        for name, kind in _KERNELS.items():
            made = counters["inductor"].get(name, 0) - before.get(name, 0)
            if made:
                kernels[kind] += made
