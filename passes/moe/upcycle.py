"""Turn dense feed-forward layers into mixtures of experts that start as copies of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fxcompress.pipeline.base import Decision, Options, Pass, Preserves, Selection
from fxcompress.rewrite.edits import Declined

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from fxcompress.rewrite import GraphRewriter

__all__ = ["Upcycle"]


class Recipe(Options):
    """What every upcycled layer becomes."""

    experts: int = Field(ge=2, description="How many experts a layer gets.")
    top_k: int = Field(ge=1, description="How many of them a token takes.")
    slices: int = Field(
        default=1,
        ge=1,
        description="Into how many slices of hidden width a layer is cut; an expert is a copy of "
        "one of them.",
    )
    shared: int = Field(
        default=0, ge=0, description="Slices that every token takes, without a router."
    )
    weights: Literal["renormalized", "straight_through", "softmax"] = Field(
        default="renormalized",
        description="What the chosen experts are multiplied by: their probabilities made to sum "
        "to 1; 1 / top_k with the gradient of the probabilities' logarithms; or the "
        "probabilities as they are, their mean made up for.",
    )
    capacity: float | None = Field(
        default=None,
        gt=0,
        description="An expert takes at most this times tokens · top_k / experts of the tokens of "
        "a sequence, the first ones; the others pass it by. Without it, all.",
    )
    router: Literal["random", "zero"] = Field(
        default="random", description="How routers start: at random, or indifferent."
    )
    router_std: float = Field(
        default=0.02, gt=0, description="Standard deviation of a random router's weights."
    )
    noise: float = Field(
        default=0.0,
        ge=0,
        description="Gaussian noise on each expert's matrices, in standard deviations of theirs.",
    )
    reinitialize: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Which part of each expert's hidden units starts anew, at random.",
    )

    @model_validator(mode="after")
    def _whole_copies(self) -> Self:
        if self.shared and self.shared >= self.slices:
            raise ValueError(
                f"{self.shared} of {self.slices} slices are shared, which leaves none to experts: "
                "cut more `slices`"
            )
        routed = self.routed
        if self.top_k > self.experts:
            raise ValueError(f"top_k {self.top_k} is above the number of experts {self.experts}")
        for name in ("experts", "top_k"):
            if getattr(self, name) % routed:
                raise ValueError(
                    f"{name} is {getattr(self, name)}, which is no multiple of the {routed} slices "
                    "that are routed: a token takes each slice equally often"
                )
        if self.router == "zero" and not self.diverse and self.experts > routed:
            raise ValueError(
                "experts that start equal under a router of zeros stay equal: all get the same "
                "gradients; use `router: random`, or give `noise` or `reinitialize`"
            )
        return self

    @property
    def routed(self) -> int:
        """Slices that experts are copies of."""
        return self.slices - self.shared

    @property
    def copies(self) -> int:
        """Experts that are copies of one slice."""
        return self.experts // self.routed

    @property
    def diverse(self) -> bool:
        """Whether copies differ at the start."""
        return self.noise > 0 or self.reinitialize > 0

    @property
    def exact(self) -> bool:
        """Whether the model computes the same at the start, up to rounding."""
        return not self.diverse and self.capacity is None and self.weights != "softmax"


class UpcycleOptions(Selection, Recipe):
    """Options of `moe.upcycle`. The selection is over the last matrices of feed-forward layers."""

    layers: tuple[int, ...] | None = Field(
        default=None, description="Which feed-forward layers, by their place in the model, from 0."
    )

    @model_validator(mode="after")
    def _places(self) -> Self:
        if self.layers is not None and (
            not self.layers or len(set(self.layers)) != len(self.layers) or min(self.layers) < 0
        ):
            raise ValueError("layers must be different numbers from 0, at least one")
        return self


class Upcycled(BaseModel):
    """A layer that becomes experts.

    Attributes:
        index: Its place among the feed-forward layers of the model.
        path: The module that holds it.
        nodes: The ids of the nodes that multiply by its last matrix, one for each call.
        hidden: Its hidden width.
        activation: Of the hidden values.
        gated: Whether it has a gate.
        dropout: How likely each hidden value is dropped while training, in experts too.
        parameters: Before and after.
        active: Parameters that a token meets, after.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    index: int
    path: str
    nodes: tuple[str, ...]
    hidden: int
    activation: str
    gated: bool
    dropout: float = 0.0
    parameters: tuple[int, int]
    active: int


