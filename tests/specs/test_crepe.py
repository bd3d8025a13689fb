"""The example `crepe`: what its int8 leaves of the pitch accuracy."""

from itertools import islice

import pytest

from fxcompress import compress
from fxcompress.spec import Spec, load_data, load_metric, load_program
from tests.specs.examples import SPECS, needs


@needs("torchcrepe")
@pytest.mark.slow
def test_int8_is_within_half_a_point_of_the_pitch_accuracy() -> None:
    spec = Spec.load(SPECS / "crepe/spec.yaml")
    data, metric, program = load_data(spec), load_metric(spec), load_program(spec)
    assert metric is not None
    data = {name: list(islice(data[name], 5)) for name in ("calibration", "eval")}
    step = {"use": "quantize.static", "calibration": 100}
    small = compress(program, [step], data=data).program
    before = metric.evaluate(program.module, data, None)
    after = metric.evaluate(small.module, data, None)
    assert before > 0.98
    assert after >= before - 0.005
