"""Make mixtures of experts dense again: one feed-forward layer each, without a router."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from fxcompress.pipeline.base import Decision, Pass, Preserves
from fxcompress.rewrite.edits import Declined
from passes.moe.lift import Lifted
from passes.moe.merge_experts import Merging

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from fxcompress.rewrite import GraphRewriter

__all__ = ["ToDense"]


class ToDenseOptions(Merging):
    """Options of `moe.to_dense`. The selection is over mixtures."""

    how: Literal["merge", "concat"] = Field(
        default="merge",
        description="One layer of an expert's width, the mean of all; or one of all their widths "
        "together, each expert times its mean weight.",
    )

    @property
    def needs_data(self) -> bool:
        """Whether deciding reads the calibration split."""
        return self.weighting != "uniform" or (self.how == "merge" and self.align == "activations")


class Densified(BaseModel):
    """A mixture that becomes one layer.

    Attributes:
        path: Of the experts.
        dense: Where the layer goes.
        experts: The experts that it is made of; those that no token chose are left out of `concat`.
        factors: What each is multiplied by.
        hidden: The width of the layer's hidden values.
        before: The parameters of all experts.
        after: Those of the layer.
        error: 0 where nothing is lost on calibration data: the largest relative distance of an
            expert to the mean's first, or for `concat` by how much an expert's weight varies; None
            where it is not known.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    path: str
    dense: str
    experts: tuple[int, ...]
    factors: tuple[float, ...]
    hidden: int
    before: int
    after: int
    error: float | None = None


class ToDenseDecision(Decision):
    """The layers; `arrays` hold which hidden unit of each expert stands in which place."""

    how: Literal["merge", "concat"] = "merge"
    layers: tuple[Densified, ...] = ()
    lifted: tuple[Lifted, ...] = ()
    declined: tuple[Declined, ...] = ()

    def summary(self) -> tuple[str, ...]:
        """Return what each mixture becomes, and whether that loses something."""
        lines = [f"lifted first: {each.path}" for each in self.lifted]
        for each in self.layers:
            line = (
                f"{each.path}: {len(each.experts)} experts become one layer of {each.hidden} "
                f"hidden values, {each.before:,} parameters {each.after:,}"
            )
            if each.error is not None and self.how == "merge":
                equal = each.error < _EQUAL
                line += "; they are equal" if equal else f"; they differ by {each.error:.0%}"
            elif each.error is not None:
                equal = each.error < _EQUAL
                line += "; weights are constant" if equal else f"; weights vary by {each.error:.2g}"
            lines.append(line)
        return tuple(lines)


_EQUAL = 1e-5


class ToDense(Pass[ToDenseOptions, ToDenseDecision]):
    """Replace y = Σ_k w_k · E_{i_k}(x) by one feed-forward layer, and drop the router.

    - `how: merge`: the mean of all experts, weighted by use, hidden units matched first as in
      `moe.merge_experts`, times the mean sum of a token's weights. The layer is as wide as an
      expert. Nothing is lost where experts are equal and weights sum to a constant.
    - `how: concat`: Σ_e m_e · E_e(x) with m_e the mean weight of expert e over all tokens, 0 where
      it is not chosen: all hidden units side by side, the last matrices scaled. The layer is as
      wide as all experts together. Nothing is lost where weights are constants, which is where a
      router says the same to every token.

    The decision says for each mixture how far it is from that. Without data (`weighting: uniform`)
    every expert counts the same, and weights must sum to 1 by the graph. Mixtures that are no
    `fxcompress.nn.Experts` are lifted first, as by `moe.lift`.

    Preserves: approximate. Needs a `calibration` split, unless nothing is counted.
    """

    Options: ClassVar[type[ToDenseOptions]] = ToDenseOptions
    Decision: ClassVar[type[Decision]] = ToDenseDecision
    preserves: ClassVar[Preserves] = "approximate"

    def reads(self, options: ToDenseOptions) -> frozenset[str]:
        """Return `calibration`, if the options need it."""
        return frozenset({"calibration"}) if options.needs_data else frozenset()

    def decide(
        self, program: Program, options: ToDenseOptions, context: Context
    ) -> ToDenseDecision:
        """Return the layers.

        Raises:
            SelectorError: There are no experts, or the selection fits none.
            UsageError: Nothing is counted, and weights do not sum to 1.
            DataError: The calibration split is missing or too small.
            NumericsError: Weights hold a NaN or an infinity.
            MissingExtraError: SciPy is not installed.
        """
        from passes.moe._merge.dense import decide

        return decide(program, options, context)

    def rewrite(self, rewriter: GraphRewriter, decision: ToDenseDecision) -> None:
        """Put the layers in place."""
        from passes.moe._merge.dense import insert

        insert(rewriter, decision)

    def ensures(self, before: Program, after: Program, decision: ToDenseDecision) -> None:
        """Check that none of the experts is left."""
        from passes.moe._merge.dense import check_dense

        check_dense(after, decision)
