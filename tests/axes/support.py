"""What tests of the axes share: tiny modules around an op, random choices, the check itself."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fxcompress.analysis import cost, masked_difference
from fxcompress.axes import Analysis, Axis, analyze
from fxcompress.axes.terms import axes_of
from fxcompress.ir import Program, capture, node_ids, op_name
from fxcompress.rewrite import GraphRewriter, shrink

Keep = dict[Axis, "np.ndarray[Any, np.dtype[np.int64]]"]


@dataclass(frozen=True)
class Sizes:
    """Three random widths, at least 3 and mostly different."""

    a: int
    b: int
    c: int


SIZES = Sizes(3, 4, 5)


class Net(nn.Module):
    """Modules, parameters and buffers by name, and what to do with them."""

    def __init__(self, forward: Callable[..., Any], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self._compute = forward
        for name, part in parts.items():
            if isinstance(part, nn.Module | nn.Parameter):
                setattr(self, name, part)
            else:
                self.register_buffer(name, part)

    def forward(self, *inputs: Tensor) -> Any:
        return self._compute(self, *inputs)


Built = tuple[nn.Module, tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """A module around some ops.

    Attributes:
        ops: The ops that it is there for; each must be in its graph, on a free axis.
        build: Makes the module and its inputs for random widths.
        freezes: Ops whose operands must have a frozen axis, for a reason given by their node.
        control: Whether one wrong channel must be seen in the outputs; not where the op's result
            is the same for all, or is random.
        inert: Whether the op meets no free axis because it has no operand with one.
        plain: Whether sizes cannot matter, so that dynamic ones need no try.
        name: Told apart where an op has several.
    """

    ops: tuple[str, ...]
    build: Callable[[Sizes], Built] = field(repr=False)
    freezes: bool = False
    control: bool = True
    inert: bool = False
    plain: bool = False
    name: str = ""

    def __str__(self) -> str:
        return "-".join(filter(None, ("+".join(self.ops), self.name)))


def case(ops: str, build: Callable[[Sizes], Built], name: str = "", **facts: bool) -> Case:
    """Return a case for ops named in one string."""
    return Case(tuple(ops.split()), build, name=name, **facts)


def tokens(compute: Callable[..., Any], s: Sizes, width: int = 0, back: int = 0) -> Built:
    """`[3, 5, a] → linear → compute → linear`; `width` after the first, `back` into the second."""
    width = width or s.b
    net = Net(
        lambda m, x: m.down(compute(m.up(x))),
        up=nn.Linear(s.a, width),
        down=nn.Linear(back or width, s.c),
    )
    return net, (torch.randn(3, 5, s.a),)


def images(
    compute: Callable[..., Any], s: Sizes, width: int = 0, back: int = 0, rank: int = 2
) -> Built:
    """`[2, a, 6, …] → convolution → compute → convolution`."""
    width = width or s.b
    conv: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
    net = Net(
        lambda m, x: m.down(compute(m.up(x))),
        up=conv(s.a, width, 3, padding=1),
        down=conv(back or width, s.c, 1),
    )
    return net, (torch.randn(2, s.a, *[6] * rank),)


def randomise(model: nn.Module) -> nn.Module:
    """Give parameters and statistics values under which every channel matters."""
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape) * max(tensor[0].numel(), 1) ** -0.5)
        for module in model.modules():
            for name in ("running_mean", "running_var"):
                statistic = getattr(module, name, None)
                if isinstance(statistic, Tensor):
                    statistic.copy_(torch.rand(statistic.shape) + 0.5)
    return model.eval()


def captured(built: Built, **options: Any) -> Program:
    """Capture a module on its inputs."""
    return capture(randomise(built[0]), built[1], **options)


def choose(analysis: Analysis, rng: random.Random, share: float = 1.0) -> Keep:
    """Keep some of each free axis: at least two indices, and not all."""
    keep: Keep = {}
    for axis in analysis.axes:
        if axis.size > 2 and rng.random() <= share:
            count = rng.randint(2, axis.size - 1)
            keep[axis] = np.array(sorted(rng.sample(range(axis.size), count)))
    return keep


def swapped(keep: Keep, axis: Axis, rng: random.Random) -> Keep:
    """Return the choice with one kept index of an axis put in place of a removed one."""
    removed = sorted(set(range(axis.size)) - set(keep[axis].tolist()))
    index = keep[axis].copy()
    index[rng.randrange(len(index))] = rng.choice(removed)
    return {**keep, axis: np.sort(index)}


def pruned(program: Program, analysis: Analysis, keep: Mapping[Axis, Any]) -> Program:
    """Return the Program that keeps only these indices."""
    rewriter = GraphRewriter(program)
    shrink(rewriter, analysis, keep)
    return rewriter.finish()


def check(
    program: Program, inputs: tuple[Tensor, ...], rng: random.Random, control: bool = True
) -> tuple[Analysis, Keep, Program]:
    """Prune random indices; compare with the masked original, and with a wrong one."""
    analysis = analyze(program)
    keep = choose(analysis, rng)
    after = pruned(program, analysis, keep)
    leaves = program.signature.flatten(inputs, {})
    gap = masked_difference(analysis, keep, after, leaves)
    assert gap < 1e-5, f"{gap}: {describe(keep)}\n{after.text(state=False)}"
    if control:
        for axis in keep:
            wrong = masked_difference(analysis, swapped(keep, axis, rng), after, leaves)
            assert wrong > 1e-3, f"one wrong index of {axis} changes {wrong}\n{describe(keep)}"
    costs_agree(analysis, keep, after)
    return analysis, keep, after


def costs_agree(analysis: Analysis, keep: Keep, after: Program) -> None:
    """Hold that the polynomials say what `cost` counts, before and after."""
    sizes = analysis.sizes | {axis.id: len(index) for axis, index in keep.items()}
    for program, at in ((analysis.program, analysis.sizes), (after, sizes)):
        counted = cost(program)
        assert analysis.macs.at(at) == counted.macs, program.text(state=False)
        assert analysis.parameters.at(at) == counted.parameters


def describe(keep: Keep) -> str:
    """Return what is kept, one axis a line."""
    return "\n".join(f"  {axis}: {index.tolist()} of {axis.size}" for axis, index in keep.items())


def axes_at(analysis: Analysis, op: str) -> list[Axis]:
    """Return every axis of the operands, results and parameters of the nodes of an op."""
    found: dict[Axis, None] = {}
    for node in analysis.program.nodes:
        if node.op in ("placeholder", "get_attr", "output") or op_name(node) != op:
            continue
        for each in (*node.all_input_nodes, node):
            for term in analysis.terms(each) or ():
                found |= dict.fromkeys(axes_of(term))
        if node.op == "call_module":
            for name in analysis.tensors:
                if name.startswith(f"{node.target}."):
                    for term in analysis.places(name):
                        found |= dict.fromkeys(axes_of(term))
    return list(found)


def ids_of(analysis: Analysis, op: str) -> set[str]:
    """Return the ids of the nodes of an op."""
    ids = node_ids(analysis.program)
    calls = ("call_module", "call_function", "call_method")
    return {ids[n] for n in analysis.program.nodes if n.op in calls and op_name(n) == op}
