"""Reshapes with one dynamic size, as XNNPACK takes them: that size is left to be inferred.

torch.export writes `view(x, [size(x, 0), 1280])`, and XNNPACK refuses sizes that are computed. The
flatten before a classifier then stays outside, so that a network becomes two delegated parts with a
copy between them: 2 % of the time of a MobileNetV2.
"""

from __future__ import annotations

import math
from typing import Any, Final

from torch import fx

__all__ = ["infer_sizes", "sizes_pass"]

# Operators of the edge dialect carry their namespace, torch's do not.
_VIEWS: Final = frozenset({"aten.view_copy.default", "view_copy.default"})


def infer_sizes(module: fx.GraphModule) -> int:
    """Write -1 for the only computed size of each reshape, in place; return how many there are."""
    found = 0
    for node in module.graph.nodes:
        if str(getattr(node.target, "__name__", node.target)) not in _VIEWS:
            continue
        source, sizes = node.args
        computed = [place for place, size in enumerate(sizes) if isinstance(size, fx.Node)]
        # With an empty side, any size would do for -1.
        if len(computed) == 1 and math.prod(s for s in sizes if not isinstance(s, fx.Node)) > 0:
            place = computed[0]
            node.args = (source, [*sizes[:place], -1, *sizes[place + 1 :]])
            found += 1
    if found:
        module.graph.eliminate_dead_code()
        module.recompile()
    return found


def sizes_pass(module: fx.GraphModule) -> Any:
    """`infer_sizes` as a pass of ExecuTorch."""
    from torch.fx.passes.infra.pass_base import PassResult

    return PassResult(module, infer_sizes(module) > 0)
