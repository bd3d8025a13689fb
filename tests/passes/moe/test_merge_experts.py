"""Experts that become one: exact where they are equal, weighted and matched where they are not."""

from functools import partial

import pytest
import torch

from fxcompress.errors import DataError, NumericsError, SelectorError, SpecError, UsageError
from fxcompress.pipeline.context import Context
from fxcompress.spec import parse_steps
from fxcompress.testing import check_pass
from passes.moe.merge_experts import MergeExperts
from tests.passes.moe.leaves import HIDDEN, experts_in, mixture, program_of, tokens
from tests.passes.moe.test_upcycle import transformer
from tests.passes.support import apply

INNER = ("gate", "up", "up_bias")


def outputs(net, x):
    with torch.no_grad():
        return net(x)


def context(**options):
    return Context(data={"calibration": tokens(**options)})


def twins(pairs=((0, 3), (1, 4)), shuffled=True, **options):
    """Return a model whose experts are equal in pairs, but for the order of hidden units."""
    model = mixture(**options)
    generator = torch.Generator().manual_seed(7)
    for block in model.blocks:
        for first, second in pairs:
            order = torch.randperm(HIDDEN, generator=generator)
            order = order if shuffled else torch.arange(HIDDEN)
            with torch.no_grad():
                for name, tensor in block.experts.named_parameters():
                    own = tensor[first]
                    dim = {"down": 1, "down_bias": None}.get(name, 0)
                    tensor[second] = own if dim is None else own.index_select(dim, order)
    return model


@pytest.mark.parametrize(
    ("similarity", "align"), [("router_logits", "activations"), ("weights", "weights")]
)
def test_equal_experts_are_merged_without_loss(similarity, align):
    model = twins()
    # Routers that think the pairs alike, so that their scores say so too.
    for block in model.blocks:
        block.router.weight.data[3:5] = block.router.weight.data[:2] + 1e-2
    options = {"experts": 4, "similarity": similarity, "align": align, "weighting": "uniform"}
    result = apply(MergeExperts, program_of(model), options, context())
    for entry in result.decision.mixtures:
        assert {frozenset(g.experts) for g in entry.groups if len(g.experts) > 1} == {
            frozenset({0, 3}), frozenset({1, 4}),
        }  # fmt: skip
        assert all(group.distance < 1e-12 for group in entry.groups)
    assert [each.experts for each in experts_in(result.program)] == [4, 4]
    x = tokens(seed=5)[0][0]
    torch.testing.assert_close(outputs(result.program, x), outputs(model, x), rtol=1e-6, atol=1e-6)


def test_weights_of_two_merged_choices_add_up_and_so_do_gradients():
    """All experts equal: whatever is chosen, the weights of a token sum to one."""
    model = twins(((0, 1), (0, 2), (0, 3), (0, 4), (0, 5)), k=3)
    program = program_of(model)
    result = apply(MergeExperts, program, {"experts": 1, "weighting": "usage"}, context())
    x = tokens(seed=5)[0][0]
    torch.testing.assert_close(outputs(result.program, x), outputs(model, x), rtol=1e-5, atol=1e-6)
    grads = []
    for each in (program, result.program):
        each.module.zero_grad()
        each(x).square().sum().backward()
        grads.append({n: p.grad for n, p in each.module.named_parameters()})
    for name in ("head.weight", "blocks.0.norm.weight"):
        torch.testing.assert_close(grads[1][name], grads[0][name], rtol=1e-4, atol=1e-5)
    bias = grads[0]["blocks.1.experts.down_bias"].sum(0)
    torch.testing.assert_close(
        grads[1]["blocks.1.experts.down_bias"][0], bias, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("weighting", ["usage", "mass"])
def test_means_are_weighted_by_use(weighting):
    model, batches = mixture(), tokens()
    groups = [[0, 2, 5]]
    options = {"groups": groups, "weighting": weighting, "align": "none", "calibration": 64}
    result = apply(MergeExperts, program_of(model), options, context())
    # Count by hand in the first block.
    block, (x,) = model.blocks[0], (torch.cat([b[0] for b in batches]),)
    weights, chosen = (3 * block.router(block.norm(x))).softmax(-1).topk(2, -1)
    weights = (weights / weights.sum(-1, keepdim=True)).detach()
    use = {
        "usage": [float((chosen == e).sum()) for e in groups[0]],
        "mass": [float(weights[chosen == e].sum()) for e in groups[0]],
    }[weighting]
    made = experts_in(result.program)[0]
    entry = next(g for g in result.decision.mixtures[0].groups if len(g.experts) > 1)
    number = [g.experts for g in result.decision.mixtures[0].groups].index(entry.experts)
    for name, tensor in block.experts.named_parameters():
        wanted = sum(u * tensor[e] for u, e in zip(use, groups[0], strict=True)) / sum(use)
        torch.testing.assert_close(getattr(made, name)[number], wanted, rtol=1e-5, atol=1e-6)
    assert entry.experts[0] == groups[0][use.index(max(use))]
    for kept in (1, 3, 4):
        place = [g.experts for g in result.decision.mixtures[0].groups].index((kept,))
        assert torch.equal(made.up[place], block.experts.up[kept])


def test_the_most_used_experts_lead():
    result = apply(MergeExperts, program_of(mixture()), {"experts": 3}, context())
    for entry in result.decision.mixtures:
        most = sorted(range(6), key=lambda each: -entry.usage[each])[:3]
        assert {group.experts[0] for group in entry.groups} == set(most)
        assert sum(entry.usage) == pytest.approx(1)
        assert sorted(e for group in entry.groups for e in group.experts) == list(range(6))
    (figure,) = result.decision.figures()
    assert figure.rows == ("blocks.0.experts", "blocks.1.experts")
    assert "6 experts become 3" in result.decision.summary()[0]


def test_matching_units_is_better_than_their_order():
    """Noisy copies in another order: matched, a mean is closer to both."""
    model = twins()
    for block in model.blocks:
        for tensor in block.experts.parameters():
            noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1))
            tensor.data += 0.02 * noise
    x = tokens(seed=5)[0][0]
    errors = []
    for align in ("weights", "activations", "none"):
        options = {"groups": [[0, 3], [1, 4]], "align": align}
        made = apply(MergeExperts, program_of(model), options, context()).program
        errors.append(float((outputs(made, x) - outputs(model, x)).square().mean()))
    assert max(errors[:2]) < errors[2] / 10


