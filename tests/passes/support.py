"""What the tests of passes share: apply one pass, seeded models, and how far outputs differ."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from fxcompress.ir import Program, capture
from fxcompress.ir.naming import node_ids
from fxcompress.ir.ops import op_name
from fxcompress.pipeline.base import Decision, Pass
from fxcompress.pipeline.context import Context
from fxcompress.rewrite import Declined, Edit, GraphRewriter


@dataclass
class Applied:
    """What a pass made of a Program."""

    before: Program
    program: Program
    decision: Decision
    edits: tuple[Edit, ...]
    declined: tuple[Declined, ...]

    def ops(self) -> list[str]:
        return [op_name(node) for node in self.program.nodes]

    def reasons(self) -> dict[str, str]:
        return {each.node: each.reason for each in self.declined}

    def kinds(self) -> dict[str, int]:
        kinds = [edit.kind for edit in self.edits]
        return {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}


def apply(
    pass_: type[Pass[Any, Any]],
    program: Program,
    options: Mapping[str, Any] | None = None,
    context: Context | None = None,
) -> Applied:
    """Decide, rewrite, check the promise and the Program, and that the input was left alone."""
    before = program.fingerprint()
    step = pass_()
    chosen = pass_.Options.model_validate_json(_json(options or {}))
    decision = step.decide(program, chosen, context or Context())
    again = pass_.Decision.model_validate_json(decision.model_dump_json())
    again = again.model_copy(update={"arrays": decision.arrays})
    assert again.model_dump() == decision.model_dump(), "a decision must survive the lock"
    rewriter = GraphRewriter(program)
    step.rewrite(rewriter, again)
    after = rewriter.finish()
    step.ensures(program, after, again)
    after.verify()
    assert program.fingerprint() == before, "the pass changed its input"
    return Applied(program, after, decision, rewriter.edits, rewriter.declined)


def _json(options: Mapping[str, Any]) -> str:
    import json

    return json.dumps(options)


def text_of(program: Program) -> list[str]:
    """Return the graph as short lines: `conv = conv2d(x)`."""
    ids = node_ids(program)
    return [
        f"{name} = {op_name(node)}({', '.join(ids[each] for each in node.all_input_nodes)})"
        for node, name in ids.items()
    ]


def seeded(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """Return a model in eval mode with random weights and lively batch norm statistics."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build().eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor, low, high in (
                (module.running_mean, -1, 1),
                (module.running_var, 0.5, 2),
                (module.weight, 0.5, 1.5),
                (module.bias, -1, 1),
            ):
                if tensor is not None:
                    tensor.data.uniform_(low, high, generator=generator)
    return model


@cache
def captured(build: Callable[[], nn.Module], *shape: int, seed: int = 0) -> Program:
    """Return a seeded model's Program; dim 0 of its one input is dynamic.

    One Program for all tests that ask for it: none may train it or change its mode.
    """
    return capture(seeded(build, seed), (torch.randn(shape, generator=_generator(seed)),))


def random_input(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=_generator(seed))


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def relative_error(
    reference: Callable[..., Any], candidate: Callable[..., Any], *args: Any
) -> float:
    """Return the largest difference of two outputs over the reference's range."""
    with torch.no_grad():
        wanted, got = reference(*args), candidate(*args)
    assert wanted.shape == got.shape
    assert wanted.dtype == got.dtype
    return float((wanted - got).abs().max() / wanted.abs().max())


def sqnr(reference: Callable[..., Any], candidate: Callable[..., Any], *args: Any) -> float:
    """Return the ratio of signal to error in dB."""
    with torch.no_grad():
        wanted, got = reference(*args), candidate(*args)
    return float(10 * torch.log10(wanted.square().sum() / (wanted - got).square().sum()))
