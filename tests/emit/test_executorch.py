"""ExecuTorch programs, run by its runtime in a fresh process, their XNNPACK kernels counted."""

from pathlib import Path

import pytest
import torch
from torch import fx

from fxcompress.emit import Artifact, EmitOptions, ExecutorchOptions, emit
from fxcompress.emit._executorch_forms import write_forms
from fxcompress.emit._executorch_sizes import infer_sizes
from fxcompress.emit._lower import EXECUTORCH, INDUCTOR, Target, lower, register_decomposed
from fxcompress.emit._plain import plain_program
from fxcompress.errors import UsageError
from fxcompress.ir import Program
from tests.emit.quantized import (
    dynamic_encoder,
    small_net,
    static_encoder,
    static_net,
    with_output_quantizer,
)

pytest.importorskip("executorch")


@pytest.fixture(scope="module")
def net() -> Program:
    return static_net()


@pytest.fixture(scope="module")
def artifact(net: Program, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    (found,) = emit(net, tmp_path_factory.mktemp("net"), ["executorch"])
    return found


def test_every_layer_runs_in_integers(artifact: Artifact) -> None:
    assert "3 of 3 convolutions run in integers in XNNPACK (3 static)" in artifact.notes
    assert "2 of 2 linear layers run in integers in XNNPACK (1 dynamic, 1 static)" in artifact.notes
    assert artifact.comparison.cosine > 0.999
    assert artifact.path.suffix == ".pte"


def test_what_is_left_to_portable_kernels_is_said(artifact: Artifact) -> None:
    (note,) = (each for each in artifact.notes if "delegated to XNNPACK" in each)
    assert "portable kernels run" in note or note.endswith("all there are")
    assert any("sizes that it accepts: batch from 1 to 16" in each for each in artifact.notes)


def forms(program: Program) -> dict[str, int]:
    return dict(write_forms(plain_program(program).module).count)


def test_a_layer_is_static_only_where_its_output_is_quantised(net: Program) -> None:
    assert forms(small_net()) == {}
    assert forms(net) == {"static": 4, "dynamic": 1}
    assert forms(with_output_quantizer(net, "fc")) == {"static": 5}
    assert forms(static_encoder()) == {"dynamic": 7}
    assert forms(dynamic_encoder()) == {"dynamic": 7}


def test_a_convolution_without_quantised_output_rounds_at_run_time() -> None:
    plain = plain_program(static_net())
    layer = next(n for n in plain.module.graph.nodes if str(n.target) == "block.conv1")
    (relu,) = layer.users
    (quantizer,) = relu.users
    quantizer.replace_all_uses_with(relu)
    plain.module.graph.erase_node(quantizer)
    found = write_forms(plain.module)
    assert found.dynamic == ["block.conv1", "fc"]
    assert found.floats == ["block.conv2.weight"], "its input is not rounded any more"
    assert dict(found.count) == {"static": 2, "dynamic": 2, "float": 1}
    assert "2 layers round their input at run time" in found.notes()[0]


def test_what_has_no_kernel_is_multiplied_out_with_the_same_values() -> None:
    program = static_net({"weights": {"bits": 8, "per": "tensor"}})
    plain = plain_program(program)
    x = torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(3))
    wanted = plain.module(x)
    found = write_forms(plain.module)
    assert found.floats == ["fc.weight"], "one scale for the tensor: no kernel at run time"
    assert torch.equal(plain.module(x), wanted)


@pytest.mark.parametrize("target", [EXECUTORCH, INDUCTOR])
def test_signedness_is_exact(net: Program, target: Target) -> None:
    plain = plain_program(net)
    x = torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(3))
    wanted = plain.module(x)
    lower(plain.module, "decomposed", target)
    assert torch.equal(plain.module(x), wanted)
    quantize = register_decomposed().quantize_per_tensor.default
    types = {n.args[-1] for n in plain.module.graph.nodes if n.target is quantize}
    assert types == {target.activations}


def test_an_unknown_size_is_refused(net: Program, tmp_path: Path) -> None:
    options = EmitOptions(executorch=ExecutorchOptions(maximum={"seq": 4}))
    with pytest.raises(UsageError, match="no dynamic size 'seq'"):
        emit(net, tmp_path, ["executorch"], options=options)


def test_a_flatten_of_a_dynamic_batch_does_not_part_the_network(artifact: Artifact) -> None:
    (note,) = (each for each in artifact.notes if "delegated to XNNPACK" in each)
    assert note.endswith("in 1 parts are delegated to XNNPACK, all there are")


def view(*sizes: int | str) -> tuple[int, list[object]]:
    """Infer the sizes of a view; a computed size is given by its name."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    size = graph.call_function(torch.ops.aten.sym_size.int, (x, 0))
    written = [size if isinstance(each, str) else each for each in sizes]
    node = graph.call_function(torch.ops.aten.view_copy.default, (x, written))
    graph.output(node)
    module = fx.GraphModule(torch.nn.Module(), graph)
    count = infer_sizes(module)
    (seen,) = graph.find_nodes(op="call_function", target=torch.ops.aten.view_copy.default)
    return count, [each if isinstance(each, int) else "size" for each in seen.args[1]]


def test_only_one_computed_size_is_inferred() -> None:
    assert view("size", 12) == (1, [-1, 12])
    assert view(3, "size", 4) == (1, [3, -1, 4])
    assert view("size", "size", 4) == (0, ["size", "size", 4]), "two cannot be"
    assert view(2, 6) == (0, [2, 6])
    assert view("size", 0) == (0, ["size", 0]), "any would do"
    assert view("size", -1) == (0, ["size", -1]), "one is inferred already"


@pytest.mark.slow
def test_a_size_of_one_and_float_layers(tmp_path: Path) -> None:
    options = EmitOptions(executorch=ExecutorchOptions(maximum={"batch": 1}))
    (found,) = emit(small_net(), tmp_path, ["executorch"], options=options)
    assert found.comparison.relative < 1e-4
    assert not any("in integers" in note for note in found.notes)
    assert any("sizes that it accepts: batch 1;" in note for note in found.notes)


@pytest.mark.slow
def test_a_transformer_rounds_at_run_time(tmp_path: Path) -> None:
    (found,) = emit(dynamic_encoder(), tmp_path, ["executorch"])
    assert "7 of 7 linear layers run in integers in XNNPACK (7 dynamic)" in found.notes
    assert found.comparison.relative < 1e-4, "per token is what its kernels do"
