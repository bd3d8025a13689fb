"""How experts are used: counted on calibration data at the nodes that choose and weigh."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from fxcompress.errors import NumericsError
from passes._observe import observe
from passes.moe._routing import Call, Mixture, choice_of, scores_of

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Batch

__all__ = ["Use", "measure"]


@dataclass
class Use:
    """What calibration data say of one mixture; padding does not count.

    Attributes:
        counts: How many tokens chose each expert, `[experts]`.
        mass: The sum of their weights, `[experts]`.
        spread: The smallest and the largest weight that an expert had in a token, 0 where it was
            not chosen, `[2, experts]`.
        sums: The smallest and the largest sum of a token's weights.
        tokens: How many there were.
        products: Σ over tokens of the products of scores, `[experts, experts]`; None where experts
            are not chosen by a top-k.
        inputs: The first tokens, `[tokens, width]`.
    """

    counts: Tensor
    mass: Tensor
    spread: Tensor
    sums: tuple[float, float] = (float("inf"), float("-inf"))
    tokens: int = 0
    products: Tensor | None = None
    inputs: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, experts: int) -> Use:
        """Return what no token says of so many experts."""
        bounds = torch.full((2, experts), float("inf"), dtype=torch.float64)
        bounds[1] = -bounds[1]
        zeros = torch.zeros(experts, dtype=torch.float64)
        return cls(zeros, zeros.clone(), bounds)

    @property
    def shares(self) -> Tensor:
        """The part of all choices that each expert has, `[experts]`."""
        return self.counts / self.counts.sum().clamp(min=1)

    @property
    def means(self) -> Tensor:
        """The mean weight of each expert over all tokens, `[experts]`."""
        return self.mass / max(self.tokens, 1)

    def add(self, weights: Tensor, indices: Tensor) -> None:
        """Count the choices `[tokens, k]` of some tokens."""
        if not len(weights):
            return
        experts = len(self.counts)
        each = weights.new_zeros(len(weights), experts).scatter_add_(1, indices, weights)
        self.counts += indices.flatten().bincount(minlength=experts)
        self.mass += each.sum(0)
        self.spread = torch.stack(
            [
                torch.minimum(self.spread[0], each.amin(0)),
                torch.maximum(self.spread[1], each.amax(0)),
            ]
        )
        total = weights.sum(1)
        self.sums = (min(self.sums[0], float(total.min())), max(self.sums[1], float(total.max())))
        self.tokens += len(weights)

    def keep(self, tokens: Tensor, most: int) -> None:
        """Keep the first tokens, `most` in all."""
        left = most - sum(map(len, self.inputs))
        if left > 0:
            self.inputs.append(tokens[:left].clone())

    def similarity(self) -> Tensor | None:
        """Return the cosine of each two experts' scores over all tokens, `[experts, experts]`."""
        if self.products is None:
            return None
        length = self.products.diagonal().clamp(min=1e-300).sqrt()
        return self.products / length / length[:, None]


def measure(
    program: Program,
    mixtures: Sequence[Mixture],
    batches: Iterable[Batch],
    *,
    inputs: int = 0,
) -> dict[str, Use]:
    """Return path -> how its experts are used.

    Args:
        program: The model.
        mixtures: Which of its experts.
        batches: Calibration data.
        inputs: How many tokens to keep of each.

    Raises:
        DataError: There are no batches.
        NumericsError: A weight is NaN.
    """
    found = {each.path: Use.of(each.experts.experts) for each in mixtures}
    mask: list[Tensor | None] = [None]
    observers: dict[fx.Node, list[Callable[[Any], None]]] = {}
    for mixture in mixtures:
        for call in mixture.calls:
            _watch(call, mixture.path, found[mixture.path], mask, observers, inputs)
    observe(program, _masked(batches, mask), {n: _all(each) for n, each in observers.items()})
    return found


def _watch(
    call: Call,
    path: str,
    use: Use,
    mask: list[Tensor | None],
    observers: dict[fx.Node, list[Callable[[Any], None]]],
    inputs: int,
) -> None:
    seen: dict[fx.Node, Tensor] = {}

    def remember(node: fx.Node) -> None:
        observers.setdefault(node, []).append(lambda value: seen.__setitem__(node, value))

    def count(_: Any) -> None:
        k = seen[call.indices].shape[-1]
        weights = _kept(seen[call.weights].reshape(-1, k).double(), mask[0])
        if bool(weights.isnan().any()):
            raise NumericsError("a weight of an expert is NaN", where=path)
        use.add(weights, _kept(seen[call.indices].reshape(-1, k), mask[0]))
        if inputs:
            use.keep(_kept(seen[call.x].flatten(0, -2), mask[0]), inputs)
        if scores is not None:
            rows = _kept(seen[scores].flatten(0, -2).double(), mask[0])
            product = rows.T @ rows
            use.products = product if use.products is None else use.products + product
        seen.clear()

    choice = choice_of(call.indices)
    scores = None if choice is None else scores_of(choice)
    if scores is not None and scores.meta["val"].shape[-1] != len(use.counts):
        # Merged before: several numbers of the router stand for one expert.
        scores = None
    for node in {
        call.weights,
        call.indices,
        *([call.x] if inputs else ()),
        *([scores] if scores is not None else ()),
    }:
        remember(node)
    observers.setdefault(call.node, []).append(count)


def _all(observers: Sequence[Callable[[Any], None]]) -> Callable[[Any], None]:
    def call(value: Any) -> None:
        for each in observers:
            each(value)

    return call


def _kept(rows: Tensor, mask: Tensor | None) -> Tensor:
    """Return the rows that are no padding."""
    return rows[mask] if mask is not None and len(mask) == len(rows) else rows


def _masked(batches: Iterable[Batch], mask: list[Tensor | None]) -> Iterator[Batch]:
    """Yield batches, and say of each which of its tokens count."""
    for batch in batches:
        found = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        mask[0] = found.flatten() != 0 if isinstance(found, Tensor) and found.dim() == 2 else None
        yield batch
