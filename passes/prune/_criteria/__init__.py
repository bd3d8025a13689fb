"""Scores of the indices of axes: one file per kind of criterion, and `score` for all of them."""

from passes.prune._criteria.score import score, unscorable

__all__ = ["score", "unscorable"]
