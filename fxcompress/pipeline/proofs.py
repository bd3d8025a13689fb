"""What is shown about every pass: input untouched, weights accounted for, numbers equal."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from fxcompress.errors import NumericsError, PassError
from fxcompress.ir import hash_tensor
from fxcompress.pipeline._probes import has_bad
from fxcompress.pipeline.records import Proof
from fxcompress.rewrite.edits import AddTensor, Edit, SetTensor

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline._probing import Measured
    from fxcompress.pipeline.steps import Step

__all__ = ["MOST", "ROUNDINGS", "Digests", "check_finite", "check_trained", "has_values", "prove"]

# Where a model amplifies rounding: so many times the effect of one unit in every weight's last
# place is rounding too, but never more than so much of the output's range.
ROUNDINGS = 8.0
MOST = 1e-2


def has_values(program: Program) -> bool:
    """Whether the weights are real, not only shapes."""
    return all(tensor.device.type != "meta" for tensor in program.state().values())


class Digests:
    """SHA-256 of tensors by identity, so that a shared tensor is hashed once per look."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[torch.Tensor, str]] = {}

    def take(self, program: Program) -> dict[str, str]:
        """Hash what is new in a Program and forget what is not in it; return name -> digest."""
        state = program.state()
        by_id: dict[int, str] = {id(t): digest for t, digest in self._known.values()}
        known: dict[str, tuple[torch.Tensor, str]] = {}
        for name, tensor in state.items():
            digest = by_id.get(id(tensor)) or hash_tensor(tensor)
            by_id[id(tensor)] = digest
            known[name] = (tensor, digest)
        self._known = known
        return {name: digest for name, (_, digest) in known.items()}

    def rebind(self, program: Program) -> None:
        """Take over the tensors of a Program whose values are known to be the same."""
        state = program.state()
        self._known = {name: (state[name], digest) for name, (_, digest) in self._known.items()}

    def check_untouched(self, program: Program, step: Step) -> None:
        """Hash every known tensor again.

        Raises:
            PassError: One was written in place; it is named.
        """
        seen: set[int] = set()
        state = program.state()
        for name, (tensor, digest) in self._known.items():
            if state.get(name) is not tensor:
                raise PassError(
                    f"pass {step.id} replaced {name} in the Program it was given",
                    reason="a pass returns a new Program and leaves its input as it is",
                    hint="change tensors through rewriter.set_tensor only",
                    where=name,
                )
            if id(tensor) not in seen and hash_tensor(tensor) != digest:
                raise PassError(
                    f"pass {step.id} wrote {name} in place",
                    reason="Programs share tensors, so the input changed too",
                    hint="compute a new tensor and give it to rewriter.set_tensor",
                    where=name,
                )
            seen.add(id(tensor))


def changed_tensors(edits: Iterable[Edit]) -> set[str]:
    """Return the names of tensors that edits added or gave another value."""
    return {edit.name for edit in edits if isinstance(edit, (AddTensor, SetTensor))}


def check_finite(program: Program, names: Iterable[str] | None = None) -> None:
    """Check that weights (all, or those named) have no NaN, and parameters no infinity.

    Buffers may hold infinities: causal masks do.

    Raises:
        NumericsError: One has; it is named.
    """
    wanted = None if names is None else set(names)
    for name, tensor in program.state().items():
        if (wanted is not None and name not in wanted) or tensor.device.type == "meta":
            continue
        if has_bad(tensor, infinite=isinstance(tensor, nn.Parameter)):
            bad = int((~tensor.isfinite()).sum())
            raise NumericsError(
                f"{name} holds {bad} values that are no finite numbers",
                reason=f"of {tensor.numel()} in all",
                hint="look at where these weights come from",
                where=name,
            )


def check_trained(edits: Sequence[Edit], step: Step) -> None:
    """Check that a trained pass changed nothing but the values of tensors.

    Raises:
        PassError: It changed the graph, or a tensor's shape or dtype.
    """
    for edit in edits:
        if not isinstance(edit, SetTensor) or edit.before != edit.after:
            raise PassError(
                f"pass {step.id} says that it only trains, and it changed the structure",
                reason=_describe(edit),
                where=step.where or None,
            )


def _describe(edit: Edit) -> str:
    subject = (
        getattr(edit, "node", None) or getattr(edit, "path", None) or getattr(edit, "name", "")
    )
    return f"{edit.kind} {subject}"


def prove(step: Step, edits: Sequence[Edit], measured: Measured) -> Proof:
    """Grade a pass by what it promises and what was measured.

    Raises:
        PassError: An exact pass changed the outputs by more than rounding does, or a trained one
            changed the structure.
    """
    preserves = step.pass_.promises(step.options)
    proof = Proof(
        grade="measured",
        probes=measured.probes,
        on=measured.on,
        error=measured.to_previous.relative,
        checks=("input unchanged", "unrecorded weights bit-identical", "types verified"),
    )
    if preserves == "approximate":
        return proof
    if preserves == "trained":
        check_trained(edits, step)
        return proof.model_copy(update={"grade": "structure"})
    worst, tolerance = measured.worst, measured.tolerance
    if not worst <= tolerance:
        raise PassError(
            f"pass {step.id} promises to be exact, and its outputs differ",
            reason=f"by {worst:.3g} of their range, and rounding explains {tolerance:.3g}",
            hint="this is a mistake in the pass, or in the weights' precision; report it",
            where=step.where or None,
        )
    exact = {"grade": "equal", "error": worst, "tolerance": tolerance}
    return proof.model_copy(update=exact)


def digest_of_model(structure: str, digests: Mapping[str, str]) -> str:
    """Return one digest of a graph's text and its tensors."""
    sha = hashlib.sha256(structure.encode())
    for name, digest in sorted(digests.items()):
        sha.update(f"\n{name} {digest}".encode())
    return sha.hexdigest()
