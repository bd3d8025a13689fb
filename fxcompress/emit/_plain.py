"""The call of a program in plain Python containers, so that a reader needs no class of the model.

Parameters that hold no tensor are left out: their values are part of the graph. Classes in inputs
and outputs (Hugging Face's `ModelOutput`, dataclasses, caches) become dicts of their fields; fields
that are None are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxcompress.emit._lower.graph import share_quantizers
from fxcompress.ir._calling import CallLike
from fxcompress.ir.program import Program
from fxcompress.ir.signature import Parameter, Signature
from fxcompress.rewrite import without_masks
from fxcompress.rewrite.closing import as_emitted

__all__ = ["Call", "PlainProgram", "plain_program"]

_SEQUENCES = (tuple, list)
_SKIP = object()


@dataclass(frozen=True)
class Call:
    """Arguments of one call: positional ones, and the rest by keyword."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class PlainProgram:
    """A private copy of a program's graph, callable with plain containers, in eval mode.

    Attributes:
        module: The copy; its modules are its own, its tensors those of the program.
        signature: Plain: no constants among the parameters, no classes in the trees.
        outputs: A name for every leaf of the output, in order: `logits`, `output_0`.
        flattened: Names of the classes that became dicts or lists.
    """

    module: fx.GraphModule
    signature: Signature
    outputs: tuple[str, ...]
    flattened: tuple[str, ...]

    def call(self, leaves: Sequence[torch.Tensor]) -> Call:
        """Return the arguments that hold the given tensors.

        Parameters are positional up to the first one that must be given by name, because one
        before it was left out or because it is keyword-only.
        """
        by_name = dict(zip((i.name for i in self.signature.inputs), leaves, strict=True))
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        for parameter in self.signature.parameters:
            value = pytree.tree_unflatten(
                [by_name[str(n)] for n in parameter.leaves], parameter.tree
            )
            if parameter.kind == "VAR_POSITIONAL":
                args.extend(value)
            elif parameter.kind == "VAR_KEYWORD":
                kwargs.update(value)
            elif parameter.kind == "KEYWORD_ONLY":
                kwargs[parameter.name] = value
            else:
                args.append(value)
        return Call(tuple(args), kwargs)

    def usage(self) -> str:
        """Return how the module is called: `module(x, mask=mask)`."""
        parts = []
        for parameter in self.signature.parameters:
            if parameter.kind == "VAR_POSITIONAL":
                parts.append(", ".join(str(n) for n in parameter.leaves))
            elif parameter.kind == "VAR_KEYWORD":
                parts.append(", ".join(f"{n}={n}" for n in parameter.leaves))
            elif parameter.kind == "KEYWORD_ONLY":
                parts.append(f"{parameter.name}={parameter.name}")
            else:
                parts.append(parameter.name)
        return f"module({', '.join(part for part in parts if part)})"


def plain_program(program: Program) -> PlainProgram:
    """Return a private copy of `program` that is called with plain containers.

    Masks on weights are burned in and taps taken out: they are there for training. Attention
    that was written out for a tap is closed.
    """
    module = without_masks(as_emitted(program)).copy().module
    share_quantizers(module)
    flattened: dict[str, None] = {}
    parameters = _parameters(program.signature, flattened)
    (output,) = module.graph.find_nodes(op="output")
    leaves = list(output.args[0])
    tree = _PlainTree(flattened, drop=[leaf is None for leaf in leaves])
    value = tree.of(program.signature.output)
    kept = [leaf for leaf, dropped in zip(leaves, tree.dropped, strict=True) if not dropped]
    output.args = (tuple(kept),)
    signature = Signature(parameters, program.signature.inputs, pytree.tree_structure(value))
    module.graph._codegen = CallLike(signature)
    module.recompile()
    module.eval()
    return PlainProgram(module, signature, _output_names(value), tuple(flattened))


def _parameters(signature: Signature, flattened: dict[str, None]) -> tuple[Parameter, ...]:
    found: list[Parameter] = []
    by_name = False
    for parameter in signature.parameters:
        names = tuple(name for name in parameter.leaves if name is not None)
        if not names:
            # Whatever comes after an argument that is no longer there must be given by name.
            by_name = by_name or parameter.kind in ("POSITIONAL_ONLY", "POSITIONAL_OR_KEYWORD")
            continue
        tree = _PlainTree(flattened, drop=[name is None for name in parameter.leaves], always=True)
        value = tree.of(parameter.tree)
        kind = parameter.kind
        if by_name and kind == "POSITIONAL_OR_KEYWORD":
            kind = "KEYWORD_ONLY"
        found.append(
            replace(
                parameter,
                kind=kind,
                tree=pytree.tree_structure(value),
                leaves=names,
                constants=(None,) * len(names),
            )
        )
    return tuple(found)


class _PlainTree:
    """Builds a value of plain containers with the structure of a tree; leaves are numbers.

    Args:
        flattened: Collects the names of the classes that were replaced.
        drop: For each leaf, whether a container may leave it out.
        always: Leave such leaves out of tuples and dicts too, not only of classes.
    """

    def __init__(
        self, flattened: dict[str, None], drop: Sequence[bool], *, always: bool = False
    ) -> None:
        self.flattened, self.drop, self.always = flattened, drop, always
        self.dropped = [False] * len(drop)
        self._next: Iterator[int] = iter(range(len(drop)))

    def of(self, tree: pytree.TreeSpec) -> Any:
        value = self._of(tree, droppable=False)
        return None if value is _SKIP else value

    def _of(self, tree: pytree.TreeSpec, *, droppable: bool) -> Any:
        if tree.is_leaf():
            index = next(self._next)
            if self.drop[index] and (droppable or self.always):
                self.dropped[index] = True
                return _SKIP
            return index
        plain = tree.type in _SEQUENCES or tree.type in pytree.BUILTIN_TYPES
        children = [self._of(child, droppable=not plain) for child in tree.children()]
        if tree.type in _SEQUENCES:
            return tree.type(child for child in children if child is not _SKIP)
        names = _field_names(tree)
        if not plain:
            self.flattened[tree.type.__name__] = None
        if names is None:
            return [child for child in children if child is not _SKIP]
        return {
            name: child for name, child in zip(names, children, strict=True) if child is not _SKIP
        }


def _field_names(tree: pytree.TreeSpec) -> list[Any] | None:
    """Return the keys of a mapping or the fields of a class, or None for what has none."""
    context = tree.context
    fields = getattr(tree.type, "_fields", None)
    if fields is not None:
        return list(fields)
    if isinstance(context, (list, tuple)) and len(context) == tree.num_children:
        return list(context) if all(isinstance(name, (str, int)) for name in context) else None
    return None


def _output_names(value: Any) -> tuple[str, ...]:
    names: list[str] = []
    for path, _ in pytree.tree_flatten_with_path(value)[0]:
        parts = [
            re.sub(r"\W", "_", str(getattr(key, "key", getattr(key, "idx", key)))) for key in path
        ]
        name = "_".join(parts)
        names.append(name if name and not name[0].isdigit() else "_".join(["output", *parts]))
    return tuple(_distinct(names))


def _distinct(names: Sequence[str]) -> Iterator[str]:
    taken: set[str] = set()
    for name in names:
        unique, count = name, 1
        while unique in taken:
            count += 1
            unique = f"{name}_{count}"
        taken.add(unique)
        yield unique
