"""Ops that multiply: linear maps, convolutions, products, attention, embeddings, recurrences."""

# fmt: off

from fxcompress.ir._optable.row import row

_CONV = "input weight bias=None | stride=1 padding=0 dilation=1 groups=1"
_DECONV = "input weight bias=None | stride=1 padding=0 output_padding=0 groups=1 dilation=1"

ROWS = (
    row("linear", "linear", "input weight bias=None", fn="F",
        nn="Linear fxcompress.nn.OperandLinear",
        aten="_linear_nobias"),
    row("bilinear", "linear", "input1 input2 weight bias=None", nn="Bilinear", fn="F torch"),
    row("conv1d", "linear", _CONV, nn="Conv1d fxcompress.nn.OperandConv1d",
        fn="F torch"),
    row("conv2d", "linear", _CONV, nn="Conv2d fxcompress.nn.OperandConv2d",
        fn="F torch"),
    row("conv3d", "linear", _CONV, nn="Conv3d fxcompress.nn.OperandConv3d",
        fn="F torch"),
    row("convolution", "linear", "input weight bias=None | stride=1 padding=0 dilation=1 "
        "transposed=False output_padding=0 groups=1", fn="torch"),
    row("conv_transpose1d", "linear", _DECONV,
        nn="ConvTranspose1d fxcompress.nn.OperandConvTranspose1d", fn="F torch"),
    row("conv_transpose2d", "linear", _DECONV,
        nn="ConvTranspose2d fxcompress.nn.OperandConvTranspose2d", fn="F torch"),
    row("conv_transpose3d", "linear", _DECONV,
        nn="ConvTranspose3d fxcompress.nn.OperandConvTranspose3d", fn="F torch"),
    row("conv_tbc", "linear", "input weight bias | pad=0"),
    row("addmm", "linear", "input mat1 mat2 | beta=1 alpha=1"),
    row("matmul", "matmul", "input other", methods="__matmul__", swapped="__rmatmul__",
        scalar="matmul"),
    row("mm", "matmul", "input mat2"),
    row("bmm", "matmul", "input mat2"),
    row("mv", "matmul", "input vec"),
    row("dot", "matmul", "input tensor"),
    row("inner", "matmul", "input other"),
    row("outer", "matmul", "input vec2", alias="torch.ger", methods="ger"),
    row("baddbmm", "matmul", "input batch1 batch2 | beta=1 alpha=1"),
    row("addbmm", "matmul", "input batch1 batch2 | beta=1 alpha=1"),
    row("chain_matmul", "matmul", "*matrices"),
    row("einsum", "matmul", "equation *operands"),
    row("tensordot", "matmul", "a b | dims=2"),
    row("kron", "matmul", "input other"),
    row("cdist", "matmul", "x1 x2 | p=2.0 compute_mode='use_mm_for_euclid_dist_if_necessary'"),
    row("grouped_mm", "matmul", "mat_a mat_b | offs=None bias=None out_dtype=None", fn="F",
        alias="torch._grouped_mm",
        aten="_grouped_mm transformers::grouped_mm_fallback"),
    row("sdpa", "attention", "query key value | attn_mask=None dropout_p=0.0 is_causal=False "
        "scale=None enable_gqa=False", fn="", alias="F.scaled_dot_product_attention",
        aten="scaled_dot_product_attention"),
    row("multi_head_attention", "attention", "query key value | embed_dim_to_check num_heads",
        nn="MultiheadAttention", fn="", alias="F.multi_head_attention_forward"),
    row("embedding", "embedding", "input weight | padding_idx=None max_norm=None norm_type=2.0 "
        "scale_grad_by_freq=False sparse=False",
        nn="Embedding fxcompress.nn.OperandEmbedding", fn="F torch",
        variants={"torch.embedding": "weight input padding_idx=-1 scale_grad_by_freq=False "
                  "sparse=False"}),
    row("embedding_bag", "embedding", "input weight offsets=None | max_norm=None norm_type=2.0 "
        "scale_grad_by_freq=False mode='mean' sparse=False per_sample_weights=None "
        "include_last_offset=False padding_idx=None", nn="EmbeddingBag", fn="F"),
    row("one_hot", "embedding", "input | num_classes=-1", fn="F"),
    row("lstm", "recurrent", "input hx=None *weights=()", nn="LSTM fxcompress.nn.OperandLSTM"),
    row("gru", "recurrent", "input hx=None *weights=()", nn="GRU fxcompress.nn.OperandGRU"),
    row("rnn", "recurrent", "input hx=None *weights=()", nn="RNN fxcompress.nn.OperandRNN", fn="", 
        alias="torch.rnn_tanh torch.rnn_relu"),
    row("lstm_cell", "recurrent", "input hx w_ih w_hh b_ih=None b_hh=None", nn="LSTMCell"),
    row("gru_cell", "recurrent", "input hx w_ih w_hh b_ih=None b_hh=None", nn="GRUCell"),
    row("rnn_cell", "recurrent", "input hx w_ih w_hh b_ih=None b_hh=None", nn="RNNCell", fn="",
        alias="torch.rnn_tanh_cell torch.rnn_relu_cell"),
)
