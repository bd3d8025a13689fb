"""Golden files: the text of a graph that a review can read, compared on every test run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxcompress._files import write_text
from fxcompress.errors import GoldenError, ModelError

if TYPE_CHECKING:
    import torch

    from fxcompress.ir import Program

__all__ = ["GoldenFile", "Update", "golden_text"]


class Update(Enum):
    """Which golden files a run may write."""

    NEW = "new"
    CHANGED = "changed"
    ALL = "all"


def golden_text(
    program: Program,
    *,
    dims: Mapping[str, int] | None = None,
    inputs: Mapping[str, Any] | Sequence[torch.Tensor] | None = None,
    state: bool = True,
    outputs: bool = True,
) -> str:
    """Return a program's golden text with the outputs, in eval mode, for fixed inputs.

    Args:
        program: The program; give it fixed weights first (`hash_weights_`, or real ones).
        dims: Dynamic sizes of the inputs; the captured ones where not given.
        inputs: Inputs in place of `hash_inputs`.
        state: Whether to list parameters and buffers.
        outputs: Whether to run the program.
    """
    from fxcompress.ir import to_text
    from fxcompress.testing.equivalence import run
    from fxcompress.testing.hashing import hash_inputs

    if not outputs or any(tensor.is_meta for tensor in program.state().values()):
        return to_text(program, state=state)
    given = list(hash_inputs(program, dims).values()) if inputs is None else inputs
    evaluated = program.copy()
    evaluated.module.eval()
    return to_text(program, state=state, outputs=run(evaluated, given))


@dataclass(frozen=True)
class GoldenFile:
    """One golden file and how to hold a text against it.

    Attributes:
        path: Where it is, `….fxg`.
    """

    path: Path

    @property
    def proposal(self) -> Path:
        """Where a differing text is put: beside the file, as `….fxg.new`."""
        return self.path.with_name(f"{self.path.name}.new")

    def check(self, text: str, update: Update | None = None) -> bool:
        """Compare `text` with the file; with `update`, write the file where it may be written.

        Numbers that are within tolerance keep their old spelling.

        Returns:
            Whether the file was written.

        Raises:
            GoldenError: The file is missing or differs and must not be written. The first line is
                the verdict; the new text is in `proposal`.
        """
        from fxcompress.ir.diff import diff, render_diff, sticky
        from fxcompress.ir.text import parse

        new = parse(text)
        if not self.path.exists():
            return self._missing(text, update)
        try:
            old = parse(self.path.read_text(encoding="utf-8"))
        except ModelError as error:
            if update in (Update.CHANGED, Update.ALL):
                return self._bless(text)
            raise GoldenError(
                f"the golden file is damaged: {error.what}",
                reason=error.reason,
                hint=error.hint,
                where=str(self.path),
            ) from error
        changes = diff(old, new)
        if not changes:
            self.proposal.unlink(missing_ok=True)
            return False
        text = sticky(old, new).render()
        if update in (Update.CHANGED, Update.ALL):
            return self._bless(text)
        _write(self.proposal, text)
        raise GoldenError(
            render_diff(changes, (str(self.path), str(self.proposal))).rstrip(),
            hint="if this is meant: --golden-update=changed, and say why in the commit",
        )

    def _missing(self, text: str, update: Update | None) -> bool:
        if update in (Update.NEW, Update.ALL):
            return self._bless(text)
        _write(self.proposal, text)
        raise GoldenError(
            f"the golden file {self.path} is missing",
            reason=f"what it would hold is in {self.proposal}",
            hint="read that; if it is right: --golden-update=new",
        )

    def _bless(self, text: str) -> bool:
        _write(self.path, text)
        self.proposal.unlink(missing_ok=True)
        return True


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
