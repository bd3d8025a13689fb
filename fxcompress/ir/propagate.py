"""Types of every node, recomputed on fake tensors with symbolic sizes."""

from __future__ import annotations

import logging
from collections.abc import Collection, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import GuardSource, Source
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, free_unbacked_symbols
from torch.utils import _pytree as pytree

from fxcompress.errors import VerifyError
from fxcompress.ir._memo import type_key
from fxcompress.ir._recorder._recurrent import recurrent_result
from fxcompress.ir._types import describe_value, same_type
from fxcompress.ir.modules import is_stock
from fxcompress.ir.naming import node_ids
from fxcompress.ir.ops import module_of
from fxcompress.ir.signature import Dim

if TYPE_CHECKING:
    from fxcompress.ir.program import Program

__all__ = [
    "Evaluator",
    "describe_value",
    "device_of",
    "ensure_inputs",
    "evaluate",
    "fake_inputs",
    "guarded",
    "new_fake_mode",
    "propagate",
    "same_type",
]


class DimSource(Source):
    """Where a dynamic size comes from; torch._dynamo's own class costs seconds to import."""

    def __init__(self, dim: str) -> None:
        self._dim = dim

    @property
    def _name_template(self) -> str:
        return self._dim

    @property
    def guard_source(self) -> GuardSource:
        return GuardSource.CONSTANT


def new_fake_mode(
    dims: Mapping[str, Dim],
) -> tuple[FakeTensorMode, dict[str, torch.SymInt], dict[str, Dim]]:
    """Return a fake mode, one symbolic size per dim, and the dims with their new symbols."""
    shape_env = ShapeEnv()
    mode = FakeTensorMode(shape_env=shape_env, allow_non_fake_inputs=False)
    sizes: dict[str, torch.SymInt] = {}
    fresh: dict[str, Dim] = {}
    for name, dim in dims.items():
        source = DimSource(f"dim_{name}")
        symbol = shape_env.create_symbol(
            dim.example, source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None
        )
        size = shape_env.create_symintnode(symbol, hint=dim.example, source=source)
        assert isinstance(size, torch.SymInt)
        if dim.maximum is not None:
            shape_env.constrain_symbol_range(symbol, dim.minimum, dim.maximum)
        sizes[name] = size
        fresh[name] = Dim(dim.name, str(symbol), dim.example, dim.minimum, dim.maximum)
    return mode, sizes, fresh


def device_of(program: Program) -> torch.device:
    """Return the device a program runs on; meta weights count as being on the CPU."""
    for tensor in program.state().values():
        if tensor.device.type != "meta":
            return tensor.device
    return torch.device("cpu")


def fake_inputs(
    program: Program, sizes: Mapping[str, torch.SymInt], device: torch.device
) -> dict[str, torch.Tensor]:
    """Return a fake tensor per input of the signature, its dynamic sizes from `sizes`."""
    with program.fake_mode:
        return {
            tensor.name: torch.empty(
                [sizes[s] if isinstance(s, str) else s for s in tensor.shape],
                dtype=tensor.dtype,
                device=device,
            )
            for tensor in program.signature.inputs
        }


