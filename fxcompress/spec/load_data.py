"""Make the data splits and the metric that a spec names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from fxcompress.errors import DataError
from fxcompress.spec._data_blocks import Text, Written
from fxcompress.spec._python import call_factory, load_factory
from fxcompress.spec.load_inputs import example_dims, input_specs
from fxcompress.spec.load_teacher import load_teacher
from fxcompress.spec.models import DataFactory, TorchMetric
from fxcompress.spec.models import Split as SplitBlock
from fxcompress.train.data import Data, Split, from_factory, one_split
from fxcompress.train.images import from_images
from fxcompress.train.inputs import InputSpec
from fxcompress.train.metrics import BUILT_IN, Metric
from fxcompress.train.sources import from_tensors, random_split, read_tensors
from fxcompress.train.text import from_text
from fxcompress.train.written import Written as WrittenRows
from fxcompress.train.written import from_teacher, prompts_of, write

if TYPE_CHECKING:
    from fxcompress.spec.spec import Spec

__all__ = ["load_data", "load_metric"]


def load_data(spec: Spec, inputs: tuple[InputSpec, ...] | None = None) -> Data:
    """Return a spec's splits; factories are called and files read when a split is asked for.

    Args:
        spec: The spec.
        inputs: What batches are checked against; by default the spec's `inputs`.

    Raises:
        DataError: Later, when a split is asked for or read: a factory fails, a file is wrong, a
            split is empty or too small, or a batch does not fit the inputs.
    """
    described = input_specs(spec) if inputs is None else inputs
    return Data(lambda: _splits(spec, described))


def _splits(spec: Spec, inputs: tuple[InputSpec, ...]) -> dict[str, Split]:
    block = spec.data
    if block is None:
        return {}
    if isinstance(block, DataFactory):
        where = spec.where("data")
        function = load_factory(block.factory, spec.folder, DataError, where)
        made = call_factory(function, block.args, block.factory, DataError, where)
        return from_factory(made, block.factory, inputs)
    found: dict[str, Split] = {}
    for seed, (name, split) in enumerate(block.items(), spec.seed):
        found[name] = (
            _split(spec, name, split, inputs, seed)
            if split.written is None
            else _written(spec, name, split, split.written, inputs, found)
        )
    return found


def _split(
    spec: Spec, name: str, block: SplitBlock, inputs: tuple[InputSpec, ...], seed: int
) -> Split:
    """Make one split; random splits differ from each other by their seed."""
    if block.factory is not None:
        where = spec.where("data", name)
        function = load_factory(block.factory, spec.folder, DataError, where)
        made = call_factory(function, block.args, block.factory, DataError, where)
        return one_split(name, made, block.factory, inputs, block.limit)
    if block.tensors is not None:
        return from_tensors(
            name,
            read_tensors(spec.path(block.tensors)),
            inputs=inputs,
            target=block.target,
            batch=block.batch,
            limit=block.limit,
        )
    if block.images is not None:
        return from_images(
            name,
            spec.path(block.images.folder),
            size=block.images.size,
            fit=block.images.fit,
            mean=block.images.mean,
            std=block.images.std,
            inputs=inputs,
            batch=block.batch,
            limit=block.limit,
        )
    if block.text is not None:
        return _text(spec, name, block, block.text, inputs)
    described = inputs or input_specs(spec)
    return random_split(
        name,
        block.random or 0,
        inputs=described,
        dims=example_dims(spec, described),
        batch=block.batch,
        seed=seed,
        limit=block.limit,
    )


def _text(
    spec: Spec, name: str, block: SplitBlock, text: Text, inputs: tuple[InputSpec, ...]
) -> Split:
    return from_text(
        name,
        [spec.path(each) for each in text.files],
        tokenizer=spec.path(text.tokenizer),
        column=text.column[0] if len(text.column) == 1 else text.column,
        labels=text.labels,
        length=text.length,
        pack=text.pack,
        pad_to=text.length if text.pad == "length" else None,
        inputs=inputs,
        batch=block.batch,
        limit=block.limit,
    )


def _written(
    spec: Spec,
    name: str,
    block: SplitBlock,
    told: Written,
    inputs: tuple[InputSpec, ...],
    made: Mapping[str, Split],
) -> Split:
    """Return a split that the teacher writes when it is first read.

    Raises:
        DataError: The prompts are no split, or come after this one.
    """
    if told.prompts not in made:
        raise DataError(
            f"split {name} is written to the prompts of {told.prompts}, which is not before it",
            reason=f"before it come {', '.join(made) or 'none'}",
            where=spec.where("data", name),
        )
    where = spec.where("data", name)
    prompts = replace(made[told.prompts], inputs=())
    check = None if told.check is None else load_factory(told.check, spec.folder, DataError, where)

    def make() -> WrittenRows:
        return write(
            load_teacher(spec.folder, spec=told.teacher.spec, run=told.teacher.run),
            prompts_of(prompts),
            stop=told.stop,
            longest=told.longest,
            distinct=told.distinct,
            check=check,
            temperature=told.temperature,
            seed=spec.seed,
        )

    return from_teacher(
        name, make, pad=told.pad, inputs=inputs, batch=block.batch, limit=block.limit
    )


def load_metric(spec: Spec) -> Metric | None:
    """Return a spec's metric, or None if it has none.

    Raises:
        DataError: The factory cannot be imported.
        UsageError: torchmetrics has no such metric, or it refuses an option.
        MissingExtraError: The metric is one of torchmetrics, which is not installed.
    """
    block = spec.metric
    if block is None:
        return None
    if isinstance(block, TorchMetric):
        from fxcompress.train._torchmetrics import from_torchmetrics

        return from_torchmetrics(
            block.use,
            block.options,
            split=block.split,
            higher_is_better=block.higher_is_better,
        )
    if block.use is not None:
        return replace(BUILT_IN[block.use], split=block.split)
    source = str(block.factory)
    where = spec.where("metric")
    function = load_factory(source, spec.folder, DataError, where)

    def measured(model: object, batches: object) -> float:
        try:
            value: float = function(model, batches, **block.args)
        except DataError:
            raise
        except Exception as error:
            raise DataError(
                f"metric {source} failed", reason=f"{type(error).__name__}: {error}", where=where
            ) from error
        return value

    name = source.rpartition(":")[2]
    return Metric(name, measured, block.split, block.improves_upwards)
