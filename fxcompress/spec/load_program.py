"""Record a spec's model as a Program."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fxcompress.errors import CaptureError, ModelError
from fxcompress.spec.load_model import LoadedModel, load_model

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.spec.load_inputs import ModelInputs
    from fxcompress.spec.spec import Spec

__all__ = ["load_program"]


def load_program(spec: Spec, *, meta: bool = False, loaded: LoadedModel | None = None) -> Program:
    """Build a spec's model and capture it as its `inputs` and `capture` blocks say.

    Args:
        spec: The spec.
        meta: Allocate no weights.
        loaded: The model, if it was built before.

    Raises:
        ModelError: As for `load_model`, or the model does not run on the inputs at all.
        NumericsError, MissingExtraError: As for `load_model`.
        CaptureError: The model cannot be recorded faithfully.
    """
    from fxcompress.ir.capture import capture

    loaded = loaded or load_model(spec, meta=meta)
    if not isinstance(loaded.model, nn.Module):
        return loaded.model
    inputs, options = loaded.inputs, spec.capture
    try:
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
    except CaptureError as error:
        reason = _refusal(loaded.model, inputs)
        if not reason:
            raise
        raise ModelError(
            "the model does not run on the inputs of the spec",
            reason=reason,
            hint="compare names, shapes and dtypes of `inputs` with what `forward` takes",
            where=spec.where("inputs"),
        ) from error
    dims = {
        name: replace(dim, minimum=inputs.ranges[name].min, maximum=inputs.ranges[name].max)
        if name in inputs.ranges
        else dim
        for name, dim in program.dims.items()
    }
    return replace(program, dims=dims)


def _refusal(model: nn.Module, inputs: ModelInputs) -> str:
    """Return why the model itself does not run on the inputs, or an empty string if it does."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    args, kwargs = pytree.tree_map_only(
        torch.Tensor, lambda tensor: tensor.to(device), (inputs.args, dict(inputs.kwargs))
    )
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""
