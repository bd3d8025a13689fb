"""Products with all experts' matrices as one einsum: which letter is what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from torch import fx

from fxcompress.ir.ops import bind

__all__ = ["STACKED", "Layout", "parsed", "written"]

_FREE: Final = "abcdfghjklmnpqrstuvwxyz"


@dataclass(frozen=True)
class Layout:
    """Which dimension of tokens and of what is made of them is what.

    `E` are experts, `I` features that are read, `O` features that are made; other letters are rows.

    Attributes:
        x: Of the tokens; without `E` where all experts read the same ones.
        out: Of what the product makes.
    """

    x: str
    out: str

    def then(self, later: Layout) -> Layout | None:
        """Return the layout of this product and a later one together, elementwise ops between."""
        if len(later.x) != len(self.out):
            return None
        names = dict(zip(later.x, self.out.replace("O", "I"), strict=True))
        if names.get("I") != "I" or names.get("E") != "E":
            return None
        return Layout(self.x, "".join(names.get(letter, letter) for letter in later.out))


STACKED: Final = Layout("EaI", "EaO")


def parsed(node: fx.Node) -> tuple[fx.Node, fx.Node, Layout, bool] | None:
    """Return tokens, matrices, their layout and whether matrices are `[experts, in, out]`.

    None where an einsum is no product of tokens with one matrix for each expert, experts first.
    """
    bound = bind(node)
    equation, operands = bound.get("equation"), bound.get("operands", ())
    if not isinstance(equation, str) or len(operands) != 2 or "->" not in equation:
        return None
    for place in (1, 0):
        x, matrices = operands[1 - place], operands[place]
        if not isinstance(x, fx.Node) or not isinstance(matrices, fx.Node):
            return None
        sides = _sides(equation, operands)
        if sides is None:
            return None
        made = _layout(sides[1 - place], sides[place], sides[2])
        if made is not None:
            return x, matrices, *made
    return None


def _sides(equation: str, operands: tuple[fx.Node, ...]) -> tuple[str, str, str] | None:
    """Return the letters of both operands and of the result, those of `...` written out."""
    left, out = equation.replace(" ", "").split("->")
    first, second = left.split(",")
    used = set(equation)
    fresh = [letter for letter in _FREE if letter not in used]
    for side, operand in zip((first, second), operands, strict=True):
        if "..." in side:
            missing = operand.meta["val"].dim() - len(side) + 3
            letters = "".join(fresh[:missing])
            if "..." in first and "..." in second:
                return None
            first, second, out = (each.replace("...", letters) for each in (first, second, out))
            break
    return first, second, out


def _layout(x: str, matrices: str, out: str) -> tuple[Layout, bool] | None:
    if len(matrices) != 3 or any(len(set(side)) != len(side) for side in (x, matrices, out)):
        return None
    expert = matrices[0]
    read = [letter for letter in matrices[1:] if letter in x and letter not in out]
    made = [letter for letter in matrices[1:] if letter not in x and letter in out]
    if expert not in out or len(read) != 1 or len(made) != 1:
        return None
    if x[-1] != read[0] or out[-1] != made[0]:
        return None
    names = {expert: "E", read[0]: "I", made[0]: "O"}
    rows = [letter for letter in x if letter not in names]
    if set(out) - set(names) != set(rows) or len(rows) > len(_FREE):
        return None
    names.update(zip(rows, _FREE, strict=False))
    layout = Layout(*("".join(names[letter] for letter in side) for side in (x, out)))
    return layout, matrices[1] == read[0]


def written(layout: Layout) -> str:
    """Return the equation that multiplies tokens by a number for each expert."""
    x, out = (side.replace("O", "I") for side in (layout.x, layout.out))
    return f"{x},E->{out}"
