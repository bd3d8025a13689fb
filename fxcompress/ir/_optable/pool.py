"""Pooling, resampling and rearranging of spatial maps."""

# fmt: off

from fxcompress.ir._optable.row import Op, row

_MAX = "input | k stride=None padding=0 dilation=1 ceil_mode=False return_indices=False"
_AVG = ("input | k stride=None padding=0 ceil_mode=False count_include_pad=True "
        "divisor_override=None")


def _max(rank: int) -> Op:
    name = f"max_pool{rank}d"
    return row(name, "pool", _MAX, nn=f"MaxPool{rank}d", fn="F torch",
               alias=f"F.{name}_with_indices torch.{name}_with_indices",
               aten=f"{name}_with_indices")


def _avg(rank: int) -> Op:
    order = _AVG if rank > 1 else _AVG.replace(" divisor_override=None", "")
    return row(f"avg_pool{rank}d", "pool", order, nn=f"AvgPool{rank}d", fn="F torch")


def _adaptive(kind: str, rank: int) -> Op:
    name = f"adaptive_{kind.lower()}_pool{rank}d"
    more = " return_indices=False" if kind == "Max" else ""
    return row(name, "pool", f"input | output_size{more}", nn=f"Adaptive{kind}Pool{rank}d",
               fn="F torch", aten=f"_{name}",
               alias=f"F.{name}_with_indices" if kind == "Max" else "")


ROWS = (
    *(_max(rank) for rank in (1, 2, 3)),
    *(_avg(rank) for rank in (1, 2, 3)),
    *(_adaptive(kind, rank) for kind in ("Avg", "Max") for rank in (1, 2, 3)),
    *(row(f"lp_pool{rank}d", "pool", "input | norm_type k stride=None ceil_mode=False",
          nn=f"LPPool{rank}d", fn="F") for rank in (1, 2, 3)),
    *(row(f"max_unpool{rank}d", "pool", "input index | k stride=None padding=0 output_size=None",
          nn=f"MaxUnpool{rank}d", fn="F") for rank in (1, 2, 3)),
    *(row(f"fractional_max_pool{rank}d", "pool", "input | k output_size=None output_ratio=None "
          "return_indices=False _random_samples=None", nn=f"FractionalMaxPool{rank}d", fn="F")
      for rank in (2, 3)),
    row("interpolate", "resample", "input | size=None scale_factor=None mode='nearest' "
        "align_corners=None recompute_scale_factor=None antialias=False",
        nn="Upsample UpsamplingBilinear2d UpsamplingNearest2d", fn="F",
        alias="F.upsample F.upsample_bilinear F.upsample_nearest"),
    row("grid_sample", "resample", "input grid | mode='bilinear' padding_mode='zeros' "
        "align_corners=None", fn="F"),
    row("affine_grid", "resample", "theta size | align_corners=None", fn="F"),
    row("unfold", "shape", "input | k dilation=1 padding=0 stride=1", nn="Unfold", fn="F",
        aten="im2col", own_method=False),
    row("fold", "shape", "input | output_size k dilation=1 padding=0 stride=1", nn="Fold", fn="F",
        aten="col2im"),
    row("pixel_shuffle", "shape", "input | upscale_factor", nn="PixelShuffle", fn="F torch"),
    row("pixel_unshuffle", "shape", "input | downscale_factor", nn="PixelUnshuffle", fn="F torch"),
    row("channel_shuffle", "shape", "input | groups", nn="ChannelShuffle", fn="F torch",
        alias="F.native_channel_shuffle torch.native_channel_shuffle",
        aten="native_channel_shuffle"),
    row("pad", "shape", "input pad | mode='constant' value=None", fn="F",
        alias="torch.constant_pad_nd", aten="constant_pad_nd",
        variants={"torch.constant_pad_nd": "input pad value=0"},
        nn=" ".join(f"{mode}Pad{rank}d" for rank in (1, 2, 3)
                    for mode in ("Zero", "Constant", "Reflection", "Replication", "Circular"))),
)
