"""Terms and constants as people read them: letters for free axes, numbers for all else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from string import ascii_lowercase

from fxcompress.axes.analysis import Constant
from fxcompress.axes.terms import Axis, Concat, Product, Term, axes_of, size_of

__all__ = ["Letters", "constant_text"]


class Letters:
    """Gives each free axis a letter when it is first written: a … z, a2 and so on.

    Attributes:
        names: Letter -> name of the axis.
    """

    def __init__(self) -> None:
        self.names: dict[str, str] = {}
        self._given: dict[Axis, str] = {}

    def write(self, term: Term) -> str:
        """Return a term such as `[a·b | a·b | 64]`."""
        if isinstance(term, Axis):
            return str(term.size) if term.frozen else self._letter(term)
        if isinstance(term, Concat) and all(axis.frozen for axis in axes_of(term)):
            return str(size_of(term))
        if isinstance(term, Concat):
            return "[" + " | ".join(map(self.write, _parts(term))) + "]"
        return "·".join(map(self.write, term.factors)) or "1"

    def _letter(self, axis: Axis) -> str:
        if axis not in self._given:
            count, place = divmod(len(self._given), len(ascii_lowercase))
            letter = ascii_lowercase[place] + (str(count + 1) if count else "")
            self._given[axis] = letter
            self.names[letter] = axis.name or f"{axis.size} that no parameter has"
        return self._given[axis]


def constant_text(constant: Constant, node: str, write: Callable[[Term], str]) -> str:
    """Return a number in the graph as `node argument[index] = terms`, by its form."""
    where = constant.name if constant.index is None else f"{constant.name}[{constant.index}]"
    terms = [write(term) for term in constant.terms if size_of(term)] or ["0"]
    if constant.form == "sections":
        return f"{node} {where} = [{', '.join(terms)}]"
    if constant.form == "scale":
        sizes = "·".join(str(size_of(term)) for term in constant.terms)
        return f"{node} {where} stays 1/√{sizes}"
    return f"{node} {where} = {'−' if constant.negative else ''}{' + '.join(terms)}"


def _parts(term: Concat) -> Iterator[Term]:
    """Yield the parts of a concatenation, those of concatenations within it one by one."""
    for part in term.parts:
        if isinstance(part, Concat):
            yield from _parts(part)
        elif not (isinstance(part, Product) and len(part.factors) == 1):
            yield part
        else:
            yield from _parts(Concat((part.factors[0],)))
