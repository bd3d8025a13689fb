"""Reductions, scans, sorting, and other ops over whole dimensions."""

# fmt: off

from fxcompress.ir._optable.row import row

_DIMS = "input dim=None | keepdim=False dtype=None"
_ONE = "input dim=None | keepdim=False"

ROWS = (
    row("sum", "reduce", _DIMS),
    row("nansum", "reduce", _DIMS),
    row("mean", "reduce", _DIMS),
    row("nanmean", "reduce", _DIMS),
    row("prod", "reduce", _DIMS),
    row("max", "reduce", _ONE),
    row("min", "reduce", _ONE),
    row("amax", "reduce", "input dim=() | keepdim=False"),
    row("amin", "reduce", "input dim=() | keepdim=False"),
    row("aminmax", "reduce", "input | dim=None keepdim=False"),
    row("argmax", "reduce", _ONE),
    row("argmin", "reduce", _ONE),
    row("any", "reduce", _ONE),
    row("all", "reduce", _ONE),
    row("median", "reduce", _ONE),
    row("nanmedian", "reduce", _ONE),
    row("mode", "reduce", "input dim=-1 | keepdim=False"),
    row("logsumexp", "reduce", "input dim | keepdim=False"),
    row("var", "reduce", "input dim=None | unbiased=True keepdim=False correction=1"),
    row("std", "reduce", "input dim=None | unbiased=True keepdim=False correction=1"),
    row("var_mean", "reduce", "input dim=None | unbiased=True keepdim=False correction=1"),
    row("std_mean", "reduce", "input dim=None | unbiased=True keepdim=False correction=1"),
    row("norm", "reduce", "input | p='fro' dim=None keepdim=False dtype=None",
        alias="torch.linalg.norm"),
    row("count_nonzero", "reduce", "input dim=None"),
    row("quantile", "reduce", "input q | dim=None keepdim=False interpolation='linear'"),
    row("kthvalue", "reduce", "input k | dim=-1 keepdim=False"),
    row("trace", "reduce", "input"),
    row("cosine_similarity", "reduce", "x1 x2 | dim=1 eps=1e-08", nn="CosineSimilarity",
        fn="F torch"),
    row("pairwise_distance", "reduce", "x1 x2 | p=2.0 eps=1e-06 keepdim=False",
        nn="PairwiseDistance", fn="F torch"),
    row("cumsum", "reduce", "input dim | dtype=None"),
    row("cumprod", "reduce", "input dim | dtype=None"),
    row("cummax", "reduce", "input dim"),
    row("cummin", "reduce", "input dim"),
    row("logcumsumexp", "reduce", "input dim"),
    row("diff", "reduce", "input | n=1 dim=-1 prepend=None append=None"),
    row("topk", "reduce", "input k | dim=-1 largest=True sorted=True"),
    row("sort", "reduce", "input | dim=-1 descending=False stable=False"),
    row("argsort", "reduce", "input | dim=-1 descending=False stable=False"),
    row("unique", "reduce", "input | sorted=True return_inverse=False return_counts=False "
        "dim=None"),
    row("unique_consecutive", "reduce", "input | return_inverse=False return_counts=False "
        "dim=None"),
    row("bincount", "reduce", "input | weights=None minlength=0"),
    row("histc", "reduce", "input | bins=100 min=0 max=0"),
    row("equal", "reduce", "input other"),
    row("allclose", "reduce", "input other | rtol=1e-05 atol=1e-08 equal_nan=False"),
)
