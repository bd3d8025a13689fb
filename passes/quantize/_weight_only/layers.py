"""Which weights are stored as integers, in which format, and why the others are not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch.nn.functional as F
from torch import Tensor, fx

from fxcompress.errors import UsageError
from fxcompress.ir.naming import node_ids
from fxcompress.ir.ops import bind, module_of, op_name
from fxcompress.nn import take_weight_as_operand
from fxcompress.pipeline.selectors import Candidate, Selector, candidate_of
from fxcompress.rewrite.edits import Declined
from passes._layers.form import Form
from passes._layers.operands import canonical
from passes._layers.quantizer import QUANTIZERS
from passes.quantize._experts import experts_in_float
from passes.quantize._masked import unmasked
from passes.quantize._rules import LAYERS
from passes.quantize._weight_only.grids import Width

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from passes.quantize.weight_only import WeightOnlyOptions

__all__ = ["Layers", "Weight", "choose", "input_operand", "readers_of"]

_WEIGHT: Final = {"addmm": "mat2"}
_INPUT: Final = {"addmm": "mat1"}


@dataclass(frozen=True)
class Weight:
    """A parameter to quantise.

    Attributes:
        tensor: Its canonical name.
        readers: The layers and embeddings that read it, in graph order.
        width: Its integers.
        axis: Dimension of its rows.
        group: Elements of a row that share a scale; None for all.
        form: Which dimension is what, for the layers' inputs; None where no layer multiplies.
    """

    tensor: str
    readers: tuple[fx.Node, ...]
    width: Width
    axis: int
    group: int | None
    form: Form | None

    def rows(self, weight: Tensor) -> Tensor:
        """Return the weight as `[rows, elements]`."""
        return weight.movedim(self.axis, 0).flatten(1)

    def padded(self, rows: Tensor, value: float = 0.0) -> Tensor:
        """Return `[rows, elements]` with a last group that is filled up."""
        missing = -rows.shape[1] % self.group if self.group else 0
        return F.pad(rows, (0, missing), value=value)

    def grouped(self, weight: Tensor) -> Tensor:
        """Return the weight as `[rows, groups, elements]`, the last group filled up with 0."""
        rows = self.rows(weight)
        return self.padded(rows).reshape(rows.shape[0], -1, self.group or rows.shape[1])

    def restored(self, grouped: Tensor, like: Tensor) -> Tensor:
        """Return `[rows, groups, elements]` in the shape of the parameter `like`."""
        moved = like.movedim(self.axis, 0).shape
        rows = grouped.flatten(1)[:, : like.numel() // moved[0]]
        return rows.reshape(moved).movedim(0, self.axis).contiguous()


@dataclass(frozen=True)
class Layers:
    """The weights to quantise in graph order, refusals, ids of nodes, and all that is selected."""

    weights: tuple[Weight, ...]
    declined: tuple[Declined, ...]
    ids: Mapping[fx.Node, str]
    chosen: frozenset[str]


def input_operand(node: fx.Node) -> str:
    """Return the name of the operand that a layer multiplies its weight with."""
    return _INPUT.get(op_name(node), "input")


def choose(
    program: Program, options: WeightOnlyOptions, experts: Sequence[Candidate] = ()
) -> Layers:
    """Select weights, and decline those that cannot be quantised.

    Args:
        program: The model.
        options: What to select, and the formats.
        experts: What else may be selected: matrices of experts.

    Raises:
        SelectorError: A selection fits nothing, or not as many as expected.
        UsageError: The group does not fit a layer that was named.
    """
    ids = node_ids(program)
    sources = {node: found for node in program.nodes if (found := _source(program, node))}
    candidates = [node for node in sources if options.embeddings or op_name(node) != "embedding"]
    described = [*(candidate_of(program, node, ids[node]) for node in candidates), *experts]
    chosen = frozenset(Selector.of(options).choose(described))
    selected = {node for node in candidates if ids[node] in chosen}
    formats = _overridden(described, candidates, ids, options)
    everybody = readers_of(program)
    weights: list[Weight] = []
    declined: list[Declined] = []
    done: set[str] = set()
    for node in candidates:
        tensor, obstacle = sources[node]
        if node not in selected or obstacle is not None:
            reason = obstacle if node in selected else "it is not selected"
            declined.append(Declined(node=ids[node], reason=str(reason)))
            continue
        if tensor in done:
            continue
        readers = everybody[tensor]
        others = [each for each in readers if each not in selected or sources[each][1]]
        if others:
            declined.append(_shared(ids, node, tensor, others, options))
            continue
        done.add(tensor)
        index, weight = _weight(program, tensor, readers, options, formats)
        reason = f"overrides[{index}] leaves it in float" if weight is None else _misfit(weight)
        if weight is not None and reason is None:
            weights.append(weight)
        elif weight is not None and (options.targets or index is not None):
            raise UsageError(f"{tensor} cannot be quantised so", reason=reason or "", where=tensor)
        else:
            declined += [Declined(node=ids[each], reason=str(reason)) for each in readers]
    if not experts:
        declined += experts_in_float(program, ids)
    return Layers(tuple(weights), tuple(declined), ids, chosen)


def _overridden(
    described: Sequence[Candidate],
    candidates: Sequence[fx.Node],
    ids: Mapping[fx.Node, str],
    options: WeightOnlyOptions,
) -> list[set[fx.Node]]:
    """Return the layers that each override is for; one with `rarest` is for experts alone."""
    found = []
    for each in options.overrides:
        hit = frozenset(Selector(each.targets).choose(described))
        layers = {node for node in candidates if ids[node] in hit}
        found.append(layers if each.rarest is None else set())
    return found


def _source(program: Program, node: fx.Node) -> tuple[str, str | None] | None:
    """Return the parameter that a candidate reads and why it cannot be quantised, if so."""
    op = op_name(node)
    if op not in LAYERS and op not in ("addmm", "embedding"):
        return None
    operand = bind(node).get(_WEIGHT.get(op, "weight"))
    if operand is None and node.op == "call_module":
        tensor = canonical(program, f"{node.target}.weight")
        try:
            take_weight_as_operand(module_of(node))
        except UsageError as error:
            return tensor, error.what
        return tensor, _not_floating(module_of(node).weight)
    if not isinstance(operand, fx.Node):
        return None
    if op_name(operand) in QUANTIZERS:
        return "", "it is quantised already"
    source = unmasked(operand)
    if op_name(source) != "param":
        return None if op == "addmm" else ("", "its weight is computed in the graph")
    return canonical(program, str(source.target)), _not_floating(source.meta.get("val"))


def _not_floating(weight: Any) -> str | None:
    floating = isinstance(weight, Tensor) and weight.is_floating_point()
    return None if floating else "its weight is not floating point"


def readers_of(program: Program) -> dict[str, list[fx.Node]]:
    """Return canonical parameter -> the nodes that compute with it, masks passed."""
    found: dict[str, list[fx.Node]] = {}
    for node in program.nodes:
        if node.op == "get_attr":
            tensor = canonical(program, str(node.target))
            masks = [user for user in node.users if op_name(user) == "mask"]
            users = [user for user in node.users if user not in masks]
            users += [user for each in masks for user in each.users]
            found.setdefault(tensor, []).extend(users)
        elif node.op == "call_module":
            for name, _ in module_of(node).named_parameters():
                if name not in bind(node):
                    full = canonical(program, f"{node.target}.{name}")
                    found.setdefault(full, []).append(node)
    order = {node: index for index, node in enumerate(program.nodes)}
    return {name: sorted(set(nodes), key=order.__getitem__) for name, nodes in found.items()}


def _shared(
    ids: Mapping[fx.Node, str],
    node: fx.Node,
    tensor: str,
    others: Iterable[fx.Node],
    options: WeightOnlyOptions,
) -> Declined:
    names = tuple(ids[each] for each in others)
    tables = all(op_name(each) == "embedding" for each in others)
    hint = ": set `embeddings: true`" if tables and not options.embeddings else ""
    reason = f"its weight {tensor} is also read by {', '.join(names)} in float{hint}"
    return Declined(node=ids[node], reason=reason, because_of=names)


def _weight(
    program: Program,
    tensor: str,
    readers: Iterable[fx.Node],
    options: WeightOnlyOptions,
    formats: Sequence[set[fx.Node]],
) -> tuple[int | None, Weight | None]:
    """Return which override counts, and the weight, or None where that leaves it in float."""
    nodes = tuple(readers)
    index = next((i for i, hit in enumerate(formats) if hit.intersection(nodes)), None)
    bits, group, symmetric = options.format(None if index is None else options.overrides[index])
    if bits == "float":
        return index, None
    layers = [node for node in nodes if op_name(node) != "embedding"]
    shape = program.state()[tensor].shape
    axis, form = _form(layers[0], len(shape)) if layers else (0, None)
    if group is not None and group > shape.numel() // shape[axis]:
        group = None
    return index, Weight(tensor, nodes, Width(bits, symmetric), axis, group, form)


def _form(node: fx.Node, dims: int) -> tuple[int, Form]:
    op = op_name(node)
    if op == "addmm":
        return 1, Form(out=1, input=0)
    if op == "linear":
        return 0, Form(out=0, input=1)
    module: Any = module_of(node) if node.op == "call_module" else None
    groups = int(bind(node).get("groups", 1) if module is None else module.groups)
    taps = tuple(range(2, dims))
    split = 0 if groups > 1 else None
    if op.startswith("conv_transpose"):
        return 1, Form(out=1, input=0, taps=taps, groups=groups, split=split)
    return 0, Form(out=0, input=1, taps=taps, groups=groups, split=split)


def _misfit(weight: Weight) -> str | None:
    """Return why a weight has no such groups, or None."""
    if weight.axis == 1 and weight.form is not None and weight.form.groups > 1:
        return "the channels of a grouped transposed convolution are not one dimension"
    if weight.group is not None and weight.axis != 0:
        return f"{weight.tensor} keeps its output channels in dimension 1: only `group: null` fits"
    return None
