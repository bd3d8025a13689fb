"""The Program: a canonical FX graph with its signature, sizes, ties and notes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import fx

from fxcompress.ir.signature import Dim, Signature

if TYPE_CHECKING:
    from torch._subclasses import FakeTensorMode

    from fxcompress.ir.diff import GraphDiff
    from fxcompress.ir.fingerprint import Fingerprint

__all__ = ["Note", "Program"]

NoteKind = Literal[
    "unused",
    "mutation",
    "assumption",
    "static",
    "opaque",
    "train-differs",
    "stochastic",
    "tracer",
    "experts",
]


@dataclass(frozen=True)
class Note:
    """Something a reader of the Program must know: its kind, what it is about, and why."""

    kind: NoteKind
    about: str
    text: str


@dataclass(frozen=True)
class Program:
    """A model as one canonical FX graph.

    A Program is a value: passes never change one, they return another. Copies share their tensors
    until a rewrite replaces them.

    Attributes:
        module: The graph and its state; an ordinary `nn.Module`, called like the original.
        name: The model's name, for texts and reports.
        signature: Inputs, their trees and sizes, and the tree of the output.
        dims: Dynamic sizes by name (`batch`, `seq`).
        ties: Alias -> canonical qualified name, for parameters and buffers that are one tensor.
        notes: What was left out, assumed or fixed.
        fake_mode: The mode in which every `meta["val"]` lives; its ShapeEnv owns the symbols.
    """

    module: fx.GraphModule
    name: str
    signature: Signature
    dims: Mapping[str, Dim]
    fake_mode: FakeTensorMode = field(repr=False, compare=False)
    ties: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[Note, ...] = ()

    @property
    def graph(self) -> fx.Graph:
        """The FX graph. Read it; change it only through `GraphRewriter`."""
        return self.module.graph

    @property
    def nodes(self) -> Iterable[fx.Node]:
        """The nodes in graph order."""
        return self.module.graph.nodes

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program like the original model."""
        return self.module(*args, **kwargs)

    def state(self) -> dict[str, torch.Tensor]:
        """Return every parameter and buffer by qualified name, non-persistent buffers included.

        Tied names appear once each, with the same tensor object.
        """
        found: dict[str, torch.Tensor] = {}
        found.update(self.module.named_parameters(remove_duplicate=False))
        found.update(self.module.named_buffers(remove_duplicate=False))
        return found

    def copy(self) -> Program:
        """Return a Program with its own graph and module tree and the same tensors."""
        from fxcompress.ir._copying import copy_module

        return replace(self, module=copy_module(self.module))

    def with_notes(self, *notes: Note) -> Program:
        """Return this Program with more notes."""
        return replace(self, notes=(*self.notes, *notes))

    def text(self, *, state: bool = True) -> str:
        """Return the golden text (`.fxg`) of the graph, with its state unless told not to."""
        from fxcompress.ir.text import to_text

        return to_text(self, state=state)

    def verify(self) -> None:
        """Check every invariant of a Program.

        Raises:
            VerifyError: One is broken; the message names the node and the invariant.
        """
        from fxcompress.ir.verify import verify

        verify(self)

    def fingerprint(self) -> Fingerprint:
        """Return the hashes of the structure and of the weights."""
        from fxcompress.ir.fingerprint import fingerprint

        return fingerprint(self)

    def diff(self, other: Program) -> GraphDiff:
        """Return what changed from this Program to the other, as typed edits."""
        from fxcompress.ir.diff import diff

        return diff(self, other)

    def save(self, path: str | Path) -> Path:
        """Write the Program to one `.fxp` file: graph and safetensors, no pickle."""
        from fxcompress.ir.storage import save

        return save(self, Path(path))

    @staticmethod
    def load(path: str | Path) -> Program:
        """Read a `.fxp` file.

        Raises:
            ModelError: The file is missing, damaged, or of a newer format.
        """
        from fxcompress.ir.storage import load

        return load(Path(path))
