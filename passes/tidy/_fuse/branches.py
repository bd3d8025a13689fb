"""Parallel convolutions of one input that are summed: one convolution (RepVGG, MobileOne)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fxcompress.ir._types import same_type
from fxcompress.ir.ops import bind, module_of, op_name
from fxcompress.rewrite import Match, MatchResult, Rule, anything, op
from passes.tidy._batchnorm import scale_and_shift
from passes.tidy._fuse._nodes import SILENT, drop, found, layer_refusal, replace, value

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.rewrite import GraphRewriter

__all__ = ["RULES"]

_CONVOLUTIONS: Final = ("conv1d", "conv2d", "conv3d")
_NOT_FOLDED: Final = "the batch norm of {} is not folded: `batch_norm` does that"


def _terms(total: fx.Node) -> list[fx.Node]:
    """Return what a sum adds up, the terms of sums inside it included."""
    flat: list[fx.Node] = []
    for term in _pair(total):
        inner = _pair(term) if op_name(term) == "add" and len(term.users) == 1 else ()
        same = inner and same_type(value(term), value(total))
        flat += _terms(term) if same else [term]
    return flat


def _pair(total: fx.Node) -> tuple[fx.Node, ...]:
    bound = bind(total)
    pair = (bound.get("input"), bound.get("other"))
    if bound.get("alpha", 1) != 1:
        return ()
    return tuple(n for n in pair if isinstance(n, fx.Node)) if all(map(_is_node, pair)) else ()


def _is_node(operand: Any) -> bool:
    return isinstance(operand, fx.Node)


def _check(program: Program, match: Match) -> MatchResult:
    root = match.root
    if not _pair(root) or _is_part_of_a_sum(root):
        return SILENT
    terms = _terms(root)
    layers = [term for term in terms if op_name(term) in _CONVOLUTIONS and term.args]
    missed = None if layers else _unfolded(terms)
    for layer in sorted(layers, key=_kernel, reverse=True):
        source = layer.all_input_nodes[0]
        if terms.count(layer) > 1:
            continue
        rivals = [t for t in terms if t is not layer and _reads(t, source)]
        if not rivals:
            continue
        result = _fused(program, root, layer, rivals)
        if result.match is not None:
            return result
        missed = result if missed is None else missed
    return SILENT if missed is None else missed


def _unfolded(terms: Sequence[fx.Node]) -> MatchResult | None:
    """Return a near miss where several terms are batch norms of convolutions of one input."""
    norms = [term for term in terms if op_name(term) == "batch_norm"]
    layers = [norm.all_input_nodes[0] for norm in norms]
    layers = [layer for layer in layers if op_name(layer) in _CONVOLUTIONS]
    sources = [layer.all_input_nodes[0] for layer in layers]
    if len(sources) < 2 or len(set(sources)) > 1:
        return None
    return MatchResult.fail(_NOT_FOLDED.format(layers[0].target), [*norms, *layers])


def _is_part_of_a_sum(root: fx.Node) -> bool:
    """Whether a larger sum takes this one in, and with it its terms."""
    users = list(root.users)
    if len(users) != 1 or op_name(users[0]) != "add":
        return False
    return bool(_pair(users[0])) and same_type(value(root), value(users[0]))


def _reads(term: fx.Node, source: fx.Node) -> bool:
    """Whether a term is the source itself, or a convolution or batch norm of it."""
    if term is source:
        return True
    if op_name(term) == "batch_norm":
        inner = term.all_input_nodes[0]
        whole = op_name(inner) in _CONVOLUTIONS and inner.all_input_nodes[:1] == [source]
        return inner is source or whole
    return op_name(term) in _CONVOLUTIONS and term.all_input_nodes[:1] == [source]


def _kernel(layer: fx.Node) -> tuple[int, ...]:
    return tuple(module_of(layer).kernel_size) if layer.op == "call_module" else ()  # type: ignore[arg-type]


def _fused(
    program: Program, root: fx.Node, layer: fx.Node, rivals: Sequence[fx.Node]
) -> MatchResult:
    """Return a match with all rivals that fit into a layer, or why none does."""
    refused = _refusal(program, layer)
    if refused is not None:
        return refused
    taken: list[fx.Node] = []
    missed: MatchResult | None = None
    for rival in rivals:
        why = _misfit(program, layer, rival)
        if why is None:
            taken.append(rival)
        missed = why if missed is None else missed
    if not taken:
        return SILENT if missed is None else missed
    return found(root, layer=layer, **{f"branch{i}": term for i, term in enumerate(taken)})


def _refusal(program: Program, layer: fx.Node) -> MatchResult | None:
    refused = layer_refusal(program, layer)
    return _read_elsewhere(layer) if refused is None else refused


def _read_elsewhere(term: fx.Node) -> MatchResult | None:
    if len(term.users) == 1:
        return None
    return MatchResult.fail(
        f"the output of {term.target} has {len(term.users)} users", [term, *term.users]
    )


def _misfit(program: Program, layer: fx.Node, rival: fx.Node) -> MatchResult | None:
    """Return why a term cannot go into a layer's kernel, or None."""
    big: Any = module_of(layer)
    name = str(layer.target)
    source = layer.all_input_nodes[0]
    if rival is not source and op_name(rival) in _CONVOLUTIONS:
        refused = _refusal(program, rival)
        if refused is not None:
            return refused
        why = _unlike(big, module_of(rival))
        return MatchResult.fail(f"{rival.target} {why} {name}", [rival, layer]) if why else None
    if rival is not source and op_name(rival) == "batch_norm":
        norm: Any = module_of(rival) if rival.op == "call_module" else None
        inner = rival.all_input_nodes[0]
        if inner is not source:
            return MatchResult.fail(_NOT_FOLDED.format(inner.target), [rival, inner])
        if norm is None or norm.running_mean is None:
            why = "it has no running statistics: it normalises by each batch"
            return MatchResult.fail(f"{rival.target}: {why}", [rival])
        refused = _read_elsewhere(rival)
        if refused is not None:
            return refused
    steps = {*big.stride, *big.dilation}
    centred = not isinstance(big.padding, str) and all(
        2 * p == k - 1 for p, k in zip(big.padding, big.kernel_size, strict=True)
    )
    if big.in_channels != big.out_channels or steps != {1} or not centred:
        reason = f"{name} makes another size or number of channels than it reads"
        return MatchResult.fail(reason, [rival, layer])
    return None


