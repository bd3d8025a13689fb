"""What depends on no input: computed once, and kept as a buffer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from torch import Tensor, fx, nn

from fxcompress.ir.naming import scope_of
from fxcompress.ir.ops import module_of, op_name
from fxcompress.rewrite import Match, MatchResult, Rule, anything
from passes.tidy._fuse._nodes import SILENT, drop, found, replace, tensor_of, value
from passes.tidy._fuse.common import is_pure

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.rewrite import GraphRewriter

__all__ = ["rules"]

_NUMBERS: Final = (bool, int, float)


def rules(parameters: bool, size: int) -> tuple[Rule, ...]:
    """Return the rule.

    Args:
        parameters: Whether trainable parameters count as constants.
        size: The most numbers that a constant may have.
    """

    def check(program: Program, match: Match) -> MatchResult:
        root = match.root
        if not root.all_input_nodes or root.op == "get_attr":
            return SILENT
        known: dict[fx.Node, bool] = {}
        if not _foldable(root, parameters, size, known):
            return _why_not(root, parameters, size)
        if all(_foldable(user, parameters, size, known) for user in root.users):
            return SILENT
        return found(root)

    return (Rule("constants", anything("value"), rewrite=_fold, check=check),)


def _foldable(node: fx.Node, parameters: bool, size: int, known: dict[fx.Node, bool]) -> bool:
    """Whether a node's value depends on no input and is small enough to be kept."""
    if node not in known:
        known[node] = False
        known[node] = _depends_on_nothing(node, parameters, size, known)
    return known[node]


def _depends_on_nothing(
    node: fx.Node, parameters: bool, size: int, known: dict[fx.Node, bool]
) -> bool:
    tensor = tensor_of(node)
    if tensor is not None:
        trained = isinstance(tensor, nn.Parameter) and tensor.requires_grad
        return parameters or not trained
    if node.op not in ("call_function", "call_method", "call_module") or not is_pure(node):
        return False
    if not _keepable(node, size) or not _has_own_constants(node, parameters):
        return False
    return all(_foldable(each, parameters, size, known) for each in node.all_input_nodes)


def _has_own_constants(node: fx.Node, parameters: bool) -> bool:
    if node.op != "call_module":
        # A value of the mode, `training_switch`, is a module.
        return True
    module = module_of(node)
    trained = any(each.requires_grad for each in module.parameters())
    return not module.training and (parameters or not trained) and not _follows_mode(node)


def _follows_mode(node: fx.Node) -> bool:
    return op_name(node) in ("training_switch", "batch_norm", "instance_norm")


def _keepable(node: fx.Node, size: int) -> bool:
    """Whether a value is a number, or a tensor of known size on the Program's device."""
    traced = value(node)
    if type(traced) in _NUMBERS:
        return True
    if not isinstance(traced, Tensor) or not all(isinstance(n, int) for n in traced.shape):
        return False
    owner: Any = node.graph.owning_module
    first = next(iter((*owner.parameters(), *owner.buffers())), None)
    device = traced.device if first is None else first.device
    return traced.numel() <= size and traced.device == device and not traced.is_sparse


def _why_not(root: fx.Node, parameters: bool, size: int) -> MatchResult:
    """Return why something of constants alone is not folded; silence where it is none."""
    sources = root.all_input_nodes
    tensors = {each: tensor_of(each) for each in sources}
    if any(tensor is None for tensor in tensors.values()) or not is_pure(root):
        return SILENT
    if root.op == "call_module" or not isinstance(value(root), Tensor):
        return SILENT
    trained = [
        node
        for node, tensor in tensors.items()
        if isinstance(tensor, nn.Parameter) and tensor.requires_grad
    ]
    if trained and not parameters:
        names = " and ".join(str(node.target) for node in trained)
        return MatchResult.fail(
            f"{names} may be trained: with `parameters: true` it is a constant", trained
        )
    count = value(root).numel()
    if isinstance(count, int) and count > size:
        return MatchResult.fail(f"{count:,} numbers are more than `constant_size`", [])
    return SILENT


# -- the value ------------------------------------------------------------------------------------


def _fold(rewriter: GraphRewriter, match: Match) -> None:
    root = match.root
    computed = _compute(root, {})
    if isinstance(computed, Tensor):
        name = rewriter.fresh_path(_name(root))
        rewriter.add_tensor(name, computed.detach().clone(), trainable=False)
        made = rewriter.get_attr(name, before=root)
        replace(rewriter, root, made)
        return
    for user in list(root.users):
        rewriter.set_args(user, *_with_number(user, root, computed))
    drop(rewriter, root)


def _compute(node: fx.Node, known: dict[fx.Node, Any]) -> Any:
    if node in known:
        return known[node]
    tensor = tensor_of(node)
    if tensor is not None:
        return tensor.detach()
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda each: _compute(each, known))
    if node.op == "call_module":
        found = module_of(node)(*args, **kwargs)
    elif node.op == "call_method":
        found = getattr(args[0], str(node.target))(*args[1:], **kwargs)
    else:
        assert callable(node.target)
        found = node.target(*args, **kwargs)
    known[node] = found
    return found


def _with_number(user: fx.Node, old: fx.Node, number: Any) -> tuple[Any, Mapping[str, Any]]:
    def swap(node: fx.Node) -> Any:
        return number if node is old else node

    args, kwargs = fx.map_arg((user.args, user.kwargs), swap)
    return args, kwargs


def _name(node: fx.Node) -> str:
    """Return where a constant goes: in the module that computed it, under the op's name."""
    scope = scope_of(node)
    leaf = re.sub(r"\W+", "_", op_name(node))
    return f"{scope}.{leaf}_constant" if scope else f"{leaf}_constant"
