"""What a reader of a captured Program must know about state that it left out or fixed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import fx, nn

from fxcompress.errors import CaptureError
from fxcompress.ir._recorder._inputs import BoundCall
from fxcompress.ir._recorder._state import ModelState
from fxcompress.ir.program import Note

__all__ = [
    "changed_state",
    "check_opaque",
    "fixed_sizes",
    "kept_opaque",
    "stochastic_calls",
    "unused_state",
]


def check_opaque(model: nn.Module, patterns: Iterable[str]) -> None:
    """Check that every glob in `opaque` names a module.

    Raises:
        CaptureError: One matches nothing.
    """
    paths = [path for path, _ in model.named_modules() if path]
    for pattern in patterns:
        if not any(fnmatchcase(path, pattern) for path in paths):
            close = difflib.get_close_matches(pattern, paths, n=3, cutoff=0.4)
            raise CaptureError(
                f"opaque {pattern!r} matches no module of {type(model).__name__}",
                reason="a glob is compared with whole qualified names",
                hint=f"did you mean {', '.join(map(repr, close))}?" if close else "",
            )


def fixed_sizes(call: BoundCall) -> list[Note]:
    """Return one note per dynamic size that `static` fixed."""
    return [
        Note("static", name, f"fixed to {size}, the size of the example")
        for name, size in call.fixed.items()
    ]


def unused_state(state: ModelState, module: fx.GraphModule, model: nn.Module) -> list[Note]:
    """Return one note per largest module, or else tensor, of which the graph uses nothing."""
    held = set(dict(module.named_parameters(remove_duplicate=False)))
    held |= set(dict(module.named_buffers(remove_duplicate=False)))
    names = [n for n in (*state.tensors, *state.ties) if n not in state.plain]
    unused = [name for name in names if name not in held]
    used_prefixes = {prefix for name in held for prefix in _prefixes(name)}
    notes: dict[str, Note] = {}
    for name in unused:
        free = [prefix for prefix in _prefixes(name) if prefix not in used_prefixes]
        about = free[0] if free else name
        what = "no tensor of this module is" if free else "this tensor is not"
        notes.setdefault(about, Note("unused", about, f"{what} used by the graph; it was left out"))
    return list(notes.values())


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")[:-1]
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def changed_state(mutated: Iterable[str], leaves: Iterable[str]) -> list[Note]:
    """Return one note per tensor that the model changes while it runs, stock modules' own apart."""
    own = tuple(f"{path}." for path in leaves)
    return [
        Note(
            "mutation",
            name,
            "the model changes this tensor while it runs; the graph computes with the changed "
            "value and does not keep it",
        )
        for name in mutated
        if not name.startswith(own)
    ]


def kept_opaque(paths: Iterable[str], model: nn.Module) -> list[Note]:
    """Return one note per module that stays one untouched call."""
    return [
        Note("opaque", path, f"{type(model.get_submodule(path)).__name__} is kept as one call")
        for path in sorted(paths)
    ]


def stochastic_calls(graph: fx.Graph) -> list[Note]:
    """Return one note per call that draws random numbers in evaluation mode too."""
    notes = []
    for node in graph.nodes:
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        if node.op in ("call_function", "call_method") and name in _RANDOM:
            place = node.meta.get("source") or ""
            notes.append(Note("stochastic", place, f"{name} draws random numbers"))
    return notes


_RANDOM = frozenset(
    "rand randn randint randperm rand_like randn_like randint_like bernoulli multinomial normal "
    "dropout rrelu exponential uniform normal_functional random".split()
)
