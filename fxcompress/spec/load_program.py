"""Record a spec's model as a Program."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

from fxcompress.spec.load_model import LoadedModel, load_model

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.spec.spec import Spec

__all__ = ["load_program"]


def load_program(spec: Spec, *, meta: bool = False, loaded: LoadedModel | None = None) -> Program:
    """Build a spec's model and capture it as its `inputs` and `capture` blocks say.

    Args:
        spec: The spec.
        meta: Allocate no weights.
        loaded: The model, if it was built before.

    Raises:
        ModelError, NumericsError, MissingExtraError: As for `load_model`.
        CaptureError: The model cannot be recorded faithfully.
    """
    from fxcompress.ir.capture import capture

    loaded = loaded or load_model(spec, meta=meta)
    if not isinstance(loaded.model, nn.Module):
        return loaded.model
    inputs, options = loaded.inputs, spec.capture
    program = capture(
        loaded.model,
        inputs.args,
        inputs.kwargs,
        dynamic=inputs.dynamic or None,
        opaque=options.opaque,
        static=options.static,
        name=spec.title,
        verify=options.verify,
        tracer=options.tracer,
    )
    dims = {
        name: replace(dim, minimum=inputs.ranges[name].min, maximum=inputs.ranges[name].max)
        if name in inputs.ranges
        else dim
        for name, dim in program.dims.items()
    }
    return replace(program, dims=dims)
