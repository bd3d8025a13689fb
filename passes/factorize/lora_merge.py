"""Write low-rank adapters into the weights that they adapt, and take them out of the graph."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from fxcompress.pipeline.base import Decision, Pass, Preserves, Selection

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from fxcompress.rewrite import GraphRewriter

__all__ = ["LoraMerge"]


class LoraMergeOptions(Selection):
    """Options of `factorize.lora_merge`. The selection is over adapted layers, by their paths."""

    thaw: bool = Field(
        default=True,
        description="Let what `factorize.lora` froze train again, once no adapter is left.",
    )


class Merged(BaseModel):
    """One adapter: its path, its layer, the weight it goes into, and whether that was tied."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    path: str
    layer: str
    weight: str
    tied: tuple[str, ...] = ()


class LoraMergeDecision(Decision):
    """The adapters to merge, and the parameters that train again."""

    adapters: tuple[Merged, ...] = ()
    thaw: tuple[str, ...] = ()

    def summary(self) -> tuple[str, ...]:
        """Return what is untied and how much trains again."""
        lines = [
            f"{each.weight} is no longer tied to {', '.join(each.tied)}, which it was adapted apart"
            " from"
            for each in self.adapters
            if each.tied
        ]
        thawed = f"{len(self.thaw)} parameters train again" if self.thaw else ""
        return (*lines, thawed) if thawed else tuple(lines)


class LoraMerge(Pass[LoraMergeOptions, LoraMergeDecision]):
    """Replace each weight W by W + s·B·A, and remove A and B.

    With a magnitude m: by m · (W + s·B·A) / ‖W + s·B·A‖ per output. The graph is then the one
    before `factorize.lora`. A weight that was tied gets a tensor of its own, since what it shared
    was not adapted. What was frozen trains again, unless it was frozen in the original.

    Preserves: exact.
    """

    Options: ClassVar[type[LoraMergeOptions]] = LoraMergeOptions
    Decision: ClassVar[type[Decision]] = LoraMergeDecision
    preserves: ClassVar[Preserves] = "exact"

    def decide(
        self, program: Program, options: LoraMergeOptions, context: Context
    ) -> LoraMergeDecision:
        """Return the adapters.

        Raises:
            SelectorError: There is none, or a pattern fits none.
            PassError: What stands around one is not its form any more.
        """
        from passes.factorize._lora.merge import decide

        return decide(program, options, context)

    def rewrite(self, rewriter: GraphRewriter, decision: LoraMergeDecision) -> None:
        """Set the merged weights and remove the adapters' nodes."""
        from fxcompress.rewrite import merge_adapters

        merge_adapters(rewriter, [each.path for each in decision.adapters])
        for name in decision.thaw:
            rewriter.set_trainable(name, trainable=True)

    def ensures(self, before: Program, after: Program, decision: LoraMergeDecision) -> None:
        """Check that nothing of a merged adapter is left.

        Raises:
            PassError: Something is.
        """
        from passes.factorize._lora.merge import check_merged

        check_merged(after, decision)
