"""strip(): the student of a joint program, alone again."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import fx

from fxcompress.ir import Program
from fxcompress.ir._calling import CallLike
from fxcompress.ir._copying import assemble

if TYPE_CHECKING:
    from fxcompress.train.joint.joint import Joint

__all__ = ["strip"]


def strip(joint: Joint) -> Program:
    """Return the student of a joint program: `strip(join(s, t))` is `s`, text and bits.

    Nodes, modules and tensors are those of the joint program, so that what was trained there is
    trained here. Only how the student is called is taken from what was joined.
    """
    student, source = joint.student, joint.module
    graph, copied = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in source.graph.nodes:
        if node in joint.own:
            copied[node] = graph.node_copy(node, copied.__getitem__)
            copied[node].meta = dict(node.meta)
        elif node.op == "output":
            leaves = node.args[0][: student.signature.output.num_leaves]
            graph.output(fx.map_arg(leaves, copied.__getitem__))
    graph.set_codegen(CallLike(student.signature))
    module = assemble(source, graph, student.module.__class__.__name__)
    for name in (joint.names.teacher, joint.names.projectors, joint.names.losses):
        module._modules.pop(name, None)
    module.recompile()
    return replace(student, module=module)
