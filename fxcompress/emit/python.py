"""The `python` format: a readable stand-alone `model.py` and its weights, needing torch alone."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

import torch
from safetensors.torch import save_file
from torch import fx

from fxcompress.emit._artifact import Written
from fxcompress.emit._exit_forms import with_exits
from fxcompress.emit._grouped import name_products
from fxcompress.emit._job import Job
from fxcompress.emit._lower import lower
from fxcompress.emit._plain import PlainProgram, plain_program
from fxcompress.emit._source.classes import write_classes
from fxcompress.emit._source.helpers import merge_weights
from fxcompress.emit._source.regions import find_regions, localize_scalars
from fxcompress.emit._source.render import render
from fxcompress.emit._source.tree import Unit, build_tree
from fxcompress.ir.program import Program

__all__ = ["write"]


_DTYPES: Final = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2", torch.complex64: "C64", torch.uint16: "U16",
    torch.uint32: "U32", torch.uint64: "U64",
}  # fmt: skip


def write(job: Job) -> Written:
    """Write the source and the weights.

    Raises:
        EmitError: The graph holds a module or function that stand-alone code cannot have.
    """
    plain = plain_program(job.program)
    name_products(plain.module)
    stored: list[str] = []
    if job.quantized:
        stored = lower(plain.module, "storage").notes
    merge_weights(plain.module)
    files, exits = with_exits(
        plain, job.example, ("rows", "flat"), lambda own: _write_source(job, own)
    )
    return Written(files.files, (*files.notes, *exits, *stored))


def _write_source(job: Job, plain: PlainProgram) -> Written:
    """Write a program whose graph is the one that is wanted."""
    name = job.file("py")
    symbols = {dim.symbol: dim.name for dim in job.program.dims.values()}
    localize_scalars(plain.module.graph)
    region = find_regions(plain.module.graph, symbols)
    tree = build_tree(plain.module, region)
    state, ties = _state(plain.module, tree)
    (output,) = plain.module.graph.find_nodes(op="output")
    classes = write_classes(tree, symbols, plain.signature, list(output.args[0]), job.program.name)
    # Several models may go to one folder, each under a name of its own.
    stem = job.options.stem
    weights = f"{'' if stem == 'model' else stem + '.'}weights.safetensors"
    source = render(classes, _constants(state, ties), _facts(job.program, plain, weights))
    compile(source, name, "exec")
    (job.stage / name).write_text(source, encoding="utf-8")
    save_file(state, job.stage / weights)
    return Written((name, weights), _notes(name, plain, tree))


def _state(module: fx.GraphModule, tree: Unit) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the tensors by name, each once, and the other names of those that are tied."""
    state: dict[str, torch.Tensor] = {}
    ties: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, tensor in _tensors(module, tree):
        known = first.setdefault(id(tensor), name)
        if known != name:
            ties[name] = known
        else:
            state[name] = tensor.detach().cpu().contiguous().clone()
    return state, ties


def _tensors(module: fx.GraphModule, tree: Unit) -> list[tuple[str, torch.Tensor]]:
    found: list[tuple[str, torch.Tensor]] = []
    prefix = f"{tree.path}." if tree.path else ""
    if tree.leaf is not None:
        leaf = module.get_submodule(tree.path)
        own = [*leaf.named_parameters(remove_duplicate=False), *leaf.named_buffers()]
        return [(f"{prefix}{name}", tensor) for name, tensor in own]
    found += [(f"{prefix}{name}", tensor) for name, tensor in tree.parameters.items()]
    found += [(f"{prefix}{name}", tensor) for name, (tensor, _) in tree.buffers.items()]
    for child in tree.children.values():
        found += _tensors(module, child)
    return found


def _constants(state: dict[str, torch.Tensor], ties: dict[str, str]) -> dict[str, str]:
    used = dict.fromkeys(tensor.dtype for tensor in state.values())
    entries = ", ".join(f'"{code}": {dtype}' for dtype, code in _DTYPES.items() if dtype in used)
    constants = {"DTYPES": f"{{{entries}}}"}
    if ties:
        pairs = ", ".join(f'("{alias}", "{name}")' for alias, name in ties.items())
        constants["TIED"] = f"({pairs},)"
    return constants


def _facts(program: Program, plain: PlainProgram, weights: str) -> dict[str, Any]:
    prints = program.fingerprint()
    try:
        ours = version("fxcompress")
    except PackageNotFoundError:
        ours = "from source"
    return {
        "title": program.name,
        "version": ours,
        "usage": plain.usage().replace("module(", "model(", 1),
        "weights": weights,
        "structure": prints.structure[:16],
        "state": prints.weights[:16],
    }


def _notes(name: str, plain: PlainProgram, tree: Unit) -> tuple[str, ...]:
    usage = plain.usage().replace("module(", "model(", 1)
    notes = [f"`from {name.removesuffix('.py')} import load; model = load()`, then `{usage}`"]
    if plain.flattened:
        notes.append(f"plain containers stand for {', '.join(plain.flattened)}")
    transient = _transient(tree)
    if transient:
        notes.append(f"the weights hold buffers that a state dict does not: {', '.join(transient)}")
    return tuple(notes)


def _transient(tree: Unit) -> list[str]:
    prefix = f"{tree.path}." if tree.path else ""
    own = [f"{prefix}{name}" for name, (_, persistent) in tree.buffers.items() if not persistent]
    return own + [name for child in tree.children.values() for name in _transient(child)]
