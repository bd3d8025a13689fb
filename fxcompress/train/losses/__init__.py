"""Losses by name: each a sum over what counts and its count, so that no batch's size matters."""

from fxcompress.train.losses._outcome import LossFunction, Outcome, Term, Total
from fxcompress.train.losses._table import LOSSES, Row, make_terms
from fxcompress.train.losses._taps import Shapes
from fxcompress.train.losses.distributions import soft_labels

__all__ = [
    "LOSSES",
    "LossFunction",
    "Outcome",
    "Row",
    "Shapes",
    "Term",
    "Total",
    "make_terms",
    "soft_labels",
]
