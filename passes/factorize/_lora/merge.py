"""Choose the adapters to merge, and what trains afterwards."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fxcompress.errors import PassError, SelectorError
from fxcompress.pipeline.selectors import Candidate, Selector, public_class
from fxcompress.rewrite.adapters import Adapter, adapter_paths, find_adapters
from passes.factorize.lora_merge import LoraMergeDecision, Merged

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from passes.factorize.lora_merge import LoraMergeOptions

__all__ = ["check_merged", "decide"]


def decide(program: Program, options: LoraMergeOptions, context: Context) -> LoraMergeDecision:
    """Return the decision of `factorize.lora_merge`."""
    found = find_adapters(program)
    if not found:
        raise SelectorError(
            "there is no adapter to merge",
            reason="the graph holds none of the form that factorize.lora inserts",
        )
    candidates = [_candidate(program, adapter) for adapter in found.values()]
    chosen = set(Selector.of(options).choose(candidates))
    merged = [adapter for adapter in found.values() if adapter.layer in chosen]
    left = len(merged) < len(found)
    return LoraMergeDecision(
        adapters=tuple(
            Merged(
                path=adapter.path,
                layer=adapter.layer,
                weight=adapter.weight,
                tied=_tied(program, adapter.weight),
            )
            for adapter in merged
        ),
        thaw=() if left or not options.thaw else _frozen_since(program, context, merged),
    )


def _candidate(program: Program, adapter: Adapter) -> Candidate:
    node = adapter.calls[0][0]
    module = program.module.get_submodule(adapter.layer) if node.op == "call_module" else None
    return Candidate(
        adapter.layer, adapter.op, "" if module is None else public_class(type(module))
    )


def _tied(program: Program, name: str) -> tuple[str, ...]:
    root = program.ties.get(name, name)
    group = {root, *(alias for alias, first in program.ties.items() if first == root)}
    return tuple(sorted(group - {name})) if len(group) > 1 else ()


def _frozen_since(program: Program, context: Context, merged: list[Adapter]) -> tuple[str, ...]:
    """Return the parameters that are frozen now and were not in the original."""
    original = {} if context.original is None else context.original.state()
    own = tuple(f"{adapter.path}." for adapter in merged)
    return tuple(
        name
        for name, parameter in program.module.named_parameters()
        if not parameter.requires_grad
        and not name.startswith(own)
        and (parameter.is_floating_point() or parameter.is_complex())
        and (name not in original or original[name].requires_grad)
    )


def check_merged(after: Program, decision: LoraMergeDecision) -> None:
    """Check that nothing of a merged adapter is left.

    Raises:
        PassError: Something is.
    """
    state = after.state()
    for adapter in decision.adapters:
        left = [name for name in state if name.startswith(f"{adapter.path}.")]
        if adapter.path in adapter_paths(after) or left:
            raise PassError(f"the adapter {adapter.path} is not merged", where=adapter.path)