def test_padding_does_not_count():
    from passes.moe._routing import find_mixtures
    from passes.moe._use import measure

    class Masked(type(mixture())):
        def forward(self, x, attention_mask):
            return super().forward(x) * attention_mask[..., None]

    model = Masked().eval()
    model.load_state_dict(mixture().state_dict())
    x, mask = tokens()[0][0], torch.ones(32, 4)
    mask[:, 2:] = 0
    from fxcompress.ir import capture

    program = capture(model, (), {"x": x, "attention_mask": mask}, verify=False)
    found = measure(program, find_mixtures(program), [{"x": x, "attention_mask": mask}])
    plain = program_of(mixture())
    for path, use in measure(plain, find_mixtures(plain), [(x[:, :2],)]).items():
        assert torch.equal(found[path].counts, use.counts)
        torch.testing.assert_close(found[path].mass, use.mass)
        assert found[path].tokens == 64


def test_every_pass_owes_this_too():
    options = {"experts": 4, "calibration": 64}
    check_pass(MergeExperts, program_of(mixture()), options, context=context())


def test_it_plans_without_data_and_weights():
    with torch.device("meta"):
        model = mixture()
    program = program_of(model)
    result = apply(MergeExperts, program, {"experts": 2}, Context(planning=True))
    assert result.decision.pending
    assert [each.up.shape[0] for each in experts_in(result.program)] == [2, 2]
    assert experts_in(result.program)[0].up.is_meta


@pytest.mark.parametrize(
    ("options", "words", "reason"),
    [
        ({"experts": 7}, "cannot be merged so", "7 are to be left of 6"),
        ({"ratio": 0.1}, "cannot be merged so", "of 6 experts is none"),
        ({"groups": [[0, 6]]}, "cannot be merged so", "there is no expert 6: there are 6"),
    ],
)
def test_what_cannot_be_merged(options, words, reason):
    with pytest.raises(UsageError, match=words) as error:
        apply(MergeExperts, program_of(mixture()), options, context())
    assert reason in error.value.reason
    assert error.value.where == "blocks.0.experts"


def test_bad_input():
    step = partial(dict, use="moe.merge_experts")
    for options, words in (
        ({}, "exactly one of"),
        ({"groups": [[1]]}, "at least two"),
        ({"groups": [[0, 1], [1, 2]]}, "one group only"),
    ):
        with pytest.raises(SpecError, match=words):
            parse_steps([step(**options)])
    with pytest.raises(SelectorError, match="there are no experts"):
        apply(MergeExperts, transformer(), {"experts": 2}, context())
    with pytest.raises(DataError, match="no split calibration"):
        apply(MergeExperts, program_of(mixture()), {"experts": 2})
    broken = mixture()
    broken.blocks[1].experts.up.data[2, 0, 0] = float("nan")
    options = {"groups": [[2, 3]], "weighting": "uniform"}
    with pytest.raises(NumericsError, match="NaN or infinite") as error:
        apply(MergeExperts, program_of(broken), options)
    assert error.value.where == "blocks.1.experts"
