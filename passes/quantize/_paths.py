"""Module paths for the quantizers that a pass adds."""

import re
from collections.abc import Collection

__all__ = ["free_path", "quantizer_path"]


def quantizer_path(node_id: str, suffix: str = "_fq") -> str:
    """Return where the quantizer of a node's result goes: beside the node's module.

    `layer1.0.conv1` -> `layer1.0.conv1_fq`; a number cannot be an attribute in Python source, so
    `stem.0` -> `stem_0_fq`; `layer1.0/relu@2` -> `layer1.0.relu_2_fq`; `/add` -> `add_fq`.
    """
    scope, slash, op = node_id.rpartition("/")
    if slash:
        parents, name = scope.split(".") if scope else [], re.sub(r"\W+", "_", op)
    else:
        *parents, name = re.sub(r"[^\w.]+", "_", node_id).split(".")
    while parents and name[0].isdigit():
        name = f"{parents.pop()}_{name}"
    return ".".join([*parents, name + suffix])


def free_path(path: str, taken: Collection[str]) -> str:
    """Return `path`, or the first of `path_2`, `path_3`, … that is not taken."""
    candidate, count = path, 1
    while candidate in taken:
        count += 1
        candidate = f"{path}_{count}"
    return candidate
