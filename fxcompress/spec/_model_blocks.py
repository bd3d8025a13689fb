"""The `model` block: where the model comes from, told by the one key that each kind alone has."""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias

from pydantic import BeforeValidator, Discriminator, Field, Tag

from fxcompress.pipeline.base import Options
from fxcompress.spec._factories import Args, Factory

__all__ = [
    "MODEL_KINDS",
    "FactoryModel",
    "HfModel",
    "Model",
    "ProgramModel",
    "Pt2Model",
    "TimmModel",
    "TorchvisionModel",
    "model_kind",
]

Weights: TypeAlias = Annotated[
    str | None,
    Field(
        description="A safetensors file or a state_dict that loads weights-only, relative to the "
        "spec; `meta` allocates nothing and is for planning only.",
    ),
]


class FactoryModel(Options):
    """A model that a Python callable returns."""

    factory: Factory
    args: Args
    weights: Weights = None


class TimmModel(Options):
    """A model of the timm library, untrained unless `weights` names a file."""

    timm: str = Field(description="The name that `timm.create_model` takes.")
    args: Args
    weights: Weights = None


class TorchvisionModel(Options):
    """A model of torchvision, untrained unless `weights` names a file."""

    torchvision: str = Field(description="The name that `torchvision.models.get_model` takes.")
    args: Args
    weights: Weights = None


class HfModel(Options):
    """A Hugging Face model: a local folder with weights, a config file, or a config inline."""

    hf: str | dict[str, Any] = Field(
        description="A local folder, a config.json, or a config with its `model_type`."
    )
    cls: str | None = Field(
        default=None,
        alias="class",
        description="The transformers class, e.g. AutoModelForMaskedLM.",
    )
    args: Args
    weights: Weights = None


class ProgramModel(Options):
    """A Program that was saved before."""

    program: str = Field(description="A `.fxp` file.")


class Pt2Model(Options):
    """An exported program."""

    pt2: str = Field(description="A `.pt2` archive of torch.export.")


MODEL_KINDS: dict[str, type[Options]] = {
    "factory": FactoryModel,
    "hf": HfModel,
    "timm": TimmModel,
    "torchvision": TorchvisionModel,
    "program": ProgramModel,
    "pt2": Pt2Model,
}


def model_kind(raw: Any) -> str | None:
    """Return which kind of model block this is, by its one distinctive key."""
    if isinstance(raw, Options):
        return next(kind for kind, model in MODEL_KINDS.items() if type(raw) is model)
    found = [kind for kind in MODEL_KINDS if isinstance(raw, dict) and kind in raw]
    return found[0] if found else None


def _model_text(raw: Any) -> Any:
    """Read `timm:resnet18` or `model.py:build` as the mapping that it stands for."""
    if not isinstance(raw, str):
        return raw
    kind, _, rest = raw.partition(":")
    return {kind: rest} if kind in MODEL_KINDS and kind != "factory" else {"factory": raw}


Model: TypeAlias = Annotated[
    Annotated[FactoryModel, Tag("factory")]
    | Annotated[HfModel, Tag("hf")]
    | Annotated[TimmModel, Tag("timm")]
    | Annotated[TorchvisionModel, Tag("torchvision")]
    | Annotated[ProgramModel, Tag("program")]
    | Annotated[Pt2Model, Tag("pt2")],
    Discriminator(
        model_kind,
        custom_error_type="model_kind",
        custom_error_message="needs one of: " + ", ".join(f"`{kind}`" for kind in MODEL_KINDS),
    ),
    BeforeValidator(_model_text),
]
