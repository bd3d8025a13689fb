"""Example inputs for a spec's model, and which of their sizes may vary."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fxcompress.errors import ModelError
from fxcompress.pipeline._close import did_you_mean
from fxcompress.spec.models import DimRange
from fxcompress.train.inputs import InputSpec, example

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.spec.spec import Spec

__all__ = ["ModelInputs", "input_specs", "load_inputs"]

_BATCH, _OTHER = 2, 16


@dataclass(frozen=True)
class ModelInputs:
    """How to call a model for recording it.

    Attributes:
        args: Positional example inputs: the leading parameters of `forward`.
        kwargs: The other example inputs, by name.
        dynamic: Input -> dim -> name of the size, for `capture`.
        ranges: Ranges of the dynamic sizes that the spec gives.
        specs: The inputs as described; batches of data are checked against them.
        dims: The size of each dynamic dim in the example.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    dynamic: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    ranges: Mapping[str, DimRange] = field(default_factory=dict)
    specs: tuple[InputSpec, ...] = ()
    dims: Mapping[str, int] = field(default_factory=dict)


def input_specs(spec: Spec) -> tuple[InputSpec, ...]:
    """Return the inputs that a spec describes; empty where it leaves them out."""
    return tuple(
        InputSpec(item.name, item.shape, getattr(torch, item.dtype), item.values)
        for item in spec.inputs
    )


def example_dims(spec: Spec, specs: tuple[InputSpec, ...]) -> dict[str, int]:
    """Return each dynamic size in the example: 2 for a first dim, else 16, if in range."""
    dims: dict[str, int] = {}
    for item in specs:
        for place, name in item.dims.items():
            known = spec.dims.get(name, DimRange())
            usual = max(known.min, _OTHER if place else _BATCH)
            dims.setdefault(name, known.example or min(usual, known.max or usual))
    return dims


def load_inputs(spec: Spec, model: nn.Module | Program) -> ModelInputs:
    """Return example inputs for a model.

    They come from the spec's `inputs`, else from the first batch of its data, else from what the
    model's library says about it.

    Raises:
        ModelError: Nothing says what the inputs are, or a name is not a parameter of `forward`.
        DataError: They come from data that cannot be read.
    """
    if not isinstance(model, nn.Module):
        return ModelInputs()
    specs = input_specs(spec)
    dims = example_dims(spec, specs)
    generator = torch.Generator().manual_seed(spec.seed)
    if specs:
        values = {item.name: example(item, dims, generator) for item in specs}
    else:
        values = _from_data(spec, model) or _from_library(model, generator)
        if not values:
            raise ModelError(
                "nothing says what the model's inputs are",
                hint="add `inputs: [{name: x, shape: [batch, 3, 224, 224]}]` to the spec",
                where=spec.where("model"),
            )
        specs = tuple(_described(name, value) for name, value in values.items())
        dims = {"batch": next(iter(values.values())).shape[0]}
    args, kwargs = _arranged(model, values, spec)
    dynamic = {item.name: item.dims for item in specs if item.dims}
    return ModelInputs(args, kwargs, dynamic, dict(spec.dims), specs, dims)


def _described(name: str, value: Tensor) -> InputSpec:
    """Describe an input that was taken from an example: its first dim is the batch."""
    return InputSpec(name, ("batch", *value.shape[1:]) if value.dim() else (), value.dtype)


def _from_data(spec: Spec, model: nn.Module) -> dict[str, Tensor]:
    """Take the first batch of the first split."""
    if spec.data is None:
        return {}
    from fxcompress.spec.load_data import load_data

    data = load_data(spec, inputs=())
    split = "calibration" if "calibration" in data else next(iter(data), None)
    if split is None:
        return {}
    batch, _ = next(iter(data[split]))
    names = [p.name for p in inspect.signature(model.forward).parameters.values()]
    pairs = batch.items() if isinstance(batch, Mapping) else zip(names, batch, strict=False)
    return {name: value for name, value in pairs if isinstance(value, Tensor)}


def _from_library(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """Ask timm's or Hugging Face's model for its usual input."""
    name = next(iter(inspect.signature(model.forward).parameters), "x")
    usual = getattr(model, "pretrained_cfg", None)
    if isinstance(usual, Mapping) and usual.get("input_size"):
        return {name: torch.randn((_BATCH, *usual["input_size"]), generator=generator)}
    dummy = getattr(model, "dummy_inputs", None)
    if isinstance(dummy, Mapping) and all(isinstance(value, Tensor) for value in dummy.values()):
        return dict(dummy)
    return {}


def _arranged(
    model: nn.Module, values: Mapping[str, Tensor], spec: Spec
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Split inputs into the leading positional parameters of `forward` and the rest by name."""
    parameters = inspect.signature(model.forward).parameters
    kinds = {p.kind for p in parameters.values()}
    if inspect.Parameter.VAR_POSITIONAL in kinds and not set(values) & set(parameters):
        return tuple(values.values()), {}
    for index, name in enumerate(values):
        if name not in parameters and inspect.Parameter.VAR_KEYWORD not in kinds:
            raise ModelError(
                f"`forward` has no parameter `{name}`",
                hint=did_you_mean(name, parameters, kind="it has"),
                where=spec.where("inputs", index, "name"),
            )
    args: list[Any] = []
    for name, parameter in parameters.items():
        if name not in values or parameter.kind == parameter.KEYWORD_ONLY:
            break
        args.append(values[name])
    leading = set(list(parameters)[: len(args)])
    return tuple(args), {name: v for name, v in values.items() if name not in leading}
