import pytest
import torch
from torch import nn

from fxcompress.errors import PassError, VerifyError
from fxcompress.ir import capture
from fxcompress.rewrite import GraphRewriter
from tests.rewrite import models


def kinds(rewriter):
    return [edit.kind for edit in rewriter.edits]


def test_nothing_done_is_no_edit_and_the_same_program():
    program = models.convnet()
    rewriter = GraphRewriter(program)
    after = rewriter.finish()
    assert rewriter.edits == ()
    assert after.text() == program.text()
    assert after.module is not program.module
    assert all(after.state()[name] is tensor for name, tensor in program.state().items())


def test_inserting_after_a_node_takes_its_users_but_not_itself():
    program = models.convnet()
    rewriter = GraphRewriter(program)
    relu = rewriter.node("relu")
    added = rewriter.call_module("clip", nn.Hardtanh(), (relu,), after=relu)
    users = rewriter.replace_uses(relu, added)
    after = rewriter.finish()
    after.verify()
    assert {rewriter.id(user) for user in users} == {"conv2", "/add"}
    assert kinds(rewriter) == ["add-node", "change-node", "change-node"]
    assert rewriter.edits[0].node == "clip"
    assert rewriter.edits[0].type == "f32[batch,8,6,6]"
    x = torch.randn(3, 3, 6, 6)
    expected = program.module.fc  # the original keeps its own graph
    assert expected is not None
    assert not torch.equal(after(x), program(x))


def test_new_nodes_inherit_scope_and_source():
    rewriter = GraphRewriter(models.convnet())
    relu = rewriter.node("relu")
    added = rewriter.call_function(torch.tanh, (relu,), after=relu)
    assert added.meta["scope"] == relu.meta["scope"]
    assert added.meta["source"] == relu.meta["source"]


def test_removing_a_module_drops_its_tensors_and_says_so():
    program = models.convnet()
    rewriter = GraphRewriter(program)
    norm = rewriter.node("bn1")
    rewriter.replace_uses(norm, rewriter.node("conv1"))
    rewriter.remove(norm)
    after = rewriter.finish()
    after.verify()
    removed = {edit.name for edit in rewriter.edits if edit.kind == "remove-tensor"}
    assert removed == {name for name in program.state() if name.startswith("bn1.")}
    assert not any(name.startswith("bn1") for name, _ in after.module.named_modules())


def test_dead_code_is_removed_and_recorded():
    program = models.convnet()
    rewriter = GraphRewriter(program)
    rewriter.set_args(rewriter.node("fc"), (rewriter.node("/mean"),))
    rewriter.replace_uses(rewriter.node("/add"), rewriter.node("relu"))
    after = rewriter.finish()
    after.verify()
    gone = {edit.node for edit in rewriter.edits if edit.kind == "remove-node"}
    assert gone == {"conv2", "bn2", "/add"}
    assert "conv2.weight" not in after.state()


def test_values_are_replaced_and_the_original_stays():
    program = models.convnet()
    before = program.fingerprint()
    rewriter = GraphRewriter(program)
    rewriter.set_tensor("conv1.weight", rewriter.get_tensor("conv1.weight") * 2)
    after = rewriter.finish()
    assert [edit.name for edit in rewriter.edits] == ["conv1.weight"]
    assert program.fingerprint() == before
    assert isinstance(after.state()["conv1.weight"], nn.Parameter)
    assert after.state()["conv1.weight"].requires_grad
    assert after.state()["fc.weight"] is program.state()["fc.weight"]


def test_a_bias_can_be_added_to_a_leaf():
    rewriter = GraphRewriter(models.convnet())
    rewriter.add_tensor("conv1.bias", torch.zeros(8), trainable=True)
    after = rewriter.finish()
    after.verify()
    assert [edit.kind for edit in rewriter.edits] == ["change-node", "set-module", "add-tensor"]
    assert "bias=False" not in after.text()


