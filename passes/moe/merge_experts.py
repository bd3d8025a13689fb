"""Merge experts that do alike: fewer matrices under the same router."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fxcompress.pipeline.base import Decision, Pass, Preserves, Selection
from fxcompress.pipeline.figures import Heatmap
from fxcompress.rewrite.edits import Declined
from passes.moe.lift import Lifted

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from fxcompress.rewrite import GraphRewriter

__all__ = ["MergeExperts"]


class Merging(Selection):
    """How experts that become one are weighed and aligned."""

    weighting: Literal["usage", "mass", "uniform"] = Field(
        default="usage",
        description="What an expert counts in a mean: how often it is chosen, the sum of its "
        "weights, or as much as any other.",
    )
    align: Literal["weights", "activations", "none"] = Field(
        default="weights",
        description="How hidden units are matched before a mean is taken: by their weights, by "
        "their values on calibration data, or in their order.",
    )
    calibration: int = Field(default=64, ge=1, description="Samples of the calibration split.")
    tokens: int = Field(
        default=1024, ge=1, description="Tokens that `align: activations` compares values on."
    )


class MergeExpertsOptions(Merging):
    """Options of `moe.merge_experts`: `experts`, `ratio` or `groups` says how far.

    The selection is over mixtures.
    """

    experts: int | None = Field(default=None, ge=1, description="How many experts are left.")
    ratio: float | None = Field(
        default=None, gt=0, lt=1, description="Which part of the experts goes, rounded down."
    )
    groups: tuple[tuple[int, ...], ...] = Field(
        default=(), description="Which experts become one, from 0; others stay."
    )
    similarity: Literal["router_logits", "weights"] = Field(
        default="router_logits",
        description="What experts are alike by: the cosine of their scores over tokens, or of "
        "their weights, hidden units matched.",
    )

    @model_validator(mode="after")
    def _one_way_to_choose(self) -> Self:
        if sum([self.experts is not None, self.ratio is not None, bool(self.groups)]) != 1:
            raise ValueError("give exactly one of experts, ratio and groups")
        flat = [each for group in self.groups for each in group]
        if any(len(group) < 2 for group in self.groups):
            raise ValueError("a group has at least two experts")
        if len(set(flat)) != len(flat) or min(flat, default=0) < 0:
            raise ValueError("an expert can be in one group only, and numbers are from 0")
        return self

    @property
    def needs_data(self) -> bool:
        """Whether deciding reads the calibration split."""
        by_scores = not self.groups and self.similarity == "router_logits"
        return self.weighting != "uniform" or self.align == "activations" or by_scores


class Group(BaseModel):
    """Experts that become one.

    Attributes:
        experts: Their numbers, the one that others are matched to first.
        shares: What each counts in the mean; they sum to 1.
        distance: The largest relative distance of a matched expert's weights to the first one's;
            0 means that merging changes nothing. None while it is not known.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    experts: tuple[int, ...]
    shares: tuple[float, ...]
    distance: float | None = None


class Merged(BaseModel):
    """A mixture whose experts are merged.

    Attributes:
        path: Of the experts.
        before: How many there were.
        groups: What becomes one, in the order of the new numbers.
        usage: The part of all choices that each expert had; empty where it was not counted.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    path: str
    before: int
    groups: tuple[Group, ...]
    usage: tuple[float, ...] = ()


class MergeExpertsDecision(Decision):
    """The groups of each mixture; `arrays` hold which hidden unit is matched to which."""

    mixtures: tuple[Merged, ...] = ()
    lifted: tuple[Lifted, ...] = ()
    declined: tuple[Declined, ...] = ()

    def summary(self) -> tuple[str, ...]:
        """Return the groups of each mixture, those of one expert left out."""
        lines = [f"lifted first: {each.path}" for each in self.lifted]
        for each in self.mixtures:
            line = f"{each.path}: {each.before} experts become {len(each.groups)}"
            groups = [group.experts for group in each.groups if len(group.experts) > 1]
            if groups and not self.pending:
                line += ": " + "; ".join(" + ".join(map(str, group)) for group in groups)
            lines.append(line)
        return tuple(lines)

    def figures(self) -> tuple[Heatmap, ...]:
        """Return how much each expert was used."""
        used = [each for each in self.mixtures if each.usage]
        if not used:
            return ()
        most = max(each.before for each in used)
        return (
            Heatmap(
                title="Use of experts",
                note="part of all choices of a token's experts on calibration data",
                columns=tuple(map(str, range(most))),
                rows=tuple(each.path for each in used),
                values=tuple((*each.usage, *[None] * (most - each.before)) for each in used),
            ),
        )


class MergeExperts(Pass[MergeExpertsOptions, MergeExpertsDecision]):
    """Replace groups of experts by their weighted means.

    E = Σ α_e · P_e(E_e) / Σ α_e, where α is how often an expert is chosen and P a permutation of
    its hidden units, which changes nothing that it computes (Li et al., 2023, "Merge, then
    compress" (M-SMoE), arXiv:2310.01334, section 3.2). P maximises the agreement with the group's
    most used expert: the sum of the products of their weights (Ainsworth et al., 2022,
    arXiv:2209.04836, section 3), or the correlation of their hidden values.

    The most used experts lead the groups, and every other joins the leader that is most alike.
    Where nothing is counted, groups are those of average linkage.

    The router stays as it is, with all its rows. Its choices are looked up in a map, `*_map`, from
    old numbers to new; where a token chose two experts of a group their weights add up. So experts
    that are equal, but for the order of their hidden units, are merged without loss. Mixtures that
    are no `fxcompress.nn.Experts` are lifted first, as by `moe.lift`.

    Preserves: approximate. Needs a `calibration` split, unless groups are given or made by weights,
    and nothing is counted.
    """

    Options: ClassVar[type[MergeExpertsOptions]] = MergeExpertsOptions
    Decision: ClassVar[type[Decision]] = MergeExpertsDecision
    preserves: ClassVar[Preserves] = "approximate"

    def reads(self, options: MergeExpertsOptions) -> frozenset[str]:
        """Return `calibration`, if the options need it."""
        return frozenset({"calibration"}) if options.needs_data else frozenset()

    def decide(
        self, program: Program, options: MergeExpertsOptions, context: Context
    ) -> MergeExpertsDecision:
        """Return the groups.

        Raises:
            SelectorError: There are no experts, or the selection fits none.
            UsageError: There are fewer experts than are to be left, or a group names one that is
                not there.
            DataError: The calibration split is missing or too small.
            NumericsError: Weights hold a NaN or an infinity.
            MissingExtraError: SciPy is not installed.
        """
        from passes.moe._merge.decide import decide

        return decide(program, options, context)

    def rewrite(self, rewriter: GraphRewriter, decision: MergeExpertsDecision) -> None:
        """Put the means in place, and the map between router and experts."""
        from passes.moe._lift.decide import lift
        from passes.moe._merge.insert import insert

        lift(rewriter, decision.lifted)
        insert(rewriter, decision)

    def ensures(self, before: Program, after: Program, decision: MergeExpertsDecision) -> None:
        """Check that mixtures have as many experts as groups, and a map to them."""
        from passes.moe._merge.insert import check_merged

        check_merged(after, decision)
