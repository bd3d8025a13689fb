"""From a plain program to a `torch.export.ExportedProgram`, dynamic sizes kept."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import fx, nn
from torch.export.dynamic_shapes import refine_dynamic_shapes_from_suggested_fixes
from torch.fx.experimental import _config as _sizes
from torch.utils import _pytree as pytree

from fxcompress.emit._grouped import write_products_out
from fxcompress.emit._plain import Call, PlainProgram
from fxcompress.emit._probes import Leaves
from fxcompress.errors import EmitError
from fxcompress.ir.signature import Dim

__all__ = ["Exported", "export_program"]


_CHECKED: Final = "sizes follow formulas: the file itself checks whether it was made for them"
_MANY: Final = 2**48
_ATTEMPTS: Final = 3
_FIXES: Final = "Suggested fixes:"
_FIX: Final = re.compile(r"^\s+\w+ = \S")
_TRACES: Final = ("stack_trace", "source_fn_stack", "from_node")


class Exported:
    """An exported program and what had to be said about its sizes."""

    def __init__(self, program: torch.export.ExportedProgram, notes: tuple[str, ...]) -> None:
        self.program, self.notes = program, notes


def export_program(plain: PlainProgram, dims: Mapping[str, Dim], example: Leaves) -> Exported:
    """Export with a named `torch.export.Dim` per dynamic size, each allowed to be 1.

    Args:
        plain: The program; its graph may be changed.
        dims: Its dynamic sizes.
        example: Inputs to trace with.

    Raises:
        EmitError: torch.export refuses the graph.
    """
    write_products_out(plain.module)
    call = plain.call(example)
    shapes: Any = _dynamic_shapes(plain, dims)
    notes: tuple[str, ...] = ()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        for _ in range(_ATTEMPTS):
            try:
                program = _export(plain, call.args, call.kwargs, shapes)
                break
            except torch._dynamo.exc.UserError as error:
                # The graph works for a part of the range only: positions up to 512, say.
                fixes = _suggested_fixes(str(error))
                if not fixes:
                    program, notes = _checked(plain, call, shapes, error), (_CHECKED,)
                    break
                shapes = refine_dynamic_shapes_from_suggested_fixes(fixes, shapes)
                notes = (_sizes_note(shapes),)
                refusal = error
            except AssertionError as error:
                # torch fails while it words a bound on a formula of sizes.
                program, notes = _checked(plain, call, shapes, error), (_CHECKED,)
                break
            except Exception as error:
                raise _refused(error) from error
        else:
            raise _refused(refusal) from refusal
    return Exported(program, notes)


def _checked(
    plain: PlainProgram, call: Call, shapes: Any, refusal: Exception
) -> torch.export.ExportedProgram:
    """Export a graph whose sizes follow formulas: what they must satisfy is checked in the file.

    Raises:
        EmitError: torch.export refuses that, too.
    """
    try:
        with _sizes.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
            return _export(plain, call.args, call.kwargs, shapes, checked=True)
    except Exception as error:
        raise _refused(refusal) from error


def _export(
    plain: PlainProgram,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    shapes: Any,
    *,
    checked: bool = False,
) -> torch.export.ExportedProgram:
    program = torch.export.export(
        _ordinary(plain.module),
        args,
        kwargs,
        dynamic_shapes=shapes or None,
        strict=False,
        prefer_deferred_runtime_asserts_over_guards=checked,
    )
    for graph_module in program.graph_module.modules():
        if isinstance(graph_module, torch.fx.GraphModule):
            for node in graph_module.graph.nodes:
                # Paths on the machine that exported; they would also be most of the file.
                for key in _TRACES:
                    node.meta.pop(key, None)
    return program


def _ordinary(module: fx.GraphModule) -> nn.Module:
    """Return a module with the same `forward` and state that is no GraphModule.

    torch.export interprets a GraphModule node by node, and then gives keyword arguments by place.
    """
    made: nn.Module = type("Exported", (nn.Module,), {"forward": type(module).forward})()
    for table in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
        setattr(made, table, getattr(module, table))
    return made.train(module.training)


def _suggested_fixes(message: str) -> str:
    """Return the lines of suggestions, which torch reads up to the end of the message."""
    lines = message.partition(_FIXES)[2].splitlines()
    kept = [line for line in lines if _FIX.match(line)]
    return "\n".join([_FIXES, *kept]) if kept else ""


def _refused(error: Exception) -> EmitError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return EmitError(
        "torch.export cannot take the program",
        reason=f"{type(error).__name__}: {' '.join(lines[:3])}",
        hint="emit it as `program` or `python`, or declare the size that it names static",
    )


def _dynamic_shapes(plain: PlainProgram, dims: Mapping[str, Dim]) -> dict[str, Any]:
    sizes = {
        name: torch.export.Dim(_symbol(name), min=1, max=dim.maximum)
        for name, dim in dims.items()
        if dim.maximum != 1
    }
    by_name = {
        tensor.name: {i: sizes[size] for i, size in enumerate(tensor.shape) if size in sizes}
        for tensor in plain.signature.inputs
    }
    shapes: dict[str, Any] = {}
    for parameter in plain.signature.parameters:
        value = pytree.tree_unflatten([by_name[str(n)] for n in parameter.leaves], parameter.tree)
        if parameter.kind == "VAR_POSITIONAL":
            value = tuple(value)
        shapes[parameter.name] = value
    return shapes


def _symbol(name: str) -> str:
    return (
        name if name.isidentifier() else "dim_" + "".join(c if c.isalnum() else "_" for c in name)
    )


def _sizes_note(shapes: Any) -> str:
    found: dict[str, None] = {}
    for leaf in pytree.tree_leaves(shapes):
        if hasattr(leaf, "min") and hasattr(leaf, "__name__"):
            top = "" if leaf.max > _MANY else f" to {leaf.max}"
            found[f"{leaf.__name__} from {max(leaf.min, 1)}{top}"] = None
        elif isinstance(leaf, int):
            found[f"a size fixed to {leaf}"] = None
    return f"sizes that torch.export accepts: {', '.join(found) or 'fixed'}"
