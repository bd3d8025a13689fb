"""Why something that looks like a mixture of experts is left alone."""

from __future__ import annotations

from torch import fx

__all__ = ["Miss", "NearMiss"]


class Miss(Exception):
    """What keeps a candidate from being lifted.

    Attributes:
        reason: In words, for the plan and the report.
        nodes: The nodes that explain it.
    """

    def __init__(self, reason: str, *nodes: fx.Node) -> None:
        super().__init__(reason)
        self.reason, self.nodes = reason, nodes


class NearMiss(Miss):
    """One condition failed where all others held: what is worth telling before other reasons."""
