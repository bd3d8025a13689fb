"""Tap: a named place of a graph whose value a loss reads while the model is trained.

    x = layer1(…)        tap = taps.hidden(x)        y = layer2(x)

A tap is a side node: it reads a value and nothing reads it. What renames, prunes, folds or skips
its operand carries the tap along, because it is one of the operand's readers. No emitted format
has taps.
"""

from typing import ClassVar, Literal

from torch import Tensor, nn

__all__ = ["Tap"]


class Tap(nn.Module):
    """Return the operand itself, under a name.

    Args:
        name: What losses and reports call it.
        at: The module path or node id where it was put; a graph may have renamed it since.
        what: Which value of that place it reads.
        teacher: The place in the teacher to compare with; None where there is none.
        opened: Whether a fused attention was written out for it, to be closed when it is gone.
    """

    # The result has its operand's type: propagation over fake tensors need not run anything.
    keeps_type: ClassVar[bool] = True
    # A graph keeps the node although nothing reads it; torch.fx's own clean-up reads this name.
    _is_impure: ClassVar[bool] = True

    def __init__(
        self,
        name: str,
        at: str = "",
        what: Literal["output", "input", "attention", "query", "key", "value"] = "output",
        teacher: str | None = None,
        opened: bool = False,
    ) -> None:
        super().__init__()
        self.name, self.at, self.what, self.teacher = name, at, what, teacher
        self.opened = opened

    def forward(self, x: Tensor) -> Tensor:
        """Return `x`, the same object."""
        return x

    def extra_repr(self) -> str:
        """Return the arguments."""
        return f"{self.name!r}, at={self.at!r}, what={self.what!r}, teacher={self.teacher!r}"
