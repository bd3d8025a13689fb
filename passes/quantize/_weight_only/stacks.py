"""Stacks of experts' matrices: which are stored as integers, each expert in a format of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from torch import fx

from fxcompress.errors import SelectorError, UsageError
from fxcompress.ir.ops import bind, op_name
from fxcompress.pipeline.selectors import Candidate
from fxcompress.rewrite.edits import Declined
from passes._layers.operands import OPERANDS, canonical, weight_operand
from passes._layers.quantizer import QUANTIZERS
from passes.moe._routing import Mixture, find_mixtures
from passes.quantize._weight_only.grids import Width
from passes.quantize._weight_only.layers import Weight

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from passes.quantize.weight_only import Override, WeightOnlyOptions

__all__ = ["Stack", "StackPart", "choose_stacks", "loose_stacks", "stack_parts"]

# Integers, and elements that share a scale.
_Format: TypeAlias = "tuple[Width, int | None]"
_LOOSE: Final = (
    "its matrices are a stack outside the leaf of experts: run moe.lift before, which says why "
    "where it cannot"
)


@dataclass(frozen=True)
class StackPart:
    """One expert's matrix, which is selected like a linear layer.

    Attributes:
        mixture: The experts.
        matrix: `gate`, `up` or `down`.
        expert: Which one.
        candidate: What selects it.
    """

    mixture: Mixture
    matrix: str
    expert: int
    candidate: Candidate


@dataclass(frozen=True)
class Stack:
    """A stack of matrices to quantise.

    Attributes:
        tensor: The canonical name of the parameter.
        mixture: The experts.
        matrix: `gate`, `up` or `down`.
        widths: The integers of each expert; None for one that stays in float.
        group: Elements of a row that share a scale; None for all.
    """

    tensor: str
    mixture: Mixture
    matrix: str
    widths: tuple[Width | None, ...]
    group: int | None

    @property
    def calls(self) -> tuple[fx.Node, ...]:
        """Its readers."""
        return tuple(call.node for call in self.mixture.calls)

    def weight(self, expert: int) -> Weight:
        """Return the matrix of an expert as that of a linear layer."""
        width = self.widths[expert]
        assert width is not None, "it is stored as integers"
        return Weight(f"{self.tensor}[{expert}]", (), width, 0, self.group, None)


def stack_parts(program: Program) -> list[StackPart]:
    """Return every matrix of every expert, in graph order."""
    parts = []
    for mixture in _mixtures(program):
        for expert in range(mixture.experts.experts):
            own = f"{mixture.path}.{expert}"
            for matrix in _matrices(mixture):
                candidate = Candidate(
                    f"{own}.{matrix}", "experts", "fxcompress.nn.Experts", (own, mixture.path)
                )
                parts.append(StackPart(mixture, matrix, expert, candidate))
    return parts


def _mixtures(program: Program) -> Sequence[Mixture]:
    return find_mixtures(program) if any(op_name(n) == "experts" for n in program.nodes) else ()


def _matrices(mixture: Mixture) -> tuple[str, ...]:
    return ("gate", "up", "down") if mixture.experts.gated else ("up", "down")


def choose_stacks(
    program: Program,
    ids: Mapping[fx.Node, str],
    parts: Sequence[StackPart],
    chosen: frozenset[str],
    options: WeightOnlyOptions,
    readers: Mapping[str, Sequence[fx.Node]],
    usage: Mapping[str, Sequence[float]] | None,
) -> tuple[list[Stack], list[Declined]]:
    """Return the stacks to quantise in graph order, and what stays in float with the reason.

    Args:
        program: The model.
        ids: Of its nodes.
        parts: All matrices of its experts.
        chosen: Ids of what the options select.
        options: The formats.
        readers: Canonical parameter -> what reads it.
        usage: Path of experts -> how often each was chosen; None where it is not known yet.

    Raises:
        SelectorError: An override with `rarest` fits no expert.
        UsageError: Experts of one stack would have different groups, or `rarest` is no expert.
    """
    hits = [_hit(each, index, parts, usage) for index, each in enumerate(options.overrides)]
    stacks: list[Stack] = []
    left: dict[str, dict[str, str]] = {}
    for (_, matrix), own in _by_stack(parts):
        selected = [part for part in own if part.candidate.id in chosen]
        formats: dict[int, _Format] = {}
        for part in selected:
            found = _format(part, options, hits)
            if found is not None:
                formats[part.expert] = found
        mixture = own[0].mixture
        tensor = canonical(program, f"{mixture.path}.{matrix}")
        reason = "it is not selected"
        if selected:
            told = None if formats else "its overrides leave it in float"
            reason = _obstacle(program, tensor, matrix, mixture, readers) or told or ""
        if reason:
            left.setdefault(ids[mixture.calls[0].node], {})[matrix] = reason
        else:
            stacks.append(_stack(tensor, mixture, matrix, formats))
    whole = {ids[part.mixture.calls[0].node]: len(_matrices(part.mixture)) for part in parts}
    return stacks, [each for node, own in left.items() for each in _left(node, own, whole[node])]


def _left(node: str, reasons: Mapping[str, str], count: int) -> list[Declined]:
    """Return refusals of a mixture's matrices, in one where all of them are left alike."""
    alike = set(reasons.values())
    if len(reasons) == count and len(alike) == 1:
        return [Declined(node=node, reason=alike.pop())]
    return [Declined(node=node, reason=f"{name}: {why}") for name, why in reasons.items()]


