"""FakeQuantize: the one form in which quantization stands in a graph.

A real number x is stored as the integer q and read back as y:

    q = clamp(round(x / scale) + zero_point, qmin, qmax)        y = (q - zero_point) · scale

with `round` to the nearest even number (Jacob et al., 2018, arXiv:1712.05877, eq. 1). The module
computes y in floating point, so that the graph trains and is compared like any other. A lowering
replaces it by the runtime's own quantize and dequantize:

- on an activation: one quantize, and one dequantize for each consumer;
- on a parameter (its operand is a `get_attr`): `quantize()` once, stored as integers, and a
  dequantize. The layer that reads it is an `Operand…` layer of `fxcompress.nn.operand`.

Every tensor that flows between integer ops is the output of a FakeQuantize node. Where a scale
passes through an op that only moves values (max pooling, reshape, concatenation), the same module
is called again on the result; quantising twice with one scale is exact.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from fxcompress.errors import UsageError
from fxcompress.nn._affine import (
    LearnedStep,
    StraightThrough,
    affine_parameters,
    grouped,
    in_place_of,
    to_integers,
    ungrouped,
)
from fxcompress.nn._tracking import Follow, RangeTracker

__all__ = ["FakeQuantize", "affine_parameters"]

# A learned scale may be trained through 0.
_SMALLEST_SCALE = 1e-30


class FakeQuantize(nn.Module):
    """Round a tensor to the values that `bits`-wide integers can hold.

    Per tensor, `scale` has shape `[]`; per channel along `axis`, `[channels]`; with `group` too,
    `[channels, groups]`, where a group is a run of a channel's elements (axis 0) in order; the last
    may be shorter.

    Args:
        bits: Width of the integers, 2 to 16.
        signed: Integers from -2^(bits-1); else from 0.
        symmetric: The zero point is the middle of the range: 0, or 2^(bits-1) when unsigned.
        narrow: Leave out the lowest integer, so that the range is symmetric around the middle.
        axis: The dimension with one scale per entry, or None for one scale.
        group: How many consecutive elements of a channel share a scale.
        shape: The shape of `scale` and `zero_point`.
        learned: `scale` is a parameter that is trained (LSQ, Esser et al., 2020,
            arXiv:1902.08153), with `offset` the zero point too (LSQ+, Bhalgat et al., 2020,
            arXiv:2004.09576).
        tracking: In training the range follows the tensor: the weight of a new step against the
            average so far, 0 for a fixed range.
        delay: In training the first so many steps only watch (with `tracking`).
        clip: A tracked range ends at the mean ± so many standard deviations.
        follow: What is tracked: the `range`, or of three levels (2 bits, narrow) the scale: the
            `mean` magnitude or that of what is `kept` (`ternary_scale`). Its gradient passes
            straight through everywhere, as the authors have it.

    Raises:
        UsageError: The arguments contradict each other.
    """

    scale: Tensor
    zero_point: Tensor

    # The result has its operand's type: propagation over fake tensors need not run the arithmetic.
    keeps_type: ClassVar[bool] = True

    def __init__(
        self,
        bits: int = 8,
        *,
        signed: bool = True,
        symmetric: bool = True,
        narrow: bool = False,
        axis: int | None = None,
        group: int | None = None,
        shape: Sequence[int] = (),
        learned: Literal["", "scale", "offset"] = "",
        tracking: float = 0.0,
        delay: int = 0,
        clip: float | None = None,
        follow: Follow = "range",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        expected = 0 if axis is None else 1 if group is None else 2
        if not 2 <= bits <= 16:
            raise UsageError(
                f"{bits} bits cannot be fake-quantised",
                reason="integers of 2 to 16 bits are supported",
            )
        if group is not None and (axis != 0 or group < 1):
            raise UsageError(
                f"groups of {group} along axis {axis} are not possible",
                reason="a group is a run of elements of a channel, and channels are axis 0",
            )
        if len(shape) != expected:
            raise UsageError(
                f"a scale of shape {list(shape)} does not fit axis={axis}, group={group}",
                reason=f"it needs {expected} dimensions",
            )
        self.bits, self.signed, self.symmetric, self.narrow = bits, signed, symmetric, narrow
        self.axis, self.group = axis, group
        middle = 0 if signed or not symmetric else 2 ** (bits - 1)
        self.register_buffer("scale", torch.ones(tuple(shape), device=device))
        self.register_buffer(
            "zero_point", torch.full(tuple(shape), middle, dtype=torch.int32, device=device)
        )
        self.tracker: RangeTracker | None = None
        if tracking:
            self.tracker = self._new_tracker(tracking, delay, clip, follow)
        if learned:
            self.learn(offset=learned == "offset")

    @property
    def learned(self) -> Literal["", "scale", "offset"]:
        """What is trained: nothing, the scale, or the zero point too."""
        if not isinstance(self.scale, nn.Parameter):
            return ""
        return "offset" if isinstance(self.zero_point, nn.Parameter) else "scale"

    @property
    def tracking(self) -> float:
        """Weight of a new training step in the range; 0 where it is fixed."""
        return self.tracker.momentum if self.tracker else 0.0

    @property
    def delay(self) -> int:
        """How many training steps only watch."""
        return self.tracker.delay if self.tracker else 0

    @property
    def clip(self) -> float | None:
        """Where a tracked range ends, in standard deviations."""
        return self.tracker.clip if self.tracker else None

    @property
    def follow(self) -> Follow:
        """What is tracked."""
        return self.tracker.follow if self.tracker else "range"

    def learn(self, *, offset: bool = False) -> "FakeQuantize":
        """Make the scale, and with `offset` the zero point, parameters; return self.

        Raises:
            UsageError: The zero point of a symmetric quantizer has its place.
        """
        if offset and self.symmetric:
            raise UsageError(
                "a symmetric quantizer cannot learn an offset",
                reason="its zero point is the middle of the range",
            )
        for name in ("scale", "zero_point") if offset else ("scale",):
            value = getattr(self, name).detach().float()
            delattr(self, name)
            self.register_parameter(name, nn.Parameter(value))
        return self

    def track(
        self,
        momentum: float,
        *,
        delay: int = 0,
        clip: float | None = None,
        follow: Follow = "range",
    ) -> "FakeQuantize":
        """Let the range follow the tensor in training, from the range that is set; return self."""
        self.tracker = self._new_tracker(momentum, delay, clip, follow)
        low, high = self.qmin - self.zero_point, self.qmax - self.zero_point
        self.tracker.start(low * self.scale, high * self.scale)
        return self

    def freeze(self) -> "FakeQuantize":
        """End training: scale and zero point are valid and fixed from here on; return self."""
        self.tracker = None
        scale, zero_point = (part.detach().clone() for part in self._valid())
        for name in ("scale", "zero_point"):
            delattr(self, name)
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point.to(torch.int32))
        return self

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of `scale`, as it is now."""
        return tuple(self.scale.shape)

    @property
    def qmin(self) -> int:
        """The lowest integer."""
        return (-(2 ** (self.bits - 1)) if self.signed else 0) + int(self.narrow)

    @property
    def qmax(self) -> int:
        """The highest integer."""
        return int(2 ** (self.bits - 1) - 1 if self.signed else 2**self.bits - 1)

    @property
    def dtype(self) -> torch.dtype:
        """The smallest dtype of torch that holds the integers."""
        small, large = (torch.int8, torch.int16) if self.signed else (torch.uint8, torch.uint16)
        return small if self.bits <= 8 else large

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` as the integers would give it back: same shape, same dtype.

        The gradient passes straight through where `x` is in range, and is 0 where it is clamped
        (Bengio et al., 2013, arXiv:1308.3432); a learned step has gradients of its own.
        """
        if self.training and self.tracker is not None and not self._track(self.tracker, x):
            return x
        scale, zero_point = self._parameters_for(x)
        if torch.is_grad_enabled() and (x.requires_grad or self.learned) and self.follow == "range":
            limits = (self.qmin, self.qmax)
            through: Any = LearnedStep.apply if self.learned else StraightThrough.apply
            return cast(Tensor, through(x, scale, zero_point, *limits, self.group))
        given = grouped(x.detach(), self.group)
        q = to_integers(given, scale, zero_point, self.qmin, self.qmax)
        y = ungrouped((q - zero_point) * scale, x.shape, self.group).to(x.dtype)
        return y if self.follow == "range" else in_place_of(x, y)

    def _new_tracker(
        self, momentum: float, delay: int, clip: float | None, follow: Follow
    ) -> RangeTracker:
        if follow != "range" and (self.qmin, self.qmax) != (-1, 1):
            raise UsageError(
                f"follow={follow!r} is for three levels", reason="they are 2 bits, narrow"
            )
        device = self.scale.device
        return RangeTracker(momentum, delay, clip, follow=follow, shape=self.shape, device=device)

    def _track(self, tracker: RangeTracker, x: Tensor) -> bool:
        """Let the range follow `x`; return whether it is to be rounded already."""
        self.fit(*tracker.update(x, self.axis, self.group))
        waiting = tracker.waiting
        tracker.steps += 1
        return not waiting

    def quantize(self, x: Tensor) -> Tensor:
        """Return the integers, as int32 of the shape of `x`."""
        scale, zero_point = self._parameters_for(x)
        q = to_integers(grouped(x, self.group), scale, zero_point, self.qmin, self.qmax)
        return ungrouped(q, x.shape, self.group).to(torch.int32)

    def dequantize(self, q: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the numbers that the integers `q` stand for."""
        scale, zero_point = self._parameters_for(q)
        y = (grouped(q, self.group).float() - zero_point) * scale
        return ungrouped(y, q.shape, self.group).to(dtype)

    def fit(self, low: Tensor, high: Tensor) -> "FakeQuantize":
        """Set scale and zero point so that [`low`, `high`] and 0 are in range; return self."""
        scale, zero_point = affine_parameters(
            low, high, qmin=self.qmin, qmax=self.qmax, symmetric=self.symmetric
        )
        with torch.no_grad():
            self.scale.copy_(scale.reshape(self.shape))
            self.zero_point.copy_(zero_point.reshape(self.shape))
        return self

    def extra_repr(self) -> str:
        """Return the non-default arguments."""
        settings = {
            "bits": None, "signed": True, "symmetric": True, "narrow": False, "axis": None,
            "group": None, "learned": "", "tracking": 0, "delay": 0, "follow": "range",
        }  # fmt: skip
        given = {name: getattr(self, name) for name in settings}
        return ", ".join(f"{name}={v!r}" for name, v in given.items() if v != settings[name])

    def _parameters_for(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return scale and zero point (as floats), shaped to broadcast against grouped `x`."""
        if self.group is not None:
            shape: list[int] = [*self.shape, 1]
        elif self.axis is not None:
            shape = [1] * x.dim()
            shape[self.axis] = -1
        else:
            shape = []
        scale, zero_point = self._valid()
        return scale.reshape(shape), zero_point.float().reshape(shape)

    def _valid(self) -> tuple[Tensor, Tensor]:
        """Return scale and zero point; learned ones as they count, gradients kept."""
        if not self.learned:
            return self.scale, self.zero_point
        zero_point = self.zero_point
        if zero_point.is_floating_point():
            zero_point = in_place_of(zero_point, zero_point.round().clamp(self.qmin, self.qmax))
        return in_place_of(self.scale, self.scale.clamp_min(_SMALLEST_SCALE)), zero_point
