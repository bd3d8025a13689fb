"""A private copy of a Program that is measured and pruned, and which of its weights are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from torch import Tensor, fx

from fxcompress.ir.naming import node_ids
from fxcompress.nn import Mask
from fxcompress.rewrite import GraphRewriter
from fxcompress.rewrite.edits import Declined
from passes._layers.weights import Reader, Weight, find_weights

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from passes.prune._sparsity.options import SparsityOptions
    from passes.prune._sparsity.patterns import Pattern

__all__ = ["Candidates"]


@dataclass
class Candidates:
    """What is pruned, of a copy.

    Attributes:
        scratch: Holds the copy; SparseGPT prunes it on the way.
        options: As given.
        pattern: Where zeros may go.
        weights: Those that can have such zeros, in graph order.
        declined: Layers that stay dense, with reasons.
        ids: Ids of the copy's nodes.
    """

    scratch: GraphRewriter
    options: SparsityOptions
    pattern: Pattern
    weights: list[Weight]
    declined: list[Declined]
    ids: Mapping[fx.Node, str]

    @classmethod
    def of(cls, program: Program, options: SparsityOptions, pattern: Pattern) -> Candidates:
        """Find the weights of the selected layers.

        Raises:
            SelectorError: The selection fits no layer, or not as many as expected.
        """
        scratch = GraphRewriter(program)
        weights, declined = find_weights(scratch.program, options)
        candidates = cls(scratch, options, pattern, [], list(declined), node_ids(scratch.program))
        for weight in weights:
            shape = weight.form.matrices(candidates.value(weight)).shape
            reason = pattern.obstacle(weight, shape)
            if reason is None:
                candidates.weights.append(weight)
            else:
                candidates.decline(weight, reason)
        return candidates

    def value(self, weight: Weight) -> Tensor:
        """Return the weight as it is now."""
        return self.scratch.get_tensor(weight.tensor)

    def mask(self, weight: Weight) -> Tensor | None:
        """Return the mask that a weight has already, True where kept."""
        if weight.mask is None:
            return None
        return cast(Mask, self.scratch.get_module(weight.mask)).mask

    def fixed(self, weight: Weight) -> Tensor | None:
        """Return the entries that a mask holds at zero already, `[groups, out, columns]`."""
        mask = self.mask(weight)
        return None if mask is None else ~weight.form.rows(mask)

    def readers(self) -> dict[fx.Node, tuple[Weight, Reader]]:
        """Return every layer of the weights."""
        return {reader.node: (each, reader) for each in self.weights for reader in each.readers}

    def decline(self, weight: Weight, reason: str) -> None:
        """Leave the layers of a weight dense."""
        self.declined += [
            Declined(node=self.ids[each.node], reason=reason) for each in weight.readers
        ]
