"""Which parameters of a Program a spec selects to train."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fxcompress.ir.ops import op_name
from fxcompress.pipeline.selectors import Candidate, Selector, public_class

if TYPE_CHECKING:
    from fxcompress.ir import Program

__all__ = ["selected"]


def selected(program: Program, selector: Selector) -> list[str]:
    """Return the names of the parameters that a selector chooses, a tied one under one name.

    Frozen parameters (`requires_grad` unset) are no candidates. Ops and classes are those of the
    module that holds a parameter; a free one has the op `parameter`.

    Raises:
        SelectorError: A pattern matches nothing, or nothing is left.
    """
    calls = {str(n.target): op_name(n) for n in program.graph.find_nodes(op="call_module")}
    candidates = []
    for name, parameter in program.module.named_parameters():
        if parameter.requires_grad:
            owner = name.rpartition(".")[0]
            cls = public_class(type(program.module.get_submodule(owner)))
            candidates.append(Candidate(name, calls.get(owner, "parameter"), cls))
    return selector.choose(candidates)
