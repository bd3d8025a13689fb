"""Make the student of a decision, and check it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fxcompress.errors import PassError
from passes.depth._share import check_shared, share
from passes.depth.skip_blocks import SkipBlocks, SkipBlocksDecision
from passes.distill._student.other import put_in_place
from passes.prune._channels.shrink import apply
from passes.prune.channels import ChannelsDecision

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.rewrite import GraphRewriter
    from passes.distill.student import StudentDecision

__all__ = ["check", "rewrite"]


def rewrite(rewriter: GraphRewriter, decision: StudentDecision) -> None:
    """Narrow, skip and share, or replace the whole graph."""
    if decision.document is not None:
        put_in_place(rewriter, decision)
        return
    if decision.channels is not None:
        # First, because axes are those of the Program that the rewriter was given.
        narrowed = ChannelsDecision.model_validate(decision.channels, strict=False)
        apply(rewriter, narrowed.model_copy(update={"arrays": decision.arrays, "declined": ()}))
        rewriter.propagate()
    if decision.skip is not None:
        skipping = SkipBlocksDecision.model_validate(decision.skip, strict=False)
        SkipBlocks().rewrite(rewriter, skipping.model_copy(update={"declined": ()}))
    share(rewriter, decision.groups, decision.shared)


def check(before: Program, after: Program, decision: StudentDecision) -> None:
    """Check the number of parameters, and that only kept blocks compute something.

    Raises:
        PassError: They are not as decided.
    """
    count = sum(parameter.numel() for parameter in after.module.parameters())
    if count != decision.after:
        raise PassError(
            f"the student has {count:,} parameters", reason=f"it should have {decision.after:,}"
        )
    if decision.skip is not None and decision.channels is None:
        from passes.depth._blocks import check_skipped

        skipping = SkipBlocksDecision.model_validate(decision.skip, strict=False)
        check_skipped(before, after, skipping.blocks)
    check_shared(after, decision.groups)
