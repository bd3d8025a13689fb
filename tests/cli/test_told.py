"""What the summary of a run tells of each pass."""

from fxcompress.cli.run import _told
from fxcompress.pipeline.records import PassRecord
from fxcompress.rewrite.edits import Declined


def record(summary, declined=()):
    nodes = tuple(Declined(node=node, reason=reason) for node, reason in declined)
    return PassRecord.model_construct(summary=tuple(summary), declined=nodes)


def test_what_stays_is_told_once_a_reason_and_not_what_nobody_selected():
    declined = [
        ("a", "it is quantised already"),
        ("b", "it is not selected"),
        ("c", "it is quantised already"),
        ("d", "no kernel"),
    ]
    assert _told(record(["3 weights as 8-bit integers"], declined)) == [
        "3 weights as 8-bit integers",
        "skipped a and 1 more: it is quantised already",
        "skipped d: no kernel",
    ]


def test_a_long_summary_is_cut():
    assert _told(record(map(str, range(8))))[-1] == "7"
    assert _told(record(map(str, range(20))))[6:] == ["6", "and 13 more lines in the report"]
