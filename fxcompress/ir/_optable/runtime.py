"""Ops of the runtime modules that a rewritten graph may hold, and of quantized arithmetic."""

# fmt: off

from fxcompress.ir._optable.row import row

ROWS = (
    row("fake_quant", "quantize", "input", nn="fxcompress.nn.FakeQuantize", fn=""),
    row("dynamic_quant", "quantize", "input", nn="fxcompress.nn.DynamicQuantize", fn=""),
    row("binarize", "quantize", "input", nn="fxcompress.nn.Binarize", fn=""),
    row("codebook", "quantize", "input", nn="fxcompress.nn.Codebook", fn=""),
    row("float_quant", "quantize", "input", nn="fxcompress.nn.FloatQuantize", fn=""),
    row("stack_quant", "quantize", "input", nn="fxcompress.nn.StackQuantize", fn=""),
    row("experts", "matmul", "input weights indices up=None down=None gate=None",
        nn="fxcompress.nn.Experts fxcompress.nn.OperandExperts", fn=""),
    row("mask", "elementwise", "input", nn="fxcompress.nn.Mask", fn=""),
    row("tap", "identity", "input", nn="fxcompress.nn.Tap", fn=""),
    row("training_switch", "other", "", nn="fxcompress.nn.TrainingSwitch", fn=""),
    row("stochastic_depth", "dropout", "input", nn="fxcompress.nn.StochasticDepth", fn=""),
    row("layer_drop", "elementwise", "input other", nn="fxcompress.nn.LayerDrop", fn=""),
    row("top_tokens", "index", "input other", nn="fxcompress.nn.TopTokens", fn=""),
    row("route_gradient", "elementwise", "score input other", nn="fxcompress.nn.RouteGradient",
        fn=""),
    row("exit", "elementwise", "input other", nn="fxcompress.nn.Exit", fn=""),
    row("fake_quantize_per_tensor_affine", "quantize",
        "input scale zero_point | quant_min quant_max"),
    row("fake_quantize_per_channel_affine", "quantize",
        "input scale zero_point axis | quant_min quant_max"),
    row("quantize_per_tensor", "quantize", "input scale zero_point | dtype"),
    row("quantize_per_channel", "quantize", "input scales zero_points axis | dtype"),
    row("dequantize", "quantize", "input"),
)
