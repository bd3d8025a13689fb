"""What decisions say about scaled parameters. Plain data, without torch."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

__all__ = ["Entry", "Scaled", "Shifted"]


class Entry(BaseModel):
    """A part of a decision: strict and frozen."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Scaled(Entry):
    """A parameter that is multiplied, or divided, along `dim` by `arrays[key]`.

    Attributes:
        tensor: The parameter.
        dim: The dimension with the channels.
        divided: Divided, else multiplied.
        groups: Groups of a convolution whose input channels these are: group k of dimension 0
            takes the k-th part of the factors.
    """

    tensor: str
    dim: int
    divided: bool
    groups: int = 1

    @property
    def key(self) -> str:
        """Name of the factors."""
        return f"{self.tensor}.{'divisor' if self.divided else 'factor'}"


class Shifted(Entry):
    """A bias to which `arrays[key]` is added; it is made where there is none.

    Attributes:
        tensor: The bias.
        channels: Its length.
        new: The layer has none yet.
    """

    tensor: str
    channels: int
    new: bool

    @property
    def key(self) -> str:
        """Name of what is added."""
        return f"{self.tensor}.shift"
