import gc

import pytest

from fxcompress.analysis import latency


def test_callables_take_turns_and_every_repeat_counts():
    calls: list[str] = []
    result = latency(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=4, warmup=1
    )
    assert "".join(calls) == "ab" + "abba" * 2
    assert {name: item.repeats for name, item in result.items()} == {"a": 4, "b": 4}
    assert all(item.lower_quartile_ms <= item.median_ms <= item.upper_quartile_ms
               for item in result.values())  # fmt: skip


def test_the_garbage_collector_is_left_as_it_was():
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        latency({"fails": lambda: 1 // 0}, warmup=0)
    assert gc.isenabled()


def test_too_few_repeats_are_refused():
    with pytest.raises(ValueError, match="repeats"):
        latency({}, repeats=1)
