"""The `executorch` format: a `.pte` whose layers run in XNNPACK.

Activations are signed, and each layer takes the form that its quantizers allow (see
`_executorch_forms`). What XNNPACK does not take runs in ExecuTorch's portable kernels.
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import fx

from fxcompress.emit._artifact import Written
from fxcompress.emit._bounds import bounded
from fxcompress.emit._executorch_forms import Forms, write_forms
from fxcompress.emit._executorch_sizes import sizes_pass
from fxcompress.emit._export import export_program
from fxcompress.emit._extras import need_extra
from fxcompress.emit._job import Job
from fxcompress.emit._lower import EXECUTORCH, Lowered, lower
from fxcompress.emit._plain import plain_program
from fxcompress.errors import EmitError

__all__ = ["write"]

_CONVOLUTIONS: Final = frozenset({"aten.convolution.default"})
_LINEARS: Final = frozenset({"aten.linear.default", "aten.addmm.default", "aten.mm.default"})
_PLUMBING: Final = frozenset({"getitem", "executorch_call_delegate", "sym_size.int"})
_SHOWN: Final = 8


def write(job: Job) -> Written:
    """Export the program, delegate it to XNNPACK and save the `.pte`.

    Raises:
        EmitError: torch.export or ExecuTorch refuses the graph.
        MissingExtraError: executorch is not installed.
    """
    need_extra("executorch")
    plain = plain_program(job.program)
    forms, lowered = Forms(), Lowered()
    if job.quantized:
        forms = write_forms(plain.module)
        lowered = lower(plain.module, "decomposed", EXECUTORCH)
    dims = bounded(job.program.dims, job.options.executorch)
    exported = export_program(plain, dims, job.example)
    found, buffer = _compile(exported.program)
    name = job.file("pte")
    (job.stage / name).write_bytes(buffer)
    notes = [
        f"`Runtime.get().load_program({name!r}).load_method('forward').execute(inputs)` of "
        "executorch.runtime; import executorch.kernels.quantized first",
        *found.notes(lowered),
        *forms.notes(),
        *lowered.notes,
    ]
    if len(plain.outputs) > 1:
        notes.append(f"outputs are a list: {', '.join(plain.outputs)}")
    sizes = ", ".join(
        f"{name} 1" if dim.maximum == 1 else f"{name} from 1 to {dim.maximum}"
        for name, dim in dims.items()
    )
    if sizes:
        notes.append(f"sizes that it accepts: {sizes}; `maximum` of the format sets others")
    return Written((name,), (*notes, *exported.notes))


def _compile(program: torch.export.ExportedProgram) -> tuple[_Delegated, bytes]:
    """Return what was delegated, and the file."""
    with _quiet():
        import executorch.kernels.quantized  # noqa: F401  # registers the quantized operators
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        try:
            edge: Any = to_edge_transform_and_lower(
                program, transform_passes=[sizes_pass], partitioner=[XnnpackPartitioner()]
            )
            found = _delegated(edge.exported_program().graph_module)
            return found, bytes(edge.to_executorch().buffer)
        except Exception as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise EmitError(
                "ExecuTorch cannot take the program",
                reason=f"{type(error).__name__}: {' '.join(lines[:3])}",
                hint="emit it as `onnx` or `openvino`, or declare dynamic sizes static",
            ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep warnings of its packages from the user, and its handlers from the root logger."""
    root, disabled = logging.getLogger(), logging.root.manager.disable
    handlers, level = root.handlers[:], root.level
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        root.handlers[:] = handlers
        root.setLevel(level)


@dataclass
class _Delegated:
    """What XNNPACK took, and what is left to portable kernels."""

    nodes: int = 0
    subgraphs: int = 0
    convolutions: Counter[str] = field(default_factory=Counter)
    linears: Counter[str] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)

    def notes(self, lowered: Lowered) -> list[str]:
        found = []
        for kind, count, total in (
            ("convolutions", self.convolutions, lowered.convolutions),
            ("linear layers", self.linears, lowered.linears),
        ):
            if total:
                how = ", ".join(f"{n} {form}" for form, n in sorted(count.items()) if n)
                integers = count["static"] + count["dynamic"]
                found.append(f"{integers} of {total} {kind} run in integers in XNNPACK ({how})")
        parts = f"{self.nodes} nodes in {self.subgraphs} parts are delegated to XNNPACK"
        if not self.left:
            return [*found, f"{parts}, all there are"]
        listed = ", ".join(f"{n} {op}" for op, n in self.left.most_common(_SHOWN))
        more = f" and {len(self.left) - _SHOWN} more kinds" if len(self.left) > _SHOWN else ""
        return [*found, f"{parts}; portable kernels run {listed}{more}"]


def _delegated(module: fx.GraphModule) -> _Delegated:
    found = _Delegated()
    for node in _calls(module):
        if node not in _PLUMBING and not str(node).startswith("sym_"):
            found.left[str(node)] += 1
    for name, part in module.named_children():
        original = getattr(part, "original_module", None)
        if original is None:
            raise AssertionError(f"{name} is no delegate")
        found.subgraphs += 1
        found.nodes += len(list(_calls(original.graph_module)))
        _count_layers(original.graph_module, found)
    return found


def _calls(module: fx.GraphModule) -> Iterator[str]:
    for node in module.graph.nodes:
        if node.op == "call_function":
            yield _name(node)


def _name(node: fx.Node) -> str:
    """Return `aten.linear.default` for an operator of whichever dialect."""
    return str(getattr(node.target, "__name__", node.target))


def _count_layers(module: fx.GraphModule, found: _Delegated) -> None:
    for node in module.graph.nodes:
        if node.op != "call_function" or _name(node) not in _CONVOLUTIONS | _LINEARS:
            continue
        rounded = next(
            (_name(each) for each in node.all_input_nodes if "dequantize_per" in _name(each)), ""
        )
        form = "dynamic" if "per_token" in rounded else "static" if rounded else "float"
        (found.convolutions if _name(node) in _CONVOLUTIONS else found.linears)[form] += 1
