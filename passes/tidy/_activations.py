"""Find activations and replace them, as modules and as functions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

from torch import fx, nn

from fxcompress.errors import SelectorError
from fxcompress.ir.naming import node_ids
from fxcompress.ir.ops import op_name, op_spec
from fxcompress.pipeline.selectors import Selector
from passes.tidy.replace_activation import Replacement

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.rewrite import GraphRewriter
    from passes.tidy.replace_activation import ReplaceActivationOptions, Target

__all__ = ["find_replacements", "replace"]

# Name in options -> module class, arguments beside the input; `identity` needs none.
_TARGETS: Final[dict[Target, tuple[type[nn.Module], Mapping[str, Any]]]] = {
    "relu": (nn.ReLU, {}),
    "relu6": (nn.ReLU6, {}),
    "leaky_relu": (nn.LeakyReLU, {}),
    "elu": (nn.ELU, {}),
    "selu": (nn.SELU, {}),
    "gelu": (nn.GELU, {}),
    "gelu_tanh": (nn.GELU, {"approximate": "tanh"}),
    "silu": (nn.SiLU, {}),
    "mish": (nn.Mish, {}),
    "softplus": (nn.Softplus, {}),
    "softsign": (nn.Softsign, {}),
    "sigmoid": (nn.Sigmoid, {}),
    "hardsigmoid": (nn.Hardsigmoid, {}),
    "tanh": (nn.Tanh, {}),
    "hardtanh": (nn.Hardtanh, {}),
    "hardswish": (nn.Hardswish, {}),
}
# Where the op is not called what the options call it.
_OPS: Final[dict[Target, str]] = {"gelu_tanh": "gelu"}


def find_replacements(
    program: Program, options: ReplaceActivationOptions
) -> tuple[Replacement, ...]:
    """Return the selected activations with what takes their place, in graph order."""
    ids = node_ids(program)
    there = {op_name(node) for node in program.nodes}
    for source in options.replace:
        if source not in there:
            spec_of = {name: op_spec(name) for name in there}
            known = sorted(
                n for n, s in spec_of.items() if s is not None and s.kind == "activation"
            )
            raise SelectorError(
                f"there is no {source} to replace",
                reason=f"the activations of the model are {', '.join(known) or 'none'}",
                hint="take it out of `replace`",
            )
    wanted = {str(source): target for source, target in options.replace.items()}
    candidates = [node for node in program.nodes if op_name(node) in wanted]
    return tuple(
        Replacement(node=ids[node], before=op_name(node), after=wanted[op_name(node)])
        for node in Selector.of(options).select(program, candidates)
    )


def replace(rewriter: GraphRewriter, replacements: Iterable[Replacement]) -> None:
    """Replace activations; a module that is called elsewhere too stays for its other calls."""
    chosen = {rewriter.node(each.node): each.after for each in replacements}
    done: set[str] = set()
    for node, target in chosen.items():
        if target == "identity":
            rewriter.replace_uses(node, node.all_input_nodes[0])
            rewriter.remove(node)
            continue
        if node.op != "call_module":
            _replace_function(rewriter, node, target)
            continue
        path = str(node.target)
        if path in done:
            continue
        if all(chosen.get(call) == target for call in rewriter.users_of_module(path)):
            rewriter.set_module(path, _module(target))
            done.add(path)
        else:
            new = rewriter.call_module(
                rewriter.fresh_path(f"{path}_{target}"), _module(target), node.args, after=node
            )
            rewriter.replace_uses(node, new)
            rewriter.remove(node)


def _module(target: Target) -> nn.Module:
    cls, arguments = _TARGETS[target]
    return cls(**arguments)


def _replace_function(rewriter: GraphRewriter, node: fx.Node, target: Target) -> None:
    spec = op_spec(_OPS.get(target, target))
    assert spec is not None, "every target is in the op table"
    arguments = _TARGETS[target][1]
    new = rewriter.call_function(spec.functions[0], node.args[:1], arguments, after=node)
    rewriter.replace_uses(node, new)
    rewriter.remove(node)
