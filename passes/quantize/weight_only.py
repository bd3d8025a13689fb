"""Weight-only quantization: weights as grouped integers of 2 to 8 bits, activations in float."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from fxcompress.pipeline.base import Decision, Options, Pass, Preserves, Selection
from fxcompress.rewrite.edits import Declined
from passes.quantize._bits import Width

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from fxcompress.rewrite import GraphRewriter

__all__ = ["WeightOnly"]

Method = Literal["rtn", "hqq", "awq", "gptq", "awq+gptq"]


class Override(Options):
    """Another format for some layers or experts; what is left out stays as it is for all."""

    targets: tuple[str, ...] = Field(
        min_length=1,
        description="Globs over node ids; expert 2 of `mlp.experts` is `mlp.experts.2`, and its "
        "matrices `mlp.experts.2.gate`, `.up` and `.down`.",
    )
    rarest: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Of the experts that match, only this part of each mixture, rounded down: "
        "those that the fewest tokens of the calibration split choose.",
    )
    bits: Annotated[Width, Field(ge=2, le=8)] | Literal["float"] | None = Field(
        default=None, description="Width of the integers, or `float`: none."
    )
    group: int | Literal["channel"] | None = Field(
        default=None, description="Elements of a row that share a scale, or `channel`: the row."
    )
    symmetric: bool | None = Field(default=None, description="Zero point in the middle.")


class WeightOnlyOptions(Selection):
    """Options of `quantize.weight_only`. The selection is over layers and embeddings."""

    bits: Width = Field(default=4, ge=2, le=8, description="Width of the integers.")
    group: int | None = Field(
        default=64,
        ge=2,
        description="Elements of a row that share a scale, the last ones of a row perhaps fewer; "
        "null: the whole row.",
    )
    symmetric: bool = Field(default=False, description="Zero point in the middle of the integers.")
    method: Method = Field(
        default="rtn",
        description="Round to nearest (rtn), HQQ, AWQ, GPTQ, or GPTQ on the scales of AWQ.",
    )
    search: Literal["auto", "minmax", "mse"] = Field(
        default="auto",
        description="Cover every weight, or clip where that lowers the error: `auto` clips where "
        "calibration data tells the error of the output.",
    )
    embeddings: bool = Field(default=False, description="Quantise embedding tables too.")
    calibration: int = Field(
        default=32, ge=1, description="Samples of the calibration split (awq, gptq)."
    )
    sequential: bool = Field(
        default=True, description="A layer sees what the quantised layers before it give (gptq)."
    )
    order: bool = Field(
        default=True, description="Round the columns with the largest inputs first (gptq)."
    )
    damping: float = Field(
        default=0.01, gt=0, description="Part of its mean added to the Hessian's diagonal (gptq)."
    )
    sweeps: int = Field(
        default=4,
        ge=0,
        description="How often integers, zero points and scales are then improved in turn (gptq).",
    )
    correct: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="How far weights first make up for inputs that quantised layers before them "
        "have changed; needs `sequential` (gptq).",
    )
    overrides: tuple[Override, ...] = Field(
        default=(),
        description="Other formats for some layers or experts; the first that matches counts.",
    )

    def format(self, override: Override | None) -> tuple[int | Literal["float"], int | None, bool]:
        """Return bits, group and whether integers are symmetric, as an override has them."""
        bits: int | Literal["float"] = self.bits
        group, symmetric = self.group, self.symmetric
        if override is not None:
            bits = bits if override.bits is None else override.bits
            symmetric = symmetric if override.symmetric is None else override.symmetric
            if override.group is not None:
                group = None if override.group == "channel" else override.group
        return bits, group, symmetric


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class WeightEntry(_Entry):
    """The quantizer of one weight.

    Its scales and zero points are in `arrays[path + ".scale"]` and `".zero_point"`, its integers,
    packed, in `".integers"`.

    Attributes:
        path: Where the quantizer goes.
        tensor: The parameter.
        layers: The nodes that read it.
        bits: Width of the integers.
        symmetric: Signed, with zero point 0; else unsigned.
        axis: Dimension of the rows.
        group: Elements of a row that share a scale.
        shape: Shape of the scale.
        unscaled: Why AWQ gives it no scales, where it was asked to.
    """

    path: str
    tensor: str
    layers: tuple[str, ...]
    bits: int
    symmetric: bool
    axis: int
    group: int | None
    shape: tuple[int, ...]
    unscaled: str | None = None


class StackEntry(_Entry):
    """The quantizer of a stack of experts' matrices.

    Its scales and zero points (from 0) are in `arrays[path + ".scale"]` and `".zero_point"`, the
    integers of those with 4 bits, packed, in `".integers.4"`.

    Attributes:
        path: Where the quantizer goes.
        tensor: The parameter.
        experts: Path of the leaf.
        matrix: `gate`, `up` or `down`.
        calls: The nodes that read it.
        bits: Width of each expert's integers; 0 for an expert in float.
        group: Elements of a row that share a scale.
        shape: Shape of the scale.
        unseen: Experts that no calibration token chose: they are rounded to nearest.
    """

    path: str
    tensor: str
    experts: str
    matrix: str
    calls: tuple[str, ...]
    bits: tuple[int, ...]
    group: int | None
    shape: tuple[int, ...]
    unseen: tuple[int, ...] = ()


class Fold(_Entry):
    """A tensor that is divided along `dim` by `arrays[tensor + ".divisor"]`.

    The layers that read the result were multiplied by the same numbers before they were rounded.
    """

    tensor: str
    dim: int


class WeightOnlyDecision(Decision):
    """Every quantizer that will be in the graph, what AWQ folds, and what stays in float."""

    method: Method = "rtn"
    weights: tuple[WeightEntry, ...] = ()
    stacks: tuple[StackEntry, ...] = ()
    folds: tuple[Fold, ...] = ()
    declined: tuple[Declined, ...] = ()

    def summary(self) -> tuple[str, ...]:
        """Return how many weights get how many bits, and which experts others than the rest."""
        formats: dict[str, int] = {}
        for each in self.weights:
            name = _format(each.bits, each.group)
            formats[f"weights as {name}"] = formats.get(f"weights as {name}", 0) + 1
        for stack in self.stacks:
            for bits in filter(None, stack.bits):
                name = f"experts' matrices as {_format(bits, stack.group)}"
                formats[name] = formats.get(name, 0) + 1
        lines = [f"{count} {name} ({self.method})" for name, count in formats.items()]
        by_experts: dict[str, list[StackEntry]] = {}
        for stack in self.stacks:
            by_experts.setdefault(stack.experts, []).append(stack)
        unseen = {
            f"{path}: no token chose {', '.join(map(str, own[0].unseen))}, rounded to nearest"
            for path, own in by_experts.items()
            if own[0].unseen
        }
        return (*lines, *filter(None, map(_exceptions, by_experts.values())), *sorted(unseen))


def _format(bits: int, group: int | None) -> str:
    return f"{bits}-bit integers per {'channel' if group is None else f'group of {group}'}"


def _exceptions(stacks: list[StackEntry]) -> str:
    """Return which experts of a mixture have a width that most do not have, if any."""
    widths = [width for each in stacks for width in each.bits]
    usual = max(widths, key=lambda width: (widths.count(width), width))
    several = [each.bits for each in stacks]
    common = max(several, key=several.count)
    parts = [_widths(common, usual)] if set(common) != {usual} else []
    for stack in stacks:
        if stack.bits != common:
            told = _widths(stack.bits, usual) or f"all in {usual} bits"
            parts.append(f"in `{stack.matrix}` {told}")
    return f"{stacks[0].experts}: experts {'; '.join(parts)}" if parts else ""


def _widths(bits: tuple[int, ...], usual: int) -> str:
    parts = []
    for width in sorted(set(bits) - {usual}):
        who = ", ".join(str(e) for e, own in enumerate(bits) if own == width)
        parts.append(f"{who} in {f'{width} bits' if width else 'float'}")
    return "; ".join(parts)


class WeightOnly(Pass[WeightOnlyOptions, WeightOnlyDecision]):
    """Store weights as grouped integers; layers compute in float with what they give back.

    A row of a weight is cut in groups of `group` elements. Each has a scale s and a whole zero
    point z; w becomes q = clamp(round(w / s) + z, qmin, qmax), read back as (q − z)·s:

    - `rtn`: every weight to its nearest integer, the range of a group covering all of it
      (`search: minmax`) or shrunk to the least squared error (`mse`);
    - `hqq`: s and z that minimise Σ|w − (q − z)·s|^0.7 by half-quadratic splitting (Badri & Shaji,
      2023, "Half-Quadratic Quantization of Large Machine Learning Models");
    - `gptq`: column by column, each rounding error made up for by the columns still in float, the
      least-squares way for the inputs X of the calibration data (Frantar et al., 2023,
      arXiv:2210.17323). Before, weights move to where X, as quantised layers before them give it,
      leads to the outputs that the float model has (`correct`; Li et al., 2025,
      arXiv:2504.02692); after, integers, zero points and scales are improved in turn (`sweeps`;
      Behdin et al., 2023, arXiv:2309.01885);
    - `awq`: input channels are multiplied by max(mean|x|)^α, normalised, before they are rounded,
      and what makes these inputs (a norm's weight, a linear layer) is divided by the same; α is
      the one with the least output error (Lin et al., 2024, arXiv:2306.00978);
    - `awq+gptq`: the rounding of GPTQ on the channels as AWQ scales them.

    With calibration data the search for a range minimises the error of the layer's output. The
    parameter becomes what its integers stand for.

    The matrices of `fxcompress.nn.Experts` are rounded as those of linear layers are, each with a
    width of its own where overrides say so.

    Preserves: approximate. Needs: a `calibration` split for awq and gptq.
    """

    Options: ClassVar[type[Options]] = WeightOnlyOptions
    Decision: ClassVar[type[Decision]] = WeightOnlyDecision
    preserves: ClassVar[Preserves] = "approximate"

    def reads(self, options: WeightOnlyOptions) -> frozenset[str]:
        """Return `calibration` for what looks at inputs, or at how experts are used."""
        used = any(each.rarest is not None for each in options.overrides)
        data = used or options.method not in ("rtn", "hqq")
        return frozenset({"calibration"}) if data else frozenset()

    def decide(
        self, program: Program, options: WeightOnlyOptions, context: Context
    ) -> WeightOnlyDecision:
        """Return the quantizers; with their scales and integers, unless planning.

        Raises:
            SelectorError: The selection fits no layer, or not as many as expected.
            UsageError: No layer of the selection can be quantised, or the group does not fit a
                layer that was named.
            DataError: The calibration split is missing or too small.
            NumericsError: A NaN or an infinity in weights or in what they are multiplied with.
        """
        from passes.quantize._weight_only.decide import decide

        return decide(program, options, context)

    def rewrite(self, rewriter: GraphRewriter, decision: WeightOnlyDecision) -> None:
        """Insert the quantizers and set the weights; pending scales are 1."""
        from passes.quantize._weight_only.insert import fold, insert
        from passes.quantize._weight_only.insert_stacks import insert_stacks

        for declined in decision.declined:
            rewriter.decline(declined.node, declined.reason, declined.because_of)
        fold(rewriter, decision.folds, decision.arrays)
        insert(rewriter, decision.weights, decision.arrays)
        insert_stacks(rewriter, decision.stacks, decision.arrays)

    def ensures(self, before: Program, after: Program, decision: WeightOnlyDecision) -> None:
        """Check that every layer decided on reads a quantised weight, which holds its integers."""
        from passes.quantize._weight_only.insert import check
        from passes.quantize._weight_only.insert_stacks import check_stacks

        check(after, decision.weights, decision.arrays)
        check_stacks(after, decision.stacks, decision.arrays)
