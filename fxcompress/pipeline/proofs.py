"""What is shown about every pass: input untouched, weights accounted for, numbers equal."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn

from fxcompress.analysis import OutputComparison, compare
from fxcompress.errors import NumericsError, PassError
from fxcompress.ir import hash_tensor, node_ids
from fxcompress.pipeline._probes import Leaves, first_bad, has_bad, probes, run
from fxcompress.pipeline.records import Proof
from fxcompress.rewrite.edits import AddTensor, Edit, SetTensor

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.steps import Step

__all__ = ["Digests", "Probing", "check_finite", "check_trained", "has_values"]

# max |Δ| / range(y) that rounding explains: a few thousand roundings of the outputs' precision.
TOLERANCES = {
    torch.float64: 1e-10,
    torch.float32: 5e-5,
    torch.float16: 1e-2,
    torch.bfloat16: 8e-2,
}


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


@dataclass
class Probing:
    """Outputs of the original and of the last Program on fixed probes.

    Only outputs are kept, so that no Program has to stay in memory to be compared with.
    """

    inputs: tuple[Leaves, ...]
    original: tuple[tuple[object, ...], ...]
    previous: tuple[tuple[object, ...], ...] = field(default=())

    @staticmethod
    def of(program: Program, seed: int) -> Probing:
        """Run the original on the probes.

        Raises:
            NumericsError: Its outputs hold a NaN; the first node that does is named.
        """
        inputs = probes(program, seed)
        outputs = tuple(run(program, leaves) for leaves in inputs)
        for leaves, output in zip(inputs, outputs, strict=True):
            if has_bad(output, infinite=False):
                raise _numerics(program, leaves, infinite=False)
        return Probing(inputs, outputs, outputs)

    def measure(self, program: Program) -> tuple[OutputComparison, OutputComparison]:
        """Run a Program on the probes; return its difference to the previous and the original.

        Raises:
            NumericsError: A NaN appeared, or an infinity where there was none.
            PassError: The outputs have other shapes.
        """
        outputs: list[tuple[object, ...]] = []
        for leaves, before in zip(self.inputs, self.previous, strict=True):
            output = run(program, leaves)
            infinite = not has_bad(before, infinite=True)
            if has_bad(output, infinite=infinite):
                raise _numerics(program, leaves, infinite=infinite)
            outputs.append(output)
        try:
            to_previous = compare(self.previous, tuple(outputs))
            to_original = compare(self.original, tuple(outputs))
        except ValueError as error:
            raise PassError("the outputs have another structure", reason=str(error)) from error
        self.previous = tuple(outputs)
        return to_previous, to_original

    @property
    def tolerance(self) -> float:
        """What rounding may do to the outputs, relative to their range."""
        kinds = {
            each.dtype
            for outputs in self.previous
            for each in _tensors(outputs)
            if each.is_floating_point()
        }
        return max((TOLERANCES.get(kind, 1e-1) for kind in kinds), default=0.0)

    @property
    def sizes(self) -> int:
        """How many probes there are."""
        return len(self.inputs)


def prove(
    step: Step,
    edits: Sequence[Edit],
    probing: Probing,
    to_previous: OutputComparison,
) -> Proof:
    """Grade a pass by what it promises and what was measured.

    Raises:
        PassError: An exact pass changed the outputs by more than rounding does, or a trained one
            changed the structure.
    """
    preserves = type(step.pass_).preserves
    checks = ("input unchanged", "unrecorded weights bit-identical", "types verified")
    error = to_previous.relative
    if preserves == "trained":
        check_trained(edits, step)
        return Proof(grade="structure", probes=probing.sizes, error=error, checks=checks)
    if preserves == "approximate":
        return Proof(grade="measured", probes=probing.sizes, error=error, checks=checks)
    tolerance = probing.tolerance
    if not error <= tolerance:
        raise PassError(
            f"pass {step.id} promises to be exact, and its outputs differ",
            reason=f"by {error:.3g} of their range, and rounding explains {tolerance:.3g}",
            hint="this is a mistake in the pass, or in the weights' precision; report it",
            where=step.where or None,
        )
    return Proof(
        grade="equal", probes=probing.sizes, error=error, tolerance=tolerance, checks=checks
    )


def digest_of_model(structure: str, digests: Mapping[str, str]) -> str:
    """Return one digest of a graph's text and its tensors."""
    sha = hashlib.sha256(structure.encode())
    for name, digest in sorted(digests.items()):
        sha.update(f"\n{name} {digest}".encode())
    return sha.hexdigest()


def _tensors(value: object) -> Iterable[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _tensors(each)


def _numerics(program: Program, leaves: Leaves, *, infinite: bool) -> NumericsError:
    node = first_bad(program, leaves, infinite=infinite)
    where = "the output" if node is None else node_ids(program)[node]
    return NumericsError(
        f"the output of {where} holds values that are no finite numbers",
        reason="every weight is finite, so the computation overflows or divides by zero",
        hint="a wider dtype for this node, or weights in a smaller range",
        where=where,
    )
