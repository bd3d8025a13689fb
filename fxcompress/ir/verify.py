"""The invariants of a Program, as a table of rules."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import fx, nn

from fxcompress.errors import FxCompressError, ModelError, VerifyError
from fxcompress.ir._memo import type_key
from fxcompress.ir.modules import ModuleConfig, describe, is_stock
from fxcompress.ir.naming import node_ids
from fxcompress.ir.ops import is_inplace, is_tap
from fxcompress.ir.propagate import (
    Evaluator,
    describe_value,
    evaluate,
    guarded,
    same_type,
)

if TYPE_CHECKING:
    from fxcompress.ir.program import Program

__all__ = ["RULES", "Violation", "verify", "violations"]


@dataclass(frozen=True)
class Violation:
    """One broken invariant: which, at which node or name, on which line of the user's model."""

    invariant: str
    about: str
    text: str
    source: str | None = None

    def __str__(self) -> str:
        place = f" ({self.source})" if self.source else ""
        return f"{self.about}{place}: {self.text} [{self.invariant}]"


class _Checked:
    """A program under check, with what several rules need."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.ids = node_ids(program)
        self.called = [str(n.target) for n in program.graph.find_nodes(op="call_module")]
        self.read = {str(n.target) for n in program.graph.find_nodes(op="get_attr")}
        self.state = program.state()

    def at(self, node: fx.Node, invariant: str, text: str) -> Violation:
        return Violation(invariant, f"%{self.ids[node]}", text, node.meta.get("source"))

    def noted(self, kind: str, name: str) -> bool:
        """Whether a note of that kind is about `name` or about a module that holds it."""
        return any(
            note.kind == kind and (name == note.about or name.startswith(f"{note.about}."))
            for note in self.program.notes
        )

    def uses(self, name: str) -> bool:
        """Whether the graph reads the tensor or calls the module that holds it."""
        if name in self.read:
            return True
        return any(name == path or name.startswith(f"{path}.") for path in self.called)


Rule = Callable[[_Checked], Iterator[Violation]]


def violations(program: Program) -> list[Violation]:
    """Return every broken invariant; later rules run only on a graph that is well formed."""
    checked = _Checked(program)
    found = list(_well_formed(checked))
    if found:
        return found
    for rule in RULES[1:]:
        found += rule(checked)
    return found


def verify(program: Program) -> None:
    """Check every invariant of a Program.

    Raises:
        VerifyError: Some are broken; names each node, the user's line and the invariant.
    """
    found = violations(program)
    if not found:
        return
    first, *rest = found
    shown = [str(v) for v in rest[:9]]
    if len(rest) > len(shown):
        shown.append(f"and {len(rest) - len(shown)} more")
    raise VerifyError(
        f"{first.about}: {first.text}",
        reason="\n    ".join([f"a Program promises: {first.invariant}", *shown]),
        where=first.source,
    )


def _well_formed(checked: _Checked) -> Iterator[Violation]:
    """The graph is well formed."""
    program = checked.program
    invariant = "the graph is well formed"
    try:
        program.graph.lint()
    except (RuntimeError, AttributeError) as error:
        yield Violation(invariant, program.name, str(error))
        return
    if program.graph.owning_module is not program.module:
        yield Violation(invariant, program.name, "the graph belongs to another module")
    seen: dict[str, fx.Node] = {}
    for node, name in checked.ids.items():
        if name in seen:
            yield checked.at(node, "every node has its own id", f"{name} is taken")
        seen[name] = node
    outputs = list(program.graph.find_nodes(op="output"))
    if len(outputs) != 1 or not isinstance(outputs[0].args[0], (tuple, list)):
        yield Violation("the output is one flat tuple", program.name, "it is not")


def _signature(checked: _Checked) -> Iterator[Violation]:
    """Placeholders and outputs are those of the signature."""
    program = checked.program
    invariant = "placeholders and outputs are those of the signature"
    holders = list(program.graph.find_nodes(op="placeholder"))
    names = [str(node.target) for node in holders]
    declared = [tensor.name for tensor in program.signature.inputs]
    if names != declared:
        yield Violation(invariant, program.name, f"graph has {names}, signature has {declared}")
        return
    for node, tensor in zip(holders, program.signature.inputs, strict=True):
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            yield checked.at(node, "every node has a type", 'its meta["val"] is no tensor')
        elif value.dtype != tensor.dtype or value.dim() != len(tensor.shape):
            yield checked.at(
                node, invariant, f"is {describe_value(value)}, not {tensor.dtype}{tensor.shape}"
            )
        for size in tensor.shape:
            if isinstance(size, str) and size not in program.dims:
                yield checked.at(node, invariant, f"has the unknown dynamic size {size!r}")
    (output,) = program.graph.find_nodes(op="output")
    leaves = len(output.args[0])
    if leaves != program.signature.output.num_leaves:
        yield checked.at(
            output,
            invariant,
            f"{leaves} outputs for a tree of {program.signature.output.num_leaves}",
        )


def _functional(checked: _Checked) -> Iterator[Violation]:
    """No op changes its operands, unless a note says so."""
    for node in checked.program.nodes:
        if is_inplace(node) and not checked.noted("mutation", checked.ids[node]):
            yield checked.at(node, "no op changes its operands", "works in place")


def _alive(checked: _Checked) -> Iterator[Violation]:
    """Every node is used, or a tap."""
    for node in checked.program.nodes:
        if node.users or node.op in ("placeholder", "output") or is_inplace(node) or is_tap(node):
            continue
        yield checked.at(node, "every node is used", "nothing uses it")


def _reachable(checked: _Checked) -> Iterator[Violation]:
    """Every tensor and every module is used, tied to a used one, or noted as unused."""
    program = checked.program
    used = {id(t) for name, t in checked.state.items() if checked.uses(name)}
    for name, tensor in checked.state.items():
        if id(tensor) not in used and not checked.noted("unused", name):
            yield Violation("every tensor is used", name, "nothing in the graph reads it")
    holders = {name.rpartition(".")[0] for name in (*checked.state, *checked.read)}
    keep = {*checked.called, *holders}
    prefixes = {path[:i] for path in keep for i, c in enumerate(path) if c == "."} | keep
    for path, _ in program.module.named_modules(remove_duplicate=False):
        if not path or path in prefixes or checked.uses(path):
            continue
        if not checked.noted("unused", path):
            yield Violation("every submodule is used", path, "nothing in the graph calls it")


def _ties(checked: _Checked) -> Iterator[Violation]:
    """Names share a tensor exactly where the alias table says so."""
    invariant = "ties are those of the alias table"
    ties, state = checked.program.ties, checked.state
    for alias, canonical in ties.items():
        if alias not in state or canonical not in state:
            missing = alias if alias not in state else canonical
            yield Violation(invariant, alias, f"is tied to {canonical}, and {missing} is gone")
        elif state[alias] is not state[canonical]:
            yield Violation(invariant, alias, f"no longer shares its tensor with {canonical}")
    first: dict[int, str] = {}
    for name, tensor in state.items():
        root = ties.get(name, name)
        other = first.setdefault(id(tensor), root)
        if other != root:
            yield Violation(invariant, name, f"shares its tensor with {other}, untold")


def _placement(checked: _Checked) -> Iterator[Violation]:
    """All tensors are on one device."""
    devices: dict[torch.device, str] = {}
    for name, tensor in checked.state.items():
        devices.setdefault(tensor.device, name)
    if len(devices) > 1:
        said = ", ".join(f"{name} on {device}" for device, name in devices.items())
        yield Violation("all tensors are on one device", checked.program.name, said)


def _configured(checked: _Checked) -> Iterator[Violation]:
    """The tensors of a leaf module have the shapes that its configuration says."""
    invariant = "tensors have the shapes their module says"
    for path in dict.fromkeys(checked.called):
        module = checked.program.module.get_submodule(path)
        if not is_stock(module):
            continue
        try:
            config = describe(module)
            shapes = _expected_shapes(config.cls, _frozen(config.kwargs))
        except (ModelError, TypeError):
            continue
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            shape = shapes.get(name)
            if tensor is None or shape is None or tuple(tensor.shape) == shape:
                continue
            yield Violation(
                invariant,
                f"{path}.{name}",
                f"is {list(tensor.shape)}, and {config.cls.rpartition('.')[2]} "
                f"was made for {list(shape)}",
            )


def _frozen(kwargs: Any) -> tuple[tuple[str, Any], ...]:
    return tuple(kwargs.items())


@cache
def _expected_shapes(
    cls: str, kwargs: tuple[tuple[str, Any], ...]
) -> dict[str, tuple[int, ...] | None]:
    module: nn.Module = ModuleConfig(cls, dict(kwargs)).build("meta")
    tensors = {**module._parameters, **module._buffers}
    return {name: None if t is None else tuple(t.shape) for name, t in tensors.items()}


def _typed(checked: _Checked) -> Iterator[Violation]:
    """Every node has the type that its op gives for its operands' types."""
    invariant = "every node has the type its op computes"
    program = checked.program
    evaluator = Evaluator(program)
    try:
        with guarded(program):
            values: dict[fx.Node, Any] = {}
            known: dict[Hashable, Any] = {}
            for node in program.nodes:
                if node.op == "output":
                    continue
                if "val" not in node.meta:
                    yield checked.at(node, "every node has a type", 'has no meta["val"]')
                    return
                values[node] = node.meta["val"]
                if node.op == "placeholder":
                    continue
                key = type_key(node, values)
                if key is None or key not in known:
                    known[key] = evaluate(evaluator, node, values)
                value = known[key]
                if not same_type(value, values[node]):
                    yield checked.at(
                        node,
                        invariant,
                        f"is said to be {describe_value(values[node])} "
                        f"and computes {describe_value(value)}",
                    )
    except FxCompressError as error:
        yield Violation(invariant, error.what, error.reason, error.where)


RULES: Final[tuple[Rule, ...]] = (
    _well_formed,
    _signature,
    _functional,
    _alive,
    _reachable,
    _ties,
    _placement,
    _configured,
    _typed,
)
