"""Remove experts: listed ones, or those that matter least by a criterion."""

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

__all__ = ["PruneExperts"]


class PruneExpertsOptions(Selection):
    """Options of `moe.prune_experts`: one of `experts`, `count` and `ratio` is given."""

    experts: tuple[tuple[int, ...], ...] = Field(
        default=(),
        description="Which experts go: a list of numbers from 0 for each selected mixture, in "
        "graph order, or one list for all of them.",
    )
    count: int | None = Field(default=None, ge=1, description="How many experts of each go.")
    ratio: float | None = Field(
        default=None, gt=0, lt=1, description="Which part of the experts goes, rounded down."
    )
    scope: Literal["layer", "global"] = Field(
        default="layer",
        description="Whether each mixture loses as many, or those go whose share in the scores of "
        "their own mixture is least.",
    )
    criterion: Literal["reap", "frequency", "mass", "metric", "random"] = Field(
        default="reap",
        description="What experts are ranked by: weight times norm of what they make, how often "
        "they are chosen, the sum of their weights, the metric without each, or chance.",
    )
    calibration: int = Field(default=64, ge=1, description="Samples of the calibration split.")

    @model_validator(mode="after")
    def _one_way_to_choose(self) -> Self:
        if sum([bool(self.experts), self.count is not None, self.ratio is not None]) != 1:
            raise ValueError("give exactly one of experts, count and ratio")
        for each in self.experts:
            if len(set(each)) != len(each) or min(each, default=0) < 0:
                raise ValueError("experts must be different numbers from 0")
        if self.scope == "global" and self.criterion == "metric":
            raise ValueError("the metric without an expert is no share: take `scope: layer`")
        return self

    @property
    def needs_data(self) -> bool:
        """Whether deciding reads the calibration split."""
        return not self.experts and self.criterion != "random"


class Pruned(BaseModel):
    """A mixture: which of its experts stay, and what the criterion says of all of them."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    path: str
    before: int
    kept: tuple[int, ...]
    scores: tuple[float, ...] = ()


class PruneExpertsDecision(Decision):
    """Every mixture with the experts that stay, what is lifted for it, and what is declined."""

    mixtures: tuple[Pruned, ...] = ()
    lifted: tuple[Lifted, ...] = ()
    declined: tuple[Declined, ...] = ()

    def summary(self) -> tuple[str, ...]:
        """Return which experts go."""
        lines = [f"lifted first: {each.path}" for each in self.lifted]
        for each in self.mixtures:
            gone = [str(e) for e in range(each.before) if e not in each.kept]
            if gone:
                lines.append(f"{each.path}: without {', '.join(gone)} of {each.before}")
        return tuple(lines)

    def figures(self) -> tuple[Heatmap, ...]:
        """Return the scores."""
        scored = [each for each in self.mixtures if each.scores]
        if not scored:
            return ()
        most = max(each.before for each in scored)
        return (
            Heatmap(
                title="Scores of experts",
                note="by the criterion; the least go",
                columns=tuple(map(str, range(most))),
                rows=tuple(each.path for each in scored),
                values=tuple((*each.scores, *[None] * (most - each.before)) for each in scored),
            ),
        )


class PruneExperts(Pass[PruneExpertsOptions, PruneExpertsDecision]):
    """Remove experts of mixtures, and what chooses them.

    Rows of the router go with their experts, and so do entries of its bias, of a correction bias
    and of whatever else counts experts. The result equals the model with the scores of what is gone
    at −∞, which is tried on the router before anything is cut.

    Criteria, of expert e over the calibration tokens that chose it, with weight g_e and output f_e;
    the least go:

    - `reap`: the mean of g_e · ‖f_e‖₂ (Lasby et al., 2025, "REAP the Experts",
      arXiv:2510.13999); 0 where no token chose it.
    - `frequency`: how often it was chosen.
    - `mass`: the sum of g_e.
    - `metric`: how much worse the spec's metric is without it alone.
    - `random`: chance, by the run's seed, to compare with.

    Padded tokens do not count where the model has an attention mask. A router that chooses groups
    first keeps groups of equal size: each loses as many. Mixtures in another spelling than
    `fxcompress.nn.Experts` are lifted first, as by `moe.lift`.

    Preserves: approximate. Without `experts` it needs a `calibration` split, unless by chance.
    """

    Options: ClassVar[type[PruneExpertsOptions]] = PruneExpertsOptions
    Decision: ClassVar[type[Decision]] = PruneExpertsDecision
    preserves: ClassVar[Preserves] = "approximate"

    def reads(self, options: PruneExpertsOptions) -> frozenset[str]:
        """Return `calibration`, if experts are ranked on data."""
        return frozenset({"calibration"}) if options.needs_data else frozenset()

    def decide(
        self, program: Program, options: PruneExpertsOptions, context: Context
    ) -> PruneExpertsDecision:
        """Return which experts stay.

        Raises:
            SelectorError: There are no experts, or the selection fits none.
            UsageError: An expert is not there, fewer are left than a token takes, or groups would
                differ.
            DataError: The calibration split is missing or too small, or there is no metric.
            NumericsError: A weight or an output holds a NaN or an infinity.
        """
        from passes.moe._prune.choose import choose

        return choose(program, options, context)

    def rewrite(self, rewriter: GraphRewriter, decision: PruneExpertsDecision) -> None:
        """Cut experts and routers."""
        from passes.moe._lift.decide import lift
        from passes.moe._prune.cut import cut

        for declined in decision.declined:
            rewriter.decline(declined.node, declined.reason, declined.because_of)
        lift(rewriter, decision.lifted)
        cut(rewriter, decision.mixtures)

    def ensures(self, before: Program, after: Program, decision: PruneExpertsDecision) -> None:
        """Check that each mixture has the experts that stay."""
        from passes.moe._prune.cut import check_cut

        check_cut(after, decision.mixtures)
