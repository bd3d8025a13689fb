"""The example mixed_precision: its plan keeps the budget, and its bits are worth it."""

from fxcompress.api import compress, prepare
from fxcompress.spec import Spec, load_data, load_program
from tests.specs.examples import SPECS, count_right, needs

SPEC = SPECS / "mixed_precision/spec.yaml"


@needs("sklearn", "scipy")
class TestMixedPrecision:
    def test_the_plan_keeps_the_size(self) -> None:
        plan = prepare(Spec.load(SPEC)).plan()
        assert plan.result.bytes < 0.09 * plan.original.bytes

    def test_the_bits_differ_and_beat_more_bits_for_all(self) -> None:
        spec = Spec.load(SPEC)
        data = load_data(spec)
        fold, bits, _ = spec.steps
        uniform = {
            "use": "quantize.static",
            "weights": {"bits": 3, "observer": "mse"},
            "calibration": 256,
        }
        mixed = compress(load_program(spec), [fold, bits], data=data)
        plain = compress(load_program(spec), [fold, uniform], data=data)
        chosen = {entry["bits"] for entry in mixed.record.passes[-1].decision["layers"]}
        assert {2, 8} <= chosen
        assert mixed.record.result.bytes < plain.record.result.bytes
        ours, count = count_right(mixed.program, data["eval"])
        theirs, _ = count_right(plain.program, data["eval"])
        assert ours >= theirs + 0.05 * count
        (figure,) = mixed.record.passes[-1].figures
        assert len(figure.rows) == 10
