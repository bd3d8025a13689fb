"""Bring a tapped tensor of the student to the shape of the teacher's: resize, then project."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from fxcompress.errors import UsageError
from fxcompress.train._feed import seed_of
from fxcompress.train.joint.options import ProjectorConfig

__all__ = ["Fitting", "fitting", "option_of", "projector"]

_DEFAULT: Final = ProjectorConfig()
_CONVOLUTIONS: Final[dict[int, type[nn.Module]]] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}


@dataclass(frozen=True)
class Fitting:
    """What stands between a tap of the student and a loss.

    Attributes:
        project: Nothing, one layer, or two with a GELU between.
        width: The dim that is projected; None where the tensor has no width.
        before: The student's width.
        after: The teacher's.
        hidden: Width inside an `mlp`.
        bias: Whether its layers have biases.
        resize: How numbers of places are brought to the teacher's.
        places: The dims that are resized: one or two.
        rank: Dims of the tensor.
    """

    project: Literal["", "linear", "mlp"] = ""
    width: int | None = None
    before: int = 0
    after: int = 0
    hidden: int = 0
    bias: bool = False
    resize: Literal["", "pool", "interpolate"] = ""
    places: tuple[int, ...] = ()
    rank: int = 0

    def __str__(self) -> str:
        parts = [f"{self.resize} of places"] if self.resize else []
        if self.project:
            first = self.width == 1 and self.rank > 2
            kind = "1×1 conv" if first and self.project == "linear" else self.project
            middle = f" → {self.hidden}" if self.project == "mlp" else ""
            bias = ", with bias" if self.bias else ""
            parts.append(f"{kind} {self.before}{middle} → {self.after}{bias}")
        return ", ".join(parts)


def option_of(options: Sequence[ProjectorConfig], name: str) -> ProjectorConfig:
    """Return what is said of a tap's projector: the last entry whose globs fit its name."""
    fit = [each for each in options if any(fnmatchcase(name, glob) for glob in each.taps)]
    return fit[-1] if fit else _DEFAULT


def fitting(
    name: str,
    what: str,
    ours: Tensor,
    theirs: Tensor,
    widths: tuple[int | None, int | None],
    option: ProjectorConfig,
    types: tuple[str, str],
    *,
    projects: bool,
) -> Fitting:
    """Return what brings `ours` to the shape of `theirs`.

    Args:
        name: The tap's, for errors.
        what: Which value of its place it reads.
        ours: The student's value, on symbolic sizes.
        theirs: The teacher's.
        widths: The width dim of both.
        option: What the spec says.
        types: Of both, for errors.
        projects: Whether a loss compares the two place by place; without one, only numbers of
            places are matched.

    Raises:
        UsageError: They cannot be matched; says why.
    """
    width, rank = widths[0], ours.dim()
    differ = ours.dim() != theirs.dim() or widths[0] != widths[1]
    if what == "attention" or (differ and not projects):
        return Fitting()
    if differ:
        said = (
            f"one has {rank} dims, the other {theirs.dim()}"
            if rank != theirs.dim()
            else f"the width is dim {widths[0]} of one and dim {widths[1]} of the other"
        )
        raise _unmatched(name, types, said)
    resize, places = _resizing(name, ours, theirs, width, option, types, projects=projects)
    before, after = _size(ours, width), _size(theirs, width)
    use = option.use
    if use == "none" and before != after and projects:
        raise _unmatched(name, types, f"widths {before} and {after}, and its projector is `none`")
    kind: Literal["", "linear", "mlp"] = ""
    if width is not None and use in ("linear", "mlp"):
        kind = "mlp" if use == "mlp" else "linear"
    elif width is not None and use == "auto" and projects and before != after:
        kind = "linear"
    return Fitting(
        project=kind,
        width=width,
        before=before,
        after=after,
        hidden=option.hidden or after,
        bias=option.bias,
        resize=resize,
        places=places,
        rank=rank,
    )


def _size(value: Tensor, width: int | None) -> int:
    return 0 if width is None else int(value.shape[width])


def _resizing(
    name: str,
    ours: Tensor,
    theirs: Tensor,
    width: int | None,
    option: ProjectorConfig,
    types: tuple[str, str],
    *,
    projects: bool,
) -> tuple[Literal["", "pool", "interpolate"], tuple[int, ...]]:
    rank = ours.dim()
    differing = [
        dim for dim in range(1, rank) if dim != width and not _same(ours.shape[dim], theirs, dim)
    ]
    if not differing:
        return "", ()
    maps = {(3, 2): (1,), (3, 1): (2,), (4, 1): (2, 3), (4, 3): (1, 2)}
    places = maps.get((rank, width or 0))
    if option.resize == "none" or places is None or not set(differing) <= set(places):
        if not projects:
            return "", ()
        raise _unmatched(name, types, f"they differ in dim {differing[0]}, a place")
    if option.resize != "auto":
        return option.resize, places
    sizes = [(ours.shape[dim], theirs.shape[dim]) for dim in places]
    static = all(isinstance(size, int) for pair in sizes for size in pair)
    more = static and all(mine >= other for mine, other in sizes)
    return ("pool" if more else "interpolate"), places


def _same(size: Any, theirs: Tensor, dim: int) -> bool:
    other: Any = theirs.shape[dim]
    left, right = (
        getattr(each.node, "expr", each) if hasattr(each, "node") else each
        for each in (size, other)
    )
    return bool(left == right)


def _unmatched(name: str, types: tuple[str, str], reason: str) -> UsageError:
    return UsageError(
        f"tap {name} cannot be brought to its teacher's shape",
        reason=f"{reason}: {types[0]} and {types[1]}",
        hint="tap places of one form, or compare relations (`rkd`, `cka`, `minilm`)",
        where=name,
    )


def projector(fit: Fitting, name: str, seed: int, like: Tensor) -> list[nn.Module]:
    """Return the layers of a projector, seeded by the run's seed and the tap's name.

    Args:
        fit: What it does.
        name: The tap's.
        seed: The run's.
        like: A tensor of the student, for device and dtype.
    """
    sizes = [fit.before, fit.after]
    if fit.project == "mlp":
        sizes.insert(1, fit.hidden)
    layers: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed_of(seed, f"projector {name}"))
        for place, (inner, outer) in enumerate(pairwise(sizes)):
            layers += [nn.GELU()] if place else []
            layers.append(_layer(fit, inner, outer))
    return [layer.to(device=like.device, dtype=like.dtype) for layer in layers]


def _layer(fit: Fitting, inner: int, outer: int) -> nn.Module:
    if fit.width == 1 and fit.rank > 2:
        return _CONVOLUTIONS[fit.rank](inner, outer, 1, bias=fit.bias)
    return nn.Linear(inner, outer, bias=fit.bias)
