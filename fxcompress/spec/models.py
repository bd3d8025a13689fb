"""The blocks of a spec as frozen, strict pydantic models; unknown keys are errors."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, model_validator

from fxcompress.pipeline.base import Options
from fxcompress.spec.constraints import Constraints

__all__ = [
    "Blocks",
    "Capture",
    "Data",
    "DataFactory",
    "DimRange",
    "Emit",
    "FactoryModel",
    "HfModel",
    "Input",
    "Metric",
    "Model",
    "ProgramModel",
    "Pt2Model",
    "Split",
    "TimmModel",
    "TorchvisionModel",
]

FACTORY = re.compile(r"(?P<source>[^:]+\.py|[A-Za-z_]\w*(\.[A-Za-z_]\w*)*):(?P<name>[A-Za-z_]\w*)")
"""`file.py:function` beside the spec, or `package.module:callable`."""


def _factory(text: str) -> str:
    if not FACTORY.fullmatch(text):
        raise ValueError("should be `file.py:function` or `package.module:callable`")
    return text


Factory: TypeAlias = Annotated[
    str,
    Field(
        description="`file.py:function` beside the spec, or `package.module:callable`.",
        examples=["model.py:build", "torchvision.models:resnet18"],
    ),
    AfterValidator(_factory),
]
Args: TypeAlias = Annotated[
    dict[str, Any], Field(default_factory=dict, description="Keyword arguments of the call.")
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

Identifier: TypeAlias = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
DType: TypeAlias = Literal[
    "float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"
]
VALUES = re.compile(r"randn|rand|ones|zeros|mask|arange|randint\(\s*-?\d+\s*,\s*-?\d+\s*\)")


def _values(text: str) -> str:
    if not VALUES.fullmatch(text):
        raise ValueError("should be randn, rand, ones, zeros, mask, arange or randint(low, high)")
    if text.startswith("randint"):
        low, high = (int(n) for n in re.findall(r"-?\d+", text))
        if low >= high:
            raise ValueError("randint(low, high) needs low below high")
    return text


def _size(raw: Any) -> Any:
    if isinstance(raw, bool) or not isinstance(raw, int | str):
        raise ValueError("should be a size or the name of a dynamic dim")
    if isinstance(raw, str) and not re.fullmatch(r"[A-Za-z_]\w*", raw):
        raise ValueError("should be a size or the name of a dynamic dim")
    if isinstance(raw, int) and raw < 0:
        raise ValueError("a size is not negative; name the dim if it is dynamic")
    return raw


class Input(Options):
    """One tensor that the model takes: its name in `forward`, sizes, type and example values."""

    name: str = Field(min_length=1, description="The parameter of `forward`.")
    shape: tuple[Annotated[int | str, BeforeValidator(_size)], ...] = Field(
        description="Sizes; a name such as `batch` makes a dim dynamic."
    )
    dtype: DType = "float32"
    values: Annotated[str, AfterValidator(_values)] | None = Field(
        default=None,
        description="randn, rand, ones, zeros, mask, arange or randint(low, high); by default "
        "randn for floats, ones for bools and randint(0, 100) for integers.",
    )


class DimRange(Options):
    """The range of a dynamic dim, and its size in the example inputs."""

    min: int = Field(default=1, ge=0)
    max: int | None = Field(default=None, ge=1)
    example: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> DimRange:
        if self.max is not None and self.min > self.max:
            raise ValueError(f"`min` {self.min} is above `max` {self.max}")
        if self.example is not None and not self.min <= self.example <= (self.max or self.example):
            raise ValueError(f"`example` {self.example} is outside the range")
        return self


class DataFactory(Options):
    """A callable that returns a mapping from split names to re-iterables of batches."""

    factory: Factory
    args: Args


class Split(Options):
    """One split: from a factory, from a file of tensors, or random."""

    factory: Factory | None = None
    args: Args
    tensors: str | None = Field(
        default=None, description="A `.npz` or `.safetensors` file with one array per input."
    )
    target: str | None = Field(default=None, description="The array that holds the targets.")
    random: int | None = Field(default=None, ge=1, description="How many random samples.")
    batch: int = Field(default=32, ge=1, description="Samples per batch.")
    limit: int | None = Field(default=None, ge=1, description="Use the first samples only.")

    @model_validator(mode="after")
    def _one_source(self) -> Split:
        given = [n for n in ("factory", "tensors", "random") if getattr(self, n) is not None]
        if len(given) != 1:
            raise ValueError("needs exactly one of `factory`, `tensors`, `random`")
        if self.target is not None and self.tensors is None:
            raise ValueError("`target` goes with `tensors`")
        if self.args and self.factory is None:
            raise ValueError("`args` goes with `factory`")
        return self


def data_kind(raw: Any) -> str:
    """Return whether a data block is one factory or names its splits."""
    if isinstance(raw, DataFactory):
        return "factory"
    return "factory" if isinstance(raw, dict) and isinstance(raw.get("factory"), str) else "splits"


def _data_text(raw: Any) -> Any:
    return {"factory": raw} if isinstance(raw, str) else raw


Data: TypeAlias = Annotated[
    Annotated[DataFactory, Tag("factory")] | Annotated[dict[Identifier, Split], Tag("splits")],
    Discriminator(data_kind),
    BeforeValidator(_data_text),
]

MetricName: TypeAlias = Literal["accuracy", "top5", "perplexity", "cosine"]


class Metric(Options):
    """The figure that says how good a model is: built in, or `fn(model, batches) -> float`."""

    use: MetricName | None = Field(default=None, description="A built-in metric.")
    factory: Factory | None = None
    args: Args
    split: str = Field(default="eval", description="The split that it is measured on.")
    higher_is_better: bool | None = Field(
        default=None, description="For a factory; built-in metrics know."
    )

    @model_validator(mode="after")
    def _one_source(self) -> Metric:
        if (self.use is None) == (self.factory is None):
            raise ValueError("needs exactly one of `use`, `factory`")
        if self.use is not None and self.higher_is_better is not None:
            raise ValueError(f"`higher_is_better` goes with `factory`; {self.use} knows its own")
        return self

    @property
    def improves_upwards(self) -> bool:
        """Whether a higher value is better."""
        if self.use is not None:
            return self.use != "perplexity"
        return self.higher_is_better is not False


def _metric_text(raw: Any) -> Any:
    if not isinstance(raw, str):
        return raw
    return {"factory": raw} if ":" in raw else {"use": raw}


class Capture(Options):
    """How the model is recorded."""

    static: tuple[str, ...] = Field(default=(), description="Names of dims that stay fixed.")
    opaque: tuple[str, ...] = Field(
        default=(), description="Globs over module paths; each match stays one untouched node."
    )
    tracer: Literal["recorder", "export"] = "recorder"
    verify: bool = Field(default=True, description="Compare with the model on a second input.")


def _stem(text: str) -> str:
    if "/" in text or "\\" in text or ".." in text or text.startswith("~"):
        raise ValueError("must stay inside the run folder: a plain file name, without its ending")
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", text):
        raise ValueError("should be a plain file name, without its ending")
    return text


class _EmitBase(Options):
    stem: Annotated[str, AfterValidator(_stem)] = Field(
        default="model", description="The file's name inside `artifacts/`, without its ending."
    )


class EmitPlain(_EmitBase):
    """Stand-alone Python source with safetensors, or a saved Program."""

    use: Literal["python", "program"]


class EmitPt2(_EmitBase):
    """An archive of torch.export."""

    use: Literal["pt2"]
    quantized: Literal["arithmetic", "decomposed"] = Field(
        default="arithmetic",
        description="Write quantisation as plain torch arithmetic, which loads with torch alone, "
        "or as `torch.ops.quantized_decomposed`, for PT2E backends.",
    )


class EmitOnnx(_EmitBase):
    """An ONNX file."""

    use: Literal["onnx"]
    opset: int = Field(default=20, ge=18, le=23, description="Version of the ONNX operator set.")


def _emit_text(raw: Any) -> Any:
    return {"use": raw} if isinstance(raw, str) else raw


Emit: TypeAlias = Annotated[
    EmitPt2 | EmitOnnx | EmitPlain, Field(discriminator="use"), BeforeValidator(_emit_text)
]


class Blocks(Options):
    """Every block of a spec but `passes`, whose options the installed passes define."""

    fxcompress: Literal[1] = Field(description="The version of the spec format.")
    name: str | None = Field(
        default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Names run and reports."
    )
    model: Model
    inputs: tuple[Input, ...] = ()
    dims: dict[Identifier, DimRange] = Field(
        default_factory=dict, description="Ranges of the dims that `inputs` names."
    )
    data: Data | None = None
    metric: Annotated[Metric, BeforeValidator(_metric_text)] | None = None
    capture: Capture = Capture()
    constraints: Constraints = Constraints()
    emit: tuple[Emit, ...] = ()
    seed: int = Field(default=0, ge=0, lt=2**63)
    output: str | None = Field(
        default=None, min_length=1, description="The run folder; by default `runs/NAME`."
    )
