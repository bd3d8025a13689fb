"""Which form the early exits of a file have: the first of several that can be exported."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final, Literal, TypeVar

from torch import fx

from fxcompress.emit._branches import batch_of, exits_in, write_branches
from fxcompress.emit._plain import PlainProgram
from fxcompress.emit._probes import Leaves
from fxcompress.emit._rows import write_rows
from fxcompress.errors import EmitError

__all__ = ["ExitForm", "with_exits"]

Made = TypeVar("Made")
ExitForm = Literal["rows", "branches", "together", "flat"]
"""`rows`: what comes after an exit runs on the samples that go on, be they none. `branches`: the
same, skipped where there are none. `together`: it runs on all samples unless all may stop. `flat`:
it runs on all in any case."""

_NOTES: Final = {
    "rows": "{count} early exits: what follows one runs on the samples that go on",
    "branches": "{count} early exits are branches: what follows one runs on the samples that go on,"
    " if there are any",
    "together": "{count} early exits are branches: a batch stops at the first one that all its "
    "samples may take",
    "flat": "{count} early exits: all answers are computed, and chosen from",
}


def with_exits(
    plain: PlainProgram,
    example: Leaves,
    forms: Sequence[ExitForm],
    make: Callable[[PlainProgram], Made],
) -> tuple[Made, tuple[str, ...]]:
    """Write the early exits of a program in the first form that it can be made of; say which.

    All forms give the same answers.

    Args:
        plain: The program, which is left as it is.
        example: Inputs to check with.
        forms: What the format can have, the best first; with `batch: together` the last is taken.
        make: Exports a program.

    Raises:
        EmitError: No form works; it says why the last one does not.
    """
    batch = batch_of(plain.module)
    if batch is None:
        return make(plain), ()
    if batch == "together":
        forms = forms[-1:]
    notes: tuple[str, ...] = ()
    for form in forms:
        own = _copied(plain)
        try:
            count = _written(own, form, example)
            made = make(own)
        except EmitError as error:
            if form == forms[-1]:
                raise
            notes = (f"early exits are not written as {form}: {error.reason or error.what}",)
            continue
        return made, (*notes, _NOTES[form].format(count=count))
    raise AssertionError("the last form is made, or its error is raised")


def _written(plain: PlainProgram, form: ExitForm, example: Leaves) -> int:
    if form == "rows":
        return write_rows(plain, example)
    if form == "flat":
        return len(exits_in(plain.module))
    return write_branches(plain.module, "each" if form == "branches" else "together")


def _copied(plain: PlainProgram) -> PlainProgram:
    """Return a copy with a graph of its own; modules and tensors are shared."""
    module = fx.GraphModule(plain.module, copy.deepcopy(plain.module.graph))
    return replace(plain, module=module.eval())
