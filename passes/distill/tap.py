"""Tap places of the model and name their counterparts in a teacher, for losses to compare."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from fxcompress.pipeline.base import Decision, Options, Pass, Preserves
from fxcompress.pipeline.figures import Heatmap
from passes.train._teacher_options import Teacher, followed

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from fxcompress.rewrite import GraphRewriter

__all__ = ["Tap"]

What: TypeAlias = Literal["output", "input", "attention", "query", "key", "value"]
Name: TypeAlias = Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class TapEntry(_Part):
    """One tap."""

    name: Name = Field(description="What losses call it.")
    at: str = Field(description="A module path or a node id.")
    what: What = Field(
        default="output",
        description="What the module makes or reads, or the probabilities, queries, keys or "
        "values of the one attention inside it.",
    )
    teacher: str | None = Field(
        default=None, description="The place in the teacher; by default the same as `at`."
    )


class LayerTaps(_Part):
    """A tap on each of several layers, matched to layers of the teacher."""

    name: Name = Field(
        default="layer", description="Taps are called by it and the layer's number: `layer_0`."
    )
    at: str = Field(description='A glob over module paths, such as `"layers.*"`.')
    what: What = Field(default="output", description="What of each layer, as for `taps`.")
    teacher: str | None = Field(
        default=None, description="A glob over the teacher's modules; by default that of `at`."
    )
    map: Literal["uniform", "last", "similarity"] | tuple[tuple[int, int], ...] = Field(
        default="uniform",
        description="Which layer learns from which: evenly spaced ones, the last ones, those that "
        "are most alike on calibration data (CKA), or pairs `[student, teacher]` from 0.",
    )
    calibration: int = Field(default=64, ge=2, description="Samples that `similarity` reads.")

    @field_validator("map", mode="before")
    @classmethod
    def _pairs(cls, value: object) -> object:
        if isinstance(value, list):
            return tuple(tuple(each) if isinstance(each, list) else each for each in value)
        return value

    @model_validator(mode="after")
    def _one_to_one(self) -> Self:
        if isinstance(self.map, tuple):
            if not self.map:
                raise ValueError("`map` lists no pairs")
            for side, what in ((0, "student"), (1, "teacher")):
                numbers = [pair[side] for pair in self.map]
                twice = next((n for n in numbers if numbers.count(n) > 1), None)
                if twice is not None:
                    raise ValueError(f"`map` is not one-to-one: {what} layer {twice} twice")
                if min(numbers) < 0:
                    raise ValueError("layers count from 0")
        return self


class TapOptions(Options):
    """Options of `distill.tap`: single taps, layers, or both."""

    taps: tuple[TapEntry, ...] = Field(default=(), strict=False, description="Single places.")
    layers: LayerTaps | Annotated[tuple[LayerTaps, ...], Field(strict=False)] = Field(
        default=(), description="Layers and their counterparts; one entry, or a list."
    )
    teacher: Teacher = Field(
        default="original",
        description="Where counterparts are looked up: `original`, `given`, `{spec: path}`, "
        "`{run: folder}` or `{step: id}`.",
    )

    @property
    def stacks(self) -> tuple[LayerTaps, ...]:
        """The entries of `layers`."""
        return (self.layers,) if isinstance(self.layers, LayerTaps) else self.layers

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not (self.taps or self.stacks):
            raise ValueError("say what to tap: `taps`, `layers` or both")
        names = [tap.name for tap in self.taps]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"two taps are called {twice}")
        return self


class Tapped(_Part):
    """A tap: what it is called, the node that it reads, and its counterpart.

    Attributes:
        name: The tap.
        at: The place as it was asked for.
        what: Which value of it.
        node: The node that it reads; the fused attention where that is written out.
        opened: Whether `node` is a fused attention that is written out.
        teacher: The place in the teacher.
    """

    name: str
    at: str
    what: What
    node: str
    opened: bool = False
    teacher: str


class LayerMap(_Part):
    """How layers were matched by similarity.

    Attributes:
        name: Of the taps.
        student: Paths of the model's layers.
        teacher: Paths of the teacher's.
        similarity: Linear CKA, `[student, teacher]`; empty while pending.
        chosen: The teacher's layer of each of the student's.
    """

    name: str
    student: tuple[str, ...]
    teacher: tuple[str, ...]
    similarity: tuple[tuple[float, ...], ...] = ()
    chosen: tuple[int, ...]


class TapDecision(Decision):
    """Every tap, and the similarities that layers were matched by."""

    taps: tuple[Tapped, ...] = ()
    mappings: tuple[LayerMap, ...] = ()

    def summary(self) -> tuple[str, ...]:
        """Return each tap with its counterpart."""
        return tuple(
            f"{tap.name}: {tap.what} of {tap.at}, as of {tap.teacher} in the teacher"
            for tap in self.taps
        )

    def figures(self) -> tuple[Heatmap, ...]:
        """Return the similarity of each layer to each of the teacher's, what was chosen marked."""
        return tuple(
            Heatmap(
                title=f"Similarity of layers: {each.name}",
                note="linear CKA of tapped tensors on calibration data: 1 is the same up to "
                "rotation and scale",
                columns=each.teacher,
                rows=each.student,
                values=each.similarity,
                chosen=each.chosen,
            )
            for each in self.mappings
            if each.similarity
        )


class Tap(Pass[TapOptions, TapDecision]):
    """Name values of the model that losses compare with values of a teacher.

    A tap is a side node: it reads a value and nothing reads it, so that no output changes. It
    follows the value through later passes: pruned channels are gone from it, a folded norm leaves
    it on the layer that took the norm in. No emitted format has taps.

    A place stands for one value: the output of a module (`what: output`), the floating-point tensor
    that it reads (`input`), or the probabilities, queries, keys or values of the one attention
    inside it. A fused attention whose probabilities are tapped is written out as softmax(q·kᵀ·s +
    mask)·v, which is equal up to rounding; others stay fused.

    `layers` taps many at once. Of n layers and m of the teacher's, `uniform` matches layer i with
    ⌊(i + 1)·m / n⌋ − 1 (Jiao et al., 2020, "TinyBERT", arXiv:1909.10351, section 4.1) and `last`
    with m − n + i. `similarity` takes the one-to-one matching in order with the largest sum of
    linear CKA (Kornblith et al., 2019, arXiv:1905.00414, eq. 3).

    Preserves: exact. `map: similarity` needs a `calibration` split.
    """

    Options: ClassVar[type[Options]] = TapOptions
    Decision: ClassVar[type[Decision]] = TapDecision
    preserves: ClassVar[Preserves] = "exact"
    version: ClassVar[int] = 2

    def reads(self, options: TapOptions) -> frozenset[str]:
        """Return the calibration split, where layers are matched by similarity."""
        alike = any(each.map == "similarity" for each in options.stacks)
        return frozenset({"calibration"} if alike else ())

    def follows(self, options: TapOptions) -> frozenset[str]:
        """Return the step in whose result counterparts are looked up, if it is one's."""
        return followed(options.teacher)

    def decide(self, program: Program, options: TapOptions, context: Context) -> TapDecision:
        """Return each tap's node and counterpart.

        Raises:
            SelectorError: A place is not there, or is not one value; in the model or the teacher.
            UsageError: Two taps are one, or layers cannot be matched one to one.
            DataError: The calibration split is missing or too small.
        """
        from passes.distill._tap import decide

        return decide(program, options, context)

    def rewrite(self, rewriter: GraphRewriter, decision: TapDecision) -> None:
        """Insert the taps; write attention out where its probabilities are tapped."""
        from passes.distill._tap import rewrite

        rewrite(rewriter, decision)
