"""Find batch norms that can be folded, say why others cannot, and fold them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, fx, nn

from fxcompress.errors import PassError
from fxcompress.ir.naming import node_ids
from fxcompress.ir.ops import module_of, op_name
from fxcompress.pipeline.selectors import Selector
from fxcompress.rewrite.edits import Declined
from passes._training_fold import end_training_fold, match_training_fold
from passes.tidy.fold_batchnorm import Fold

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.rewrite import GraphRewriter
    from passes.tidy.fold_batchnorm import FoldBatchNormOptions

__all__ = ["check_folded", "find_folds", "fold", "scale_and_shift"]

Side = Literal["previous", "next"]
Refusal = tuple[str, tuple[fx.Node, ...]]

_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
_TRANSPOSED = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
_LAYERS = frozenset({"linear", *_CONVOLUTIONS, *_TRANSPOSED})


def find_folds(
    program: Program, options: FoldBatchNormOptions
) -> tuple[tuple[Fold, ...], tuple[Declined, ...]]:
    """Return the folds in graph order, and a refusal for every other selected batch norm."""
    return _Finder(program).find(options)


class _Finder:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.ids = node_ids(program)
        # A folded batch norm -> what its users read instead, so that a second one in a row folds.
        self.gone: dict[fx.Node, fx.Node] = {}

    def find(self, options: FoldBatchNormOptions) -> tuple[tuple[Fold, ...], tuple[Declined, ...]]:
        norms = [node for node in self.program.nodes if op_name(node) == "batch_norm"]
        folds, declined = [], []
        for norm in Selector.of(options).select(self.program, norms):
            refusal = self._unusable(norm)
            refusals = [refusal] if refusal else []
            for side in () if refusal else options.into:
                layer, refusal = self._previous(norm) if side == "previous" else self._next(norm)
                if refusal is None and layer is not None:
                    folds.append(Fold(norm=self.ids[norm], layer=self.ids[layer], into=side))
                    self.gone[norm] = norm.all_input_nodes[0]
                    break
                if refusal is not None:
                    refusals.append(refusal)
            else:
                declined.append(self._declined(norm, refusals))
        return tuple(folds), tuple(declined)

    def _declined(self, norm: fx.Node, refusals: Iterable[Refusal]) -> Declined:
        reasons = dict.fromkeys(reason for reason, _ in refusals)
        because = dict.fromkeys(self.ids[node] for _, nodes in refusals for node in nodes)
        return Declined(node=self.ids[norm], reason="; ".join(reasons), because_of=tuple(because))

    def _unusable(self, norm: fx.Node) -> Refusal | None:
        if norm.op != "call_module":
            return "it is a function call, whose statistics are operands", ()
        if module_of(norm).running_mean is None:
            return "it has no running statistics: it normalises by each batch", ()
        return None

    def _previous(self, norm: fx.Node) -> tuple[fx.Node | None, Refusal | None]:
        """Return the layer that makes the batch norm's input, or why it cannot take it."""
        trained = match_training_fold(norm)
        if trained is not None:
            return trained.layer, None
        source = norm.all_input_nodes[0]
        layer = source
        while layer in self.gone:
            if len(layer.users) > 1:
                return None, _users(self.ids, layer)
            layer = self.gone[layer]
        if op_name(layer) not in _LAYERS:
            return None, (f"no layer makes its input: {self.ids[layer]} does", (layer,))
        if len(layer.users) > 1:
            return None, _users(self.ids, layer)
        refusal = self._layer_refusal(layer)
        if refusal is None and op_name(layer) == "linear" and _rank(layer) != 2:
            refusal = (
                f"its channels are dim 1 of {_rank(layer)}, those of {self.ids[layer]} the last",
                (layer,),
            )
        return layer, refusal

    def _next(self, norm: fx.Node) -> tuple[fx.Node | None, Refusal | None]:
        """Return the layer that reads the batch norm's output, or why it cannot take it."""
        users = list(norm.users)
        if len(users) != 1:
            return None, _users(self.ids, norm)
        layer = users[0]
        if op_name(layer) not in _LAYERS or layer.all_input_nodes != [norm]:
            return None, (f"no layer reads its output: {self.ids[layer]} does", (layer,))
        refusal = self._layer_refusal(layer)
        if refusal is None and op_name(layer) == "linear" and _rank(norm) != 2:
            refusal = (
                f"its channels are dim 1 of {_rank(norm)}, those of {self.ids[layer]} the last",
                (layer,),
            )
        if refusal is None and not _shift_is_zero(module_of(norm)):
            module = module_of(layer)
            if op_name(layer) in _TRANSPOSED:
                refusal = (
                    f"its shift does not reach every output of {self.ids[layer]} alike",
                    (layer,),
                )
            elif op_name(layer) != "linear" and _pads_zeros(module):
                refusal = f"the zeros that {self.ids[layer]} pads would not get its shift", (layer,)
        return layer, refusal

    def _layer_refusal(self, layer: fx.Node) -> Refusal | None:
        name = self.ids[layer]
        if layer.op != "call_module":
            return f"{name} is a function call, whose weight is an operand", (layer,)
        if len(layer.args) > 1:
            why = "it is masked or quantised already"
            return f"{name} takes its weight as an operand: {why}", (layer,)
        calls = list(layer.graph.find_nodes(op="call_module", target=str(layer.target)))
        if len(calls) > 1:
            return f"{layer.target} is a reused module, called {len(calls)} times", tuple(calls)
        ties = self.program.ties
        for tensor in ("weight", "bias"):
            own = f"{layer.target}.{tensor}"
            canonical = ties.get(own, own)
            others = [n for n in (canonical, *ties) if ties.get(n, n) == canonical and n != own]
            readers = layer.graph.find_nodes(op="get_attr", target=own)
            if others or readers:
                shared = others[0] if others else "the graph"
                return f"{own} is shared with {shared}", (layer, *readers)
        return None


