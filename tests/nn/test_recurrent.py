"""Operand forms of recurrent layers: against naive loops, and what the stock layers compute."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fxcompress.errors import UsageError
from fxcompress.ir.modules import describe
from fxcompress.nn import DynamicQuantize, take_weights_as_operands

STOCK = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}


def made(kind, *args, seed=0, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return STOCK[kind](*args, **options).eval()


def matrices(layer):
    return [value for name, value in layer.named_parameters() if name.startswith("weight")]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def naive_direction(kind, x, h, c, w_ih, w_hh, b_ih, b_hh, quantize):
    """Run one direction, step by step, the formulas as torch.nn documents them."""
    outputs = []
    for step in x:
        a = step @ w_ih.T + b_ih
        if kind == "lstm":
            i, f, g, o = (a + quantize(h) @ w_hh.T + b_hh).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        elif kind == "gru":
            b = h @ w_hh.T + b_hh
            (ri, zi, ni), (rh, zh, nh) = a.chunk(3, -1), b.chunk(3, -1)
            r, z = (ri + rh).sigmoid(), (zi + zh).sigmoid()
            h = (1 - z) * (ni + r * nh).tanh() + z * h
        else:
            h = (a + h @ w_hh.T + b_hh).tanh()
        outputs.append(h)
    return torch.stack(outputs), h, c


def naive(kind, layer, x, bits):
    """Stack the directions of the layers on `[time, batch, features]`, from zero states."""
    quantize = DynamicQuantize(bits, per="tensor")
    lasts = []
    for index in range(layer.num_layers):
        rounded, parts = quantize(x), []
        for suffix in ["", "_reverse"][: 1 + layer.bidirectional]:
            names = [f"{n}_l{index}{suffix}" for n in ("weight_ih", "weight_hh")]
            w_ih, w_hh = (getattr(layer, n) for n in names)
            zeros = x.new_zeros(w_ih.shape[0])
            biases = [getattr(layer, n.replace("weight", "bias"), zeros) for n in names]
            h = x.new_zeros(x.shape[1], layer.hidden_size)
            run = rounded.flip(0) if suffix else rounded
            y, last, _ = naive_direction(kind, run, h, h, w_ih, w_hh, *biases, quantize)
            parts.append(y.flip(0) if suffix else y)
            lasts.append(last)
        x = torch.cat(parts, -1)
    return x, torch.stack(lasts)


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(["lstm", "gru", "rnn"]),
    layers=st.integers(1, 2),
    both=st.booleans(),
    bias=st.booleans(),
    steps=st.integers(1, 4),
    batch=st.integers(1, 3),
    bits=st.sampled_from([3, 8]),
)
def test_equals_the_naive_loops(kind, layers, both, bias, steps, batch, bits):
    stock = made(kind, 3, 5, layers, bias=bias, bidirectional=both)
    layer = take_weights_as_operands(stock, bits)
    x = normal(steps, batch, 3)
    with torch.no_grad():
        y, state = layer(x, None, *matrices(stock))
        wanted, last = naive(kind, stock, x, bits)
    torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)
    hidden = state[0] if kind == "lstm" else state
    torch.testing.assert_close(hidden, last, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", STOCK)
@pytest.mark.parametrize("layout", ["time", "batch", "single"])
def test_layouts_and_states_are_those_of_the_stock_layer(kind, layout):
    stock = made(kind, 4, 6, 2, batch_first=layout == "batch", bidirectional=True)
    layer = take_weights_as_operands(stock)
    x = normal(5, 4) if layout == "single" else normal(3, 5, 4)
    wide = {"single": (), "batch": (3,), "time": (5,)}[layout]
    h = 0.3 * normal(4, *wide, 6, seed=1)
    hx = (h, 0.3 * normal(4, *wide, 6, seed=2)) if kind == "lstm" else h
    with torch.no_grad():
        wanted, got = stock(x, hx), layer(x, hx, *matrices(stock))
    torch.testing.assert_close(got, wanted, rtol=0, atol=0.03)
    assert not torch.equal(got[0], wanted[0])


def test_parameters_stay_the_same_objects_and_train():
    stock = made("lstm", 3, 4)
    layer = take_weights_as_operands(stock, 6)
    assert dict(layer.named_parameters()) == dict(stock.named_parameters())
    assert layer._flat_weights is not stock._flat_weights
    y, _ = layer(normal(4, 2, 3), None, *matrices(stock))
    y.square().sum().backward()
    assert all(float(p.grad.abs().sum()) > 0 for p in layer.parameters())
    config = describe(layer)
    assert config.cls == "fxcompress.nn.OperandLSTM"
    assert config.nondefault() == {"input_size": 3, "hidden_size": 4, "bits": 6}


def test_dropout_between_layers_is_of_training_only():
    stock = made("gru", 3, 4, 2, dropout=0.5)
    layer = take_weights_as_operands(stock)
    call = (normal(4, 2, 3), None, *matrices(stock))
    assert torch.equal(layer(*call)[0], layer(*call)[0])
    layer.train()
    assert not torch.equal(layer(*call)[0], layer(*call)[0])


@pytest.mark.parametrize("layer", [nn.Linear(2, 2), nn.LSTM(2, 4, proj_size=2)])
def test_other_layers_are_refused(layer):
    with pytest.raises(UsageError, match="cannot take its weights as operands"):
        take_weights_as_operands(layer)
