"""One-operand nonlinearities, and the losses."""

# fmt: off

from fxcompress.ir._optable.row import Op, row


def _act(name: str, attrs: str = "", *, nn: str = "", alias: str = "", fn: str = "F torch") -> Op:
    return row(name, "activation", f"input | {attrs}", nn=nn, fn=fn, alias=alias)


def _loss(name: str, nn: str, attrs: str = "reduction='mean'") -> Op:
    return row(name, "loss", f"input target | {attrs}", nn=nn, fn="F torch")


ROWS = (
    _act("relu", nn="ReLU"),
    _act("relu6", nn="ReLU6"),
    _act("leaky_relu", "negative_slope=0.01", nn="LeakyReLU"),
    _act("elu", "alpha=1.0", nn="ELU"),
    _act("selu", nn="SELU"),
    _act("celu", "alpha=1.0", nn="CELU"),
    _act("gelu", "approximate='none'", nn="GELU"),
    _act("silu", nn="SiLU"),
    _act("mish", nn="Mish"),
    _act("sigmoid", nn="Sigmoid", fn="torch F", alias="special.expit"),
    _act("tanh", nn="Tanh", fn="torch F"),
    _act("hardsigmoid", nn="Hardsigmoid"),
    _act("hardswish", nn="Hardswish"),
    _act("hardtanh", "min_val=-1.0 max_val=1.0", nn="Hardtanh"),
    _act("softplus", "beta=1.0 threshold=20.0", nn="Softplus"),
    _act("softsign", nn="Softsign"),
    _act("softshrink", "lambd=0.5", nn="Softshrink"),
    _act("hardshrink", "lambd=0.5", nn="Hardshrink"),
    _act("tanhshrink", nn="Tanhshrink"),
    _act("logsigmoid", nn="LogSigmoid"),
    _act("threshold", "threshold value", nn="Threshold"),
    row("rrelu", "activation", "input | lower=0.125 upper=0.3333333333333333 training=False",
        nn="RReLU", fn="F torch"),
    # Not element-wise over channels: the slope is a parameter of one per channel.
    row("prelu", "activation", "input weight", nn="PReLU", fn="F torch"),
    row("glu", "shape", "input | dim=-1", nn="GLU", fn="F"),
    _loss("mse_loss", "MSELoss"),
    _loss("l1_loss", "L1Loss"),
    _loss("smooth_l1_loss", "SmoothL1Loss", "reduction='mean' beta=1.0"),
    _loss("huber_loss", "HuberLoss", "reduction='mean' delta=1.0"),
    _loss("kl_div", "KLDivLoss", "reduction='mean' log_target=False"),
    _loss("cross_entropy", "CrossEntropyLoss",
          "weight=None ignore_index=-100 reduction='mean' label_smoothing=0.0"),
    _loss("nll_loss", "NLLLoss", "weight=None ignore_index=-100 reduction='mean'"),
    _loss("binary_cross_entropy", "BCELoss", "weight=None reduction='mean'"),
    _loss("binary_cross_entropy_with_logits", "BCEWithLogitsLoss",
          "weight=None reduction='mean' pos_weight=None"),
)
