"""Ops that make tensors, fixed or random, and transforms of signals."""

# fmt: off

from fxcompress.ir._optable.row import row

_WHERE = "dtype=None layout=None device=None pin_memory=None requires_grad=False memory_format=None"
_NEW = "dtype=None device=None requires_grad=False layout=None pin_memory=False"

ROWS = (
    row("zeros", "create", f"*size | {_WHERE}"),
    row("ones", "create", f"*size | {_WHERE}"),
    row("empty", "create", f"*size | {_WHERE}"),
    row("full", "create", f"size fill_value | {_WHERE}"),
    row("zeros_like", "create", f"input | {_WHERE}"),
    row("ones_like", "create", f"input | {_WHERE}"),
    row("empty_like", "create", f"input | {_WHERE}"),
    row("full_like", "create", f"input fill_value | {_WHERE}"),
    row("new_zeros", "create", f"input *size | {_NEW}", fn=""),
    row("new_ones", "create", f"input *size | {_NEW}", fn=""),
    row("new_empty", "create", f"input *size | {_NEW}", fn=""),
    row("new_full", "create", f"input size fill_value | {_NEW}", fn=""),
    row("new_tensor", "create", f"input data | {_NEW}", fn=""),
    row("arange", "create", f"start end=None step=None | {_WHERE}"),
    row("linspace", "create", f"start end steps | {_WHERE}"),
    row("logspace", "create", f"start end steps | base=10.0 {_WHERE}"),
    row("eye", "create", f"n m=None | {_WHERE}"),
    row("scalar_tensor", "create", f"value | {_WHERE}"),
    row("tensor", "create", f"data | {_WHERE}", alias="torch.as_tensor"),
    row("tril_indices", "create", f"row col | offset=0 {_WHERE}"),
    row("triu_indices", "create", f"row col | offset=0 {_WHERE}"),
    row("rand", "create", f"*size | {_WHERE} generator=None"),
    row("randn", "create", f"*size | {_WHERE} generator=None"),
    row("randint", "create", f"low high size | {_WHERE} generator=None"),
    row("randperm", "create", f"n | {_WHERE} generator=None"),
    row("rand_like", "create", f"input | {_WHERE}"),
    row("randn_like", "create", f"input | {_WHERE}"),
    row("bernoulli", "create", "input p=None | generator=None"),
    row("multinomial", "create", "input num_samples | replacement=False generator=None"),
    row("normal", "create", "mean std=None size=None | generator=None"),
    row("hann_window", "create", f"window_length | periodic=True {_WHERE}"),
    row("hamming_window", "create", f"window_length | periodic=True {_WHERE}"),
    row("stft", "other", "input n_fft | hop_length=None win_length=None window=None center=True "
        "pad_mode='reflect' normalized=False onesided=None return_complex=None"),
    row("istft", "other", "input n_fft | hop_length=None win_length=None window=None center=True "
        "normalized=False onesided=None length=None return_complex=False"),
    *(row(name, "other", "input | n=None dim=-1 norm=None", fn="", alias=f"torch.fft.{name}")
      for name in ("fft", "ifft", "rfft", "irfft")),
    *(row(name, "other", "input | s=None dim=(-2,-1) norm=None", fn="",
          alias=f"torch.fft.{name}") for name in ("fft2", "ifft2", "rfft2", "irfft2")),
    *(row(name, "other", "input | s=None dim=None norm=None", fn="",
          alias=f"torch.fft.{name}") for name in ("fftn", "ifftn", "rfftn", "irfftn")),
    row("fftshift", "shape", "input | dim=None", fn="", alias="torch.fft.fftshift"),
    row("vector_norm", "reduce", "input | ord=2 dim=None keepdim=False dtype=None", fn="",
        alias="torch.linalg.vector_norm", aten="linalg_vector_norm"),
    row("inverse", "other", "input", alias="torch.linalg.inv"),
    row("cross", "other", "input other | dim=None", alias="torch.linalg.cross"),
)
