"""What one model cannot see: names in one block that another block must define."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fxcompress.errors import Problem
from fxcompress.pipeline._close import did_you_mean
from fxcompress.pipeline.rounds import Rounds
from fxcompress.pipeline.steps import Step
from fxcompress.spec._source import Key, Map, Node, descend
from fxcompress.spec.models import Blocks, DataFactory

__all__ = ["inconsistencies"]


def inconsistencies(
    blocks: Blocks, steps: Sequence[Step], places: Sequence[int], tree: Map
) -> list[Problem]:
    """Return a Problem for each name that is used in one block and missing in another."""
    return [
        *_inputs(blocks, tree),
        *_dims(blocks, tree),
        *_splits(blocks, steps, places, tree),
        *_followed(steps, places, tree),
        *_metric(blocks, tree),
        *_emitted(blocks, tree),
    ]


def _node(tree: Map, key: Key) -> Node:
    return [tree, *(child for _, child in descend(tree, key))][-1]


def _problem(tree: Map, key: Key, message: str, hint: str = "") -> Problem:
    return _node(tree, key).origin.problem(message, key=key, hint=hint)


def _inputs(blocks: Blocks, tree: Map) -> Iterator[Problem]:
    names = [item.name for item in blocks.inputs]
    for index, name in enumerate(names):
        if name in names[:index]:
            yield _problem(tree, ("inputs", index, "name"), f"a second input called `{name}`")


def _dims(blocks: Blocks, tree: Map) -> Iterator[Problem]:
    named = [size for item in blocks.inputs for size in item.shape if isinstance(size, str)]
    for name in blocks.dims:
        if name not in named:
            node = _node(tree, ("dims",))
            origin = node.key_origin(name) if isinstance(node, Map) else node.origin
            hint = did_you_mean(name, named, kind="named in inputs")
            yield origin.problem("no input has this dim", key=("dims", name), hint=hint)
    for index, name in enumerate(blocks.capture.static):
        if name not in named:
            hint = did_you_mean(name, named, kind="named in inputs")
            yield _problem(tree, ("capture", "static", index), f"no input has a dim `{name}`", hint)


def _splits(
    blocks: Blocks, steps: Sequence[Step], places: Sequence[int], tree: Map
) -> Iterator[Problem]:
    """Check splits by name where the spec names them; a data factory is asked when it runs."""
    if isinstance(blocks.data, DataFactory):
        return
    known = list(blocks.data or ())
    wanted: list[tuple[Key, str, str]] = []
    if blocks.metric is not None:
        place: Key = (
            ("metric", "split") if "split" in blocks.metric.model_fields_set else ("metric",)
        )
        wanted.append((place, blocks.metric.split, "the metric"))
    for step, index in zip(steps, places, strict=True):
        wanted.extend(
            (("passes", index), split, f"`{step.use}`")
            for split in sorted(step.pass_.reads(step.options))
        )
    for key, split, who in wanted:
        if split not in known:
            reason = "and the spec has no `data`" if blocks.data is None else ""
            message = " ".join(filter(None, (f"{who} needs a split `{split}`", reason)))
            example = f'add `data: {{factory: "data.py:splits"}}`, which makes `{split}`'
            hint = did_you_mean(split, known, kind="splits") if known else example
            yield _problem(tree, key, message, hint)


def _followed(steps: Sequence[Step], places: Sequence[int], tree: Map) -> Iterator[Problem]:
    before: list[str] = []
    for step, index in zip(steps, places, strict=True):
        # The steps of rounds get their ids later: a run checks those.
        if not any(isinstance(each.pass_, Rounds) for each in steps):
            for name in sorted(step.pass_.follows(step.options).difference(before)):
                hint = did_you_mean(name, before, kind="steps")
                message = f"`{step.use}` reads the result of a step, and there is no step `{name}` "
                yield _problem(tree, ("passes", index), f"{message}before it", hint)
        before.append(step.id)


def _metric(blocks: Blocks, tree: Map) -> Iterator[Problem]:
    for name in ("metric_drop", "metric"):
        if getattr(blocks.constraints, name) is not None and blocks.metric is None:
            yield _problem(tree, ("constraints", name), "the spec has no `metric`")


def _emitted(blocks: Blocks, tree: Map) -> Iterator[Problem]:
    seen: set[tuple[str, str]] = set()
    for index, item in enumerate(blocks.emit):
        if (item.use, item.stem) in seen:
            yield _problem(tree, ("emit", index), f"emits `{item.use}` twice under one name")
        seen.add((item.use, item.stem))
