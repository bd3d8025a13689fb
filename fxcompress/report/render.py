"""Render a report: one self-contained HTML file, and Markdown for pull requests."""

import base64
import hashlib
import json
from functools import cache
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from fxcompress.pipeline.figures import Ladder
from fxcompress.report._format import FILTERS, TESTS
from fxcompress.report.model import Rails, Report, UnionGraph, UnionNode

__all__ = ["render_html", "render_ladder", "render_macro", "render_markdown", "render_rails"]


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("fxcompress.report"),
        autoescape=select_autoescape(["html.j2"]),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters.update(FILTERS)
    environment.tests.update(TESTS)
    return environment


def _asset(name: str) -> str:
    return resources.files("fxcompress.report").joinpath("templates", name).read_text("utf-8")


def _source(text: str) -> str:
    """Return the hash by which a Content-Security-Policy allows one inline style or script."""
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def render_html(report: Report) -> str:
    """Return the report as one HTML file that needs no network; the same report, the same bytes.

    The policy in its head allows the file's own style and scripts, by hash, and nothing else.
    """
    style, dagre, script = _asset("style.css"), _asset("vendor/dagre.min.js"), _asset("graph.js")
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            report=report,
            style=Markup(style),
            dagre=Markup(dagre),
            script=Markup(script),
            graph_json=_graph_json(report.graph),
            csp={
                "style": Markup(_source(style)),
                "scripts": Markup(f"{_source(dagre)} {_source(script)}"),
            },
        )
    )


def render_markdown(report: Report) -> str:
    """Return the report as GitHub-flavoured Markdown, short enough for a pull request."""
    return _environment().get_template("report.md.j2").render(report=report)


def render_rails(rails: Rails) -> str:
    """Return the picture of axes as an SVG file of its own, with its part of the style in it."""
    return render_macro("rails", rails)


def render_ladder(ladder: Ladder) -> str:
    """Return the picture of a joint graph as an SVG file of its own, with its style in it."""
    return render_macro("ladder", ladder)


def render_macro(name: str, *arguments: object) -> str:
    """Return what the macro of `NAME.svg.j2` draws, as an SVG file with its style in it."""
    colours, rest = _asset("style.css").split("* {", 1)
    starts = (".rail", f".{name}", "svg text")
    style = colours + "\n".join(line for line in rest.splitlines() if line.startswith(starts))
    module = _environment().get_template(f"{name}.svg.j2").module
    return str(getattr(module, name)(*arguments, Markup(style))) + "\n"


def _graph_json(graph: UnionGraph) -> Markup:
    """Return the graph's data for the page's script, safe inside a script element."""
    document = {
        "nodes": [_node(node) for node in graph.nodes],
        "edges": [[edge.source, edge.target, edge.status] for edge in graph.edges],
        "modules": [module.model_dump() for module in graph.modules],
    }
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _node(node: UnionNode) -> dict[str, Any]:
    short = node.id.removeprefix(f"{node.scope}.").removeprefix(f"{node.scope}/").lstrip("/")
    label = short if short.partition("@")[0] == node.op else f"{short} : {node.op}"
    return {
        "id": node.id,
        "label": label,
        "type": node.type,
        "status": node.status,
        "kind": node.kind,
        "scope": node.scope,
        "text": node.text,
        "before": node.before,
    }
