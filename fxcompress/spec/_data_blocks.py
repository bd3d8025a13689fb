"""The blocks `inputs`, `dims` and `data`."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    model_validator,
)

from fxcompress.pipeline.base import Options
from fxcompress.spec._factories import Args, Factory

__all__ = [
    "Data",
    "DataFactory",
    "DimRange",
    "Identifier",
    "Input",
    "Split",
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


SOURCES = ("factory", "tensors", "images", "text", "written", "random")


def _sides(raw: Any) -> Any:
    return (raw, raw) if isinstance(raw, int) else raw


def _listed(raw: Any) -> Any:
    return (raw,) if isinstance(raw, str) else raw


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


class Images(Options):
    """Image files in folders, one folder for each class."""

    folder: str = Field(description="The folder; its sub-folders are the classes, by name.")
    size: Annotated[tuple[int, int], BeforeValidator(_sides), Field(strict=False)] = Field(
        description="Height and width of what the model gets, or one number for both."
    )
    fit: Literal["crop", "stretch"] = Field(
        default="crop",
        description="Scale the shorter side and cut the middle out, or scale each side.",
    )
    mean: tuple[float, ...] = Field(
        default=(0.0, 0.0, 0.0),
        strict=False,
        description="Taken from each channel of values from 0 to 1; one number for grey images.",
    )
    std: tuple[float, ...] = Field(
        default=(1.0, 1.0, 1.0), strict=False, description="What each channel is divided by."
    )

    @model_validator(mode="after")
    def _channels(self) -> Images:
        if len(self.mean) != len(self.std) or len(self.mean) not in (1, 3):
            raise ValueError("`mean` and `std` have one number each (grey) or three (colours)")
        if min(self.std) <= 0:
            raise ValueError("`std` is above 0")
        return self


class Text(Options):
    """Rows of JSONL or Parquet files as tokens."""

    files: Annotated[tuple[str, ...], BeforeValidator(_listed), Field(strict=False)] = Field(
        min_length=1, description="`.jsonl` or `.parquet` files."
    )
    tokenizer: str = Field(description="A folder with `tokenizer.json`.")
    column: Annotated[tuple[str, ...], BeforeValidator(_listed), Field(strict=False)] = Field(
        default=("text",),
        min_length=1,
        max_length=2,
        description="The column with the text, or two for pairs of texts.",
    )
    labels: str | None = Field(
        default=None, description="The column with classes: numbers, or texts in their order."
    )
    length: int = Field(default=128, ge=2, description="Tokens of a row; longer texts are cut.")
    pack: bool = Field(
        default=False,
        description="Join all texts, the end token between them, and cut blocks of `length`.",
    )
    pad: Literal["batch", "length"] = Field(
        default="batch", description="Pad to the longest row of a batch, or to `length`."
    )

    @model_validator(mode="after")
    def _whole(self) -> Text:
        if self.pack and self.labels is not None:
            raise ValueError("packed blocks have no `labels`: they hold parts of several texts")
        return self


class Teacher(Options):
    """A model that writes; one of the two is given."""

    spec: str | None = Field(
        default=None, description="A spec: the model that it names, before any pass."
    )
    run: str | None = Field(
        default=None, description="A run folder: the model after its last pass."
    )

    @model_validator(mode="after")
    def _one(self) -> Teacher:
        if (self.spec is None) == (self.run is None):
            raise ValueError("say either `spec` or `run`")
        return self


class Written(Options):
    """What a causal language model writes to prompts, finished, checked and without repetitions."""

    prompts: Identifier = Field(description="The split whose `input_ids` it continues.")
    teacher: Teacher = Field(description="The model: `{spec: path}` or `{run: folder}`.")
    stop: int = Field(ge=0, description="The token that ends what is written.")
    longest: int = Field(default=64, ge=1, description="Tokens that it may write to a prompt.")
    distinct: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Drop rows whose ROUGE-L with a kept one, prompt included, is so much or more.",
    )
    check: Factory | None = Field(
        default=None,
        description="`fn(prompt, written) -> bool` on lists of tokens: whether a row is kept.",
    )
    temperature: float = Field(
        default=0.0, ge=0, description="0 takes the likeliest token; else tokens are drawn."
    )
    pad: int = Field(default=0, ge=0, description="The token that fills short rows.")


class Split(Options):
    """One split: from a factory, from files, written by a model, or random."""

    factory: Factory | None = None
    args: Args
    tensors: str | None = Field(
        default=None, description="A `.npz` or `.safetensors` file with one array per input."
    )
    target: str | None = Field(default=None, description="The array that holds the targets.")
    images: Images | None = Field(default=None, description="Image files in folders.")
    text: Text | None = Field(default=None, description="Rows of text files, as tokens.")
    written: Written | None = Field(
        default=None, description="What a teacher writes to the prompts of another split."
    )
    random: int | None = Field(default=None, ge=1, description="How many random samples.")
    batch: int = Field(default=32, ge=1, description="Samples per batch.")
    limit: int | None = Field(default=None, ge=1, description="Use the first samples only.")

    @model_validator(mode="after")
    def _one_source(self) -> Split:
        given = [name for name in SOURCES if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"needs exactly one of {', '.join(f'`{name}`' for name in SOURCES)}")
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
