"""Record a model once, in one mode."""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils import _pytree as pytree

from fxcompress.errors import CaptureError, FxCompressError
from fxcompress.ir._copying import copy_tree
from fxcompress.ir._recorder._fake import Transcript, fill_values
from fxcompress.ir._recorder._guards import check_still_dynamic
from fxcompress.ir._recorder._inputs import BoundCall
from fxcompress.ir._recorder._mode import Recorder
from fxcompress.ir._recorder._play import GraphPlayer, plays
from fxcompress.ir._recorder._scopes import ModuleFollower
from fxcompress.ir._recorder._sizes import Guard, Sizes
from fxcompress.ir._recorder._source import full_place, place_of_error
from fxcompress.ir._recorder._state import ModelState
from fxcompress.ir._recorder._trees import register_trees

__all__ = ["Recording", "fake_inputs", "record_model", "untouched_random_state"]


@dataclass
class Recording:
    """What one run of the model wrote.

    Attributes:
        graph: The graph, its output a flat tuple.
        output: The tree of the model's output.
        leaves: Qualified name -> leaf module (of the recorded copy).
        opaque: Names of the leaves that were declared opaque.
        constants: Name -> tensor that the model's code made of literals.
        mutated: Names of parameters and buffers that the forward changes.
        guards: Conditions on sizes that were tested.
        sizes: The symbols.
    """

    graph: fx.Graph
    output: pytree.TreeSpec
    leaves: dict[str, nn.Module]
    opaque: set[str]
    constants: dict[str, torch.Tensor]
    mutated: tuple[str, ...]
    guards: list[Guard]
    sizes: Sizes
    inputs: list[fx.Node] = field(default_factory=list)


def record_model(
    model: nn.Module,
    state: ModelState,
    call: BoundCall,
    sizes: Sizes,
    stand_ins: dict[int, Any],
    transcript: Transcript,
    fakes: list[torch.Tensor],
    *,
    training: bool,
    opaque: tuple[str, ...] = (),
    stochastic: Mapping[str, nn.Module] | None = None,
    player: Callable[[Recorder, tuple[Any, ...], dict[str, Any]], Any] | None = None,
) -> Recording:
    """Run a copy of `model` on fake tensors and return what it called.

    With `player`, the calls are those that it makes, not the model's own.

    Raises:
        CaptureError: The model does something that a graph cannot hold.
    """
    twin = copy_tree(model, stand_ins)
    twin.train(training) if training else twin.eval()
    if player is None and plays(twin):
        player = GraphPlayer(twin)  # type: ignore[arg-type]
    recorder = Recorder(state, stand_ins, sizes, transcript, training=training)
    follower = ModuleFollower(recorder, twin, model, opaque, stochastic or {})
    for tensor, fake in zip(call.inputs, fakes, strict=True):
        node = recorder.graph.placeholder(tensor.name)
        node.meta.update(val=fake, scope=(), source=None)
        recorder.values.define(fake, node)
        recorder.writer.asked(fake, tuple(fake.shape))
    sizes.env.watched.clear()
    args, kwargs = call.rebuild(fakes)
    with _named_errors(sizes):
        with contextlib.ExitStack() as modes:
            modes.enter_context(_recording_flags())
            modes.enter_context(untouched_random_state())
            # some kernels, such as that of pad, keep sizes symbolic only in their Python form
            modes.enter_context(enable_python_dispatcher())
            modes.enter_context(sizes.fake_mode)
            modes.enter_context(torch.enable_grad())
            with follower.following(), _custom_functions(recorder), recorder:
                result = player(recorder, args, kwargs) if player else twin(*args, **kwargs)
            register_trees(result)
            flat, tree = pytree.tree_flatten(result)
            outputs = tuple(_output_leaf(recorder, leaf) for leaf in flat)
            fill_values(recorder.graph)
    recorder.graph.output(outputs)
    check_still_dynamic(sizes)
    return Recording(
        recorder.graph,
        tree,
        follower.leaves,
        follower.opaque_paths,
        recorder.constants,
        tuple(recorder.mutated),
        list(sizes.env.watched),
        sizes,
    )