class Evaluator:
    """Runs nodes of one program on fake tensors, weights included; changes nothing."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.mode = program.fake_mode
        inputs = [node.meta.get("val") for node in program.graph.find_nodes(op="placeholder")]
        known = [value.device for value in inputs if isinstance(value, torch.Tensor)]
        self.device = known[0] if known else device_of(program)
        self._fakes: dict[int, torch.Tensor] = {}

    def fake(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the fake of a parameter or buffer, the same one every time."""
        found = self._fakes.get(id(tensor))
        if found is None:
            device = self.device if tensor.device.type == "meta" else tensor.device
            with self.mode:
                found = torch.empty_strided(
                    tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device
                )
            self._fakes[id(tensor)] = found
        return found

    def run(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        """Return the value of one node for the given values of its inputs.

        Raises:
            Exception: Whatever the op raises on these shapes.
        """
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        if node.op == "get_attr":
            return self._constant(self._attribute(str(node.target)))
        if node.op == "output":
            return args[0]
        # The Python dispatcher finds the decompositions that work on symbolic sizes (LSTM, GRU).
        with self.mode, torch.no_grad(), enable_python_dispatcher():
            if node.op == "call_module":
                module = module_of(node)
                if isinstance(module, nn.RNNBase):
                    known = recurrent_result(module, args, kwargs)
                    if known is not None:
                        return known
                if getattr(module, "keeps_type", False) and isinstance(args[0], torch.Tensor):
                    return torch.empty_like(args[0])
                with self._faked(module):
                    return module(*args, **kwargs)
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            assert callable(node.target)
            return node.target(*args, **kwargs)

    def _attribute(self, target: str) -> Any:
        owner: Any = self.program.module
        for part in target.split("."):
            owner = getattr(owner, part)
        return owner

    def _constant(self, value: Any) -> Any:
        return self.fake(value) if isinstance(value, torch.Tensor) else value

    @contextmanager
    def _faked(self, root: nn.Module) -> Iterator[None]:
        """Swap every tensor of a leaf module for its fake while it runs."""
        saved: list[tuple[dict[str, Any], dict[str, Any]]] = []
        flat: list[tuple[nn.RNNBase, list[Any]]] = []
        try:
            for module in root.modules():
                for table in (module._parameters, module._buffers):
                    saved.append((table, dict(table)))
                    for name, tensor in table.items():
                        if tensor is not None:
                            # A Parameter slot takes a plain tensor here: only shapes are computed.
                            table[name] = self.fake(tensor)  # type: ignore[assignment]
                if isinstance(module, nn.RNNBase):
                    flat.append((module, module._flat_weights))
                    module._flat_weights = [
                        None if w is None else self.fake(w) for w in module._flat_weights
                    ]
            yield
        finally:
            for table, before in saved:
                table.clear()
                table.update(before)
            for rnn, weights in flat:
                rnn._flat_weights = weights


def propagate(program: Program, nodes: Collection[fx.Node] | None = None) -> None:
    """Recompute `meta["val"]` of the graph, or of `nodes` and of all that depends on them.

    Raises:
        VerifyError: An op does not work on these shapes, reads data, or fixes a dynamic size.
    """
    ensure_inputs(program)
    with guarded(program):
        _propagate(program, None if nodes is None else set(nodes))


def _propagate(program: Program, dirty: set[fx.Node] | None) -> None:
    evaluator = Evaluator(program)
    values: dict[fx.Node, Any] = {}
    known: dict[Hashable, Any] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            values[node] = node.meta["val"]
            continue
        asked = dirty is None or node in dirty or "val" not in node.meta
        if asked or (dirty and not dirty.isdisjoint(node.all_input_nodes)):
            key = type_key(node, values)
            if key in known:
                value = known[key]
            else:
                value = evaluate(evaluator, node, values)
                if key is not None and not _depends_on_data(value):
                    known[key] = value
            if dirty is not None and (asked or not same_type(node.meta["val"], value)):
                dirty.add(node)
            node.meta["val"] = value
        values[node] = node.meta["val"]


def _depends_on_data(value: Any) -> bool:
    """Whether a size in a value is known only when it is computed: no two such sizes are one."""
    return any(free_unbacked_symbols(leaf) for leaf in pytree.tree_leaves(value) if _sized(leaf))


def _sized(leaf: Any) -> bool:
    return isinstance(leaf, (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool))


@contextmanager
def guarded(program: Program) -> Iterator[None]:
    """Run an evaluation; if it fixes a dynamic size, undo that and complain.

    The symbols are shared by every copy of a Program, so a bad rewrite must not spoil the good one.

    Raises:
        VerifyError: An op fixed a dynamic size to a number or tied it to another.
    """
    shape_env = program.fake_mode.shape_env
    if shape_env is None:
        with _quiet():
            yield
        return
    tables: tuple[Any, ...] = (shape_env.replacements, shape_env.axioms, shape_env.divisible)
    saved = [table.copy() for table in tables]
    ranges, guards = dict(shape_env.var_to_range), len(shape_env.guards)
    try:
        with _quiet():
            yield
        check_dims(program)
    except BaseException:
        for table, before in zip(tables, saved, strict=True):
            table.clear()
            table.update(before)
        shape_env.fake_tensor_cache.clear()
        shape_env._update_version_counter()
        shape_env._replacements_version_counter += 1
        raise
    finally:
        # Kernel choices ask for ranges (`batch < 16`); they are no property of the model.
        shape_env.var_to_range.update(ranges)
        del shape_env.guards[guards:]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch from logging a failing op with its whole trace: the error says it better."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    disabled, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = disabled


def ensure_inputs(program: Program) -> None:
    """Give every placeholder its fake tensor where it has none.

    Raises:
        VerifyError: Some inputs have one and others, with dynamic sizes, do not.
    """
    holders = list(program.graph.find_nodes(op="placeholder"))
    missing = [node for node in holders if "val" not in node.meta]
    if not missing:
        return
    sizes = _known_sizes(program, holders)
    made = fake_inputs(program, sizes, device_of(program))
    for node in missing:
        node.meta["val"] = made[str(node.target)]


def _known_sizes(program: Program, holders: list[fx.Node]) -> dict[str, torch.SymInt]:
    sizes: dict[str, Any] = {}
    for node in holders:
        value = node.meta.get("val")
        if value is None:
            continue
        shape = program.signature.input(str(node.target)).shape
        for name, size in zip(shape, value.shape, strict=True):
            if isinstance(name, str):
                sizes[name] = size
    lost = [name for name in program.dims if name not in sizes]
    if lost:
        raise VerifyError(
            f"no input carries the dynamic size {lost[0]!r}",
            reason="its placeholder lost its type, and a new symbol would not be the old one",
        )
    return sizes


def evaluate(evaluator: Evaluator, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    """Return the value of one node; an opaque module that cannot run on fakes keeps its own.

    Raises:
        VerifyError: The op fails on these shapes; names the node and the user's line.
    """
    try:
        return evaluator.run(node, values)
    except VerifyError:
        raise
    except Exception as error:
        if node.op == "call_module" and not is_stock(module_of(node)) and "val" in node.meta:
            return node.meta["val"]
        name = node_ids(node.graph)[node]
        raise VerifyError(
            f"%{name} does not work on its operands",
            reason=f"{type(error).__name__}: {_first_line(error)}; operands: "
            + ", ".join(describe_value(values[n]) for n in node.all_input_nodes),
            where=str(node.meta.get("source") or name),
        ) from error


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip() if lines else "no message"


def check_dims(program: Program) -> None:
    """Check that every dynamic size is still free.

    Raises:
        VerifyError: An op fixed one to a number or tied it to another.
    """
    shape_env = program.fake_mode.shape_env
    if shape_env is None:
        return
    for dim in program.dims.values():
        fixed = next((v for k, v in shape_env.replacements.items() if str(k) == dim.symbol), None)
        if fixed is not None:
            raise VerifyError(
                f"the dynamic size {dim.name!r} became {fixed}",
                reason="an op of the graph works for that size only",
                hint=f"declare it static: capture(..., static=({dim.name!r},))",
            )
