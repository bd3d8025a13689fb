"""Ops that normalise by a statistic, and dropout."""

# fmt: off

from fxcompress.ir._optable.row import row

ROWS = (
    row("batch_norm", "norm", "input running_mean running_var weight=None bias=None | "
        "training=False momentum=0.1 eps=1e-05", fn="F",
        nn="BatchNorm1d BatchNorm2d BatchNorm3d SyncBatchNorm", alias="torch.batch_norm",
        variants={"torch.batch_norm": "input weight bias running_mean running_var training "
                  "momentum eps cudnn_enabled=True"}),
    row("layer_norm", "norm", "input | normalized_shape weight=None bias=None eps=1e-05",
        nn="LayerNorm", fn="F torch", aten="native_layer_norm"),
    row("rms_norm", "norm", "input | normalized_shape weight=None eps=None", nn="RMSNorm",
        fn="F torch"),
    row("group_norm", "norm", "input | num_groups weight=None bias=None eps=1e-05",
        nn="GroupNorm", fn="F torch", aten="native_group_norm"),
    row("instance_norm", "norm", "input running_mean=None running_var=None weight=None bias=None "
        "| use_input_stats=True momentum=0.1 eps=1e-05",
        nn="InstanceNorm1d InstanceNorm2d InstanceNorm3d", fn="F",
        alias="torch.instance_norm",
        variants={"torch.instance_norm": "input weight bias running_mean running_var "
                  "use_input_stats momentum eps cudnn_enabled=True"}),
    row("local_response_norm", "norm", "input | size alpha=0.0001 beta=0.75 k=1.0",
        nn="LocalResponseNorm CrossMapLRN2d", fn="F"),
    row("normalize", "norm", "input | p=2.0 dim=1 eps=1e-12", fn="F"),
    row("renorm", "norm", "input p dim maxnorm"),
    row("weight_norm", "other", "g v | dim=0", fn="", alias="torch._weight_norm",
        nn="torch.nn.utils.parametrizations._WeightNorm", aten="_weight_norm",
        variants={"torch._weight_norm": "v g dim=0"}),
    row("softmax", "norm", "input | dim=None _stacklevel=3 dtype=None", nn="Softmax Softmax2d",
        fn="F torch", alias="special.softmax", aten="_softmax",
        variants={"torch.softmax": "input dim dtype=None",
                  "special.softmax": "input dim dtype=None"}),
    row("softmin", "norm", "input | dim=None _stacklevel=3 dtype=None", nn="Softmin", fn="F"),
    row("log_softmax", "norm", "input | dim=None _stacklevel=3 dtype=None", nn="LogSoftmax",
        fn="F torch", alias="special.log_softmax", aten="_log_softmax",
        variants={"torch.log_softmax": "input dim dtype=None",
                  "special.log_softmax": "input dim dtype=None"}),
    row("gumbel_softmax", "norm", "logits | tau=1 hard=False eps=1e-10 dim=-1", fn="F"),
    row("dropout", "dropout", "input | p=0.5 training=True", nn="Dropout", fn="F torch",
        aten="native_dropout"),
    row("dropout1d", "dropout", "input | p=0.5 training=True", nn="Dropout1d", fn="F"),
    row("dropout2d", "dropout", "input | p=0.5 training=True", nn="Dropout2d", fn="F"),
    row("dropout3d", "dropout", "input | p=0.5 training=True", nn="Dropout3d", fn="F"),
    row("alpha_dropout", "dropout", "input | p=0.5 training=False", nn="AlphaDropout",
        fn="F torch"),
    row("feature_alpha_dropout", "dropout", "input | p=0.5 training=False",
        nn="FeatureAlphaDropout", fn="F torch"),
    row("feature_dropout", "dropout", "input | p training"),
)
