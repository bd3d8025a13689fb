"""Dense layers that become experts: equal at the start, trained after it, and refusals."""

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxcompress.api import compress
from fxcompress.errors import SelectorError, SpecError, UsageError
from fxcompress.ir import capture
from fxcompress.ir.ops import module_of, op_name
from fxcompress.nn import Experts
from fxcompress.nn.experts import ACTIVATIONS
from fxcompress.pipeline.context import Context
from fxcompress.rewrite import taps_of
from fxcompress.testing import check_pass
from passes.moe.upcycle import Upcycle
from tests.passes.models import Transformer, token_batches
from tests.passes.support import apply, seeded

SIZES = {"ids": {0: "batch", 1: "seq"}}
WIDTH = 16


class Gated(nn.Module):
    """A gated layer with biases, and a fused one without, on `[batch, seq, width]`."""

    def __init__(self, activation=F.silu):
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, 24), nn.Linear(WIDTH, 24)
        self.down = nn.Linear(24, WIDTH)
        self.both, self.last = nn.Linear(WIDTH, 40, False), nn.Linear(20, WIDTH, False)
        self.activation = activation

    def forward(self, x):
        x = x + self.down(self.up(x) * self.activation(self.gate(x)))
        gate, up = self.both(x).chunk(2, -1)
        return x + self.last(self.activation(gate) * up)


@cache
def transformer():
    model = seeded(lambda: Transformer(width=WIDTH, depth=2, heads=2))
    return capture(model, token_batches(1)[0], dynamic=SIZES, verify=False)


@cache
def gated():
    return capture(seeded(Gated), (torch.randn(2, 6, WIDTH),), dynamic="batch", verify=False)


def example(program):
    if program is transformer():
        return token_batches(1, seed=5)[0][0]
    return torch.randn(3, 6, WIDTH, generator=torch.Generator().manual_seed(5))


def experts_in(program):
    return [module_of(node) for node in program.nodes if op_name(node) == "experts"]


EXACT = [
    {"experts": 4, "top_k": 1},
    {"experts": 4, "top_k": 2},
    {"experts": 3, "top_k": 3},
    {"experts": 8, "top_k": 2, "slices": 2},
    {"experts": 8, "top_k": 4, "slices": 2},
    {"experts": 6, "top_k": 3, "slices": 4, "shared": 1},
    {"experts": 4, "top_k": 1, "weights": "straight_through"},
    {"experts": 8, "top_k": 4, "slices": 2, "weights": "straight_through"},
]


