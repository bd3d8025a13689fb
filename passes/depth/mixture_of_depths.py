"""Let only some tokens go through a block: a router chooses, and the others pass it by."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fxcompress.pipeline.base import Decision, Options, Pass, Preserves
from fxcompress.rewrite.edits import Declined

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from fxcompress.rewrite import GraphRewriter

__all__ = ["MixtureOfDepths"]


class MixtureOfDepthsOptions(Options):
    """Options of `depth.mixture_of_depths`."""

    blocks: tuple[str, ...] = Field(
        default=(),
        description="Globs over module paths of blocks; by default, the repeated residual modules.",
    )
    layers: tuple[int, ...] = Field(
        default=(),
        description="Which blocks are routed, by their place in the model, from 0; by default "
        "every second one, the second first.",
    )
    capacity: float = Field(
        gt=0, le=1, description="Share of the tokens that go through a routed block."
    )
    start: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="The capacity at the start of a training, from where it falls in a line.",
    )
    until: float = Field(
        default=0.5, gt=0, le=1, description="Share of the training after which it has fallen."
    )
    inference: Literal["auto", "top_k", "predictor"] = Field(
        default="auto",
        description="How tokens are chosen in evaluation: the same way as in training, or for "
        "causal models by a predictor that sees no later tokens; `auto` looks at the masks.",
    )
    init: Literal["influence", "random"] = Field(
        default="random",
        description="How routers start: by chance, or fitted to how far the block moves each "
        "token on calibration data.",
    )
    calibration: int = Field(default=64, ge=1, description="Samples of the calibration split.")

    @model_validator(mode="after")
    def _falls(self) -> Self:
        if self.start is not None and self.start < self.capacity:
            raise ValueError("start is at least the capacity")
        if len(set(self.layers)) != len(self.layers) or min(self.layers, default=0) < 0:
            raise ValueError("layers must be different numbers from 0")
        return self


class Routed(BaseModel):
    """A routed block.

    Attributes:
        index: Its place among the blocks.
        path: Its module.
        entry: The state that it reads.
        exit: The state that it makes.
        gathered: What of its operands is gathered along with the tokens: pairs of the node that
            reads and the node that is read.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    index: int
    path: str
    entry: str
    exit: str
    gathered: tuple[tuple[str, str], ...] = ()


class MixtureOfDepthsDecision(Decision):
    """The routed blocks, and how their tokens are chosen. Routers that were fitted are `arrays`."""

    blocks: tuple[Routed, ...] = ()
    capacity: float = 1.0
    causal: bool = False
    start: float | None = None
    until: float = 0.5
    seed: int = 0
    declined: tuple[Declined, ...] = ()

    def summary(self) -> tuple[str, ...]:
        """Return which blocks are routed, and how."""
        how = "a predictor" if self.causal else "the router"
        return (
            f"{self.capacity:.1%} of the tokens go through "
            f"{', '.join(each.path for each in self.blocks)}; in evaluation {how} chooses",
        )


class MixtureOfDepths(Pass[MixtureOfDepthsOptions, MixtureOfDepthsDecision]):
    """Route tokens around blocks (Raposo et al., 2024, arXiv:2404.02258).

    A router, one linear layer, scores the tokens x_i of a sequence, s_i = wᵀx_i. The k =
    ⌈capacity · tokens⌉ largest go through the block, which sees these alone: masks and positions
    are gathered with them. The others stay as they are. Where the paper multiplies what the block
    adds by s_i (equation 1), here s_i has the gradient of such a factor and the value 1: so a model
    that is there already stays what it is where its tokens go through, and at capacity 1 equals
    itself bit for bit.

    A choice of the largest is not causal. In a causal model a second linear layer therefore learns
    to predict it (`use: routing` in the losses: binary cross entropy, section 3.5); in evaluation
    it chooses, from the first token on, until k have been chosen; the last tokens fill up what is
    left.

    Refused, with what differs: blocks whose state is no `[batch, tokens, width]`, that are not
    residual, of which others read more than the state, or that read per-token values in a way that
    cannot be gathered.

    Preserves: approximate; exact at capacity 1. `init: influence` needs a `calibration` split.
    """

    Options: ClassVar[type[MixtureOfDepthsOptions]] = MixtureOfDepthsOptions
    Decision: ClassVar[type[MixtureOfDepthsDecision]] = MixtureOfDepthsDecision
    preserves: ClassVar[Preserves] = "approximate"

    def promises(self, options: MixtureOfDepthsOptions) -> Preserves:
        """Return `exact` at capacity 1."""
        return "exact" if options.capacity == 1 else "approximate"

    def reads(self, options: MixtureOfDepthsOptions) -> frozenset[str]:
        """Return `calibration`, if routers are fitted."""
        return frozenset({"calibration"} if options.init == "influence" else ())

    def decide(
        self, program: Program, options: MixtureOfDepthsOptions, context: Context
    ) -> MixtureOfDepthsDecision:
        """Return the routed blocks.

        Raises:
            SelectorError: There are no blocks, or a glob fits none.
            UsageError: A listed block cannot be routed, or none can.
            DataError: The calibration split is missing or too small.
        """
        from passes.depth._routing.decide import decide_routed

        return decide_routed(program, options, context)

    def rewrite(self, rewriter: GraphRewriter, decision: MixtureOfDepthsDecision) -> None:
        """Insert routers, and let the blocks see the chosen tokens alone."""
        from passes.depth._routing.rewrite import insert_routers

        for declined in decision.declined:
            rewriter.decline(declined.node, declined.reason, declined.because_of)
        insert_routers(rewriter, decision)
