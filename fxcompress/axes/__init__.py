"""Axes: which dimensions of a model must shrink together, and which cannot shrink at all."""

from typing import TYPE_CHECKING

from fxcompress._lazy import lazy_exports

if TYPE_CHECKING:
    from fxcompress.axes._polynomial import Polynomial as Polynomial
    from fxcompress.axes._site import Rule as Rule
    from fxcompress.axes._site import Site as Site
    from fxcompress.axes._site import Value as Value
    from fxcompress.axes.analysis import Analysis as Analysis
    from fxcompress.axes.analysis import analyze as analyze
    from fxcompress.axes.explain import Explanation as Explanation
    from fxcompress.axes.explain import coupling as coupling
    from fxcompress.axes.explain import explain as explain
    from fxcompress.axes.terms import Axis as Axis
    from fxcompress.axes.terms import Concat as Concat
    from fxcompress.axes.terms import Frozen as Frozen
    from fxcompress.axes.terms import Place as Place
    from fxcompress.axes.terms import Product as Product
    from fxcompress.axes.terms import Term as Term
    from fxcompress.axes.terms import kept as kept
    from fxcompress.axes.terms import polynomial as polynomial
    from fxcompress.axes.terms import positions as positions

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "Analysis": "analysis",
        "Axis": "terms",
        "Concat": "terms",
        "Explanation": "explain",
        "Frozen": "terms",
        "Place": "terms",
        "Polynomial": "_polynomial",
        "Product": "terms",
        "Rule": "_site",
        "Site": "_site",
        "Term": "terms",
        "Value": "_site",
        "analyze": "analysis",
        "coupling": "explain",
        "explain": "explain",
        "kept": "terms",
        "polynomial": "terms",
        "positions": "terms",
    },
)
