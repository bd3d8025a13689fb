"""Choose the layers that take an adapter, and draw its first values."""

from __future__ import annotations

import hashlib
import math
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fxcompress.errors import SelectorError
from fxcompress.pipeline._close import did_you_mean
from fxcompress.pipeline.selectors import Selector
from fxcompress.rewrite.adapters import find_adapters
from fxcompress.rewrite.edits import Declined
from passes._freezing import freezing
from passes._paths import free_path, path_beside
from passes.factorize._lora.layers import Layer, layers_of, refusal
from passes.factorize._lora.peft import Loaded, load_adapter
from passes.factorize.lora import LoraDecision, LoraEntry

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from passes.factorize.lora import LoraOptions

__all__ = ["decide"]


def decide(program: Program, options: LoraOptions, context: Context) -> LoraDecision:
    """Return the decision of `factorize.lora`."""
    layers = layers_of(program)
    loaded = None
    if options.adapter is not None:
        loaded = load_adapter(context.folder / options.adapter, layers, program.state())
    dora = options.dora if loaded is None else loaded.dora
    chosen, declined = _chosen(program, options, layers, loaded, dora=dora)
    known = {*program.state(), *(path for path, _ in program.module.named_modules())}
    entries: list[LoraEntry] = []
    arrays: dict[str, Tensor] = {}
    for layer in chosen:
        rank, scale = _size(layer, options, loaded)
        path = free_path(path_beside(layer.path, "_lora"), known)
        known.add(path)
        weight = program.state()[layer.weight]
        entry = LoraEntry(
            path=path,
            layer=layer.path,
            op=layer.op,
            weight=layer.weight,
            nodes=tuple(layer.nodes),
            rank=rank,
            scale=scale,
            added=_added(weight, layer.op, rank, dora=dora),
        )
        entries.append(entry)
        if loaded is not None:
            arrays |= {f"{path}.{name}": t for name, t in loaded.tensors[layer.path].items()}
        else:
            arrays[f"{path}.A.weight"] = _first(entry, weight, options.init, context.seed, layer)
    decision = LoraDecision(
        adapters=tuple(entries),
        dora=dora,
        dropout=options.dropout,
        declined=declined,
        arrays=arrays,
    )
    earlier = tuple(f"{path}." for path in find_adapters(program))
    added = sum(entry.added for entry in entries)
    return decision.model_copy(update=freezing(program, options.train, added, earlier))


def _chosen(
    program: Program,
    options: LoraOptions,
    layers: list[Layer],
    loaded: Loaded | None,
    *,
    dora: bool,
) -> tuple[list[Layer], tuple[Declined, ...]]:
    """Return the layers that take an adapter, and why others that are selected do not."""
    selector = Selector.of(options)
    if loaded is not None:
        selector = Selector(targets=tuple(map(_literal, loaded.tensors)), expect=options.expect)
    by_path = {layer.path: layer for layer in layers}
    adapted = {adapter.layer for adapter in find_adapters(program).values()}
    why = {
        path: refusal(program, layer, dora=dora, adapted=adapted) for path, layer in by_path.items()
    }
    able = [layer.candidate for layer in layers if not why[layer.path]]
    everything = [layer.candidate for layer in layers]
    # What is refused stays a candidate, so that the reason is said and not that nothing matches.
    selected = Selector(selector.targets, selector.types, selector.exclude).choose(everything)
    taken = [path for path in selected if not why[path]]
    if not taken:
        reasons = "; ".join(f"{path}: {why[path]}" for path in selected[:3])
        raise SelectorError(
            "no selected layer can take an adapter",
            reason=reasons,
            hint=f"layers that can: {', '.join(c.id for c in able[:8]) or 'none'}",
        )
    if loaded is not None and len(taken) < len(selected):
        path = next(path for path in selected if why[path])
        raise SelectorError("the adapter's files name a layer that takes none", reason=why[path],
                            where=path)  # fmt: skip
    if options.expect is not None and len(taken) != options.expect:
        shown = ", ".join(taken[:8])
        raise SelectorError(
            f"{len(taken)} layers are selected, {options.expect} are expected",
            reason=f"selected: {shown}",
            hint="narrow the targets, or correct `expect`",
        )
    declined = tuple(Declined(node=path, reason=why[path]) for path in selected if why[path])
    for glob in options.ranks:
        if not any(fnmatchcase(path, glob) for path in taken):
            raise SelectorError(
                f"`{glob}` in `ranks` matches no selected layer",
                hint=did_you_mean(glob, taken, kind="selected are"),
            )
    return [by_path[path] for path in taken], declined


def _literal(path: str) -> str:
    return path.replace("[", "[[]")


def _size(layer: Layer, options: LoraOptions, loaded: Loaded | None) -> tuple[int, float]:
    """Return the rank and the scale of a layer's adapter."""
    if loaded is not None:
        down = loaded.tensors[layer.path]["A.weight"]
        rank = int(down.shape[1 if layer.op == "embedding" else 0])
        return rank, loaded.scale(layer.path, rank)
    fits = [rank for glob, rank in options.ranks.items() if fnmatchcase(layer.path, glob)]
    rank = fits[0] if fits else options.rank
    return rank, options.alpha / (math.sqrt(rank) if options.rslora else rank)


def _added(weight: Tensor, op: str, rank: int, *, dora: bool) -> int:
    """Return how many parameters an adapter has."""
    out = int(weight.shape[1 if op in ("embedding", "addmm") else 0])
    rest = weight.numel() // out
    return rank * (out + rest) + (out if dora else 0)


def _first(entry: LoraEntry, weight: Tensor, init: str, seed: int, layer: Layer) -> Tensor:
    """Draw A; each layer has draws of its own, whatever else is selected."""
    digest = hashlib.sha256(f"{seed}:{entry.layer}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    shape: tuple[int, ...]
    if entry.op == "embedding":
        shape = (int(weight.shape[0]), entry.rank)
    elif entry.op == "addmm":
        shape = (entry.rank, int(weight.shape[0]))
    else:
        shape = (entry.rank, *map(int, weight.shape[1:]))
    if init == "gaussian" or entry.op == "embedding":
        drawn = torch.randn(shape, generator=generator) / entry.rank
    else:
        # Kaiming's uniform with a = √5, the first values of torch's own layers.
        bound = 1.0 / math.sqrt(math.prod(shape[1:]))
        drawn = (2.0 * torch.rand(shape, generator=generator) - 1.0) * bound
    padding = getattr(layer.module, "padding_idx", None)
    if entry.op == "embedding" and padding is not None:
        drawn[padding] = 0.0
    return drawn.to(weight.dtype)
