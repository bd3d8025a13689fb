"""Shrink a Program as a decision says, and check that nothing else happened to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from fxcompress.analysis.masked import masked_difference
from fxcompress.axes import Analysis, Axis, analyze, kept
from fxcompress.axes.terms import axes_of
from fxcompress.errors import PassError
from fxcompress.pipeline._probes import probes
from fxcompress.pipeline.proofs import has_values
from fxcompress.rewrite import GraphRewriter
from fxcompress.rewrite.shrink import shrink

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from passes.prune.channels import ChannelsDecision

__all__ = ["KEEP", "VALUE", "apply", "check", "check_masked", "shrunk"]

KEEP, VALUE = "keep/", "value/"
"""Prefixes of a decision's arrays: kept indices by axis, and new values by tensor."""

_TOLERANCE, _HALF_TOLERANCE = 1e-3, 0.25
"""Parts of an output's standard deviation; a wrong channel costs far more, rounding far less."""

Keep = dict[Axis, NDArray[np.int64]]


def shrunk(program: Program, analysis: Analysis, keep: Mapping[Axis, NDArray[np.int64]]) -> Program:
    """Return a Program that keeps only some indices of some axes."""
    rewriter = GraphRewriter(program)
    with torch.no_grad():
        shrink(rewriter, analysis, keep)
        return rewriter.finish()


def apply(rewriter: GraphRewriter, decision: ChannelsDecision) -> None:
    """Shrink the axes of a decision, and set what was compensated.

    Raises:
        PassError: The decision is about other axes than the Program has.
    """
    for declined in decision.declined:
        rewriter.decline(declined.node, declined.reason, declined.because_of)
    analysis = analyze(rewriter.before, signature=decision.signature)
    shrink(rewriter, analysis, _keep(analysis, decision))
    for name, value in _arrays(decision, VALUE).items():
        rewriter.set_tensor(name, torch.as_tensor(value), tied=True)


def check(before: Program, after: Program, decision: ChannelsDecision) -> None:
    """Check masked equivalence, that tensors are slices of what they were, and no other changed.

    Raises:
        PassError: One of these does not hold.
    """
    still = before.copy()
    still.module.eval()
    analysis = analyze(still, signature=decision.signature)
    keep = _keep(analysis, decision)
    _check_slices(before, after, analysis, keep, frozenset(_arrays(decision, VALUE)))
    if has_values(before):
        pruned = shrunk(still, analysis, keep) if _arrays(decision, VALUE) else after
        check_masked(analysis, keep, pruned)


def check_masked(
    analysis: Analysis, keep: Mapping[Axis, NDArray[np.int64]], after: Program
) -> None:
    """Check that the result computes what the original does with the removed indices at zero."""
    private = after.copy()
    private.module.eval()
    dtypes = {t.dtype for t in after.state().values() if t.is_floating_point()}
    tolerance = _HALF_TOLERANCE if any(d.itemsize < 4 for d in dtypes) else _TOLERANCE
    for leaves in probes(analysis.program, 0):
        error = masked_difference(analysis, keep, private, leaves)
        if not error <= tolerance:
            raise PassError(
                "the pruned model does not compute what the masked one does",
                reason=f"an output differs by {error:.2g} of its standard deviation, and "
                f"{tolerance:g} is allowed, on inputs of size "
                + ", ".join("x".join(map(str, leaf.shape)) for leaf in leaves),
                hint="a rule for one of the model's ops is wrong: prune fewer axes at a time to "
                "find it, exclude them, and report it",
            )


def _check_slices(
    before: Program,
    after: Program,
    analysis: Analysis,
    keep: Mapping[Axis, NDArray[np.int64]],
    compensated: frozenset[str],
) -> None:
    new = after.state()
    for name, old in before.state().items():
        now = new.get(name)
        if now is None or before.ties.get(name, name) in compensated:
            continue
        expected = _sliced(old, analysis, name, keep)
        same = now is expected or (now.shape == expected.shape and _equal(now, expected))
        if not same and (isinstance(old, torch.nn.Parameter) or expected is not old):
            raise PassError(
                f"{name} is not what was kept of it",
                reason=f"it should be {tuple(expected.shape)} of {tuple(old.shape)}, bit by bit; "
                f"it is {tuple(now.shape)}",
                where=name,
            )


def _keep(analysis: Analysis, decision: ChannelsDecision) -> Keep:
    found: Keep = {}
    for name, indices in _arrays(decision, KEEP).items():
        axis = analysis.axis(name)
        entry = next((each for each in decision.axes if each.name == name), None)
        if entry is None or entry.size != axis.size or len(indices) != entry.kept:
            raise PassError(
                f"the decision does not fit {name}",
                reason=f"it has {axis.size} indices here, and another number was decided on",
                hint="run without --locked to decide again",
                where=name,
            )
        found[axis] = np.asarray(indices, dtype=np.int64)
    return found


def _arrays(decision: ChannelsDecision, prefix: str) -> dict[str, Any]:
    return {
        name.removeprefix(prefix): array
        for name, array in decision.arrays.items()
        if name.startswith(prefix)
    }


def _sliced(
    tensor: torch.Tensor, analysis: Analysis, name: str, keep: Mapping[Axis, NDArray[np.int64]]
) -> torch.Tensor:
    """Return what stays of a tensor; the tensor itself if that is all of it."""
    for dim, term in enumerate(analysis.places(name)):
        if any(axis in keep for axis in axes_of(term)):
            index = torch.from_numpy(kept(term, keep)).to(tensor.device)
            tensor = tensor.detach().index_select(dim, index)
    return tensor


def _equal(left: torch.Tensor, right: torch.Tensor) -> bool:
    if left.is_meta or right.is_meta:
        return left.is_meta == right.is_meta
    return bool(torch.equal(left, right))
