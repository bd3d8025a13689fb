"""How much `prune.channels` takes: ratios, numbers, budgets, multiples."""

import pytest

from passes.prune.channels import Channels
from tests.passes.models import ResNet
from tests.passes.prune.shrinking import INNER, LAST, STEM, resnet, sizes, with_weak_channels
from tests.passes.support import apply, captured


def test_numbers_and_globs_say_how_much():
    assert set(sizes(apply(Channels, resnet(), {"keep": 8})).values()) == {8}
    options = {"keep": {"layer1.0.*": 5, "layer*": 8}, "max_ratio": 0.9}
    assert sizes(apply(Channels, resnet(), options)) == {
        STEM: 5, INNER: 5, "layer1.1.conv1.weight[0]": 8, "layer2.0.conv1.weight[0]": 8,
        LAST: 8, "layer2.1.conv1.weight[0]": 8,
    }  # fmt: skip
    by_glob = apply(Channels, resnet(), {"ratio": {"layer2.*.conv1": "25%"}})
    assert sizes(by_glob)["layer2.1.conv1.weight[0]"] == 12
    assert sizes(by_glob)[LAST] == 16


@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize("name", ["macs", "parameters", "bytes"])
def test_budgets_are_met_closely(name, scope):
    program = captured(lambda: ResNet(32), 2, 3, 16, 16)
    result = apply(Channels, program, {"budget": {name: "55%"}, "scope": scope})
    share = getattr(result.decision.after, name) / getattr(result.decision.before, name)
    assert (0.54 if scope == "global" else 0.5) < share <= 0.55
    if scope == "global":
        parts = {round(e.kept / e.size, 2) for e in result.decision.axes}
        assert len(parts) > 2, "a global budget is not a uniform ratio"


def test_relative_scores_cut_axes_more_alike_than_scores_in_one_unit():
    spreads = []
    for normalise in ("auto", "mean"):
        criterion = {"name": "l2", "normalise": normalise}
        options = {"budget": {"macs": "50%"}, "criterion": criterion}
        result = apply(Channels, resnet(), options)
        parts = [each.kept / each.size for each in result.decision.axes]
        spreads.append(max(parts) - min(parts))
    assert spreads[0] <= 0.2 < spreads[1]


def test_absolute_budgets_and_several_at_once():
    result = apply(Channels, resnet(), {"budget": {"macs": "200k", "parameters": "6k"}})
    assert result.decision.after.macs <= 200_000
    assert result.decision.after.parameters <= 6_000


def test_a_global_ratio_compares_indices_of_all_axes():
    result = apply(Channels, with_weak_channels(), {"ratio": 0.125, "scope": "global"})
    assert sum(sizes(result).values()) == 63
    assert sizes(result)[INNER] == 5


def test_multiples_caps_and_least_sizes_hold():
    options = {"budget": {"macs": "65%"}, "round_to": {"residual": 4, "default": 2}, "min_keep": 5}
    result = apply(Channels, resnet(), options)
    for entry in result.decision.axes:
        assert entry.kept % (4 if entry.kind == "residual" else 2) == 0
        assert entry.kept >= max(5, entry.size / 2)