def _users(ids: dict[fx.Node, str], node: fx.Node) -> Refusal:
    return f"the output of {ids[node]} has {len(node.users)} users", (node, *node.users)


def _rank(node: fx.Node) -> int:
    value = node.meta.get("val")
    return value.dim() if isinstance(value, Tensor) else 0


def _pads_zeros(layer: Any) -> bool:
    padding = layer.padding
    pads = padding == "same" if isinstance(padding, str) else any(padding)
    return bool(pads and layer.padding_mode == "zeros")


def _shift_is_zero(norm: nn.Module) -> bool:
    _, shift = scale_and_shift(norm)
    return shift.device.type != "meta" and not bool(shift.any())


def scale_and_shift(norm: Any) -> tuple[Tensor, Tensor]:
    """Return g and h of y = g·x + h, in float64."""
    mean, variance = norm.running_mean.double(), norm.running_var.double()
    scale = torch.rsqrt(variance + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -mean * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    return scale, shift


def fold(rewriter: GraphRewriter, decided: Fold) -> None:
    """Fold one batch norm into its layer and take it out of the graph."""
    norm, layer = rewriter.node(decided.norm), rewriter.node(decided.layer)
    trained = match_training_fold(norm)
    if trained is not None:
        end_training_fold(rewriter, trained)
        return
    path = str(layer.target)
    module: Any = rewriter.get_module(path)
    scale, shift = scale_and_shift(rewriter.get_module(str(norm.target)))
    weight = rewriter.get_tensor(f"{path}.weight")
    bias = None if module.bias is None else rewriter.get_tensor(f"{path}.bias")
    if decided.into == "previous":
        new_weight, new_bias = _into_previous(module, weight, bias, scale, shift)
    else:
        new_weight, new_bias = _into_next(module, weight, bias, scale, shift)
    rewriter.set_tensor(f"{path}.weight", new_weight.to(weight.dtype))
    if bias is not None:
        rewriter.set_tensor(f"{path}.bias", new_bias.to(bias.dtype))
    elif decided.into == "previous" or not _shift_is_zero(rewriter.get_module(str(norm.target))):
        rewriter.add_tensor(f"{path}.bias", new_bias.to(weight.dtype), trainable=True)
    rewriter.replace_uses(norm, norm.all_input_nodes[0])
    rewriter.remove(norm)


def _into_previous(
    module: Any, weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor]:
    scaled = _scale_outputs(module, weight.double(), scale)
    return scaled, shift if bias is None else scale * bias.double() + shift


def _into_next(
    module: Any, weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor]:
    wide = weight.double()
    scaled = _scale_inputs(module, wide, scale)
    if _is_transposed(module):
        # Only folded when the shift is zero.
        added = wide.new_zeros(int(module.out_channels))
    else:
        added = _scale_inputs(module, wide, shift).flatten(1).sum(dim=1)
    return scaled, added if bias is None else bias.double() + added


def _is_transposed(module: Any) -> bool:
    return bool(getattr(module, "transposed", False))


def _scale_outputs(module: Any, weight: Tensor, scale: Tensor) -> Tensor:
    """Multiply a weight by a factor per output channel."""
    if not _is_transposed(module):
        return _scale_rows(weight, scale)
    # [in, out / groups, …]: group k of the inputs makes group k of the outputs.
    return _scale_in_groups(weight, scale, module.groups)


def _scale_inputs(module: Any, weight: Tensor, scale: Tensor) -> Tensor:
    """Multiply a weight by a factor per input channel."""
    if _is_transposed(module):
        return _scale_rows(weight, scale)
    # [out, in / groups, …]: group k of the outputs reads group k of the inputs.
    return _scale_in_groups(weight, scale, getattr(module, "groups", 1))


def _scale_rows(weight: Tensor, scale: Tensor) -> Tensor:
    return weight * scale.reshape(-1, *[1] * (weight.dim() - 1))


def _scale_in_groups(weight: Tensor, scale: Tensor, groups: int) -> Tensor:
    """Scale dim 1 of `[groups·rows, columns, …]` by the factors of each group's columns."""
    grouped = weight.reshape(groups, -1, *weight.shape[1:])
    factor = scale.reshape(groups, 1, -1, *[1] * (weight.dim() - 2))
    return (grouped * factor).reshape(weight.shape)


def check_folded(before: Program, after: Program, folds: Iterable[Fold]) -> None:
    """Check that as many batch norms are gone as were decided.

    Raises:
        PassError: One is left.
    """

    def count(program: Program) -> int:
        return sum(1 for node in program.nodes if op_name(node) == "batch_norm")

    decided = len(list(folds))
    if count(before) - count(after) != decided:
        raise PassError(
            f"{count(before) - count(after)} batch norms are gone, {decided} were to be folded"
        )
