"""What the model's Python asked of its sizes: assumptions to note, and sizes it fixed."""

from __future__ import annotations

from collections.abc import Iterable

import sympy

from fxcompress.errors import CaptureError
from fxcompress.ir._recorder._sizes import Guard, Sizes
from fxcompress.ir._recorder._source import full_place, short_place
from fxcompress.ir.program import Note

__all__ = ["SizeFixed", "assumptions", "check_still_dynamic"]


class SizeFixed(CaptureError):
    """The model's Python works for one value of a dynamic size only."""


def check_still_dynamic(sizes: Sizes) -> None:
    """Check that no dynamic size was fixed while recording.

    Raises:
        SizeFixed: The model's Python turned one into a plain number, or two into one.
    """
    for name, symbol in sizes.symbols.items():
        expr = symbol.node.expr
        if str(expr) == sizes.dims[name].symbol:
            continue
        guard = _culprit(sizes, name)
        where = full_place(guard.place) if guard else None
        other = [n for n, d in sizes.dims.items() if n != name and d.symbol in str(expr)]
        if other:
            raise SizeFixed(
                f"the sizes {name!r} and {other[0]!r} must be equal",
                reason=f"the model relates them: {guard.expression if guard else expr}",
                hint=f"give both the name {other[0]!r} in dynamic",
                where=where,
            )
        raise SizeFixed(
            f"the model works for one value of the size {name!r} only",
            reason="its Python turns the size into a plain number (a loop over it, int(), a "
            "comparison), so the graph would hold that number",
            hint=f"fix the size: static=[{name!r}]",
            where=where,
        )


def _culprit(sizes: Sizes, name: str) -> Guard | None:
    symbol = sizes.dims[name].symbol
    equalities = [
        guard
        for guard in sizes.env.watched
        if isinstance(guard.expression, sympy.Eq)
        and symbol in {str(s) for s in guard.expression.free_symbols}
    ]
    return equalities[-1] if equalities else None


def assumptions(sizes: Sizes, guards: Iterable[Guard]) -> list[Note]:
    """Return one note per condition on the sizes that holds for the captured graph only."""
    notes: dict[str, Note] = {}
    names = {dim.symbol: name for name, dim in sizes.dims.items()}
    for guard in guards:
        free = {str(s) for s in guard.expression.free_symbols}
        if not free or not free <= names.keys():
            continue
        shown = guard.expression.xreplace(
            {s: sympy.Symbol(names[str(s)]) for s in guard.expression.free_symbols}
        )
        text = f"{shown} ({short_place(guard.place)})" if guard.place else str(shown)
        notes.setdefault(
            str(shown), Note("assumption", ", ".join(sorted(names[f] for f in free)), text)
        )
    return list(notes.values())
