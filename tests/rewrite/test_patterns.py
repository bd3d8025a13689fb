import torch

from fxcompress.rewrite import GraphRewriter, MatchResult, Rule, anything, apply_rules, find, op
from tests.rewrite import models


def drop(rewriter, match):
    rewriter.replace_uses(match["norm"], match["conv"])
    rewriter.remove(match["norm"])


NORM = Rule("drop", op("batch_norm", op("conv2d", name="conv", only_user=True), name="norm"), drop)


def test_matches_are_found_by_id_and_change_nothing():
    program = models.convnet()
    text = program.text()
    findings = find(program, [NORM])
    assert findings.matches == {"drop": ("bn1", "bn2")}
    assert findings.declined == ()
    assert program.text() == text


def test_rules_are_applied_in_graph_order_and_counted():
    rewriter = GraphRewriter(models.convnet())
    assert apply_rules(rewriter, [NORM]) == {"drop": 2}
    after = rewriter.finish()
    after.verify()
    assert "batch_norm" not in after.text(state=False)


def test_a_near_miss_says_what_was_found_instead():
    rule = Rule("relu", op("relu", op("conv2d", name="conv"), name="norm"), drop)
    findings = find(models.convnet(), [rule])
    assert [(each.node, each.reason) for each in findings.declined] == [
        ("relu", "expected conv2d, found batch_norm"),
        ("/relu", "expected conv2d, found add"),
    ]
    assert findings.declined[0].because_of == ("bn1",)


def test_a_second_user_is_a_reason():
    rule = Rule("add", op("conv2d", op("relu", name="conv", only_user=True), name="norm"), drop)
    findings = find(models.convnet(), [rule])
    explained = {each.node: each for each in findings.declined}
    assert "2 users" in explained["conv2"].reason
    assert explained["conv2"].because_of == ("relu", "/add")
    assert explained["conv1"].reason == "expected relu, found input"


def test_checks_explain_themselves():
    def only_wide(program, match):
        return MatchResult.fail("too narrow", [match["conv"]])

    rule = Rule("wide", NORM.pattern, drop, only_wide)
    rewriter = GraphRewriter(models.convnet())
    assert apply_rules(rewriter, [rule]) == {"wide": 0}
    assert {each.reason for each in rewriter.declined} == {"too narrow"}
    assert rewriter.declined[0].because_of == ("conv1",)


def test_commutative_operands_match_in_any_order():
    pattern = op("add", op("relu", name="skip"), op("batch_norm"), commutative=True)
    ordered = op("add", op("relu", name="skip"), op("batch_norm"))
    program = models.convnet()
    assert find(program, [Rule("any", pattern, drop)]).matches == {"any": ("/add",)}
    assert find(program, [Rule("one", ordered, drop)]).matches == {"one": ()}


def test_one_name_is_one_node():
    twice = op("add", anything("same"), anything("same"))
    findings = find(models.convnet(), [Rule("twice", twice, drop)])
    assert findings.declined[0].reason == "two different nodes for same"


def test_the_first_rule_that_matches_wins():
    other = Rule("other", op("batch_norm"), drop)
    findings = find(models.convnet(), [NORM, other])
    assert findings.matches == {"drop": ("bn1", "bn2"), "other": ()}


def test_new_nodes_are_not_visited_again():
    def doubled(rewriter, match):
        added = rewriter.call_function(torch.relu, (match.root,), after=match.root)
        rewriter.replace_uses(match.root, added)

    rewriter = GraphRewriter(models.convnet())
    assert apply_rules(rewriter, [Rule("twice", op("relu"), doubled)]) == {"twice": 2}
