import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest

from fxcompress.pipeline.figures import Heatmap, Ladder, Rung
from fxcompress.report import render_html, render_markdown
from fxcompress.report.model import PassFigures
from fxcompress.report.render import render_ladder
from tests.report.sample import report


class _Page(HTMLParser):
    """Collects what a browser would load, and checks that tags are balanced."""

    VOID = frozenset({"meta", "link", "br", "hr", "img", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.urls: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.stack.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "srcset", "action"):
                self.urls.append(value or "")
            if name == "id":
                self.ids.append(value or "")
            assert not name.startswith("on"), "inline handlers would break the policy"
            assert name != "style", "inline styles would break the policy"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag


def test_page_is_well_formed_and_loads_nothing():
    page = _Page()
    page.feed(render_html(report()))
    assert page.stack == []
    assert page.urls == []
    assert len(page.ids) == len(set(page.ids))


def test_policy_allows_exactly_the_page_s_own_scripts_and_style():
    html = render_html(report())
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', html).group(1)
    assert policy.startswith("default-src 'none'")
    bodies = re.findall(r"<script>(.*?)</script>", html, re.S)
    bodies += re.findall(r"<style>(.*?)</style>", html, re.S)
    assert len(bodies) == 3
    for body in bodies:
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert "unsafe" not in policy


def test_the_same_report_gives_the_same_bytes():
    assert render_html(report()) == render_html(report())


def test_input_is_escaped_everywhere():
    evil = report(title="</script><img src=x onerror=alert(1)>")
    node = evil.graph.nodes[1].model_copy(update={"text": "</script><b>"})
    graph = evil.graph.model_copy(update={"nodes": (node, *evil.graph.nodes[1:])})
    html = render_html(evil.model_copy(update={"graph": graph}))
    assert "<img" not in html
    assert html.count("</script>") == 3
    data = re.search(r'id="graph-data">(.*?)</script>', html, re.S).group(1)
    assert json.loads(data)["nodes"][0]["text"] == "</script><b>"
    assert "<img" not in render_markdown(evil)


@pytest.mark.parametrize(
    "text",
    [
        "8.12 k",
        "learning rate",
        "24.6 MiB",
        "1 / 2",
        "4.1e-07",
        "130.2 dB",
        "2 min 2 s",
        "its input",
        "✗",
        "25,557,032",
    ],
)
def test_figures_stand_in_both_forms(text: str):
    assert text in render_html(report())
    assert text in render_markdown(report())


def test_markdown_tables_have_as_many_cells_in_each_row():
    blocks = re.findall(r"(?:^\|.*\n)+", render_markdown(report()), re.M)
    assert len(blocks) == 4
    for block in blocks:
        cells = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(cells) == 1


def test_a_long_training_is_thinned_in_markdown_and_whole_in_html():
    sample = report()
    (training,) = sample.trainings
    rows = tuple(
        training.epochs[0].model_copy(update={"place": n, "label": str(n + 1)}) for n in range(90)
    )
    longer = sample.model_copy(
        update={"trainings": (training.model_copy(update={"epochs": rows}),)}
    )
    shown = re.findall(r"^\| (\d+) \| 19 \|", render_markdown(longer), re.M)
    assert shown == [str(n + 1) for n in range(0, 90, 5)] + ["90"]
    html = render_html(longer)
    assert html.count("<tr><td>") >= 90
    (points,) = re.findall(r'aria-label="loss of fine_tune[^>]*>.*?points="([^"]*)"', html, re.S)
    assert len(points.split(" ")) == 90
    assert "nan" not in points


def test_a_heatmap_marks_what_was_chosen_and_shades_by_powers_of_ten():
    html = render_html(report())
    heat = html[html.index('<figure class="heatmap">') :].split("</figure>")[0]
    assert heat.count('class="ring"') == 3
    assert "<title>conv1, 4 bits: 0.021 (chosen)</title>" in heat
    assert "<title>fc, 8 bits: 8.0e-09</title>" in heat
    assert "layer1.0.&lt;conv&gt;" in heat
    assert "<title>layer1.0.&lt;conv&gt;: 144.0 KiB</title>" in heat
    shades = [float(part) for part in re.findall(r'fill-opacity="([^"]+)"', heat)]
    assert len(shades) == 10  # two places of twelve hold nothing
    conv1 = shades[:4]
    assert conv1 == sorted(conv1, reverse=True)
    assert conv1[-1] == 0 < conv1[-2]


@pytest.mark.parametrize("values", [((None,),), ((0.0,),), ((float("inf"),),), ((5.0,),)])
def test_a_heatmap_of_one_number_is_drawn(values):
    data = Heatmap(title="t", columns=("a",), rows=("b",), values=values)
    made = report().model_copy(update={"figures": (PassFigures(id="x", heatmaps=(data,)),)})
    assert '<figure class="heatmap">' in render_html(made)


def joint_graph():
    rungs = (
        Rung(left="layer1.<0>", left_type="f32[batch,4]", right="stage.1", right_order=1,
             right_type="f32[batch,8]", through="linear 4 → 8", read_by="features, cka"),
        Rung(left="layer2", right="stage.0", right_order=0),
        Rung(left="output", read_by="hard_labels"),
    )  # fmt: skip
    return Ladder(
        title="The joint graph", inputs="x, mask", left="model", right="teacher", rungs=rungs
    )


def test_a_joint_graph_is_drawn_with_all_its_parts():
    made = report().model_copy(update={"figures": (PassFigures(id="x", ladders=(joint_graph(),)),)})
    html = render_html(made)
    ladder = html[html.index('class="rails ladder"') :].split("</figure>")[0]
    for text in (
        "layer1.&lt;0&gt;",
        "stage.1",
        "linear 4 → 8",
        "features, cka",
        "x, mask",
        "teacher",
    ):
        assert text in ladder
    assert ladder.count("<circle") == 5
    # The rung of the first pair goes to the second place on the right.
    assert 'd="M300 92H570L640 140"' in ladder
    alone = render_ladder(joint_graph())
    assert alone.startswith("<svg")
    assert "--rail-2" in alone


def test_places_on_the_right_are_numbered():
    with pytest.raises(ValueError, match="not numbered"):
        Ladder(title="t", inputs="x", left="a", rungs=(Rung(left="l", right="r", right_order=1),))
