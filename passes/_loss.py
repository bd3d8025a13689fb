"""The loss whose gradients tell importance: what the labels, or the inputs, say it is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from fxcompress.errors import DataError
from fxcompress.train.data import Batch
from fxcompress.train.metrics import main_output

if TYPE_CHECKING:
    from fxcompress.ir import Program

__all__ = ["Labelled", "loss_of", "one_by_one"]

Labelled: TypeAlias = tuple[Batch, Any]
"""A batch and its labels, or None."""


def loss_of(output: Any, target: Any, batch: Batch, probe: torch.Generator | None = None) -> Tensor:
    """Return the loss of one batch, a scalar: the mean over its samples or tokens.

    - Class targets `[batch, ...]` for logits `[batch, classes, ...]`: cross entropy; -100 is left
      out.
    - Tokens `[batch, seq]` for logits `[batch, seq, vocabulary]`, as targets or as an input:
      cross entropy of each next token; those where `attention_mask` is 0 are left out.
    - Targets of the output's shape: half the squared error.
    - Without labels: half the squared norm of each sample's output; with a probe v·y instead, v
      normal, whose squared gradients are in expectation the diagonal of the Gauss–Newton matrix
      of half the squared error to the present output.

    Args:
        output: What the model returned.
        target: The labels, or None.
        batch: The inputs.
        probe: Draws v where there are no labels.

    Raises:
        DataError: Labels that fit none of these.
    """
    y = main_output(output)
    if target is None:
        tokens = _tokens(y, batch)
        if tokens is not None:
            return _next_token(y, tokens, batch)
        return _unlabelled(y, probe)
    if not isinstance(target, Tensor):
        raise DataError(
            f"the labels are a {type(target).__name__}", reason="gradients need a tensor of labels"
        )
    target = target.to(y.device)
    if target.is_floating_point():
        if target.shape == y.shape:
            error: Tensor = (y.float() - target.float()).square().reshape(len(y), -1).sum(1)
            return 0.5 * error.mean()
    elif y.dim() >= 2 and y.shape[:1] + y.shape[2:] == target.shape:
        return F.cross_entropy(y.float(), target.long())
    elif y.shape[:-1] == target.shape:
        return _next_token(y, target, batch)
    raise DataError(
        f"outputs {tuple(y.shape)} and labels {tuple(target.shape)} do not agree",
        reason="classes are [batch, ...] for logits [batch, classes, ...], tokens [batch, seq] for "
        "logits [batch, seq, vocabulary], and other labels have the shape of the output",
        hint="let the split give no labels: then the size of the output is the loss",
    )


def one_by_one(program: Program, batches: Iterable[Labelled]) -> Iterator[Labelled]:
    """Yield the samples of batches, each repeated as often as the Program's smallest batch asks.

    The mean loss over copies of a sample is that of the sample. A Program with a fixed batch gets
    the batches as they are.
    """
    size = program.signature.inputs[0].shape[:1]
    dim = program.dims.get(size[0]) if size and isinstance(size[0], str) else None
    for batch, target in batches:
        leading = _leading(batch)
        if dim is None or leading is None:
            yield batch, target
            continue
        for index in range(leading):
            yield _sample((batch, target), index, leading, max(1, dim.minimum))


def _leading(batch: Batch) -> int | None:
    values = batch.values() if isinstance(batch, Mapping) else batch
    return next((len(v) for v in values if isinstance(v, Tensor) and v.dim()), None)


def _sample(item: Labelled, index: int, size: int, copies: int) -> Labelled:
    def cut(leaf: Any) -> Any:
        whole = isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == size
        return leaf[index : index + 1].repeat_interleave(copies, 0) if whole else leaf

    made: Labelled = pytree.tree_map(cut, item)
    return made


def _tokens(y: Tensor, batch: Batch) -> Tensor | None:
    """Return the input that holds the tokens which logits `[batch, seq, vocabulary]` predict."""
    values = batch.values() if isinstance(batch, Mapping) else batch
    for value in values:
        if (
            isinstance(value, Tensor)
            and value.dtype in (torch.int64, torch.int32)
            and y.dim() == 3
            and value.shape == y.shape[:-1]
        ):
            return value if y.shape[-1] > int(value.max()) else None
    return None


def _next_token(y: Tensor, tokens: Tensor, batch: Batch) -> Tensor:
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    following = tokens.long()[:, 1:]
    if isinstance(mask, Tensor) and mask.shape == tokens.shape:
        following = following.masked_fill(mask[:, 1:] == 0, -100)
    return F.cross_entropy(y[:, :-1].flatten(0, 1).float(), following.flatten().to(y.device))


def _unlabelled(y: Tensor, probe: torch.Generator | None) -> Tensor:
    rows = y.float().reshape(len(y), -1) if y.dim() else y.float().reshape(1, 1)
    if probe is None:
        return 0.5 * rows.square().sum(1).mean()
    # One v for all rows: they are copies of one sample.
    v = torch.randn(rows.shape[1], generator=probe)
    return (rows @ v.to(rows.device)).mean()