def test_a_bias_can_be_removed_from_a_leaf():
    rewriter = GraphRewriter(models.convnet())
    rewriter.remove_tensor("conv2.bias")
    after = rewriter.finish()
    after.verify()
    assert after.module.conv2.bias is None


def test_set_module_retypes_what_follows():
    rewriter = GraphRewriter(models.convnet())
    rewriter.set_module("fc", nn.Linear(8, 12))
    after = rewriter.finish()
    after.verify()
    assert after(torch.randn(2, 3, 6, 6)).shape == (2, 12)
    assert ("set-module", "fc") in [(e.kind, getattr(e, "path", "")) for e in rewriter.edits]


def test_operands_that_do_not_fit_are_refused_with_the_node():
    rewriter = GraphRewriter(models.convnet())
    rewriter.set_module("fc", nn.Linear(9, 12))
    with pytest.raises(VerifyError, match="fc"):
        rewriter.finish()


def test_a_free_tensor_can_be_added_and_read():
    rewriter = GraphRewriter(models.branch())
    rewriter.add_tensor("extra", torch.full((4,), 2.0), trainable=False)
    fc = rewriter.node("fc")
    extra = rewriter.get_attr("extra", before=fc)
    scaled = rewriter.call_function(torch.mul, (fc.args[0], extra), before=fc)
    rewriter.set_args(fc, (scaled,))
    after = rewriter.finish()
    after.verify()
    assert "extra" in after.state()
    assert not isinstance(after.state()["extra"], nn.Parameter)


def test_a_free_tensor_that_nothing_reads_goes():
    rewriter = GraphRewriter(models.branch())
    product = rewriter.node("/mul")
    rewriter.replace_uses(product, rewriter.node("x"))
    after = rewriter.finish()
    after.verify()
    assert "gain" not in after.state()
    assert ("remove-tensor", "gain") in [(e.kind, getattr(e, "name", "")) for e in rewriter.edits]


def test_tied_tensors_change_together():
    program = models.tied()
    assert program.ties
    rewriter = GraphRewriter(program)
    value = rewriter.get_tensor("embed.weight") + 1
    rewriter.set_tensor("embed.weight", value, tied=True)
    after = rewriter.finish()
    after.verify()
    assert after.state()["embed.weight"] is after.state()["head.weight"]
    assert after.ties == program.ties
    assert {edit.name for edit in rewriter.edits} == {"embed.weight", "head.weight"}


def test_breaking_a_tie_must_be_said():
    rewriter = GraphRewriter(models.tied())
    rewriter.set_tensor("head.weight", rewriter.get_tensor("head.weight") + 1)
    with pytest.raises(PassError, match="no longer shares"):
        rewriter.finish()


def test_untied_tensors_go_their_own_way():
    rewriter = GraphRewriter(models.tied())
    rewriter.untie("head.weight")
    rewriter.set_tensor("head.weight", rewriter.get_tensor("head.weight") + 1)
    after = rewriter.finish()
    after.verify()
    assert not after.ties
    assert not torch.equal(after.state()["embed.weight"], after.state()["head.weight"])


def test_removing_one_user_of_a_tie_keeps_the_other():
    rewriter = GraphRewriter(models.tied())
    rewriter.replace_uses(rewriter.node("head"), rewriter.node("mid"))
    after = rewriter.finish()
    after.verify()
    assert "embed.weight" in after.state()
    assert "head.weight" not in after.state()
    assert not after.ties


def test_recurrent_weights_follow():
    program = models.recurrent()
    x = torch.randn(2, 3, 4)
    expected = program(x)
    rewriter = GraphRewriter(program)
    for name in list(program.state()):
        rewriter.set_tensor(name, torch.zeros_like(rewriter.get_tensor(name)))
    after = rewriter.finish()
    after.verify()
    assert torch.equal(after(x), torch.zeros(2, 3, 5))
    assert torch.equal(program(x), expected)


