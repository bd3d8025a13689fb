"""Experts: the one form in which a mixture of experts stands in a graph.

    router: linear → softmax → top-k (→ renormalise)       y = experts(x, weights, indices)

The router stays ordinary nodes, so that its weights and choices are seen, changed and quantised
like any others. The leaf is what is left: each token through its own experts, and the weighted sum.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from fxcompress.errors import UsageError
from fxcompress.nn._expert_activations import ACTIVATIONS, GATES, check_activation

__all__ = ["ACTIVATIONS", "GATES", "Experts"]

# What a grouped product of a GPU needs: rows that start at a multiple of 16 bytes.
_ALIGNMENT: Final = 16


_BIASES: Final = ("gate", "up", "down")

_Stacks: TypeAlias = "tuple[Tensor | None, ...]"


class Experts(nn.Module):
    """Send each token through its own experts and sum what they make of it, weighted.

        y = Σ_k weights_k · down_e(act(gate_e x) · up_e x),   e = indices_k

    without a gate `down_e(act(up_e x))`. With a limit ℓ, `gate_e x` is cut off above ℓ and `up_e x`
    above ℓ and below −ℓ. While training, `dropout` of what `down_e` reads is dropped. All
    parameters and `weights` have gradients; those of an expert that no token chose are zeros. A
    token may choose one expert more than once.

    Parameters: `gate` and `up` `[experts, hidden, width]`, `down` `[experts, width, hidden]`,
    `gate_bias` and `up_bias` `[experts, hidden]`, `down_bias` `[experts, width]`; `gate` and the
    biases may be None.

    Args:
        experts: How many there are.
        width: Features of a token.
        hidden: Features between an expert's matrices.
        activation: A key of `ACTIVATIONS`, or with a gate of `GATES`.
        gated: Whether there is a gate.
        biases: Which of `gate`, `up` and `down` have a bias.
        limit: Where `gate` is cut off above and `up` both ways; None for nowhere.
        dropout: How likely each value before `down` is dropped while training.

    Raises:
        UsageError: The activation is not known, or needs a gate, as a limit does; a bias of a
            matrix that is not.
    """

    gate: Tensor | None
    up: Tensor
    down: Tensor
    gate_bias: Tensor | None
    up_bias: Tensor | None
    down_bias: Tensor | None

    def __init__(
        self,
        experts: int,
        width: int,
        hidden: int,
        activation: str = "silu",
        gated: bool = True,
        biases: Sequence[str] = (),
        *,
        limit: float | None = None,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_activation(activation, gated)
        if limit is not None and not gated:
            raise UsageError("a limit of experts needs a gate", reason="it cuts gate and up off")
        wrong = [name for name in biases if name not in _BIASES[not gated :]]
        if wrong:
            raise UsageError(
                f"experts have no {wrong[0]} that could have a bias",
                reason=f"their matrices are {', '.join(_BIASES[not gated :])}",
            )
        self.activation, self.limit, self.dropout = activation, limit, dropout
        inner, outer = (experts, hidden, width), (experts, width, hidden)
        for name, shape in (("gate", inner), ("up", inner), ("down", outer)):
            held = gated or name != "gate"
            matrix = torch.empty(shape, device=device, dtype=dtype)
            bias = torch.zeros(shape[:2], device=device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(matrix) if held else None)
            self.register_parameter(f"{name}_bias", nn.Parameter(bias) if name in biases else None)
        with torch.no_grad():
            for matrix in self.matrices():
                nn.init.uniform_(matrix, -(matrix.shape[2] ** -0.5), matrix.shape[2] ** -0.5)

    @classmethod
    def of(
        cls,
        *,
        up: Tensor,
        down: Tensor,
        gate: Tensor | None = None,
        gate_bias: Tensor | None = None,
        up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
        activation: str = "silu",
        limit: float | None = None,
        dropout: float = 0.0,
    ) -> Experts:
        """Return experts of these matrices, which become parameters unless they are.

        Raises:
            UsageError: The shapes do not fit each other, or the activation is not known.
        """
        given = {"gate": gate, "up": up, "down": down, "gate_bias": gate_bias,
                 "up_bias": up_bias, "down_bias": down_bias}  # fmt: skip
        experts, hidden, width = up.shape
        biases = tuple(name for name in _BIASES if given[f"{name}_bias"] is not None)
        made = cls(
            experts,
            width,
            hidden,
            activation,
            gate is not None,
            biases,
            limit=limit,
            dropout=dropout,
            device="meta",
        )
        for name, tensor in given.items():
            if tensor is None:
                continue
            wanted = getattr(made, name).shape
            if tensor.shape != wanted:
                raise UsageError(
                    f"{name} of experts has the shape {list(tensor.shape)}",
                    reason=f"with an up of {list(up.shape)} it is {list(wanted)}",
                )
            own = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)
            made.register_parameter(name, own)
        return made

    @property
    def experts(self) -> int:
        """How many experts there are."""
        return self.up.shape[0]

    @property
    def hidden(self) -> int:
        """Features between an expert's matrices."""
        return self.up.shape[1]

    @property
    def width(self) -> int:
        """Features of a token."""
        return self.up.shape[2]

    @property
    def gated(self) -> bool:
        """Whether there is a gate."""
        return self.gate is not None

    @property
    def biases(self) -> tuple[str, ...]:
        """Which matrices have a bias."""
        return tuple(name for name in _BIASES if getattr(self, f"{name}_bias") is not None)

    @property
    def settings(self) -> dict[str, Any]:
        """What `of` takes beside tensors to make experts that compute alike."""
        return {"activation": self.activation, "limit": self.limit, "dropout": self.dropout}

    def matrices(self) -> tuple[Tensor, ...]:
        """Return gate (where there is one), up and down."""
        return (self.up, self.down) if self.gate is None else (self.gate, self.up, self.down)

    def forward(self, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        """Return the weighted sum of each token's experts.

        Args:
            x: Tokens `[..., width]`.
            weights: `[..., k]`.
            indices: Experts of each token `[..., k]`, from 0.

        Returns:
            `[..., width]`, of the dtype of `x`.
        """
        return self._mixed(x, weights, indices, self._all())

    def apply_expert(self, expert: int, x: Tensor) -> Tensor:
        """Return what one expert makes of rows `[rows, width]`, unweighted."""
        own: Any = (None if p is None else p[expert] for p in self._all())
        return self._one(x, *own)

    def extra_repr(self) -> str:
        """Return the arguments."""
        shape = f"experts={self.experts}, width={self.width}, hidden={self.hidden}"
        rest = f"activation={self.activation!r}, gated={self.gated}"
        held = {"biases": self.biases, "limit": self.limit, "dropout": self.dropout}
        return ", ".join([shape, rest, *(f"{name}={own}" for name, own in held.items() if own)])

    def _mixed(self, x: Tensor, weights: Tensor, indices: Tensor, stacks: _Stacks) -> Tensor:
        """Return what `forward` does, by the tensors of all experts as `_all` gives them."""
        k = indices.shape[-1]
        tokens, chosen = x.reshape(-1, x.shape[-1]), indices.reshape(-1)
        # Tokens in runs of one expert each; their order in a run changes nothing.
        order = torch.argsort(chosen)
        rows = tokens[torch.div(order, k, rounding_mode="floor")]
        made = self._runs(rows, chosen, stacks)
        made = made[torch.argsort(order)].reshape(-1, k, made.shape[-1])
        summed = (made * weights.reshape(-1, k, 1)).sum(1)
        return summed.to(x.dtype).reshape(x.shape)

    def _runs(self, rows: Tensor, chosen: Tensor, stacks: _Stacks) -> Tensor:
        """Return each row through its expert; `rows` are sorted by it, `chosen` is not."""
        if torch.compiler.is_compiling():
            return self._static_runs(rows, _counts(chosen, self._count(stacks)), stacks)
        if rows.is_meta or isinstance(rows, FakeTensor):
            # Nobody knows the runs: types and costs are those of any, such as one run of the first.
            return self._one(rows, *next(self._each(stacks)))
        counts = _counts(chosen, self._count(stacks))
        if self._is_grouped(rows, stacks):
            return self._grouped(rows, counts, stacks)
        runs = torch.split(rows, counts.tolist())
        return torch.cat(
            [self._one(run, *own) for run, own in zip(runs, self._each(stacks), strict=True)]
        )

    def _static_runs(self, rows: Tensor, counts: Tensor, stacks: _Stacks) -> Tensor:
        """Return the same as a fixed number of slices and products, which every format has."""
        check: Any = torch._check
        made: list[Tensor] = []
        start: Any = 0
        for expert, own in enumerate(self._each(stacks)):
            count: Any = counts[expert].item()
            # What counts of tokens are, and torch.export cannot know.
            check(count >= 0)
            check(start + count <= rows.shape[0])
            made.append(self._one(rows.narrow(0, start, count), *own))
            start = start + count
        joined = torch.cat(made)
        check(joined.shape[0] == rows.shape[0])
        return joined

    def _grouped(self, rows: Tensor, counts: Tensor, stacks: _Stacks) -> Tensor:
        """Return the same by one grouped product per matrix, which need not wait for the counts."""
        ends = counts.cumsum(0, dtype=torch.int32)

        def product(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
            made = F.grouped_mm(x, matrix.transpose(1, 2), offs=ends)
            if bias is None:
                return made
            return made + bias.repeat_interleave(counts, 0, output_size=x.shape[0])

        gate, up, down, gate_bias, up_bias, down_bias = stacks
        assert up is not None, "experts have one"
        assert down is not None, "experts have one"
        gated = None if gate is None else product(rows, gate, gate_bias)
        inner = self._activated(gated, product(rows, up, up_bias))
        return product(inner, down, down_bias)

    def _is_grouped(self, rows: Tensor, stacks: _Stacks) -> bool:
        """Whether a grouped product can be used and gains: on a GPU, in bfloat16, aligned."""
        if rows.device.type != "cuda" or torch.cuda.get_device_capability(rows.device) < (8, 0):
            return False
        same = all(each.dtype == rows.dtype for each in stacks[:3] if each is not None)
        size = rows.element_size()
        aligned = all(n * size % _ALIGNMENT == 0 for n in (self.width, self.hidden))
        return rows.dtype is torch.bfloat16 and same and aligned and rows.shape[0] > 0

    def _one(
        self,
        x: Tensor,
        gate: Tensor | None,
        up: Tensor,
        down: Tensor,
        gate_bias: Tensor | None,
        up_bias: Tensor | None,
        down_bias: Tensor | None,
    ) -> Tensor:
        gated = None if gate is None else F.linear(x, gate, gate_bias)
        return F.linear(self._activated(gated, F.linear(x, up, up_bias)), down, down_bias)

    def activated(self, gate: Tensor | None, up: Tensor) -> Tensor:
        """Return what the last matrix reads, before any dropout."""
        if gate is None:
            return ACTIVATIONS[self.activation](up)
        if self.limit is not None:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        if self.activation in GATES:
            return GATES[self.activation](gate, up)
        return ACTIVATIONS[self.activation](gate) * up

    def _activated(self, gate: Tensor | None, up: Tensor) -> Tensor:
        inner = self.activated(gate, up)
        # Without one there is no op, so that what is exported has none either.
        return F.dropout(inner, self.dropout, self.training) if self.dropout else inner

    def _all(self) -> _Stacks:
        biases = (self.gate_bias, self.up_bias, self.down_bias)
        return (self.gate, self.up, self.down, *biases)

    def _count(self, stacks: _Stacks) -> int:
        """Return how many experts there are."""
        up = stacks[1]
        assert up is not None, "experts have one"
        return up.shape[0]

    def _each(self, stacks: _Stacks) -> Iterator[tuple[Any, ...]]:
        """Yield what `_one` takes after the tokens, expert by expert."""
        # One unbind: its gradient is one stack, where each index would fill a whole tensor.
        count = self._count(stacks)
        unbound: list[Any] = [[None] * count if p is None else p.unbind(0) for p in stacks]
        return zip(*unbound, strict=True)


def _counts(chosen: Tensor, experts: int) -> Tensor:
    """Return how many tokens chose each expert, `[experts]`."""
    numbers = torch.arange(experts, device=chosen.device)
    return (chosen.unsqueeze(-1) == numbers).sum(0)
