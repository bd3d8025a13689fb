"""Torch-Pruning on any model by the recipes that its examples document, one per family, untuned.

From `examples/` of version 1.6.1: L2 group magnitude, uniform ratio, the head ignored, outputs
reduced to a scalar where they are not one tensor, heads declared per attention, the attributes of
attention modules set anew afterwards (timm_models/prune_timm_models.py,
transformers/prune_hf_vit.py, torchvision_models/torchvision_pruning.py). Text models lose whole
heads instead of head dimensions, as in transformers/prune_hf_bert.py and LLMs/prune_llm.py.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from benchmarks.zoo import Inputs
from benchmarks.zoo._compare import tensors

__all__ = ["PeerRecipe", "PeerRun", "prune_with_peer", "recipe"]

_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")
_KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")
_FUSED = ("qkv", "qkv_proj")
_QUERIES = ("query", "query_proj", "q_proj", "q", "q_lin", "to_q", "wq", "self_attn_q")
_KEYS = (
    *("key", "key_proj", "k_proj", "k", "k_lin", "to_k", "wk"),
    *("value", "value_proj", "v_proj", "v", "v_lin", "to_v", "wv"),
)
_OUTPUTS = ("logits", "pooler_output")
_LAYERS = (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding, nn.LSTM)


@dataclass(frozen=True)
class PeerRecipe:
    """The arguments of the pruner beyond model, example, importance and ratio."""

    ignored: list[nn.Module]
    num_heads: dict[nn.Module, int]
    groups: dict[nn.Module, int]
    whole_heads: bool
    output: str


@dataclass
class PeerRun:
    """What was pruned: positions per tensor and dimension, and the CPU seconds that it took."""

    seconds: float = 0.0
    removed: dict[str, dict[int, list[int]]] = field(default_factory=dict)
    unjudged: str = ""


def recipe(model: nn.Module, inputs: Inputs, *, text: bool) -> PeerRecipe:
    """Write the documented recipe down for one model."""
    args, kwargs = inputs
    with torch.no_grad():
        output = model(*args, **kwargs)
    num_heads: dict[nn.Module, int] = {}
    groups: dict[nn.Module, int] = {}
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            groups[module] = module.num_heads
            continue
        heads = _first(module, _HEADS) or _first(getattr(module, "config", None), _HEADS)
        if heads is None:
            continue
        shared = _first(module, _KEY_VALUE_HEADS)
        shared = shared or _first(getattr(module, "config", None), _KEY_VALUE_HEADS) or heads
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                if name in _FUSED or name in _QUERIES:
                    num_heads[child] = heads
                elif name in _KEYS:
                    num_heads[child] = shared
    named = [name for name in _OUTPUTS if isinstance(output, Mapping) and name in output]
    heads = _heads_of_model(model, inputs)
    return PeerRecipe(heads, num_heads, groups, text, named[0] if named else "")


def prune_with_peer(
    model: nn.Module,
    inputs: Inputs,
    how: PeerRecipe,
    ratio: float,
    *,
    importance: Any = None,
    across: bool = False,
) -> PeerRun:
    """Prune a model in place; the seconds are those of building the pruner and of pruning.

    Args:
        model: What is pruned.
        inputs: What it is traced with.
        how: The recipe.
        ratio: Which part of each layer goes, or with `across` of all channels together.
        importance: One of Torch-Pruning's criteria; L2 of groups by default.
        across: Compare channels of all layers (its `global_pruning`).
    """
    import torch_pruning as tp

    for parameter in model.parameters():
        parameter.requires_grad_(True)
    args, kwargs = inputs
    names = {id(module): name for name, module in model.named_modules()}
    run = PeerRun()
    start = time.process_time()
    pruner = tp.pruner.BasePruner(
        model,
        kwargs or args,
        importance=importance or tp.importance.GroupMagnitudeImportance(p=2),
        global_pruning=across,
        pruning_ratio=ratio,
        ignored_layers=how.ignored,
        num_heads=how.num_heads,
        out_channel_groups=dict(how.groups),
        prune_num_heads=how.whole_heads,
        prune_head_dims=not how.whole_heads,
        head_pruning_ratio=ratio,
        output_transform=(lambda out: out[how.output].sum()) if how.output else None,
    )
    recorder = _Recorder(pruner, names, run)
    for group in pruner.step(interactive=True):
        recorder.add(group)
        group.prune()
    run.seconds = time.process_time() - start
    _set_attributes(model, pruner.num_heads)
    return run


def _heads_of_model(model: nn.Module, inputs: Inputs) -> list[nn.Module]:
    """Find the last layers: those that an output comes from without a norm in between."""
    made: dict[Any, nn.Module] = {}

    def note(module: nn.Module, _: object, output: Any) -> None:
        for tensor in tensors(output).values():
            if tensor.grad_fn is not None:
                made.setdefault(tensor.grad_fn, module)

    handles = [
        m.register_forward_hook(note)
        for m in model.modules()
        if isinstance(m, _LAYERS) or "norm" in type(m).__name__.lower()
    ]
    args, kwargs = inputs
    outputs = tensors(model(*args, **kwargs))
    for handle in handles:
        handle.remove()
    heads: list[nn.Module] = []
    for output in outputs.values():
        found = _frontier(output.grad_fn, made) if output.grad_fn is not None else []
        if len(found) <= 3 and all(isinstance(module, _LAYERS) for module in found):
            heads += [module for module in found if module not in heads]
    return heads


def _frontier(root: Any, made: dict[Any, nn.Module]) -> list[nn.Module]:
    found: list[nn.Module] = []
    seen, stack = set(), [root]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in made:
            found.append(made[node])
        else:
            stack += [before for before, _ in node.next_functions]
    return found


class _Recorder:
    """Translate pruned groups to positions in the original tensors, whatever was pruned before."""

    def __init__(self, pruner: Any, names: dict[int, str], run: PeerRun) -> None:
        self.graph = pruner.DG
        self.names = names
        self.run = run
        self.left: dict[tuple[str, int], list[int]] = {}
        self.sizes = {n: tuple(p.shape) for n, p in pruner.model.named_parameters()}

    def add(self, group: Any) -> None:
        for dep, positions in group:
            target = dep.target.module
            if isinstance(target, nn.Parameter):
                name = self.graph._param_to_name[target]
                self._remove(name, dep.target.pruning_dim % target.ndim, positions)
            elif id(target) in self.names:
                out = self.graph.is_out_channel_pruning_fn(dep.handler)
                self._module(self.names[id(target)], target, out, list(positions))

    def _module(self, name: str, module: nn.Module, out: bool, positions: list[int]) -> None:
        import torch_pruning as tp

        weight, bias = f"{name}.weight", f"{name}.bias"
        if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
            kind = tp.ops.module2type(module)
            if out or kind == tp.ops.OPTYPE.DEPTHWISE_CONV:
                transposed = getattr(module, "transposed", False)
                self._remove(weight, int(transposed), positions)
                self._remove(bias, 0, positions)
            else:
                transposed = getattr(module, "transposed", False)
                size = module.weight.shape[0 if transposed else 1]
                inner = sorted({position % size for position in positions})
                self._remove(weight, 0 if transposed else 1, inner)
        elif isinstance(module, nn.Embedding):
            self._remove(weight, 1, positions)
        elif isinstance(module, (nn.LSTM, nn.MultiheadAttention)):
            self._packed(name, module, positions)
        elif getattr(module, "weight", None) is not None and module.weight.ndim == 1:
            self._remove(weight, 0, positions)
            self._remove(bias, 0, positions)
        elif list(module.parameters(recurse=False)):
            self.run.unjudged = f"{type(module).__name__} {name}: no map to its tensors"

    def _packed(self, name: str, module: nn.Module, positions: list[int]) -> None:
        if isinstance(module, nn.LSTM) or module.in_proj_weight is None:
            self.run.unjudged = f"{type(module).__name__} {name}: no map to its tensors"
            return
        width = module.embed_dim
        rows = [position + block * width for block in range(3) for position in positions]
        self._remove(f"{name}.in_proj_weight", 0, rows)
        self._remove(f"{name}.in_proj_weight", 1, positions)
        self._remove(f"{name}.in_proj_bias", 0, rows)
        self._remove(f"{name}.out_proj.weight", 0, positions)
        self._remove(f"{name}.out_proj.weight", 1, positions)
        self._remove(f"{name}.out_proj.bias", 0, positions)

    def _remove(self, name: str, dim: int, positions: list[int]) -> None:
        if name not in self.sizes:
            return
        left = self.left.setdefault((name, dim), list(range(self.sizes[name][dim])))
        gone = {left[position] for position in positions if position < len(left)}
        self.left[name, dim] = [position for position in left if position not in gone]
        self.run.removed.setdefault(name, defaultdict(list))[dim] += sorted(gone)


def _set_attributes(model: nn.Module, num_heads: dict[nn.Module, int]) -> None:
    """Set what attention modules remember of their width, as each example does after pruning."""
    for module in model.modules():
        fused = next((m for n in _FUSED if (m := getattr(module, n, None)) in num_heads), None)
        query = next((m for n in _QUERIES if (m := getattr(module, n, None)) in num_heads), None)
        if fused is not None:
            heads = num_heads[fused]
            _set(module, ("num_heads", "num_attention_heads"), heads)
            _set(module, ("head_dim",), fused.out_features // (3 * heads))
            _set(module, ("attn_dim",), fused.out_features // 3)
        elif query is not None:
            width = query.out_features
            heads = num_heads[query]
            _set(module, ("num_heads", "num_attention_heads", "n_heads"), heads)
            _set(module, ("attention_head_size", "head_dim"), width // heads)
            _set(module, ("all_head_size", "dim"), width)
            shared = next((m for n in _KEYS if (m := getattr(module, n, None)) in num_heads), None)
            if shared is not None and hasattr(module, "num_key_value_groups"):
                _set(module, ("num_key_value_heads",), num_heads[shared])
                module.num_key_value_groups = heads // num_heads[shared]
    if type(model).__name__ == "VisionTransformer" and hasattr(model, "conv_proj"):
        model.hidden_dim = model.conv_proj.out_channels


def _set(module: nn.Module, names: tuple[str, ...], value: int) -> None:
    for name in names:
        if isinstance(getattr(module, name, None), int):
            setattr(module, name, value)


def _first(owner: object, names: tuple[str, ...]) -> int | None:
    for name in names:
        value = getattr(owner, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None