@pytest.mark.parametrize(
    ("make", "options"), [*((gated, each) for each in EXACT), (transformer, EXACT[4])]
)
def test_a_mixture_of_copies_is_the_layer_and_so_are_its_gradients(make, options):
    program = make()
    result = apply(Upcycle, program, options)
    x = example(program)
    grads = []
    for each in (program, result.program):
        each.module.zero_grad()
        made = each(x)
        made.square().sum().backward()
        grads.append({n: p.grad.clone() for n, p in each.module.named_parameters()
                      if p.grad is not None})  # fmt: skip
        torch.testing.assert_close(made, program(x), rtol=1e-6, atol=1e-6)
    if options.get("weights") == "straight_through":
        return  # its routers hear of the loss, and so does what is before them
    same = set(grads[0]) & set(grads[1])
    assert same or make is gated
    for name in same:
        torch.testing.assert_close(grads[1][name], grads[0][name], rtol=1e-4, atol=1e-5)
    # Copies share what the layer would have got: of one slice, all of its experts together.
    up = grads[0]["layers.0.up.weight" if make is transformer else "up.weight"]
    name = "layers.0.experts.up" if make is transformer else "experts.up"
    shared, slices = options.get("shared", 0), options.get("slices", 1)
    routed = slices - shared
    copies = grads[1][name].unflatten(0, (-1, routed)).sum(0).flatten(0, 1)
    torch.testing.assert_close(copies, up[shared * len(up) // slices :], rtol=1e-4, atol=1e-5)


def test_experts_drop_hidden_values_as_the_layer_did():
    layer = nn.Sequential(nn.Linear(WIDTH, 24), nn.GELU(), nn.Dropout(0.25), nn.Linear(24, WIDTH))
    program = capture(layer.eval(), (torch.randn(2, 6, WIDTH),), dynamic="batch", verify=False)
    options = {"experts": 6, "top_k": 3, "slices": 4, "shared": 1}
    result = apply(Upcycle, program, options).program
    (leaf,) = experts_in(result)
    assert leaf.dropout == 0.25
    dropped = [n for n in result.nodes if op_name(n) == "dropout"]
    assert len(dropped) == 1, "of the shared slice"
    assert result.verify() is None


def test_one_expert_has_exactly_the_weight_one():
    for weights in ("renormalized", "straight_through"):
        seen = []
        result = apply(Upcycle, transformer(), {"experts": 4, "top_k": 1, "weights": weights})
        for module in experts_in(result.program):
            module.register_forward_hook(lambda _, args, __, seen=seen: seen.append(args[1]))
        result.program(example(transformer()))
        assert len(seen) == 2
        assert all(bool((each == 1).all()) for each in seen)


def router_gradient(options):
    result = apply(Upcycle, gated(), {**options, "layers": [0]})
    result.program(example(gated())).square().sum().backward()
    return float(result.program.module.get_submodule("router").weight.grad.abs().max())


def test_which_routers_hear_of_the_loss():
    """Equal copies make no difference; a constant weight never does."""
    assert router_gradient({"experts": 4, "top_k": 1, "weights": "straight_through"}) > 1e-4
    assert router_gradient({"experts": 4, "top_k": 2, "noise": 0.1}) > 1e-4
    assert router_gradient({"experts": 8, "top_k": 2, "slices": 2}) > 1e-4
    # What is left of p / p is rounding.
    assert router_gradient({"experts": 4, "top_k": 1, "noise": 0.1}) < 1e-5
    assert router_gradient({"experts": 4, "top_k": 2}) < 1e-5
    told = apply(Upcycle, transformer(), {"experts": 4, "top_k": 1}).decision.summary()
    assert any("always 1" in line for line in told)


def test_probabilities_as_they_are_make_up_for_their_mean():
    options = {"experts": 8, "top_k": 2, "slices": 2, "weights": "softmax", "router_std": 1e-5}
    result = apply(Upcycle, transformer(), options)
    x = example(transformer())
    torch.testing.assert_close(result.program(x), transformer()(x), rtol=1e-3, atol=1e-4)
    assert Upcycle().promises(Upcycle.Options(**options)) == "approximate"


def by_hand(dense, module, router, x, k, capacity):
    """Route the tokens of each sequence one after the other."""
    made = torch.zeros_like(x)
    chances = F.softmax(router(x), -1)
    for b in range(len(x)):
        taken = [0] * module.experts
        limit = -(-capacity * x.shape[1] * k // module.experts)
        for t in range(x.shape[1]):
            values, chosen = chances[b, t].topk(k)
            for value, expert in zip(values / values.sum(), chosen.tolist(), strict=True):
                taken[expert] += 1
                if taken[expert] <= limit:
                    made[b, t] += value * dense(x[b, t])
    return made


@pytest.mark.parametrize(("k", "capacity"), [(1, 1.0), (2, 0.75), (1, 4.0)])
def test_tokens_above_the_capacity_pass_by(k, capacity):
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)

        def forward(self, x):
            return self.down(torch.relu(self.up(x)))

    model = seeded(Plain)
    sizes = {"x": {0: "batch", 1: "seq"}}
    program = capture(model, (torch.randn(2, 6, WIDTH),), dynamic=sizes, verify=False)
    options = {"experts": 4, "top_k": k, "capacity": capacity, "router_std": 1.0}
    made = apply(Upcycle, program, options).program
    x = torch.randn(3, 12, WIDTH, generator=torch.Generator().manual_seed(2))
    wanted = by_hand(model, made.module.experts, made.module.router, x, k, capacity)
    torch.testing.assert_close(made(x), wanted, rtol=1e-5, atol=1e-5)
    dropped = int((made(x) == 0).all(-1).sum())
    assert dropped == 0 if capacity == 4 else k > 1 or dropped > 0


@pytest.mark.parametrize("options", [{"noise": 0.1}, {"reinitialize": 0.25}])
def test_noise_and_fresh_units_make_experts_differ(options):
    given = {"experts": 4, "top_k": 2, "router": "zero", **options}
    result = apply(Upcycle, transformer(), given)
    module = experts_in(result.program)[0]
    dense = transformer().module.get_submodule("layers.0").up.weight
    moved = (module.up - dense).detach()
    if "noise" in options:
        spread = moved.flatten(1).std(1) / dense.detach().std()
        torch.testing.assert_close(spread, torch.full((4,), 0.1), rtol=0.1, atol=0)
    else:
        fresh = (moved != 0).any(2)
        assert fresh.sum(1).tolist() == [16] * 4
        assert not torch.equal(fresh[0], fresh[1])
        down = transformer().module.get_submodule("layers.0").down.weight
        assert torch.equal((module.down != down).any(1), fresh)
    again = apply(Upcycle, transformer(), given)
    other = apply(Upcycle, transformer(), given, Context(seed=1))
    assert torch.equal(experts_in(again.program)[0].up, module.up)
    assert not torch.equal(experts_in(other.program)[0].up, module.up)
    assert not torch.equal(module.up[0], experts_in(result.program)[1].up[0])


def test_a_layer_that_is_called_twice_stays_one_layer():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)

        def forward(self, x):
            for _ in range(2):
                x = x + self.down(F.gelu(self.up(x), approximate="tanh"))
            return x

    program = capture(seeded(Twice), (torch.randn(2, WIDTH),), verify=False)
    result = apply(Upcycle, program, {"experts": 4, "top_k": 2})
    assert len(result.decision.layers) == 1
    assert len(set(map(id, experts_in(result.program)))) == 1
    assert list(taps_of(result.program)) == ["router_0", "router_0_2"]
    x = torch.randn(5, WIDTH)
    torch.testing.assert_close(result.program(x), program(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activations_are_known_by_what_they_compute(name):
    program = capture(seeded(lambda: Gated(ACTIVATIONS[name])), (torch.randn(2, WIDTH),),
                      verify=False)  # fmt: skip
    options = {"experts": 2, "top_k": 1, "slices": 2, "shared": 1}
    result = apply(Upcycle, program, options)
    assert {each.activation for each in result.decision.layers} == {name}
    x = torch.randn(5, WIDTH)
    torch.testing.assert_close(result.program(x), program(x), rtol=1e-5, atol=1e-5)


def test_counts_are_those_of_the_model():
    options = {"experts": 6, "top_k": 3, "slices": 4, "shared": 1}
    for program in (transformer(), gated()):
        result = apply(Upcycle, program, options)
        before, after = (
            sum(p.numel() for p in each.module.parameters()) for each in (program, result.program)
        )
        entries = result.decision.layers
        assert after - before == sum(e.parameters[1] - e.parameters[0] for e in entries)
        idle = sum(
            p.numel() // 2 for module in experts_in(result.program) for p in module.parameters()
        )
        assert sum(e.parameters[1] - e.active for e in entries) == idle
    # As many matrices active as the dense layer has, where as many slices are taken.
    entry = apply(Upcycle, gated(), {"experts": 8, "top_k": 2, "slices": 2}).decision.layers[1]
    assert entry.active == entry.parameters[0] + 8 * WIDTH


def test_every_pass_owes_this_too():
    check_pass(Upcycle, gated(), {"experts": 2, "top_k": 1, "layers": [1]}, idempotent=False)


def test_the_pipeline_proves_it_exact():
    step = {"use": "moe.upcycle", "experts": 8, "top_k": 4, "slices": 2, "targets": ["layers.1.*"]}
    result = compress(transformer(), [step])
    (entry,) = result.record.passes
    assert entry.preserves == "exact"
    assert list(taps_of(result.program)) == ["router_1"]


def test_it_plans_from_meta_weights():
    with torch.device("meta"):
        model = Transformer(width=4096, depth=2, heads=32).eval()
    program = capture(model, (token_batches(1)[0][0].to("meta"),), dynamic=SIZES)
    options = {"experts": 8, "top_k": 2, "noise": 0.1}
    result = apply(Upcycle, program, options, Context(planning=True))
    made = experts_in(result.program)[0]
    assert made.up.shape == (8, 16384, 4096)
    assert made.up.is_meta
    assert "2 feed-forward layers with 8 experts" in result.decision.summary()[0]


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"experts": 4, "top_k": 5}, "top_k 5 is above the number of experts 4"),
        ({"experts": 4, "top_k": 2, "router": "zero"}, "stay equal"),
        ({"experts": 6, "top_k": 2, "slices": 4}, "experts is 6, which is no multiple of the 4"),
        ({"experts": 8, "top_k": 1, "slices": 2}, "top_k is 1, which is no multiple of the 2"),
        ({"experts": 8, "top_k": 1, "slices": 2, "shared": 2}, "leaves none to experts"),
        ({"experts": 8, "top_k": 1, "layers": []}, "at least one"),
    ],
)
def test_recipes_that_cannot_be(options, words):
    with pytest.raises(SpecError, match=words):
        compress(transformer(), [{"use": "moe.upcycle", **options}])


