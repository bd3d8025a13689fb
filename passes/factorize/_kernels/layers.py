"""The convolutions that can become chains, and their weights as `[out, in, taps]`."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, Final

from torch import SymInt, Tensor, nn

from fxcompress.errors import NumericsError, SelectorError, UsageError
from fxcompress.ir.ops import bind
from fxcompress.pipeline._close import did_you_mean
from fxcompress.rewrite.edits import Declined
from passes._paths import free_path, path_beside
from passes.factorize._kernels.model import KernelEntry, Part
from passes.factorize._svd.layers import Layer, find_layers

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fxcompress.ir import Program
    from fxcompress.pipeline.base import Selection

__all__ = ["Kernel", "check_full", "find_kernels", "named"]


@dataclass(frozen=True)
class Kernel:
    """A convolution, its weight being `[out, in, taps]`.

    Attributes:
        layer: It, as a matrix.
        path: Where its parts go.
        module: The layer.
        inputs: Input channels.
        outputs: Output channels.
        taps: Of the kernel, all dimensions together.
        work: How often its weight is applied: output positions of all calls.
        spread: Input positions for each output position.
    """

    layer: Layer
    path: str
    module: Any
    inputs: int
    outputs: int
    taps: int
    work: int
    spread: float

    @property
    def name(self) -> str:
        """The path of the layer."""
        return self.layer.path

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes of the kernel."""
        return tuple(self.module.kernel_size)

    @property
    def parameters(self) -> int:
        """Elements of its weight."""
        return self.outputs * self.inputs * self.taps

    def tensor(self, value: Tensor) -> Tensor:
        """Return the weight as `[out, in, taps]`, in float64 on the CPU.

        Raises:
            NumericsError: It holds a NaN or an infinity.
        """
        found = value.detach().double().cpu().flatten(2)
        if not bool(found.isfinite().all()):
            raise NumericsError(
                f"a NaN or an infinity in the weight of {self.name}",
                hint="check the weights",
                where=self.name,
            )
        return found

    def pointwise(self, name: str, inputs: int, outputs: int) -> Part:
        """Return a part of kernel 1."""
        ones = (1,) * len(self.sizes)
        return Part(
            name=name, inputs=inputs, outputs=outputs, kernel=ones, stride=ones,
            padding=(0,) * len(ones), dilation=ones,
        )  # fmt: skip

    def spatial(
        self, name: str, inputs: int, outputs: int, groups: int = 1, only: int | None = None
    ) -> Part:
        """Return a part that moves as the layer does, in all dimensions or in `only` one."""
        module = self.module
        padding = module.padding
        return Part(
            name=name,
            inputs=inputs,
            outputs=outputs,
            kernel=_along(module.kernel_size, 1, only),
            stride=_along(module.stride, 1, only),
            padding=padding if isinstance(padding, str) else _along(padding, 0, only),
            dilation=_along(module.dilation, 1, only),
            groups=groups,
            padding_mode=module.padding_mode,
        )

    def entry(self, full: tuple[int, ...], **more: Any) -> KernelEntry:
        """Return what a decision says of it; without `ranks` it stays whole."""
        parts: tuple[Part, ...] = more.get("parts", ())
        after = sum(part.parameters for part in parts) if parts else self.parameters
        return KernelEntry(
            path=self.path,
            layer=self.name,
            weight=self.layer.weight.tensor,
            bias=self.layer.bias,
            nodes=self.layer.nodes,
            full=full,
            parameters=(self.parameters, after),
            **more,
        )


def _along(values: Sequence[int], rest: int, only: int | None) -> tuple[int, ...]:
    return tuple(v if only in (None, place) else rest for place, v in enumerate(values))


_POINTWISE: Final = "its kernel is 1: it is a product already, see factorize.svd"


def find_kernels(
    program: Program, options: Selection, suffix: str
) -> tuple[tuple[Kernel, ...], tuple[Declined, ...]]:
    """Return the selected convolutions in graph order, and why others stay as they are.

    Args:
        program: The model.
        options: The selection.
        suffix: What the path of the parts ends in.

    Raises:
        SelectorError: The selection fits no layer, or not as many as expected.
    """
    layers, declined = find_layers(program, options)
    taken = {*program.state(), *(path for path, _ in program.module.named_modules())}
    found, refused = [], list(declined)
    for layer in layers:
        node = layer.weight.readers[0].node
        module = program.module.get_submodule(str(node.target)) if layer.weight.form.taps else None
        reason = "it is no convolution" if module is None else ""
        if module is not None and prod(module.kernel_size) == 1:  # type: ignore[arg-type]
            reason = _POINTWISE
        if reason:
            refused += [Declined(node=name, reason=reason) for name in layer.nodes]
            continue
        assert isinstance(module, nn.modules.conv._ConvNd), "only these have taps"
        path = free_path(path_beside(layer.path, suffix), taken)
        taken.add(path)
        inputs, taps = module.in_channels, prod(module.kernel_size)
        spread = _positions(bind(node)["input"]) / max(_positions(node), 1)
        work = layer.macs // (layer.out * layer.columns)
        found.append(Kernel(layer, path, module, inputs, layer.out, taps, work, spread))
    return tuple(found), tuple(refused)


def _positions(node: Any) -> int:
    shape = node.meta["val"].shape
    return prod(size.node.hint if isinstance(size, SymInt) else size for size in shape[2:])


def named(kernels: Sequence[Kernel], given: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Return path -> what the first fitting glob says.

    Raises:
        SelectorError: A glob fits no convolution.
    """
    from fnmatch import fnmatchcase

    paths = [kernel.name for kernel in kernels]
    for glob in given:
        if not any(fnmatchcase(path, glob) for path in paths):
            raise SelectorError(
                f"`{glob}` in `{what}` matches no selected convolution",
                hint=did_you_mean(glob, paths, kind="selected are"),
            )
    found = {}
    for path in paths:
        fits = [value for glob, value in given.items() if fnmatchcase(path, glob)]
        if fits:
            found[path] = fits[0]
    return found


def check_full(kernel: Kernel, ranks: Sequence[int], full: Sequence[int], what: str) -> None:
    """Check that ranks are not above full rank.

    Args:
        kernel: The convolution.
        ranks: What was asked for.
        full: What there is.
        what: What the numbers are called.

    Raises:
        UsageError: One is.
    """
    if all(rank <= most for rank, most in zip(ranks, full, strict=True)):
        return
    asked, most = (", ".join(map(str, each)) for each in (ranks, full))
    raise UsageError(
        f"{what} {asked} of {kernel.name} is above full rank, {most}",
        reason=f"its weight is {kernel.outputs} x {kernel.inputs} x {kernel.taps} (out, in, taps)",
        hint=f"give at most {most}: with it outputs are equal; fewer save parameters",
        where=kernel.name,
    )
