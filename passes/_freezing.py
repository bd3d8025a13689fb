"""What trains and what is frozen when a pass adds parameters that alone are to train."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from fxcompress.errors import SelectorError
from fxcompress.pipeline._close import did_you_mean

if TYPE_CHECKING:
    from fxcompress.ir import Program

__all__ = ["freezing"]


def freezing(
    program: Program, globs: tuple[str, ...], added: int, also: tuple[str, ...] = ()
) -> dict[str, tuple[str, ...] | int]:
    """Return `freeze` (names), `frozen` and `trained` (numbers of parameters), for a decision.

    Args:
        program: The Program before parameters are added.
        globs: Parameters that train as they do.
        added: How many parameters are added.
        also: Prefixes of names that train as they do: what an earlier pass added.

    Raises:
        SelectorError: A glob fits no parameter.
    """
    parameters = dict(program.module.named_parameters())
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in parameters):
            raise SelectorError(
                f"`{glob}` in `train` matches no parameter",
                hint=did_you_mean(glob, parameters, kind="there are"),
            )
    freeze = []
    frozen, trained = 0, added
    for name, parameter in parameters.items():
        stays = any(fnmatchcase(name, glob) for glob in globs) or name.startswith(also)
        if parameter.requires_grad and stays:
            trained += parameter.numel()
            continue
        frozen += parameter.numel()
        if parameter.requires_grad:
            freeze.append(name)
    return {"freeze": tuple(freeze), "frozen": frozen, "trained": trained}
