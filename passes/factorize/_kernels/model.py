"""What the passes on kernels decide, as plain data. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from fxcompress.pipeline.base import Decision
from fxcompress.rewrite.edits import Declined

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.rewrite import GraphRewriter

__all__ = ["KernelDecision", "KernelEntry", "Part", "ensures_chains", "rewrite_chains"]


class Part(BaseModel):
    """One convolution of a chain; its weight is `arrays["<entry's path>.<name>.weight"]`.

    `padding` is a number per spatial dimension, or `same` or `valid`.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: str
    inputs: int
    outputs: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int = 1
    padding_mode: str = "zeros"

    @property
    def parameters(self) -> int:
        """Elements of its weight."""
        count = self.outputs * (self.inputs // self.groups)
        for size in self.kernel:
            count *= size
        return count


class KernelEntry(BaseModel):
    """One convolution: what it is, the ranks it gets, and what it becomes.

    Attributes:
        path: Where its parts go: below it.
        layer: The path of the layer.
        weight: The name of its weight.
        bias: The name of its bias, which goes to the last part; None without one.
        nodes: Its calls.
        full: The ranks from which on outputs are equal.
        ranks: The ranks that it gets; None where it stays as it is.
        error: The part of the energy of its weights, or of its outputs where data was read, that
            is lost; None while planning.
        loss: What the model loses by it where a budget measured that; else None.
        parameters: Elements of its weights, before and after.
        parts: The convolutions in its place.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    path: str
    layer: str
    weight: str
    bias: str | None
    nodes: tuple[str, ...]
    full: tuple[int, ...]
    ranks: tuple[int, ...] | None = None
    error: float | None = None
    loss: float | None = None
    parameters: tuple[int, int]
    parts: tuple[Part, ...] = ()


class KernelDecision(Decision):
    """Every convolution's ranks, with the weights of the parts in `arrays`, and what stays whole.

    Attributes:
        layers: The convolutions that were looked at.
        declined: Those that stay as they are, and why.
    """

    layers: tuple[KernelEntry, ...] = ()
    declined: tuple[Declined, ...] = ()

    def summary(self) -> tuple[str, ...]:
        """Return how many convolutions become chains and what that saves."""
        chosen = [each for each in self.layers if each.ranks is not None]
        before = sum(each.parameters[0] for each in chosen)
        after = sum(each.parameters[1] for each in chosen)
        return (
            f"{len(chosen)} of {len(self.layers)} convolutions become chains of thinner ones: "
            f"{before:,} parameters become {after:,}",
        )


def rewrite_chains(rewriter: GraphRewriter, decision: KernelDecision) -> None:
    """Put the parts in the place of each convolution that has ranks."""
    from passes.factorize._kernels.insert import insert

    insert(rewriter, decision)


def ensures_chains(after: Program, decision: KernelDecision) -> None:
    """Check that every part is there, and that no replaced weight is.

    Raises:
        PassError: One is not, or is.
    """
    from passes.factorize._kernels.insert import check_inserted

    check_inserted(after, decision)
