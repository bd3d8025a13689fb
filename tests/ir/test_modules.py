import inspect
import warnings

import pytest
import torch
from torch import nn

from fxcompress.errors import ModelError
from fxcompress.ir import ModuleConfig, describe, is_stock
from fxcompress.ir.modules import qualified_class

ARGUMENTS = {
    "Conv1d": (4, 8, 3), "Conv2d": (4, 8, (3, 1)), "Conv3d": (4, 8, 3),
    "ConvTranspose1d": (4, 8, 3), "ConvTranspose2d": (4, 8, 3), "ConvTranspose3d": (4, 8, 3),
    "Linear": (4, 8), "Bilinear": (4, 5, 6), "Embedding": (10, 4), "EmbeddingBag": (10, 4),
    "BatchNorm1d": (4,), "BatchNorm2d": (4,), "BatchNorm3d": (4,), "SyncBatchNorm": (4,),
    "InstanceNorm1d": (4,), "InstanceNorm2d": (4,), "InstanceNorm3d": (4,),
    "LayerNorm": (4,), "RMSNorm": (4,), "GroupNorm": (2, 4),
    "LSTM": (4, 8), "GRU": (4, 8), "RNN": (4, 8),
    "LSTMCell": (4, 8), "GRUCell": (4, 8), "RNNCell": (4, 8),
    "MultiheadAttention": (8, 2), "AdaptiveLogSoftmaxWithLoss": (64, 20, [5, 10]),
    "FractionalMaxPool2d": (2, 3), "FractionalMaxPool3d": (2, 3), "PixelShuffle": (2,),
    "PixelUnshuffle": (2,), "ChannelShuffle": (2,), "Fold": (4, 2), "Unfold": (2,),
    "LocalResponseNorm": (2,), "CrossMapLRN2d": (2,), "Threshold": (1, 2), "Unflatten": (1, (2, 2)),
    **{f"LPPool{r}d": (2, 2) for r in (1, 2, 3)},
    **{f"{kind}Pool{r}d": (2,) for r in (1, 2, 3)
       for kind in ("Max", "Avg", "AdaptiveAvg", "AdaptiveMax")},
    **{f"MaxUnpool{r}d": (2,) for r in (1, 2, 3)},
    **{f"{kind}Pad{r}d": (1,) for r in (1, 2, 3)
       for kind in ("Zero", "Reflection", "Replication", "Circular")},
    **{f"ConstantPad{r}d": (1, 2.0) for r in (1, 2, 3)},
}  # fmt: skip
# No leaves, abstract, deprecated by torch itself, or given a module as an argument.
LEFT_OUT = {
    "Module", "Sequential", "ModuleList", "ModuleDict", "ParameterList", "ParameterDict",
    "Container", "DataParallel", "RNNBase", "RNNCellBase", "TripletMarginWithDistanceLoss",
    "NLLLoss2d", "LinearCrossEntropyLoss",
}  # fmt: skip


def leaf_classes():
    for name in dir(nn):
        cls = getattr(nn, name)
        if not (inspect.isclass(cls) and issubclass(cls, nn.Module)) or name in LEFT_OUT:
            continue
        if not name.startswith(("Lazy", "Transformer")):
            yield name


def tensors(module):
    return {k: (tuple(v.shape), v.dtype) for k, v in module.state_dict().items()}


@pytest.mark.parametrize("name", list(leaf_classes()))
def test_round_trip(name):
    module = getattr(nn, name)(*ARGUMENTS.get(name, ()))
    config = describe(module)
    assert config.cls == f"torch.nn.{name}"
    built = config.build()
    assert type(built) is type(module)
    assert describe(built) == config
    assert tensors(built) == tensors(module)
    assert all(t.is_meta for t in built.state_dict().values())


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Conv2d(4, 8, 3, bias=False, padding="same"), {"bias": False, "padding": "same"}),
        (nn.Linear(3, 2, bias=False), {"bias": False}),
        (nn.BatchNorm2d(4, affine=False), {"affine": False}),
        (nn.BatchNorm2d(4, track_running_stats=False), {"track_running_stats": False}),
        (nn.BatchNorm1d(4, momentum=None, eps=1e-3), {"eps": 1e-3, "momentum": None}),
        (nn.LayerNorm((3, 4), bias=False), {"normalized_shape": (3, 4), "bias": False}),
        (nn.LayerNorm(3, elementwise_affine=False), {"elementwise_affine": False}),
        (nn.GELU(approximate="tanh"), {"approximate": "tanh"}),
        (nn.LSTM(3, 4, 2, batch_first=True, bidirectional=True, proj_size=2),
         {"num_layers": 2, "batch_first": True, "bidirectional": True, "proj_size": 2}),
        (nn.RNN(3, 4, nonlinearity="relu"), {"nonlinearity": "relu"}),
        (nn.Embedding(5, 3, padding_idx=0), {"padding_idx": 0}),
        (nn.PReLU(7), {"num_parameters": 7}),
        (nn.MultiheadAttention(8, 2, add_bias_kv=True, kdim=4), {"add_bias_kv": True, "kdim": 4}),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_options_survive(module, expected):
    config = describe(module)
    nondefault = config.nondefault()
    assert {key: nondefault[key] for key in expected} == expected
    assert tensors(config.build()) == tensors(module)


def test_placement_is_no_configuration():
    half = describe(nn.Linear(3, 2, dtype=torch.float16, device="meta"))
    assert half == describe(nn.Linear(3, 2))
    assert set(half.kwargs) == {"in_features", "out_features", "bias"}


def test_runtime_modules_round_trip():
    import fxcompress.nn as runtime

    fake = runtime.FakeQuantize()
    assert is_stock(fake)
    config = describe(fake)
    assert config.cls == "fxcompress.nn.FakeQuantize"
    assert describe(config.build()) == config


class Own(nn.Linear):
    pass


def test_a_users_class_is_refused_by_name():
    assert not is_stock(Own(2, 2))
    with pytest.raises(ModelError, match=r"test_modules\.Own is not a module of torch\.nn"):
        describe(Own(2, 2))
    with pytest.raises(ModelError, match=r"os\.path is not a module"):
        ModuleConfig("os.path").build()
    with pytest.raises(ModelError, match="no module class"):
        ModuleConfig("torch.nn.NoSuchThing").build()


def test_containers_are_no_leaves():
    assert not is_stock(nn.Module())
    assert not is_stock(nn.Sequential(nn.ReLU()))


def test_wrong_arguments_are_named():
    with pytest.raises(ModelError, match=r"cannot build torch\.nn\.Linear"):
        ModuleConfig("torch.nn.Linear", {"nonsense": 1}).build()


def test_an_argument_that_is_a_module_is_refused():
    loss = nn.TripletMarginWithDistanceLoss(distance_function=nn.PairwiseDistance())
    with pytest.raises(ModelError, match="distance_function"):
        describe(loss)


def test_public_names():
    assert qualified_class(nn.Conv2d) == "torch.nn.Conv2d"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert qualified_class(nn.NLLLoss2d) == "torch.nn.NLLLoss2d"