def _unlike(big: Any, small: Any) -> str:
    """Return how a convolution differs from one that is to take it in; empty if it fits."""
    if tuple(small.stride) != tuple(big.stride):
        return "has another stride than"
    if small.groups != big.groups:
        return "has another number of groups than"
    if small.out_channels != big.out_channels:
        return "makes another number of channels than"
    same = tuple(small.kernel_size) == tuple(big.kernel_size)
    if tuple(small.dilation) != tuple(big.dilation) or (not same and {*big.dilation} != {1}):
        return "has another dilation than"
    modes = {small.padding_mode, big.padding_mode}
    if any(isinstance(each.padding, str) for each in (small, big)):
        return "pads by name (`same`), beside"
    if modes != {"zeros"} and (len(modes) > 1 or not same or small.padding != big.padding):
        return "pads with other values than"
    sizes = zip(big.kernel_size, small.kernel_size, big.padding, small.padding, strict=True)
    if any(k - s != 2 * (p - q) or p < q for k, s, p, q in sizes):
        return "looks at other places than"
    if small.weight.requires_grad != big.weight.requires_grad:
        return "is frozen or trained, unlike"
    return ""


# -- the sum --------------------------------------------------------------------------------------


def _merge(rewriter: GraphRewriter, match: Match) -> None:
    root, layer = match.root, match["layer"]
    branches = [node for name, node in match.items() if name.startswith("branch")]
    big: Any = module_of(layer)
    path = str(layer.target)
    weight, bias = big.weight.detach().double(), _bias(big)
    for branch in branches:
        kernel, shift = _as_kernel(big, branch, identity=branch is layer.all_input_nodes[0])
        weight, bias = weight + kernel, bias + shift
    rewriter.set_tensor(f"{path}.weight", weight.to(big.weight.dtype))
    if big.bias is not None:
        rewriter.set_tensor(f"{path}.bias", bias.to(big.bias.dtype))
    elif bias.device.type == "meta" or bool(bias.any()):
        trainable = bool(big.weight.requires_grad)
        rewriter.add_tensor(f"{path}.bias", bias.to(big.weight.dtype), trainable=trainable)
    total = layer
    scope = root.meta.get("scope", ())
    for term in _left(root, layer, branches):
        total = rewriter.call_function(torch.add, (total, term), before=root, scope=scope)
    replace(rewriter, root, total)
    for branch in branches:
        drop(rewriter, branch)


def _left(root: fx.Node, layer: fx.Node, branches: Sequence[fx.Node]) -> Iterator[fx.Node]:
    """Yield the terms that stay, each as often as it is added."""
    gone = [layer, *branches]
    for term in _terms(root):
        if term in gone:
            gone.remove(term)
        else:
            yield term


def _bias(module: Any) -> Tensor:
    if module.bias is not None:
        return module.bias.detach().double()  # type: ignore[no-any-return]
    return module.weight.new_zeros(module.out_channels, dtype=torch.float64)  # type: ignore[no-any-return]


def _as_kernel(big: Any, branch: fx.Node, *, identity: bool) -> tuple[Tensor, Tensor]:
    """Return a branch as weight and bias of the shape of the largest convolution's."""
    if not identity and op_name(branch) in _CONVOLUTIONS:
        small: Any = module_of(branch)
        gaps = [(k - s) // 2 for k, s in zip(big.kernel_size, small.kernel_size, strict=True)]
        around = [gap for each in reversed(gaps) for gap in (each, each)]
        return F.pad(small.weight.detach().double(), around), _bias(small)
    scale = big.weight.new_ones(big.out_channels, dtype=torch.float64)
    shift = torch.zeros_like(scale)
    if not identity and op_name(branch) == "batch_norm":
        norm: nn.Module = module_of(branch)
        scale, shift = scale_and_shift(norm)
    kernel = torch.zeros_like(big.weight, dtype=torch.float64)
    out = torch.arange(big.out_channels, device=kernel.device)
    middle = tuple(k // 2 for k in big.kernel_size)
    places = (out, out % (big.in_channels // big.groups), *middle)
    return kernel.index_put([_as_index(each, kernel) for each in places], scale), shift


def _as_index(place: Any, like: Tensor) -> Tensor:
    return place if isinstance(place, Tensor) else torch.tensor(place, device=like.device)


RULES: Final = (Rule("branches", op("add", anything("x")), rewrite=_merge, check=_check),)
