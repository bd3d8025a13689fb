"""Another number of experts a token: as if the model had been built with it."""

import pytest
import torch

from fxcompress.errors import SelectorError, UsageError
from fxcompress.ir import capture
from fxcompress.testing import check_pass
from passes.moe.change_top_k import ChangeTopK
from passes.moe.lift import Lift
from passes.moe.merge_experts import MergeExperts
from passes.moe.to_dense import ToDense
from passes.moe.upcycle import Upcycle
from tests.passes.moe.leaves import Model, mixture, program_of, tokens
from tests.passes.moe.mixtures import WIDTH, Sliced
from tests.passes.moe.test_upcycle import gated, transformer
from tests.passes.support import apply


def outputs(net, x):
    with torch.no_grad():
        return net(x)


@pytest.mark.parametrize("k", [1, 3, 6])
@pytest.mark.parametrize(
    "options", [{}, {"renormalise": False}, {"late": True}], ids=["sum", "plain", "late"]
)
def test_it_is_the_model_built_with_another_number(k, options):
    x = tokens(seed=3)[0][0]
    made = apply(ChangeTopK, program_of(mixture(**options)), {"top_k": k})
    assert [each.before for each in made.decision.mixtures] == [2, 2]
    torch.testing.assert_close(
        outputs(made.program, x), outputs(mixture(k=k, **options), x), rtol=1e-6, atol=1e-6
    )


def test_weights_are_made_to_sum_to_one_or_left():
    x = tokens(seed=3)[0][0]
    plain, summed = mixture(renormalise=False), mixture()
    for start, how, wanted in (
        (plain, "always", mixture(k=3)),
        (summed, "always", mixture(k=3)),
        (summed, "never", mixture(k=3, renormalise=False)),
        (plain, "never", mixture(k=3, renormalise=False)),
    ):
        made = apply(ChangeTopK, program_of(start), {"top_k": 3, "renormalize": how})
        torch.testing.assert_close(
            outputs(made.program, x), outputs(wanted, x), rtol=1e-6, atol=1e-6
        )


def test_one_mixture_alone():
    made = apply(ChangeTopK, program_of(mixture()), {"top_k": 4, "targets": ["blocks.1.*"]})
    model = mixture()
    model.blocks[1].k = 4
    x = tokens(seed=3)[0][0]
    torch.testing.assert_close(outputs(made.program, x), outputs(model, x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("weights", ["renormalized", "straight_through"])
def test_an_upcycled_model_stays_what_it_was(weights):
    upcycled = apply(Upcycle, gated(), {"experts": 4, "top_k": 1, "weights": weights}).program
    made = apply(ChangeTopK, upcycled, {"top_k": 3})
    x = torch.randn(3, 6, 16, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(outputs(made.program, x), outputs(gated(), x), rtol=1e-6, atol=1e-6)


def test_every_pass_owes_this_too():
    result = check_pass(ChangeTopK, program_of(mixture()), {"top_k": 3})
    assert result.decision.summary()[0] == "blocks.0.experts: 2 of 6 experts a token become 3"
    check_pass(ChangeTopK, program_of(mixture()), {"top_k": 2}, edits=0)


@pytest.mark.parametrize(
    ("pass_", "options"),
    [
        (ChangeTopK, {"top_k": 1}),
        (MergeExperts, {"experts": 2, "similarity": "weights", "weighting": "uniform"}),
        (ToDense, {"weighting": "uniform"}),
    ],
)
def test_mixtures_in_another_spelling_are_lifted_first(pass_, options):
    x = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(0))
    program = capture(Sliced().eval(), (x,))
    made = apply(pass_, program, options)
    assert made.decision.summary()[0].startswith("lifted first: ")
    after = apply(pass_, apply(Lift, program, {}).program, options)
    torch.testing.assert_close(outputs(made.program, x), outputs(after.program, x))


def test_numbers_that_cannot_be():
    with pytest.raises(UsageError, match="top_k 7 is above the number of experts 6") as error:
        apply(ChangeTopK, program_of(mixture()), {"top_k": 7})
    assert error.value.where == "blocks.0.experts"
    assert "at most 6" in error.value.hint
    with pytest.raises(SelectorError, match="there are no experts") as missing:
        apply(ChangeTopK, transformer(), {"top_k": 1})
    assert "moe.lift" in missing.value.hint
    program = program_of(mixture(late=True))
    with pytest.raises(UsageError, match="cannot be left without a sum of 1"):
        apply(ChangeTopK, program, {"top_k": 1, "renormalize": "never"})


def test_a_router_that_takes_the_largest_is_declined():
    class Largest(Model):
        def forward(self, x):
            for block in self.blocks:
                y = block.norm(x)
                weights, chosen = block.router(y).softmax(-1).max(-1, keepdim=True)
                x = x + block.experts(y, weights, chosen)
            return self.head(x)

    result = apply(ChangeTopK, program_of(Largest().eval()), {"top_k": 2})
    assert not result.edits
    assert set(result.reasons().values()) == {"its experts are not chosen by a top-k"}