def _stack(tensor: str, mixture: Mixture, matrix: str, formats: Mapping[int, _Format]) -> Stack:
    groups = {expert: group for expert, (_, group) in formats.items()}
    group = _common_group(f"{mixture.path}.{matrix}", groups, mixture, matrix)
    widths = tuple(formats[e][0] if e in formats else None for e in range(mixture.experts.experts))
    return Stack(tensor, mixture, matrix, widths, group)


def _by_stack(
    parts: Iterable[StackPart],
) -> Iterator[tuple[tuple[str, str], list[StackPart]]]:
    found: dict[tuple[str, str], list[StackPart]] = {}
    for part in parts:
        found.setdefault((part.mixture.path, part.matrix), []).append(part)
    yield from found.items()


def _hit(
    override: Override,
    index: int,
    parts: Sequence[StackPart],
    usage: Mapping[str, Sequence[float]] | None,
) -> frozenset[str]:
    """Return the ids of the matrices that an override is for."""
    hit = [part for part in parts if part.candidate.matches(override.targets)]
    if override.rarest is None:
        return frozenset(part.candidate.id for part in hit)
    experts: dict[str, list[int]] = {}
    for part in hit:
        own = experts.setdefault(part.mixture.path, [])
        if part.expert not in own:
            own.append(part.expert)
    if not experts:
        raise SelectorError(
            f"overrides[{index}] has `rarest` and selects no expert",
            reason="how often they are used is known of experts alone",
            hint="select experts, such as `*.experts.*`, or drop `rarest`",
        )
    rare: set[tuple[str, int]] = set()
    for path, found in experts.items():
        count = int(override.rarest * len(found))
        if count == 0:
            raise UsageError(
                f"the rarest {override.rarest:g} of {len(found)} experts of {path} is none",
                reason="parts are rounded down",
                hint=f"ask for {1 / len(found):.3g} or more",
                where=f"overrides[{index}]",
            )
        if usage is not None:
            ranked = sorted(found, key=lambda e: (usage[path][e], e))
            rare.update((path, expert) for expert in ranked[:count])
    return frozenset(p.candidate.id for p in hit if (p.mixture.path, p.expert) in rare)


def _format(
    part: StackPart, options: WeightOnlyOptions, hits: Sequence[frozenset[str]]
) -> _Format | None:
    """Return the integers and the group of a matrix, or None where it stays in float."""
    found = (o for o, hit in zip(options.overrides, hits, strict=True) if part.candidate.id in hit)
    override = next(found, None)
    bits, group, symmetric = options.format(override)
    return None if bits == "float" else (Width(bits, symmetric), group)


def _common_group(
    name: str, groups: Mapping[int, int | None], mixture: Mixture, matrix: str
) -> int | None:
    counted = Counter(groups.values())
    if len(counted) > 1:
        one, other = list(counted)[:2]
        first, second = (next(e for e, g in groups.items() if g == each) for each in (one, other))
        raise UsageError(
            f"experts of {name} cannot have different groups",
            reason=f"expert {first} would have {_groups(one)}, expert {second} {_groups(other)}, "
            "and their scales are one tensor",
            hint="override `group` for all experts of a mixture, or for none; bits may differ",
            where=name,
        )
    (group,) = counted
    columns = int(getattr(mixture.experts, matrix).shape[2])
    return None if group is not None and group > columns else group


def _groups(group: int | None) -> str:
    return "one for a row" if group is None else f"groups of {group}"


def _obstacle(
    program: Program,
    tensor: str,
    matrix: str,
    mixture: Mixture,
    readers: Mapping[str, Sequence[fx.Node]],
) -> str | None:
    """Return why a stack cannot be quantised, or None."""
    calls = [call.node for call in mixture.calls]
    operands = [bind(node).get(matrix) for node in calls]
    if any(isinstance(each, fx.Node) and op_name(each) in QUANTIZERS for each in operands):
        return "it is quantised already"
    if not program.state()[tensor].is_floating_point():
        return "it is not floating point"
    others = [node for node in readers.get(tensor, ()) if node not in calls]
    return f"{tensor} is also read by {others[0].name} in float" if others else None


def loose_stacks(program: Program, ids: Mapping[fx.Node, str]) -> list[Declined]:
    """Return a refusal for each product with a stack of matrices that is a parameter."""
    found = []
    for node in program.nodes:
        names = OPERANDS.get(op_name(node), ())
        if op_name(node) in ("grouped_mm", "bmm", "baddbmm", "matmul") and any(
            _is_stack(program, node, weight) for _, weight in names
        ):
            found.append(Declined(node=ids[node], reason=_LOOSE))
    return found


def _is_stack(program: Program, node: fx.Node, weight: str) -> bool:
    operand: Any = weight_operand(program, node, weight)
    return operand is not None and program.state()[operand.tensor].dim() == 3
