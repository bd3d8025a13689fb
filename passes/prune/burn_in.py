"""Burn masks in: zeros in the weights themselves, and no masks in the graph."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import BaseModel, ConfigDict

from fxcompress.pipeline.base import Decision, Options, Pass, Preserves

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from fxcompress.rewrite import GraphRewriter

__all__ = ["BurnIn"]


class NoOptions(Options):
    """`prune.burn_in` takes no options."""


class BurnedMask(BaseModel):
    """One mask: its path, the tensor that it masks, and how many zeros it holds there.

    `zeros` is None where the mask has no values (on the meta device).
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    path: str
    tensor: str
    zeros: int | None
    entries: int


class BurnInDecision(Decision):
    """The masks to burn in."""

    masks: tuple[BurnedMask, ...] = ()


class BurnIn(Pass[NoOptions, BurnInDecision]):
    """Write the zeros of every mask into its weight and take the masks out of the graph.

    It comes after the training that `mode: keep` of `prune.unstructured` and `prune.n_m` is for.
    A layer whose weight was an operand only because of its mask is a stock layer again. Outputs
    are the same bits.

    Preserves: exact.
    """

    Options: ClassVar[type[Options]] = NoOptions
    Decision: ClassVar[type[Decision]] = BurnInDecision
    preserves: ClassVar[Preserves] = "exact"

    def decide(self, program: Program, options: NoOptions, context: Context) -> BurnInDecision:
        """Return every mask of the graph."""
        from fxcompress.rewrite import masked_tensors

        state = program.state()
        found = []
        for path, tensor in masked_tensors(program).items():
            mask = state[f"{path}.mask"]
            zeros = None if mask.is_meta else int((~mask).sum())
            found.append(BurnedMask(path=path, tensor=tensor, zeros=zeros, entries=mask.numel()))
        return BurnInDecision(masks=tuple(found))

    def rewrite(self, rewriter: GraphRewriter, decision: BurnInDecision) -> None:
        """Burn them in."""
        from fxcompress.rewrite import burn_masks

        burn_masks(rewriter, [mask.path for mask in decision.masks])

    def ensures(self, before: Program, after: Program, decision: BurnInDecision) -> None:
        """Check that no mask is left and that its zeros are in the weights.

        Raises:
            PassError: A mask is left, or a weight is not zero where it was masked.
        """
        from fxcompress.errors import PassError
        from fxcompress.rewrite import masked_tensors

        old, new, left = before.state(), after.state(), masked_tensors(after)
        for mask in decision.masks:
            tensor = new[mask.tensor].detach()
            dense = not tensor.is_meta and bool(tensor[~old[f"{mask.path}.mask"]].any())
            if mask.path in left or dense:
                raise PassError(
                    f"the mask {mask.path} was not burned into {mask.tensor}", where=mask.path
                )
