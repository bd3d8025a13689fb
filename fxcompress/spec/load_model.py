"""Build the model that a spec names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from fxcompress.errors import FxCompressError, ModelError
from fxcompress.spec import models
from fxcompress.spec._libraries import from_hf, from_timm, from_torchvision
from fxcompress.spec._python import call_factory, load_factory
from fxcompress.spec._weights import check_finite, load_weights

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.spec.load_inputs import ModelInputs
    from fxcompress.spec.spec import Spec

__all__ = ["LoadedModel", "build_model", "load_model"]


@dataclass(frozen=True)
class LoadedModel:
    """A model and how to call it.

    Attributes:
        model: The module in eval mode, or a Program that was saved before.
        inputs: Example inputs and dynamic dims.
    """

    model: nn.Module | Program
    inputs: ModelInputs


def load_model(spec: Spec, *, meta: bool = False) -> LoadedModel:
    """Build a spec's model with its weights, and example inputs for it.

    Args:
        spec: The spec.
        meta: Allocate no weights, whatever the spec says.

    Raises:
        ModelError: The factory fails or returns no module, weights miss or add keys, or the
            inputs do not fit.
        NumericsError: There is a NaN in the weights.
        MissingExtraError: A library that the spec names is not installed.
    """
    from fxcompress.spec.load_inputs import load_inputs

    model = build_model(spec, meta=meta)
    return LoadedModel(model, load_inputs(spec, model))


def build_model(spec: Spec, *, meta: bool = False) -> nn.Module | Program:
    """Build a spec's model with its weights; see `load_model`."""
    block, where = spec.model, spec.where("model")
    if isinstance(block, models.ProgramModel):
        from fxcompress.ir.program import Program

        return Program.load(spec.path(block.program))
    if isinstance(block, models.Pt2Model):
        return _exported(spec, block, where)
    meta = meta or block.weights == "meta"
    torch.manual_seed(spec.seed)
    model = _made(spec, block, where, meta=meta)
    if meta:
        model = model.to("meta")
    elif block.weights is not None:
        load_weights(model, spec.path(block.weights), spec.where("model", "weights"))
    if not meta:
        _check_allocated(model, where)
        check_finite(model, where)
    return model.eval()


def _made(
    spec: Spec,
    block: models.FactoryModel | models.HfModel | models.TimmModel | models.TorchvisionModel,
    where: str,
    *,
    meta: bool,
) -> nn.Module:
    """Build the module; for meta without allocating, where its code can do that."""
    if not meta:
        return _create(spec, block, where, meta=False)
    try:
        with torch.device("meta"):
            return _create(spec, block, where, meta=True)
    except FxCompressError:
        # Some constructors read the values that they have just made.
        return _create(spec, block, where, meta=True)


def _create(
    spec: Spec,
    block: models.FactoryModel | models.HfModel | models.TimmModel | models.TorchvisionModel,
    where: str,
    *,
    meta: bool,
) -> nn.Module:
    if isinstance(block, models.TimmModel):
        return from_timm(block, where)
    if isinstance(block, models.TorchvisionModel):
        return from_torchvision(block, where)
    if isinstance(block, models.HfModel):
        return from_hf(block, spec.folder, where, meta=meta)
    function = load_factory(block.factory, spec.folder, ModelError, where)
    made = call_factory(function, block.args, block.factory, ModelError, where)
    if not isinstance(made, nn.Module):
        raise ModelError(
            f"{block.factory} returned a {type(made).__name__}",
            reason="a model factory returns a torch.nn.Module",
            hint="return the model itself" if isinstance(made, tuple | list) else "",
            where=where,
        )
    return made


def _exported(spec: Spec, block: models.Pt2Model, where: str) -> nn.Module:
    """Read an archive of torch.export and return its module."""
    path = spec.path(block.pt2)
    try:
        module: nn.Module = torch.export.load(path).module()
    except Exception as error:
        raise ModelError(
            f"{block.pt2} is no exported program",
            reason=f"{type(error).__name__}: {error}",
            where=where,
        ) from error
    check_finite(module, where)
    return module


def _check_allocated(model: nn.Module, where: str) -> None:
    """Refuse a model some of whose tensors have no data."""
    named = [*model.named_parameters(), *model.named_buffers()]
    empty = [name for name, tensor in named if tensor.is_meta]
    if empty:
        more = f" and {len(empty) - 5} more" if len(empty) > 5 else ""
        raise ModelError(
            f"{len(empty)} tensors of the model have no data",
            reason=", ".join(empty[:5]) + more,
            hint="name the weights with `weights:`, or plan only with `weights: meta`",
            where=where,
        )
