"""Hashes that say whether two Programs are the same: structure, and weights tensor by tensor."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from fxcompress.ir._format import Spelling, type_text
from fxcompress.ir.text import text_of

if TYPE_CHECKING:
    from fxcompress.ir.program import Program

__all__ = ["Fingerprint", "fingerprint", "hash_tensor"]

# 16 MiB at a time keeps a strided or remote tensor from being copied whole.
_CHUNK = 1 << 24


@dataclass(frozen=True)
class Fingerprint:
    """SHA-256 hashes (hex) of a program.

    Attributes:
        structure: Of the graph: ops, operands, attributes, types, state names, ties, signature.
        weights: Of all tensors together.
        tensors: Of every parameter and buffer, by qualified name.
    """

    structure: str
    weights: str
    tensors: Mapping[str, str] = field(repr=False)

    @property
    def digest(self) -> str:
        """One hash over both."""
        return hashlib.sha256((self.structure + self.weights).encode()).hexdigest()

    @property
    def short(self) -> str:
        """The first 8 digits of a hash over both."""
        return self.digest[:8]

    def changed(self, other: Fingerprint) -> tuple[str, ...]:
        """Return the sorted names of tensors that differ, or that only one of the two has."""
        names = self.tensors.keys() | other.tensors.keys()
        return tuple(sorted(n for n in names if self.tensors.get(n) != other.tensors.get(n)))


def hash_tensor(tensor: torch.Tensor) -> str:
    """Return the hash of a tensor's dtype, shape and bytes; of dtype and shape alone on meta."""
    digest = hashlib.sha256(f"{tensor.dtype}{list(tensor.shape)}".encode())
    if tensor.is_meta:
        return digest.hexdigest()
    flat = tensor.detach()
    flat = flat.view(-1) if flat.is_contiguous() else flat.reshape(-1)
    step = max(1, _CHUNK // max(1, flat.element_size()))
    for start in range(0, flat.numel(), step):
        part = flat[start : start + step].cpu().resolve_conj().resolve_neg().contiguous()
        digest.update(part.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fingerprint(program: Program) -> Fingerprint:
    """Return the hashes of a program's structure and weights; no tensor is copied whole.

    Equal in every process and whatever FX calls the nodes.
    """
    text = text_of(program, state=False)
    structure = hashlib.sha256()
    for line in (*map(str, text.nodes), text.returns):
        structure.update(f"{line}\n".encode())
    tensors: dict[str, str] = {}
    weights = hashlib.sha256()
    seen: dict[int, str] = {}
    for name, tensor in sorted(program.state().items()):
        digest = seen.get(id(tensor))
        if digest is None:
            digest = seen[id(tensor)] = hash_tensor(tensor)
        kind = "parameter" if isinstance(tensor, torch.nn.Parameter) else "buffer"
        structure.update(
            f"{name} {kind} {type_text(tensor)} {program.ties.get(name, '')}\n".encode()
        )
        weights.update(f"{name} {digest}\n".encode())
        tensors[name] = digest
    structure.update(_calling(program).encode())
    return Fingerprint(structure.hexdigest(), weights.hexdigest(), tensors)


def _calling(program: Program) -> str:
    signature = program.signature
    inputs = [(t.name, str(t.dtype), t.shape, t.parameter, t.path) for t in signature.inputs]
    # An object's repr may hold its address, which is no part of the structure.
    leaves = [
        (p.name, p.kind, p.leaves, [Spelling().literal(c) for c in p.constants])
        for p in signature.parameters
    ]
    return f"{inputs}\n{leaves}\n{signature.output.num_leaves}\n"