def test_writing_past_the_rewriter_is_caught():
    rewriter = GraphRewriter(models.convnet())
    rewriter.module.fc.bias = nn.Parameter(torch.zeros(10))
    with pytest.raises(PassError, match=r"fc\.bias"):
        rewriter.finish()


def test_changing_operands_past_the_rewriter_is_caught():
    rewriter = GraphRewriter(models.convnet())
    rewriter.node("bn1").args = (rewriter.node("conv1"),)
    rewriter.node("/add").args = (rewriter.node("relu"), rewriter.node("relu"))
    with pytest.raises(PassError, match="/add"):
        rewriter.finish()


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda r: r.node("conv11"), "close ids: conv1"),
        (lambda r: r.remove(r.node("conv1")), "bn1 use it"),
        (lambda r: r.remove(r.node("x")), "part of the signature"),
        (lambda r: r.get_tensor("conv1.bias"), "no parameter or buffer conv1.bias"),
        (lambda r: r.get_module("nothing"), "no module nothing"),
        (lambda r: r.set_tensor("nothing", torch.ones(1)), "add_tensor"),
        (lambda r: r.add_tensor("fc.bias", torch.ones(1), trainable=True), "taken"),
        (lambda r: r.call_module("fc", nn.ReLU(), (), after=r.node("fc")), "fresh_path"),
        (lambda r: r.call_module("new", nn.ReLU(), ()), "after= or before="),
        (lambda r: r.edits, "after finish"),
    ],
)
def test_misuse_is_explained(act, message):
    rewriter = GraphRewriter(models.convnet())
    with pytest.raises(PassError) as caught:
        act(rewriter)
    assert message in str(caught.value)


def test_a_user_that_comes_first_cannot_take_a_later_node():
    rewriter = GraphRewriter(models.branch())
    late = rewriter.call_function(torch.tanh, (rewriter.node("x"),), after=rewriter.node("fc"))
    with pytest.raises(PassError, match="/mul cannot use"):
        rewriter.replace_uses(rewriter.node("x"), late)


def test_a_finished_rewriter_is_closed():
    rewriter = GraphRewriter(models.convnet())
    rewriter.finish()
    with pytest.raises(PassError, match="finished"):
        rewriter.set_tensor("fc.bias", torch.zeros(10))


def test_fresh_paths_do_not_collide():
    rewriter = GraphRewriter(models.convnet())
    assert rewriter.fresh_path("new") == "new"
    assert rewriter.fresh_path("fc") == "fc_2"
    assert rewriter.fresh_path("fc.bias") == "fc.bias_2"


def test_reused_modules_show_every_call():
    rewriter = GraphRewriter(models.convnet())
    relu = rewriter.node("relu")
    again = rewriter.call_module("relu", None, (relu,), after=relu)
    assert rewriter.users_of_module("relu") == (relu, again)


def test_declines_name_nodes_by_id():
    rewriter = GraphRewriter(models.convnet())
    rewriter.decline(rewriter.node("bn1"), "not now", [rewriter.node("conv1"), "elsewhere"])
    assert rewriter.declined[0].model_dump() == {
        "node": "bn1",
        "reason": "not now",
        "because_of": ("conv1", "elsewhere"),
    }


def test_what_is_added_goes_to_the_device_of_the_program():
    with torch.device("meta"):
        model = models.ConvNet().eval()
    program = capture(model, (torch.randn(2, 3, 6, 6),))
    rewriter = GraphRewriter(program)
    relu = rewriter.node("relu")
    rewriter.replace_uses(
        relu, rewriter.call_module("norm", nn.BatchNorm2d(8), (relu,), after=relu)
    )
    rewriter.set_tensor("fc.bias", torch.zeros(10))
    rewriter.add_tensor("conv1.bias", torch.zeros(8), trainable=True)
    after = rewriter.finish()
    after.verify()
    assert {tensor.device.type for tensor in after.state().values()} == {"meta"}
