"""Models and inputs that a spec names: what is built, and every way they are refused."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fxcompress.errors import (
    CaptureError,
    FxCompressError,
    ModelError,
    NumericsError,
)
from fxcompress.pipeline.catalog import Catalog
from fxcompress.spec import Spec, load_model, load_program
from tests.spec.conftest import INPUTS, built

Parse = Callable[..., Spec]


def test_a_factory_with_arguments_and_weights(spec: Parse, folder: Path) -> None:
    block = {"factory": "model.py:net", "args": {"width": 5}}
    first = built(spec(block))
    assert not first.training
    again = built(spec(block))
    assert torch.equal(first.a.weight, again.a.weight)  # type: ignore[union-attr]
    state = {name: value + 1 for name, value in first.state_dict().items()}
    save_file(state, folder / "w.safetensors")
    torch.save(state, folder / "w.pt")
    torch.save({"epoch": 3, "state_dict": state}, folder / "nested.pt")
    for name in ("w.safetensors", "w.pt", "nested.pt"):
        loaded = built(spec({**block, "weights": name})).state_dict()
        assert all(torch.equal(loaded[key], state[key]) for key in state)


def test_weights_may_name_a_tied_tensor_once(spec: Parse, folder: Path) -> None:
    save_file({"embed.weight": torch.ones(5, 3)}, folder / "w.safetensors")
    model: Any = built(spec({"factory": "model.py:tied", "weights": "w.safetensors"}))
    assert model.head.weight is model.embed.weight
    assert model.head.weight.eq(1).all()


def test_weights_fill_a_model_without_data(spec: Parse, folder: Path) -> None:
    with pytest.raises(ModelError, match="have no data"):
        load_model(spec("model.py:on_meta"))
    source = built(spec())
    save_file(source.state_dict(), folder / "w.safetensors")
    model = built(spec({"factory": "model.py:on_meta", "weights": "w.safetensors"}))
    assert torch.equal(model.a.weight, source.a.weight)  # type: ignore[union-attr]
    assert isinstance(model.a.weight, nn.Parameter)  # type: ignore[union-attr]


@pytest.mark.parametrize("factory", ["model.py:net", "model.py:reads_values"])
def test_meta_weights_allocate_nothing(spec: Parse, factory: str) -> None:
    model = built(spec({"factory": factory, "weights": "meta"}))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    model = load_model(spec(factory), meta=True).model  # type: ignore[assignment]
    assert {p.device.type for p in model.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("factory", "args", "message"),
    [
        ("model.py:fails", {}, r"RuntimeError: no such disk, at model.py:\d+"),
        ("model.py:nothing", {}, "returned a NoneType"),
        ("model.py:pair", {}, "return the model itself"),
        ("model.py:NUMBER", {}, "is a int"),
        ("model.py:ney", {}, "did you mean `net`"),
        ("missing.py:net", {}, "cannot import missing.py"),
        ("no_such_package.models:net", {}, "is the package installed"),
        ("model.py:net", {"widht": 3}, "did you mean `width`"),
        ("broken.py:f", {}, "SyntaxError"),
        ("raises.py:f", {}, "ZeroDivisionError: division by zero, at raises.py:2"),
    ],
)
def test_a_factory_that_fails(
    spec: Parse, folder: Path, factory: str, args: dict[str, Any], message: str
) -> None:
    (folder / "broken.py").write_text("def f(:\n")
    (folder / "raises.py").write_text("import os\n1 / 0\n")
    with pytest.raises(ModelError, match=message) as caught:
        load_model(spec({"factory": factory, "args": args}))
    assert caught.value.where == "<spec>"


def state(**changes: Any) -> dict[str, torch.Tensor]:
    names = {"a.weight": (4, 3), "a.bias": (4,), "b.weight": (3, 4), "b.bias": (3,)}
    made = {name: torch.zeros(shape) for name, shape in names.items()}
    for name, value in changes.items():
        made.pop(name.replace("__", "."), None)
        if value is not None:
            made[name.replace("__", ".")] = value
    return made


@pytest.mark.parametrize(
    ("tensors", "error", "message"),
    [
        (state(a__bias=None), ModelError, "1 keys missing, 0 left over"),
        (state(c__bias=torch.ones(1)), ModelError, "not in the model: c.bias"),
        (state(a__bias=None, a__bia=torch.ones(4)), ModelError, "did you mean `a.bias`"),
        (state(a__weight=torch.ones(3, 4)), ModelError, r"a.weight is \(3, 4\)"),
        ({f"module.{k}": v for k, v in state().items()}, ModelError, "start with `module.`"),
        (state(a__bias=torch.tensor([0, 0, 0, torch.nan])), NumericsError, r"a.bias \(1 of 4\)"),
    ],
)
def test_weights_that_do_not_fit(
    spec: Parse, folder: Path, tensors: Any, error: type[FxCompressError], message: str
) -> None:
    save_file(tensors, folder / "w.safetensors")
    with pytest.raises(error, match=message):
        load_model(spec({"factory": "model.py:net", "weights": "w.safetensors"}))


class Evil:
    def __reduce__(self) -> Any:
        return (exec, ("import pathlib; pathlib.Path('pwned').touch()",))


def test_a_pickle_is_refused_and_not_run(
    spec: Parse, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    torch.save({"a": Evil()}, folder / "evil.pt")
    (folder / "plain.pkl").write_bytes(pickle.dumps(Evil()))
    torch.save(nn.Linear(2, 2), folder / "module.pt")
    for name in ("evil.pt", "plain.pkl", "module.pt"):
        with pytest.raises(ModelError, match=r"needs pickle|no file of torch\.save"):
            load_model(spec({"factory": "model.py:net", "weights": name}))
    assert not (folder / "pwned").exists()


def test_files_that_are_no_weights(spec: Parse, folder: Path) -> None:
    (folder / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    (folder / "text.pt").write_text("weights")
    torch.save([1, 2], folder / "list.pt")
    torch.save({"a": 1}, folder / "numbers.pt")
    for name, message in [
        ("cut.safetensors", "damaged"),
        ("text.pt", "text.pt"),
        ("list.pt", "holds a list"),
        ("numbers.pt", "`a` is a int"),
        ("none.safetensors", "no weights file"),
    ]:
        with pytest.raises(ModelError, match=message):
            load_model(spec({"factory": "model.py:net", "weights": name}))


def test_two_specs_may_each_have_a_helper_of_one_name(tmp_path: Path, passes: Catalog) -> None:
    for width in (2, 7):
        inner = tmp_path / str(width)
        inner.mkdir()
        (inner / "helper.py").write_text(f"WIDTH = {width}\n")
        (inner / "model.py").write_text(
            "from torch import nn\nfrom helper import WIDTH\n"
            "def net():\n    import helper\n    return nn.Linear(helper.WIDTH, WIDTH)\n"
        )
        blocks = {
            "fxcompress": 1,
            "model": "model.py:net",
            "inputs": [{"name": "input", "shape": [2, width]}],
        }
        model: Any = load_model(Spec.parse(blocks, folder=inner, passes=passes)).model
        assert model.weight.shape == (width, width)


def test_inputs_become_arguments(spec: Parse) -> None:
    inputs = [
        *INPUTS,
        {"name": "bias", "shape": ["batch", 1], "values": "zeros"},
    ]
    loaded = load_model(spec(inputs=inputs, dims={"batch": {"example": 3}})).inputs
    assert [tuple(value.shape) for value in loaded.args] == [(3, 3)]
    assert {name: tuple(value.shape) for name, value in loaded.kwargs.items()} == {"bias": (3, 1)}
    assert loaded.dynamic == {"x": {0: "batch"}, "bias": {0: "batch"}}
    assert loaded.dims == {"batch": 3}
    with pytest.raises(ModelError, match="did you mean `scale`"):
        load_model(spec(inputs=[*INPUTS, {"name": "scal", "shape": [1]}]))


def test_inputs_come_from_data_or_not_at_all(spec: Parse) -> None:
    loaded = load_model(spec(inputs=[], data="data.py:splits")).inputs
    assert loaded.specs[0].name == "x"
    assert loaded.dynamic == {"x": {0: "batch"}}
    with pytest.raises(ModelError, match="add `inputs:"):
        load_model(spec(inputs=[]))


def test_capture_a_spec(spec: Parse, folder: Path) -> None:
    program = load_program(spec(name="small", dims={"batch": {"min": 2, "max": 8}}))
    assert program.name == "small"
    assert (program.dims["batch"].minimum, program.dims["batch"].maximum) == (2, 8)
    path = program.save(folder / "small.fxp")
    loaded = load_model(spec({"program": path.name}, inputs=[])).model
    x = torch.randn(5, 3)
    assert torch.equal(loaded(x), program(x))
    fixed = load_program(spec(capture={"static": ["batch"]}))
    assert not fixed.dims


@pytest.mark.parametrize("weights", [None, "meta"])
def test_inputs_that_the_model_cannot_take(spec: Parse, weights: str | None) -> None:
    block = {"factory": "model.py:net", "weights": weights}
    with pytest.raises(ModelError, match="does not run on the inputs") as caught:
        load_program(spec(block, inputs=[{"name": "x", "shape": [2, 5]}]))
    assert "RuntimeError" in caught.value.reason
    with pytest.raises(CaptureError):
        load_program(spec("model.py:branching"))


def test_an_exported_program(spec: Parse, folder: Path) -> None:
    model = built(spec())
    exported = torch.export.export(
        model, (torch.randn(2, 3),), dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    torch.export.save(exported, folder / "net.pt2")
    program = load_program(spec({"pt2": "net.pt2"}))
    x = torch.randn(5, 3)
    torch.testing.assert_close(program(x), model(x))
    (folder / "bad.pt2").write_bytes(b"no")
    with pytest.raises(ModelError, match="no exported program"):
        load_model(spec({"pt2": "bad.pt2"}))


def test_models_of_libraries(spec: Parse) -> None:
    image = [{"name": "x", "shape": ["batch", 3, 64, 64]}]
    timm: Any = built(spec("timm:resnet18", inputs=image))
    assert timm.fc.out_features == 1000
    assert load_model(spec("timm:resnet10t", inputs=[])).inputs.args[0].shape == (2, 3, 176, 176)
    vision: Any = built(spec({"torchvision": "resnet18", "args": {"num_classes": 7}}, inputs=image))
    assert vision.fc.out_features == 7
    for block, message in [
        ("timm:resnet81", "did you mean `resnet18`"),
        ("torchvision:resnet81", "did you mean `resnet18`"),
        ({"timm": "resnet18", "args": {"num_clases": 3}}, "cannot be built"),
        ({"torchvision": "resnet18", "args": {"num_clases": 3}}, "cannot be built"),
    ]:
        with pytest.raises(ModelError, match=message):
            load_model(spec(block, inputs=image))


LLAMA = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 32,
}  # fmt: skip
IDS = [{"name": "input_ids", "shape": ["batch", "seq"], "dtype": "int64", "values": "randint(0,9)"}]


def test_hugging_face_models(spec: Parse, folder: Path) -> None:
    model: Any = built(spec({"hf": LLAMA, "class": "LlamaForCausalLM"}, inputs=IDS))
    model.save_pretrained(folder / "llama")
    loaded: Any = built(spec("hf:llama", inputs=IDS))
    assert type(loaded) is type(model)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    config = {"hf": "llama/config.json", "args": {"num_hidden_layers": 2}}
    assert len(built(spec(config, inputs=IDS)).model.layers) == 2  # type: ignore[union-attr, arg-type]
    planned = built(spec({"hf": LLAMA, "weights": "meta"}, inputs=IDS))
    assert {p.device.type for p in planned.parameters()} == {"meta"}
    for block, message in [
        ("hf:lama", "no config at"),
        ({"hf": {"model_type": "lama"}}, "did you mean `llama`"),
        ({"hf": {**LLAMA, "hiden_size": 4}}, "did you mean `hidden_size`"),
        ({"hf": "llama", "args": {"hiden_size": 4}}, "did you mean `hidden_size`"),
        ({"hf": "llama", "class": "LlamaForCausal"}, "no model class"),
        ({"hf": "llama", "class": "LlamaForSequenceClassification"}, "missing: score.weight"),
    ]:
        with pytest.raises(ModelError, match=message):
            load_model(spec(block, inputs=IDS))
