"""The only way to change a Program: GraphRewriter, its typed edits, pattern rules, masks, taps."""

from typing import TYPE_CHECKING

from fxcompress._lazy import lazy_exports

if TYPE_CHECKING:
    from fxcompress.rewrite.adapters import Adapter as Adapter
    from fxcompress.rewrite.adapters import adapter_paths as adapter_paths
    from fxcompress.rewrite.adapters import find_adapters as find_adapters
    from fxcompress.rewrite.adapters import merge_adapters as merge_adapters
    from fxcompress.rewrite.adapters import merged_weight as merged_weight
    from fxcompress.rewrite.edits import AddNode as AddNode
    from fxcompress.rewrite.edits import AddTensor as AddTensor
    from fxcompress.rewrite.edits import ChangeNode as ChangeNode
    from fxcompress.rewrite.edits import Declined as Declined
    from fxcompress.rewrite.edits import Edit as Edit
    from fxcompress.rewrite.edits import RemoveNode as RemoveNode
    from fxcompress.rewrite.edits import RemoveTensor as RemoveTensor
    from fxcompress.rewrite.edits import SetModule as SetModule
    from fxcompress.rewrite.edits import SetTensor as SetTensor
    from fxcompress.rewrite.edits import SetTrainable as SetTrainable
    from fxcompress.rewrite.exits import Early as Early
    from fxcompress.rewrite.exits import at_exit as at_exit
    from fxcompress.rewrite.exits import early_exits as early_exits
    from fxcompress.rewrite.masks import burn_masks as burn_masks
    from fxcompress.rewrite.masks import masked_tensors as masked_tensors
    from fxcompress.rewrite.masks import without_masks as without_masks
    from fxcompress.rewrite.patterns import Findings as Findings
    from fxcompress.rewrite.patterns import Match as Match
    from fxcompress.rewrite.patterns import MatchResult as MatchResult
    from fxcompress.rewrite.patterns import Pattern as Pattern
    from fxcompress.rewrite.patterns import Rule as Rule
    from fxcompress.rewrite.patterns import anything as anything
    from fxcompress.rewrite.patterns import apply_rules as apply_rules
    from fxcompress.rewrite.patterns import find as find
    from fxcompress.rewrite.patterns import op as op
    from fxcompress.rewrite.peft import save_adapter as save_adapter
    from fxcompress.rewrite.rewriter import GraphRewriter as GraphRewriter
    from fxcompress.rewrite.shrink import shrink as shrink
    from fxcompress.rewrite.taps import Put as Put
    from fxcompress.rewrite.taps import insert_tap as insert_tap
    from fxcompress.rewrite.taps import put_taps as put_taps
    from fxcompress.rewrite.taps import taps_of as taps_of
    from fxcompress.rewrite.taps import without_taps as without_taps

_EDITS = (
    "AddNode", "AddTensor", "ChangeNode", "Declined", "Edit", "RemoveNode", "RemoveTensor",
    "SetModule", "SetTensor", "SetTrainable",
)  # fmt: skip
_ADAPTERS = ("Adapter", "adapter_paths", "find_adapters", "merge_adapters", "merged_weight")
_PATTERNS = (
    "Findings", "Match", "MatchResult", "Pattern", "Rule", "anything", "apply_rules", "find", "op",
)  # fmt: skip

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "GraphRewriter": "rewriter",
        "save_adapter": "peft",
        "shrink": "shrink",
        **dict.fromkeys(_ADAPTERS, "adapters"),
        **dict.fromkeys(_EDITS, "edits"),
        **dict.fromkeys(("Early", "at_exit", "early_exits"), "exits"),
        **dict.fromkeys(("burn_masks", "masked_tensors", "without_masks"), "masks"),
        **dict.fromkeys(_PATTERNS, "patterns"),
        **dict.fromkeys(("Put", "insert_tap", "put_taps", "taps_of", "without_taps"), "taps"),
    },
)
