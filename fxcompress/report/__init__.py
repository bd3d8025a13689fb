"""Reports: one model of what is said (pydantic), rendered as HTML and as Markdown (Jinja2)."""

from typing import TYPE_CHECKING

from fxcompress._lazy import lazy_exports

if TYPE_CHECKING:
    from fxcompress.report.build import build as build
    from fxcompress.report.files import load_report as load_report
    from fxcompress.report.files import write_report as write_report
    from fxcompress.report.graph import union_graph as union_graph
    from fxcompress.report.model import Report as Report
    from fxcompress.report.render import render_html as render_html
    from fxcompress.report.render import render_markdown as render_markdown

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "Report": "model",
        "build": "build",
        "load_report": "files",
        "render_html": "render",
        "render_markdown": "render",
        "union_graph": "graph",
        "write_report": "files",
    },
)
