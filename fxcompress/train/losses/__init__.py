"""Losses by name: each a mean over what counts, so that a batch's size changes no scale."""

from fxcompress.train.losses._outcome import Outcome, Term, Total
from fxcompress.train.losses._table import make_terms
from fxcompress.train.losses.outputs import soft_labels

__all__ = ["Outcome", "Term", "Total", "make_terms", "soft_labels"]
