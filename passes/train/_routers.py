"""How evenly a trained model spreads its tokens over experts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from fxcompress.ir.ops import op_name
from fxcompress.train.data import samples_in
from passes.train._options import RouterLoad

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.train.data import Split

__all__ = ["router_loads"]

_SAMPLES: Final = 256


def router_loads(program: Program, split: Split) -> tuple[RouterLoad, ...]:
    """Return the load of each expert on the first samples of a split; nothing without experts."""
    if not any(op_name(node) == "experts" for node in program.nodes):
        return ()
    from passes.moe._routing import find_mixtures
    from passes.moe._use import measure

    mixtures = find_mixtures(program)
    use = measure(program, mixtures, _first(split))
    return tuple(
        RouterLoad(path=each.path, shares=tuple(use[each.path].shares.tolist()))
        for each in mixtures
    )


def _first(split: Split) -> Iterator[Any]:
    seen = 0
    for batch, _ in split:
        yield batch
        seen += samples_in(batch)
        if seen >= _SAMPLES:
            return
