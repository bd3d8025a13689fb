"""Ops that pick or write values by position."""

# fmt: off

from fxcompress.ir._optable.row import row

ROWS = (
    row("getitem", "index", "input index", fn="", methods="__getitem__", scalar="getitem"),
    row("setitem", "index", "input index value", fn="", methods="__setitem__", scalar="setitem"),
    row("getattr", "other", "input name", fn="", alias="builtins.getattr"),
    row("select", "index", "input dim index"),
    row("slice", "index", "input | dim=0 start=None end=None step=1", fn="",
        alias="torch.ops.aten.slice.Tensor"),
    row("narrow", "index", "input dim start length"),
    row("index_select", "index", "input dim index"),
    row("gather", "index", "input dim index | sparse_grad=False"),
    row("take", "index", "input index"),
    row("take_along_dim", "index", "input index dim=None"),
    row("masked_select", "index", "input mask"),
    row("masked_scatter", "index", "input mask source"),
    row("nonzero", "index", "input | as_tuple=False"),
    row("argwhere", "index", "input"),
    row("index_put", "index", "input index values | accumulate=False"),
    row("index_add", "index", "input dim index source | alpha=1"),
    row("index_copy", "index", "input dim index source"),
    row("index_fill", "index", "input dim index value"),
    row("scatter", "index", "input dim index src=None | value=None reduce=None"),
    row("scatter_add", "index", "input dim index src"),
    row("scatter_reduce", "index", "input dim index src reduce | include_self=True"),
    row("slice_scatter", "index", "input src | dim=0 start=None end=None step=1"),
    row("select_scatter", "index", "input src dim index"),
    row("index", "index", "input index", fn=""),
    row("searchsorted", "index", "sorted_sequence input | out_int32=False right=False side=None "
        "sorter=None"),
    row("bucketize", "index", "input boundaries | out_int32=False right=False"),
)
