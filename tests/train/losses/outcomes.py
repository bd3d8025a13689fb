"""Outcomes of small sizes, and losses of them by their options."""

import torch
from pydantic import TypeAdapter

from fxcompress.train.loss_config import LossConfig
from fxcompress.train.losses import Outcome, make_terms

ADAPTER = TypeAdapter(LossConfig)


def normal(seed, *shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def probabilities(seed, *shape):
    return normal(seed, *shape).softmax(-1)


def term(options, shapes=None):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        (made,) = make_terms((ADAPTER.validate_python(options),), shapes=shapes)
    if made.module is not None:
        made.module.double()
    return made


def loss(options, outcome, progress=0.0):
    return term(options, shapes_of(outcome)).loss(outcome, progress)


def shapes_of(outcome):
    return {
        name: (tuple(outcome.raw_taps[name].shape), tuple(each.shape))
        for name, each in outcome.teacher_taps.items()
    }


def of_logits(z, v=None, target=None, batch=()):
    return Outcome(z, v, batch, target)


def of_taps(ours, theirs, *, batch=(), target=None):
    """Return an outcome of taps without projectors; a tensor alone is the tap `a`."""
    ours, theirs = (t if isinstance(t, dict) else {"a": t} for t in (ours, theirs))
    return Outcome(None, None, batch, target, ours, theirs, ours)