def test_layers_that_cannot_be():
    with pytest.raises(UsageError, match="there is no feed-forward layer 7") as error:
        apply(Upcycle, transformer(), {"experts": 2, "top_k": 1, "layers": [7]})
    assert "the model has 2" in error.value.reason
    with pytest.raises(UsageError, match="64 cannot be cut into 3 equal slices") as error:
        apply(Upcycle, transformer(), {"experts": 3, "top_k": 3, "slices": 3})
    assert error.value.where == "layers.0.down"
    program = capture(nn.Linear(4, 4), (torch.randn(2, 4),), verify=False)
    with pytest.raises(SelectorError, match="there is no dense feed-forward layer"):
        apply(Upcycle, program, {"experts": 2, "top_k": 1})


class Almost(nn.Module):
    """Layers that are almost feed-forward layers, each in its own way, and one that is."""

    def __init__(self):
        super().__init__()
        self.up, self.down = (
            nn.ModuleList(make() for _ in range(4))
            for make in (lambda: nn.Linear(WIDTH, 32), lambda: nn.Linear(32, WIDTH))
        )

    def forward(self, x):
        hidden = F.silu(self.up[0](x))
        read = self.down[0](hidden) + hidden.sum(-1, keepdim=True)
        odd = self.down[1](torch.sin(self.up[1](x)))
        crossed = self.down[2](F.silu(self.up[2](x)) * self.up[3](x + 1))
        return read + odd + crossed + self.down[3](F.silu(self.up[3](x)))


def test_near_misses_are_declined_with_the_reason():
    program = capture(seeded(Almost), (torch.randn(2, WIDTH),), verify=False)
    result = apply(Upcycle, program, {"experts": 2, "top_k": 1})
    assert result.reasons() == {
        "down.0": "something else reads its hidden values",
        "down.1": "its activation is none that experts have",
        "down.2": "its gate and its values are made of different inputs",
    }
    assert [each.nodes for each in result.decision.layers] == [("down.3",)]


def test_a_capacity_needs_a_sequence():
    class Image(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)

        def forward(self, x):
            return self.down(F.gelu(self.up(x)))

    program = capture(seeded(Image), (torch.randn(2, 3, 3, WIDTH),), verify=False)
    with pytest.raises(UsageError, match="a capacity counts the tokens of a sequence") as error:
        apply(Upcycle, program, {"experts": 2, "top_k": 1, "capacity": 1.0})
    assert "4 dimensions" in error.value.reason
    assert isinstance(experts_in(apply(Upcycle, program, {"experts": 2, "top_k": 1}).program)[0],
                      Experts)  # fmt: skip
