"""Experts whose matrices are operands, as those of quantised ones are."""

from __future__ import annotations

from torch import Tensor

from fxcompress.nn.experts import Experts

__all__ = ["OperandExperts"]


class OperandExperts(Experts):
    """`Experts` whose matrices are operands: what a `StackQuantize` gives of its parameters.

    The parameters stay under their own names, read by `get_attr` nodes.
    """

    @classmethod
    def over(cls, experts: Experts) -> OperandExperts:
        """Return the operand form of a leaf, with the same parameter objects."""
        made = cls.__new__(cls)
        made.__dict__ = {
            key: value.copy() if isinstance(value, (dict, set)) else value
            for key, value in experts.__dict__.items()
        }
        return made

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        weights: Tensor,
        indices: Tensor,
        up: Tensor,
        down: Tensor,
        gate: Tensor | None = None,
    ) -> Tensor:
        """Return the weighted sum of each token's experts, by matrices of the parameters' shapes.

        The rest is as in `Experts`.
        """
        biases = (self.gate_bias, self.up_bias, self.down_bias)
        return self._mixed(x, weights, indices, (gate, up, down, *biases))
