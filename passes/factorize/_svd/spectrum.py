"""What a matrix loses at each rank, and its best factors of one rank."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, fx

from fxcompress.errors import NumericsError
from fxcompress.ir.naming import node_ids
from fxcompress.ir.ops import bind
from passes._layers.inputs import input_rows
from passes._layers.stream import stream

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Batch
    from passes.factorize._svd.layers import Layer
    from passes.factorize.svd import SvdOptions

__all__ = ["Factors", "Moments", "Spectrum", "decompose", "measure"]

# What is added to a second moment, of its mean diagonal: directions that calibration never saw
# count a little, so that weights of full rank stay what they are.
_UNSEEN: Final = 1e-6


class Moments:
    """Sums over the inputs of layers that read the same.

    Args:
        columns: Of a row of inputs.
    """

    def __init__(self, columns: int) -> None:
        self.products = torch.zeros(columns, columns)
        self.sums = torch.zeros(columns, dtype=torch.float64)
        self.sizes = torch.zeros(columns, dtype=torch.float64)
        self.rows = 0

    def add(self, rows: Tensor) -> None:
        """Take in `[rows, columns]`."""
        rows = rows.cpu()
        self.products.addmm_(rows.T, rows)
        self.sums += rows.sum(0, dtype=torch.float64)
        self.sizes += rows.abs().sum(0, dtype=torch.float64)
        self.rows += len(rows)

    @property
    def mean(self) -> Tensor:
        """The mean row."""
        return self.sums / max(self.rows, 1)

    def second(self, *, centred: bool) -> Tensor:
        """Return the mean of x·xᵀ, less that of the mean if `centred`, `[columns, columns]`."""
        found = self.products.double() / max(self.rows, 1)
        return found - torch.outer(self.mean, self.mean) if centred else found


@torch.no_grad()
def measure(
    program: Program, layers: Sequence[Layer], batches: Iterable[Batch]
) -> dict[str, Moments]:
    """Return path -> moments of what each layer is multiplied with in the model as it is.

    Raises:
        DataError: There are no batches.
        NumericsError: Inputs hold a NaN or an infinity.
    """
    scratch = program.copy()
    nodes = {name: node for node, name in node_ids(scratch).items()}
    state = scratch.state()
    found: dict[str, Moments] = {}
    watched: dict[fx.Node, list[tuple[Layer, Any]]] = {}
    shared: dict[fx.Node, tuple[str, fx.Node]] = {}
    for layer in layers:
        readers = [
            replace(reader, node=nodes[name])
            for reader, name in zip(layer.weight.readers, layer.nodes, strict=True)
        ]
        first = readers[0]
        source = bind(first.node)[first.operand]
        single = len(readers) == 1 and not layer.weight.form.taps
        if single and source in shared and len(found[shared[source][0]].sums) == layer.columns:
            found[layer.path] = found[shared[source][0]]
            continue
        found[layer.path] = Moments(layer.columns)
        if single:
            shared[source] = (layer.path, first.node)
        for reader in readers:
            watched.setdefault(reader.node, []).append((layer, reader))

    def see(node: fx.Node, env: Mapping[fx.Node, Any]) -> None:
        for layer, reader in watched[node]:
            shape = state[layer.weight.tensor].shape
            for _, rows in input_rows(reader, layer.weight.form, shape, env):
                found[layer.path].add(rows[0])

    stream(scratch, batches, watched, see)
    for path, moments in found.items():
        _check(path, moments.products, "inputs", "check the calibration data")
    return found


@dataclass(frozen=True)
class Factors:
    """B·A of some rank, and what goes to the bias.

    Attributes:
        down: A, `[rank, columns]`.
        up: B, `[out, rank]`, with orthonormal columns.
        shift: What the bias gains, `[out]`; None where nothing is known of the inputs.
    """

    down: Tensor
    up: Tensor
    shift: Tensor | None


@dataclass(frozen=True)
class Spectrum:
    """The principal directions of a layer's outputs.

    Attributes:
        matrix: W, `[out, columns]`.
        directions: Orthonormal columns, `[out, full]`, the strongest first.
        values: The mean square of the outputs along each, `[full]`.
        mean: The mean input, where the bias takes up what is lost of it.
    """

    matrix: Tensor
    directions: Tensor
    values: Tensor
    mean: Tensor | None

    @property
    def total(self) -> float:
        """The mean square of all outputs."""
        return float(self.values.sum())

    def lost(self, rank: int) -> float:
        """Return the mean square of what a rank leaves out."""
        return float(self.values[rank:].sum())

    def energy(self, rank: int) -> float:
        """Return the part of the mean square that a rank keeps; 1 where there is none."""
        total = self.total
        return 1.0 - self.lost(rank) / total if total > 0 else 1.0

    def rank(self, energy: float) -> int:
        """Return the least rank that keeps this part."""
        kept = self.values.cumsum(0)
        # A part of 1 is all but what rounding made of zeros.
        wanted = min(energy, 1.0 - 1e-12) * kept[-1]
        return min(int((kept < wanted).sum()) + 1, len(kept))

    def factors(self, rank: int) -> Factors:
        """Return the best B·A of a rank: outputs are projected onto the strongest directions."""
        up = self.directions[:, :rank]
        down = up.T @ self.matrix
        shift = None
        if self.mean is not None:
            shift = self.matrix @ self.mean - up @ (down @ self.mean)
        return Factors(down, up, shift)


@torch.no_grad()
def decompose(
    layer: Layer, value: Tensor, moments: Moments | None, options: SvdOptions, *, centred: bool
) -> Spectrum:
    """Return the spectrum of a layer's outputs.

    The left singular vectors of W·L are the eigenvectors of W·(L·Lᵀ)·Wᵀ, so that L itself is not
    needed; and the best W' of rank r is the projection of W onto the first r of them.

    Args:
        layer: The layer.
        value: Its weight.
        moments: Of its inputs; None for `whiten: none`.
        options: Say what L is.
        centred: The bias takes up what is lost of the mean input.

    Raises:
        NumericsError: The weight holds a NaN or an infinity.
    """
    matrix = layer.matrix(value.detach()).double().cpu()
    _check(layer.path, matrix, "weight", "check the weights")
    basis, core = None, matrix
    if layer.out > layer.columns:
        basis, core = torch.linalg.qr(matrix)
    values, vectors = torch.linalg.eigh(_products(core, moments, options, centred=centred))
    directions = vectors.flip(1)
    if basis is not None:
        directions = basis @ directions
    centred = centred and moments is not None and options.whiten == "inputs"
    mean = moments.mean if moments is not None and centred else None
    return Spectrum(matrix, directions, values.flip(0).clamp_min(0), mean)


def _products(
    core: Tensor, moments: Moments | None, options: SvdOptions, *, centred: bool
) -> Tensor:
    """Return W·L·Lᵀ·Wᵀ."""
    if moments is None or options.whiten == "none":
        return core @ core.T
    if options.whiten == "scale":
        sizes = (moments.sizes / max(moments.rows, 1)).pow(options.alpha)
        # An input that is always 0 keeps a little weight too.
        scaled = core * sizes.clamp_min(_UNSEEN * float(sizes.mean()))
        return scaled @ scaled.T
    second = moments.second(centred=centred)
    second.diagonal().add_(_UNSEEN * float(second.diagonal().mean()))
    return core @ second @ core.T


def _check(path: str, value: Tensor, what: str, hint: str) -> None:
    if not bool(value.isfinite().all()):
        raise NumericsError(f"a NaN or an infinity in the {what} of {path}", hint=hint, where=path)
