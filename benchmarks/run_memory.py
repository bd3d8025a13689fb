"""Peak memory of a run of many passes, against the model's bytes.

python -m benchmarks.run_memory
"""

from __future__ import annotations

import tempfile

from benchmarks._common import child, own_peak, write_table

PASSES = [
    {"use": "tidy.fold_batchnorm"},
    *({"use": "tidy.replace_activation", "id": f"swap{i}", "replace": swap}
      for i, swap in enumerate([{"relu": "relu6"}, {"relu6": "relu"}] * 3)),
    {"use": "quantize.static", "calibration": 8},
]  # fmt: skip


def measure() -> None:
    """Run in this process; print model bytes, peak before the run and peak after it."""
    import torch

    import fxcompress as fxc
    from fxcompress._torchvision import declare_operators

    declare_operators()
    from torchvision.models import wide_resnet101_2

    torch.manual_seed(0)
    model = wide_resnet101_2(weights=None).eval()
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    program = fxc.capture(model, (torch.randn(2, 3, 64, 64),))
    del model
    batches = [(torch.randn(4, 3, 64, 64),) for _ in range(4)]
    before = own_peak()
    with tempfile.TemporaryDirectory() as folder:
        fxc.compress(program, PASSES, data={"calibration": batches}, run_dir=folder)
    print(size, before, own_peak())


def main() -> None:
    result = child(
        ["-c", "from benchmarks.run_memory import measure; measure()"], OMP_NUM_THREADS="2"
    )
    size, before, peak = map(float, result.output.split()[-3:])
    limit = 2.5 * size + 1e9
    write_table(
        "run_memory",
        f"Peak memory of a run of {len(PASSES)} passes on Wide ResNet-101-2",
        "python -m benchmarks.run_memory",
        ("figure", "MB"),
        [
            ("model", f"{size / 1e6:.0f}"),
            ("peak resident before the run", f"{before / 1e6:.0f}"),
            ("peak resident of the whole process", f"{peak / 1e6:.0f}"),
            ("limit: 2.5 × model + 1 GB", f"{limit / 1e6:.0f}"),
        ],
        f"Goal: peak ≤ limit; here {peak / limit:.2f} of it, in {result.seconds:.0f} s.",
    )


if __name__ == "__main__":
    main()
