"""Remove whole channels, neurons, heads, experts: any axis that can shrink, as one piece."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fxcompress.pipeline.base import Decision, Options, Pass, Preserves
from fxcompress.rewrite.edits import Declined
from fxcompress.spec.units import Amount, Count, Duration, Percent, Size
from passes.prune._compensate.options import ByMethod, Compensation
from passes.prune._criteria.options import Criterion, Named

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from fxcompress.rewrite import GraphRewriter

__all__ = ["Channels"]

Kind: TypeAlias = Literal[
    "channel",
    "neuron",
    "head",
    "kv_group",
    "head_width",
    "residual",
    "embedding",
    "expert",
    "other",
]
Multiple: TypeAlias = Annotated[int, Field(ge=1)]


class Budget(Options):
    """The most that the result may cost; a percentage is a share of what is there now."""

    macs: Count | None = Field(default=None, description="Multiply-accumulates of one sample.")
    parameters: Count | None = Field(default=None, description="Number of parameters.")
    bytes: Size | None = Field(default=None, description="Bytes of the weights as stored.")
    latency: Duration | None = Field(
        default=None,
        description="Time of one call, measured while deciding; a percentage is a share of "
        "the time of the model as it is now.",
    )

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not self.costs and self.latency is None:
            raise ValueError("needs macs, parameters, bytes or latency")
        if self.latency is not None and self.costs:
            raise ValueError("`latency` stands alone: it is searched for by changing the MACs")
        return self

    @property
    def costs(self) -> dict[str, Amount]:
        """The limits that polynomials tell, by name."""
        named = {"macs": self.macs, "parameters": self.parameters, "bytes": self.bytes}
        return {name: amount for name, amount in named.items() if amount is not None}


class PruneOptions(Options):
    """What may be removed and how it is chosen; the amount aside."""

    kinds: tuple[Kind, ...] = Field(default=(), description="Kinds of axes; empty means every one.")
    targets: tuple[str, ...] = Field(
        default=(),
        description="Globs over names of axes and over modules that an axis is made or scaled in; "
        "empty means every axis.",
    )
    exclude: tuple[str, ...] = Field(default=(), description="Globs of axes to leave whole.")
    expect: int | None = Field(
        default=None, ge=0, description="How many axes must be selected; else it is an error."
    )
    round_to: Multiple | dict[Kind | Literal["default"], Multiple] = Field(
        default=1,
        description="Kept sizes are multiples of this, or the axis stays whole; one number, or by "
        "kind (`default` for the others).",
    )
    min_keep: int | None = Field(default=None, ge=1, description="Fewest indices an axis keeps.")
    max_ratio: Percent = Field(default=0.5, description="Largest part of an axis that may go.")
    criterion: Named = Field(default=Criterion(), description="What is kept.")
    compensation: ByMethod = Field(
        default=Compensation(), description="How the layers that read them make up for it."
    )
    signature: Literal["fixed", "free"] = Field(
        default="fixed",
        description="`free` lets axes shrink that are sizes of the model's outputs.",
    )


class ChannelsOptions(PruneOptions):
    """Options of `prune.channels`: one of `ratio`, `keep` and `budget` says how much."""

    ratio: Percent | dict[str, Percent] | None = Field(
        default=None,
        description="Which part goes: of each axis, of each axis that a glob fits (the first one "
        "counts), or with `scope: global` of all indices together.",
    )
    keep: Multiple | dict[str, Multiple] | None = Field(
        default=None, description="How many indices stay, of each axis or by glob."
    )
    budget: Budget | None = Field(default=None, description="What the result may cost.")
    scope: Literal["global", "local"] | None = Field(
        default=None,
        description="`global` compares indices of all axes; `local` takes the same part of each. "
        "By default global for a budget, else local.",
    )

    reached: Percent = Field(
        default=1.0,
        description="Which part of the way this step goes: the rounds of prune.iterative set it.",
    )

    @model_validator(mode="after")
    def _one_amount(self) -> Self:
        given = [self.ratio is not None, self.keep is not None, self.budget is not None]
        if sum(given) != 1:
            raise ValueError("give exactly one of ratio, keep and budget")
        if self.is_global and (self.keep is not None or isinstance(self.ratio, dict)):
            raise ValueError("`scope: global` needs a budget or one ratio")
        return self

    @property
    def is_global(self) -> bool:
        """Whether indices of different axes are compared."""
        return self.scope == "global" or (self.scope is None and self.budget is not None)


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class AxisEntry(_Entry):
    """An axis that was selected; the indices that stay are in `arrays["keep/<name>"]`.

    Attributes:
        name: What the axis is called.
        kind: What it is in the model.
        size: How many indices it has.
        kept: How many stay.
        lost: Which part of the sum of its scores goes; None while pending.
        statistics: A norm or softmax spans it, so that removing is not the same as zeroing.
    """

    name: str
    kind: str
    size: int
    kept: int
    lost: float | None = None
    statistics: bool = False


class CostFigures(_Entry):
    """What the program costs, from the polynomials: at batch 1 and example sizes."""

    macs: int
    parameters: int
    bytes: int


class ChannelsDecision(Decision):
    """Every selected axis with its new size, what that should save, and what stays and why.

    `unknown` counts ops without a rule, `stuck` names the axes of parameters that each freezes;
    `outputs` says which sizes of the outputs change. Tensors that compensation gives other values
    are in `arrays["value/<name>"]`; `ridges` has the ridge of each layer for which it was chosen.
    """

    axes: tuple[AxisEntry, ...] = ()
    before: CostFigures
    after: CostFigures
    unknown: dict[str, int] = Field(default_factory=dict)
    stuck: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    declined: tuple[Declined, ...] = ()
    signature: Literal["fixed", "free"] = "fixed"
    outputs: tuple[str, ...] = ()
    ridges: dict[str, float] = Field(default_factory=dict)

    def summary(self) -> tuple[str, ...]:
        """Return the sizes by kind, what norms span, ops without a rule, and changed outputs."""
        lines = [_sizes(kind, entries) for kind, entries in self._by_kind().items()]
        spanned = [each.name for each in self.axes if each.statistics and each.kept < each.size]
        if spanned:
            more = f" and {len(spanned) - 2} more" if len(spanned) > 2 else ""
            lines.append(f"norms over {', '.join(spanned[:2])}{more} count only what is kept")
        lines += [self._without_rule(op, count) for op, count in self.unknown.items()]
        return (*lines, *self.outputs)

    def _without_rule(self, op: str, count: int) -> str:
        """Return `no rule for roll (3 nodes): fc.weight[0] and 4 more stay whole`."""
        stuck = self.stuck.get(op, ())
        more = f" and {len(stuck) - 2} more" if len(stuck) > 2 else ""
        stays = f"{', '.join(stuck[:2])}{more} stay whole" if stuck else "it touches no weights"
        return f"no rule for {op} ({'1 node' if count == 1 else f'{count} nodes'}): {stays}"

    def _by_kind(self) -> dict[str, list[AxisEntry]]:
        found: dict[str, list[AxisEntry]] = {}
        for entry in self.axes:
            found.setdefault(entry.kind, []).append(entry)
        return found


def _sizes(kind: str, entries: list[AxisEntry]) -> str:
    """Return `channel: 4 of 6 axes, 64 → 40`, the sizes added up where they differ."""
    cut = [each for each in entries if each.kept < each.size]
    axes = "1 axis" if len(entries) == 1 else f"{len(entries)} axes"
    which = axes if len(cut) == len(entries) else f"{len(cut)} of {axes}"
    sizes = {(each.size, each.kept) for each in cut}
    if len(sizes) == 1:
        ((size, kept),) = sizes
        each = "" if len(cut) == 1 else " each"
    else:
        size, kept = sum(e.size for e in cut), sum(e.kept for e in cut)
        each = " in all"
    return f"{kind}: {which}" + (f", {size} → {kept}{each}" if cut else "")


class Channels(Pass[ChannelsOptions, ChannelsDecision]):
    """Shrink axes: remove the indices that matter least, everywhere they occur.

    An axis is a dimension with everything that must shrink with it: the rows of a convolution, its
    norm, the columns of each layer that reads them, through reshapes, splits and concatenations.
    `fxcompress.axes` finds them; each index gets a score by `criterion`, and the lowest go.

    How many go is a `ratio` or number per axis, or what a `budget` leaves. The budget is solved for
    all axes together: minimise Σₐ wₐ · removedₐ / keptₐ, the noise over the signal of each axis a,
    subject to C(n₁, n₂, …) ≤ B. C is a polynomial in the sizes n, and wₐ the part of it that axis a
    takes part in; scores in units of the loss are added up as they are. That is a knapsack with
    prices that rise as neighbours shrink: blocks go in the order of loss per cost saved, prices are
    renewed, then blocks are exchanged while that loses less. A latency budget is met by searching
    the MAC budget whose result is measured to be that quick.

    Removing an index is the same as holding its contribution at zero, except where a norm spans
    the axis: then its statistics are taken over what is kept, and the plan says so.

    Preserves: approximate. Needs data where the criterion does.
    """

    Options: ClassVar[type[Options]] = ChannelsOptions
    Decision: ClassVar[type[Decision]] = ChannelsDecision
    preserves: ClassVar[Preserves] = "approximate"

    def reads(self, options: ChannelsOptions) -> frozenset[str]:
        """Return the splits that the criterion and the compensation need."""
        criterion, compensation = options.criterion, options.compensation
        found = {criterion.data} if criterion.needs_data else set()
        return frozenset(found | ({compensation.data} if compensation.method != "none" else set()))

    def decide(
        self, program: Program, options: ChannelsOptions, context: Context
    ) -> ChannelsDecision:
        """Return the sizes of the selected axes and the indices that stay.

        Raises:
            SelectorError: A glob fits no axis, only frozen ones, or not as many as expected.
            UsageError: The amount empties an axis, passes `max_ratio`, or cannot be met;
                `round_to` is larger than an axis.
            DataError: The criterion needs data that is not there.
            NumericsError: A score is NaN.
        """
        from passes.prune._channels.decide import decide

        return decide(program, options, context)

    def rewrite(self, rewriter: GraphRewriter, decision: ChannelsDecision) -> None:
        """Shrink every tensor and every number in the graph that depends on the sizes."""
        from passes.prune._channels.shrink import apply

        apply(rewriter, decision)

    def ensures(self, before: Program, after: Program, decision: ChannelsDecision) -> None:
        """Check masked equivalence, and that all weights are slices of what they were."""
        from passes.prune._channels.shrink import check

        check(before, after, decision)
