"""What a search for mixtures of experts returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from passes.moe._lift.feeds import Feed

__all__ = ["Found", "Refused", "Search", "Weighing"]


@dataclass(frozen=True)
class Weighing:
    """What chooses experts and weighs them.

    Attributes:
        indices: The experts' numbers `[…, k]`, or `[…]` where each token has one.
        weights: Of the same shape; with `spread` `[…, experts]`.
        spread: The weights have a number for every expert, 0 for those that are not chosen.
        kept: Ones `[…, k, experts]` or `[…, experts]` for choices that count, zeros for choices
            beyond an expert's capacity; None where all count.
        before: Weights multiply the tokens that experts read, not what they make.
    """

    indices: fx.Node
    weights: fx.Node
    spread: bool = False
    kept: fx.Node | None = None
    before: bool = False

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """All of its nodes."""
        own = (self.indices, self.weights)
        return own if self.kept is None else (*own, self.kept)


@dataclass(frozen=True)
class Found:
    """A mixture of experts in another spelling than the leaf.

    Attributes:
        feeds: One feed-forward layer for all experts, or one each, in their order.
        x: The tokens `[…, width]`.
        weighing: What chooses and weighs.
        output: The weighted sum.
        count: How many experts there are.
    """

    feeds: tuple[Feed, ...]
    x: fx.Node
    weighing: Weighing
    output: fx.Node
    count: int


@dataclass(frozen=True)
class Refused:
    """What looks like a mixture of experts and stays: a node, why, and what explains it."""

    node: fx.Node
    reason: str
    because_of: tuple[fx.Node, ...] = ()


@dataclass(frozen=True)
class Search:
    """What a Program holds: leaves, mixtures in another spelling, and what is refused."""

    leaves: tuple[fx.Node, ...] = ()
    found: tuple[Found, ...] = ()
    refused: tuple[Refused, ...] = ()
