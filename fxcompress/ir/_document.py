"""A Program as one JSON document, tensors apart, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Final

import torch
from torch import fx, nn

from fxcompress.errors import FxCompressError, ModelError
from fxcompress.ir._calling import CallLike
from fxcompress.ir._copying import assemble, copy_tree
from fxcompress.ir._encode import decode, dtype_from, encode, read_tree, write_tree
from fxcompress.ir._targets import check_method, resolve_function, write_function
from fxcompress.ir.modules import ModuleConfig, describe, is_stock, qualified_class
from fxcompress.ir.naming import node_ids
from fxcompress.ir.program import Note, Program
from fxcompress.ir.propagate import device_of, fake_inputs, new_fake_mode, propagate
from fxcompress.ir.signature import Dim, Parameter, Signature, TensorInput

__all__ = ["FORMAT", "VERSION", "graph_to_json", "program_from_json", "stored_tensors"]

FORMAT: Final = "fxcompress.program"
# The newest version that is read. A document without packed weights is of the first.
VERSION: Final = 2
_PLAIN: Final = 1


def stored_tensors(program: Program) -> dict[str, torch.Tensor]:
    """Return the tensors that a file holds: each once, under its canonical name, meta ones not."""
    return {
        name: tensor.detach()
        for name, tensor in sorted(program.state().items())
        if name not in program.ties and not tensor.is_meta
    }


def graph_to_json(program: Program, *, foreign: bool = False) -> dict[str, Any]:
    """Return everything about a program but its tensors' values, as a JSON document.

    Equal programs give equal documents, in every process.

    Args:
        program: What to write.
        foreign: Write only the names of modules that are neither of torch.nn nor of fxcompress.nn;
            a reader must be given them.

    Raises:
        ModelError: The program holds what has no name: a user's module, function or class.
    """
    return {
        "format": FORMAT,
        "version": _PLAIN,
        "name": program.name,
        "training": program.module.training,
        "dims": [_dim_to_json(dim) for dim in program.dims.values()],
        "inputs": [_input_to_json(tensor) for tensor in program.signature.inputs],
        "parameters": [_parameter_to_json(p) for p in program.signature.parameters],
        "output": write_tree(program.signature.output, "the output"),
        "modules": _modules_to_json(program, foreign=foreign),
        "tensors": _tensors_to_json(program),
        "ties": dict(sorted(program.ties.items())),
        "notes": [asdict(note) for note in program.notes],
        "nodes": _nodes_to_json(program),
    }


def _dim_to_json(dim: Dim) -> dict[str, Any]:
    # The symbol's name belongs to one process; loading makes another.
    return {k: v for k, v in asdict(dim).items() if k != "symbol"}


def _input_to_json(tensor: TensorInput) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "parameter": tensor.parameter,
        "path": list(tensor.path),
    }


def _parameter_to_json(parameter: Parameter) -> dict[str, Any]:
    try:
        constants = [encode(c) for c in parameter.constants]
    except ModelError as error:
        raise ModelError(
            f"the argument {parameter.name!r} cannot be saved", reason=error.what
        ) from error
    return {
        "name": parameter.name,
        "kind": parameter.kind,
        "tree": write_tree(parameter.tree, f"the argument {parameter.name!r}"),
        "leaves": list(parameter.leaves),
        "constants": constants,
    }


def _modules_to_json(program: Program, *, foreign: bool) -> dict[str, Any]:
    """Return, by path, the configuration of every leaf; other modules only hold names."""
    called = {str(node.target) for node in program.graph.find_nodes(op="call_module")}
    own = called | {str(node.target) for node in program.graph.find_nodes(op="get_attr")}
    written: dict[str, Any] = {}
    first: dict[int, str] = {}
    leaves: list[str] = []
    for path, module in program.module.named_modules(remove_duplicate=False):
        inside = any(path.startswith(f"{leaf}.") for leaf in leaves)
        # A leaf brings its own children (MultiheadAttention), unless the graph uses one by itself.
        if not path or (inside and not any(f"{name}.".startswith(f"{path}.") for name in own)):
            continue
        shared = first.setdefault(id(module), path)
        if shared != path:
            written[path] = {"same": shared}
            continue
        if path in called and foreign and not is_stock(module):
            written[path] = {
                "foreign": qualified_class(type(module)),
                "training": module.training,
            }
            leaves.append(path)
        elif path in called or is_stock(module):
            written[path] = {**_leaf_to_json(path, module), "training": module.training}
            leaves.append(path)
        else:
            written[path] = {"training": module.training}
    return written


def _leaf_to_json(path: str, module: nn.Module) -> dict[str, Any]:
    if not is_stock(module):
        raise ModelError(
            f"the module {path} is a {qualified_class(type(module))}, which cannot be saved",
            reason="a file holds no code; only torch.nn and fxcompress.nn modules are rebuilt",
            hint="capture the model without this module in `opaque`, or emit pt2",
            where=path,
        )
    config = describe(module)
    return {
        "class": config.cls,
        "kwargs": {name: encode(value) for name, value in config.kwargs.items()},
    }


def _tensors_to_json(program: Program) -> dict[str, Any]:
    transient = {
        f"{path}.{name}" if path else name
        for path, module in program.module.named_modules(remove_duplicate=False)
        for name in module._non_persistent_buffers_set
    }
    return {
        name: {
            "kind": "parameter" if isinstance(tensor, nn.Parameter) else "buffer",
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
            "meta": tensor.is_meta,
            "trainable": tensor.requires_grad,
            "persistent": name not in transient,
        }
        for name, tensor in program.state().items()
    }


def _nodes_to_json(program: Program) -> list[dict[str, Any]]:
    index = {node: place for place, node in enumerate(program.nodes)}
    ids = node_ids(program)
    written = []
    for node in program.nodes:
        try:
            target = str(node.target)
            if node.op == "call_function":
                assert callable(node.target)
                target = write_function(node.target)
            elif node.op == "call_method":
                target = check_method(target)
            document: dict[str, Any] = {
                "op": node.op,
                "target": target,
                "args": [encode(arg, index) for arg in node.args],
                "kwargs": {key: encode(arg, index) for key, arg in node.kwargs.items()},
            }
        except ModelError as error:
            raise ModelError(
                f"%{ids[node]} cannot be saved: {error.what}",
                reason=error.reason,
                hint=error.hint,
                where=node.meta.get("source"),
            ) from error
        for key in ("scope", "source"):
            if node.meta.get(key):
                document[key] = node.meta[key]
        written.append(document)
    return written


def program_from_json(
    document: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    *,
    foreign: Mapping[str, nn.Module] | None = None,
) -> Program:
    """Return the program of a document and its tensors; types are recomputed, then verified.

    Args:
        document: What `graph_to_json` returned.
        tensors: By canonical name, as `stored_tensors` returns them. They are shared, not copied.
        foreign: By path, the modules that the document only names; copies of them are used.

    Raises:
        ModelError: The document is damaged or of a newer format, or tensors do not fit it.
    """
    if document.get("format") != FORMAT:
        raise ModelError("this is not a saved program", reason=f"its format is not {FORMAT}")
    if document.get("version", 0) > VERSION:
        raise ModelError(
            f"the program was saved in format {document['version']}",
            reason=f"this fxcompress reads up to format {VERSION}",
            hint="update fxcompress",
        )
    try:
        program = _build(document, tensors, foreign or {})
        propagate(program)
        program.verify()
    except FxCompressError:
        raise
    except Exception as error:
        raise ModelError(
            "the saved program is damaged", reason=f"{type(error).__name__}: {error}"
        ) from error
    return program


def _build(
    document: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    foreign: Mapping[str, nn.Module],
) -> Program:
    dims = {d["name"]: Dim(symbol="", **d) for d in document["dims"]}
    mode, sizes, dims = new_fake_mode(dims)
    signature = _signature(document)
    root = _module_tree(document, foreign)
    _assign(root, document, tensors)
    graph = _graph(document)
    graph.set_codegen(CallLike(signature))
    root.training = bool(document["training"])
    module = assemble(root, graph, str(document["name"]))
    program = Program(
        module=module,
        name=document["name"],
        signature=signature,
        dims=dims,
        fake_mode=mode,
        ties=dict(document["ties"]),
        notes=tuple(Note(**note) for note in document["notes"]),
    )
    values = fake_inputs(program, sizes, device_of(program))
    for node in graph.find_nodes(op="placeholder"):
        node.meta["val"] = values[str(node.target)]
    return program


def _signature(document: Mapping[str, Any]) -> Signature:
    inputs = tuple(
        TensorInput(
            t["name"], dtype_from(t["dtype"]), tuple(t["shape"]), t["parameter"], tuple(t["path"])
        )
        for t in document["inputs"]
    )
    parameters = tuple(
        Parameter(
            p["name"],
            p["kind"],
            read_tree(p["tree"]),
            tuple(p["leaves"]),
            tuple(decode(c, _no_node) for c in p["constants"]),
        )
        for p in document["parameters"]
    )
    return Signature(parameters, inputs, read_tree(document["output"]))


def _no_node(index: int) -> Any:
    raise ModelError("a constant of the saved program refers to a node")


def _module_tree(document: Mapping[str, Any], foreign: Mapping[str, nn.Module]) -> nn.Module:
    root = nn.Module()
    for path, written in document["modules"].items():
        parent, _, name = path.rpartition(".")
        owner = root.get_submodule(parent)
        if "same" in written:
            owner._modules[name] = root.get_submodule(written["same"])
            continue
        module: nn.Module = nn.Module()
        if "class" in written:
            kwargs = {k: decode(v, _no_node) for k, v in written["kwargs"].items()}
            module = ModuleConfig(written["class"], kwargs).build("meta")
        elif "foreign" in written:
            module = _foreign(path, written["foreign"], foreign)
        module.train(bool(written["training"]))
        owner._modules[name] = module
    return root


def _foreign(path: str, cls: str, modules: Mapping[str, nn.Module]) -> nn.Module:
    given = modules.get(path)
    if given is None or qualified_class(type(given)) != cls:
        raise ModelError(
            f"the saved program needs the module {path}, a {cls}",
            reason="a file holds no code, and the module was not given",
            where=path,
        )
    return copy_tree(given)


def _assign(
    root: nn.Module, document: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> None:
    ties: Mapping[str, str] = document["ties"]
    made: dict[str, torch.Tensor] = {}
    for name, written in document["tensors"].items():
        canonical = ties.get(name, name)
        if canonical not in made:
            made[canonical] = _tensor(canonical, written, tensors)
        tensor, (path, _, leaf) = made[canonical], name.rpartition(".")
        owner = root.get_submodule(path)
        if isinstance(tensor, nn.Parameter):
            # Not register_parameter: LSTM and GRU keep a flat list in step through setattr.
            owner._buffers.pop(leaf, None)
            setattr(owner, leaf, tensor)
        else:
            owner._parameters.pop(leaf, None)
            owner._buffers.pop(leaf, None)
            owner.register_buffer(leaf, tensor, persistent=bool(written["persistent"]))


def _tensor(
    name: str, written: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    dtype, shape = dtype_from(written["dtype"]), list(written["shape"])
    if written["meta"]:
        tensor = torch.empty(shape, dtype=dtype, device="meta")
    elif name not in tensors:
        raise ModelError(f"the tensor {name} is missing", where=name)
    else:
        tensor = tensors[name]
    if tensor.dtype != dtype or list(tensor.shape) != shape:
        raise ModelError(
            f"the tensor {name} does not fit the program",
            reason=f"it is {tensor.dtype}{list(tensor.shape)}, the program says {dtype}{shape}",
            where=name,
        )
    if written["kind"] == "parameter":
        if isinstance(tensor, nn.Parameter) and tensor.requires_grad == written["trainable"]:
            return tensor
        return nn.Parameter(tensor.detach(), requires_grad=bool(written["trainable"]))
    return tensor


def _graph(document: Mapping[str, Any]) -> fx.Graph:
    graph = fx.Graph()
    nodes: list[fx.Node] = []
    for written in document["nodes"]:
        op, target = written["op"], written["target"]
        if op == "call_function":
            target = resolve_function(target)
        elif op == "call_method":
            target = check_method(target)
        args = tuple(decode(arg, nodes.__getitem__) for arg in written["args"])
        kwargs = {key: decode(arg, nodes.__getitem__) for key, arg in written["kwargs"].items()}
        node = graph.create_node(op, target, args, kwargs)
        node.meta["scope"] = tuple((path, cls) for path, cls in written.get("scope", ()))
        node.meta["source"] = written.get("source")
        nodes.append(node)
    return graph
