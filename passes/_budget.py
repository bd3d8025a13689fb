"""The budget of passes that make each of many things smaller or leave it as it is."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from fxcompress.pipeline.base import Options
from fxcompress.spec.units import Amount, Count

__all__ = ["CostBudget"]


class CostBudget(Options):
    """The most that the result may cost; a percentage is a share of what is there now."""

    parameters: Count | None = Field(default=None, description="Number of parameters.")
    macs: Count | None = Field(default=None, description="Multiply-accumulates of one sample.")

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not self.costs:
            raise ValueError("needs parameters or macs")
        return self

    @property
    def costs(self) -> dict[str, Amount]:
        """The limits by name."""
        named = {"parameters": self.parameters, "macs": self.macs}
        return {name: amount for name, amount in named.items() if amount is not None}
