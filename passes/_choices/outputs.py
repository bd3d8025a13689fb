"""What changing one weight does to the outputs: of the model, or of the layers that read it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Final, Protocol

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxcompress.errors import NumericsError
from fxcompress.ir.ops import op_name
from fxcompress.pipeline.context import Batch
from fxcompress.rewrite import GraphRewriter

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context

__all__ = ["Changed", "Variants", "output_losses"]

# Changed weights that are kept from batch to batch: 512 MiB of float32.
_KEPT: Final = 1 << 27


class Variants(Protocol):
    """A weight and what it may become."""

    @property
    def tensor(self) -> str:
        """Its canonical name."""

    @property
    def readers(self) -> tuple[str, ...]:
        """The ids of the nodes that read it, in graph order."""

    @property
    def choices(self) -> tuple[int, ...]:
        """What may be made of it, as numbers: of bits, of ranks."""

    def changed(self, choice: int) -> Tensor | None:
        """Return it so changed; None where the choice leaves it as it is."""


class Changed:
    """A private copy of a Program in which one weight at a time has another value."""

    def __init__(self, program: Program) -> None:
        self.scratch = GraphRewriter(program)
        self.program = self.scratch.program
        self.program.module.eval()
        self.state = program.state()

    def set(self, tensor: str, value: Tensor) -> None:
        """Give a weight a value, under all its names."""
        self.scratch.set_tensor(tensor, value, tied=True)

    def reset(self, tensor: str) -> None:
        """Give a weight the value it had."""
        self.set(tensor, self.state[tensor])


@torch.no_grad()
def output_losses(
    program: Program,
    candidates: Sequence[Variants],
    batches: Iterable[Batch],
    context: Context,
    *,
    own: bool,
) -> list[list[float]]:
    """Return noise over signal for each weight at each of its choices; 0 as it is.

    All values of one batch are kept, so that only what depends on a weight is computed again.

    Args:
        program: The model.
        candidates: Its weights.
        batches: What to run it on.
        context: Is told of the progress.
        own: Measure at the layers that read the weight, not at the model's outputs.

    Raises:
        NumericsError: The outputs are not finite.
    """
    changed = Changed(program)
    elements = sum(changed.state[each.tensor].numel() * len(each.choices) for each in candidates)
    measured = [_Measured(changed, each, own=own, keep=elements <= _KEPT) for each in candidates]
    for index, batch in enumerate(batches):
        env = _values(changed.program, batch)
        for place, each in enumerate(measured):
            each.measure(env)
            context.progress(f"sensitivity, batch {index + 1}", place + 1, len(measured))
    return [each.losses() for each in measured]


def _values(program: Program, batch: Batch) -> dict[fx.Node, Any]:
    """Return the value of every node for one batch."""
    runner = fx.Interpreter(program.module, garbage_collect_values=False)
    leaves: list[Any] = program.signature.leaves_of(batch)
    runner.run(*leaves, enable_io_processing=False)
    return runner.env


class _Measured:
    """Sums of noise and signal of one weight."""

    def __init__(self, changed: Changed, candidate: Variants, *, own: bool, keep: bool) -> None:
        self.changed, self.candidate = changed, candidate
        self.value = cache(candidate.changed) if keep else candidate.changed
        self.runner = fx.Interpreter(changed.program.module, garbage_collect_values=False)
        readers = [changed.scratch.node(name) for name in candidate.readers]
        self.nodes, self.watched = _downstream(changed, candidate.tensor, readers, own=own)
        self.noise = dict.fromkeys(candidate.choices, 0.0)
        self.signal = 0.0

    def measure(self, env: dict[fx.Node, Any]) -> None:
        """Add one batch, whose values are in `env`."""
        wanted = [leaf for node in self.watched for leaf in _floats(env[node])]
        self.signal += sum(_energy(leaf) for leaf in wanted)
        for choice in self.candidate.choices:
            value = self.value(choice)
            if value is None:
                continue
            self.changed.set(self.candidate.tensor, value)
            self.runner.env = dict(env)
            for node in self.nodes:
                self.runner.env[node] = self.runner.run_node(node)
            got = [leaf for node in self.watched for leaf in _floats(self.runner.env[node])]
            self.noise[choice] += sum(
                _energy(after - before) for before, after in zip(wanted, got, strict=True)
            )
            self.runner.env = {}
        self.changed.reset(self.candidate.tensor)

    def losses(self) -> list[float]:
        """Return noise over signal of each choice.

        Raises:
            NumericsError: It is not finite.
        """
        found = [self.noise[each] / max(self.signal, 1e-300) for each in self.candidate.choices]
        if not all(map(_finite, found)):
            raise NumericsError(
                f"a NaN or an infinity in outputs while {self.candidate.tensor} was measured",
                reason="calibration data leads to it",
                hint="check the data and the weights; if fp16 overflows, calibrate in fp32",
                where=self.candidate.tensor,
            )
        return found


def _downstream(
    changed: Changed, tensor: str, readers: Sequence[fx.Node], *, own: bool
) -> tuple[list[fx.Node], list[fx.Node]]:
    """Return the nodes that change with a weight, in graph order, and those to compare."""
    names = set(changed.scratch.tied(tensor))
    dirty = {
        node
        for node in changed.program.nodes
        if (node.op == "get_attr" and str(node.target) in names)
        or (node.op == "call_module" and node in readers)
    }
    order = []
    for node in changed.program.nodes:
        if node.op == "output":
            break
        if node in dirty or any(each in dirty for each in node.all_input_nodes):
            past = own and any(each in readers for each in node.all_input_nodes)
            if not past or node in readers:
                dirty.add(node)
                order.append(node)
    if own:
        return order, [node for node in order if node in readers]
    (output,) = changed.program.graph.find_nodes(op="output")
    return order, [node for node in output.all_input_nodes if op_name(node) != "param"]


def _floats(value: Any) -> list[Tensor]:
    leaves = pytree.tree_leaves(value)
    return [each for each in leaves if isinstance(each, Tensor) and each.is_floating_point()]


def _energy(x: Tensor) -> float:
    return float(x.double().square().sum())


def _finite(value: float) -> bool:
    return value == value and abs(value) != float("inf")