class UpcycleDecision(Decision):
    """The layers, what they become, and the seed of all that is drawn."""

    recipe: Recipe
    layers: tuple[Upcycled, ...] = ()
    seed: int = 0
    declined: tuple[Declined, ...] = ()

    def summary(self) -> tuple[str, ...]:
        """Return what the layers become, and what that means for their training."""
        recipe, count = self.recipe, len(self.layers)
        before, after = (sum(each.parameters[i] for each in self.layers) for i in (0, 1))
        active = sum(each.active for each in self.layers)
        plural = "s" if count != 1 else ""
        lines = [
            f"{count} feed-forward layer{plural} with {recipe.experts} experts, {recipe.top_k} a "
            f"token: {before:,} parameters become {after:,}, {active:,} of them active a token"
        ]
        if recipe.top_k == 1 and recipe.weights == "renormalized":
            lines.append(
                "one renormalised weight is always 1: routers learn from `load_balance` and "
                "`router_z` alone; `weights: straight_through` also gives them the model's loss"
            )
        if recipe.experts > recipe.top_k and not recipe.diverse and recipe.copies > 1:
            lines.append("experts start equal; a random router sends them different tokens")
        return tuple(lines)


class Upcycle(Pass[UpcycleOptions, UpcycleDecision]):
    """Replace feed-forward layers F(x) by y = Σ_k w_k · E_{i_k}(x) with copies E of F.

    A feed-forward layer is down(act(up x)) or down(act(gate x) · up x), whatever it is written in:
    it is found by what it computes. Its experts start as copies (Komatsuzaki et al., 2022, "Sparse
    upcycling", arXiv:2212.05055, section 2), its router p = softmax(R·x) at random; the top k of p
    choose the experts. With weights that sum to 1 a mixture of copies is F.

    - `weights: renormalized`: w = p / Σ p over the chosen ones. For k = 1 that is the number 1, so
      that the model's loss says nothing to the router.
    - `weights: straight_through`: w = p / (k · p'), p' being p as a constant: 1 / k in value, with
      the gradient of log p. For k = 1 this is the model's own function and a live router.
    - `weights: softmax`: w = p · experts / k, whose mean is 1 / k of an indifferent router. Not F
      at the start.

    With `slices` m a layer is cut along its hidden width, F = Σ F_s, and experts are copies of
    slices (He et al., 2024, "Upcycling large language models into mixture of experts",
    arXiv:2410.07524, section 3.3). All slices of one copy start with the same row of R, so that a
    token takes whole copies, and the last matrix is multiplied by the number of routed slices: the
    mixture is F again, with as many parameters active as F has where k = m. `shared` slices go to
    a layer of their own that every token takes.

    `noise` and `reinitialize` (Nakamura et al., 2025, "Drop-Upcycling", arXiv:2502.19261) make
    copies different. Equal experts under a router of zeros are refused: they would stay equal.

    Routers compute in float32 whatever the model does (Fedus et al., 2021, arXiv:2101.03961,
    section 2.4), so that rounding makes no ties.

    A tap `router_N` reads the logits of each router, for the losses `load_balance` and `router_z`.

    Preserves: exact; approximate with `noise`, `reinitialize`, `capacity` or `weights: softmax`.
    """

    Options: ClassVar[type[UpcycleOptions]] = UpcycleOptions
    Decision: ClassVar[type[Decision]] = UpcycleDecision
    preserves: ClassVar[Preserves] = "exact"

    def promises(self, options: UpcycleOptions) -> Preserves:
        """Return `exact` where copies are what they are copies of."""
        return "exact" if options.exact else "approximate"

    def decide(
        self, program: Program, options: UpcycleOptions, context: Context
    ) -> UpcycleDecision:
        """Return the layers.

        Raises:
            SelectorError: There is no feed-forward layer, or the selection fits none.
            UsageError: A place is above their number, a hidden width cannot be cut, or a capacity
                cannot be counted.
        """
        from passes.moe._upcycle.decide import decide

        return decide(program, options, context)

    def rewrite(self, rewriter: GraphRewriter, decision: UpcycleDecision) -> None:
        """Put routers and experts in the places of the layers."""
        from passes.moe._upcycle.insert import insert

        insert(rewriter, decision)

    def ensures(self, before: Program, after: Program, decision: UpcycleDecision) -> None:
        """Check that each layer has its experts and nothing else of it is left."""
        from passes.moe._upcycle.insert import check_inserted

        check_inserted(after, decision)
