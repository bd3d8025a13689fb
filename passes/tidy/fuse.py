"""Fuse what belongs together: branches, projections, chains, constants, repetitions."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fxcompress.pipeline.base import Decision, Options, Pass, Preserves, Selection
from fxcompress.rewrite.edits import Declined

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from fxcompress.rewrite import GraphRewriter

__all__ = ["Fuse"]

RuleName = Literal[
    "identities",
    "dead_branches",
    "batch_norm",
    "branches",
    "products",
    "linears",
    "projections",
    "split",
    "constants",
    "common",
]


class FuseOptions(Selection):
    """Options of `tidy.fuse`. The selection is over the nodes that a rule starts from."""

    rules: tuple[RuleName, ...] = Field(
        default=(
            "identities",
            "dead_branches",
            "batch_norm",
            "branches",
            "products",
            "linears",
            "projections",
            "constants",
            "common",
        ),
        description="What to fuse; `split` is the inverse of `projections`.",
    )
    parameters: bool = Field(
        default=False,
        description="Take trainable parameters as constants, for a model that is trained no more.",
    )
    constant_size: int = Field(
        default=65_536, ge=1, description="The most numbers that a folded constant may have."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.rules:
            raise ValueError("rules is empty: name at least one")
        if len(set(self.rules)) != len(self.rules):
            raise ValueError("a rule is named twice")
        if {"projections", "split"} <= set(self.rules):
            raise ValueError("`projections` and `split` undo one another: take one of them out")
        return self


class Fusion(BaseModel):
    """One application of a rule: the node it starts from, and the other nodes that it takes.

    `how` is what the rule must know again: for `batch_norm` the neighbour that takes it.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    rule: RuleName
    node: str
    others: tuple[str, ...] = ()
    how: str = ""


class FuseDecision(Decision):
    """The fusions in the order in which they are made, and why others are not."""

    fusions: tuple[Fusion, ...] = ()
    declined: tuple[Declined, ...] = ()
    parameters: bool = False
    constant_size: int = 65_536

    def summary(self) -> tuple[str, ...]:
        """Return how often each rule applies."""
        counts = Counter(each.rule for each in self.fusions)
        return tuple(f"{rule}: {count}" for rule, count in counts.items())


class Fuse(Pass[FuseOptions, FuseDecision]):
    """Replace what can be computed with less by what computes the same.

    - `identities`: dropout with p = 0, x + 0, x · 1, casts to the same type, slices of everything,
      reshapes to the same shape or of reshapes, two transposes that undo one another.
    - `dead_branches`: x + 0 · f(x) becomes x. Holds where f is finite.
    - `batch_norm`: as `tidy.fold_batchnorm`.
    - `branches`: a sum of convolutions, batch norms and the identity, all of one input, becomes one
      convolution: smaller kernels are padded to the largest, the identity is a 1 in its middle
      (Ding et al., 2021, "RepVGG", arXiv:2101.03697, section 3.3).
    - `products`: `addmm` with a transposed weight becomes a linear layer.
    - `linears`: B(A x + a) + b becomes (B A) x + (B a + b), where that costs less.
    - `projections`: linear layers of one module that read one input become one, and a split.
    - `split`: the inverse, for a layer whose output is only ever cut into parts.
    - `constants`: what depends on no input is computed now, up to `constant_size` numbers.
    - `common`: what is computed twice from the same operands is computed once.

    Weights are combined in float64 and rounded once. The rules are applied again until none fits.

    Preserves: exact (in eval mode; `batch_norm` and `branches` end batch statistics of training).
    """

    Options: ClassVar[type[Options]] = FuseOptions
    Decision: ClassVar[type[Decision]] = FuseDecision
    preserves: ClassVar[Preserves] = "exact"

    def decide(self, program: Program, options: FuseOptions, context: Context) -> FuseDecision:
        """Return the fusions, found by making them on a copy.

        Raises:
            SelectorError: The selection fits no node, or not as many as expected.
        """
        from passes.tidy._fuse.engine import find_fusions

        return find_fusions(program, options)

    def rewrite(self, rewriter: GraphRewriter, decision: FuseDecision) -> None:
        """Make the fusions.

        Raises:
            PassError: One does not fit the Program: it was decided for another.
        """
        from passes.tidy._fuse.engine import make_fusions

        for declined in decision.declined:
            rewriter.decline(declined.node, declined.reason, declined.because_of)
        make_fusions(rewriter, decision)
