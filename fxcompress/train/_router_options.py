"""What losses on the routers of experts are told. Imports no torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from fxcompress.train._tap_options import Taps

__all__ = ["LoadBalance", "RouterZ"]


class Routers(Taps):
    """What every loss on routers is told: it is averaged over them."""

    taps: tuple[str, ...] = Field(
        default=(),
        strict=False,
        description="Names of taps on routers' logits; empty means all called `router_…`.",
    )

    @property
    def compares(self) -> bool:
        """Nobody teaches a router."""
        return False


class LoadBalance(Routers):
    """How unevenly tokens are spread over experts: 1 where evenly, at most experts / top_k."""

    relates: ClassVar[bool] = True
    use: Literal["load_balance"]
    top_k: int = Field(
        default=1, ge=1, description="How many of a token's likeliest experts count as its load."
    )


class RouterZ(Routers):
    """The square of the logarithm of Σ exp of a router's logits, which keeps them small."""

    use: Literal["router_z"]