def fake_inputs(call: BoundCall, sizes: Sizes) -> list[torch.Tensor]:
    """Return the inputs of a recording: tensors without data, their dynamic sizes symbols."""
    fakes = []
    with sizes.fake_mode:
        for tensor, example in zip(call.inputs, call.examples, strict=True):
            device = "cpu" if example.device.type == "meta" else example.device
            shape = sizes.shape(tensor.shape)
            fakes.append(torch.empty(shape, dtype=tensor.dtype, device=device))
    return fakes


def _output_leaf(recorder: Recorder, leaf: Any) -> Any:
    if leaf is None or isinstance(leaf, (bool, int, float, complex, str, torch.dtype)):
        return leaf
    if isinstance(leaf, (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)):
        return recorder.lower(leaf)
    raise CaptureError(
        f"the model returns a {type(leaf).__name__}",
        reason="an output is made of tensors, numbers and strings in tuples, lists, dicts, "
        "dataclasses and objects with attributes",
        hint="wrap the model so that it returns tensors",
    )


_LOGGERS: Final = ("torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes")
_DATA_DEPENDENT: Final = (
    GuardOnDataDependentSymNode,
    DataDependentOutputException,
    DynamicOutputShapeException,
)


@contextlib.contextmanager
def _recording_flags() -> Iterator[None]:
    # Libraries ask torch.compiler.is_compiling() before they look at data for a short cut, and
    # is_exporting() before they use operators that only a compiler understands.
    flags = ("_is_compiling_flag", "_is_exporting_flag")
    before = {name: getattr(torch.compiler, name) for name in flags}
    # What fails on fake tensors is tried another way, or becomes an error of ours.
    loggers = {logging.getLogger(name): logging.getLogger(name).level for name in _LOGGERS}
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        for name in flags:
            setattr(torch.compiler, name, True)
        yield
    finally:
        for logger, level in loggers.items():
            logger.setLevel(level)
        for name, value in before.items():
            setattr(torch.compiler, name, value)


@contextlib.contextmanager
def untouched_random_state() -> Iterator[None]:
    """Put every random generator back where it was, whatever happens inside."""
    import numpy as np

    python, numpy_state, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)
        torch.set_rng_state(cpu)


@contextlib.contextmanager
def _named_errors(sizes: Sizes) -> Iterator[None]:
    try:
        yield
    except FxCompressError:
        raise
    except Exception as error:
        check_still_dynamic(sizes)
        if isinstance(error, _DATA_DEPENDENT):
            raise CaptureError(
                "what the model does depends on the data of a tensor",
                reason=f"a size or a branch follows from values: {_first_lines(str(error), 1)}",
                hint="use a form whose sizes do not depend on data (a mask instead of an index), "
                "or mark the module as opaque",
                where=full_place(place_of_error(error)),
            ) from error
        raise CaptureError(
            f"the model could not be recorded: {type(error).__name__}",
            reason=_first_lines(str(error)),
            hint="run the model on the example inputs first; if that works, mark the module as "
            'opaque (opaque=["…"]), or use tracer="export"',
            where=full_place(place_of_error(error)),
        ) from error


@contextlib.contextmanager
def _custom_functions(recorder: Recorder) -> Iterator[None]:
    """Record through `autograd.Function`s; they compute their forward without gradients."""
    function: Any = torch.autograd.Function
    original = function.apply.__func__

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        recorder.custom_depth += torch.is_grad_enabled()
        try:
            return original(cls, *args, **kwargs)
        finally:
            recorder.custom_depth -= torch.is_grad_enabled()

    function.apply = classmethod(apply)
    try:
        yield
    finally:
        function.apply = classmethod(original)


def _first_lines(text: str, limit: int = 3) -> str:
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return " ".join(lines[:limit])
