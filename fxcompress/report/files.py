"""Reports on disk: `report.json`, from which `report.html` and `report.md` are rendered again."""

from pathlib import Path

from pydantic import ValidationError

from fxcompress._files import write_text
from fxcompress.errors import RunFolderError
from fxcompress.report.model import Report
from fxcompress.report.render import render_html, render_markdown

__all__ = ["load_report", "write_report"]


def load_report(path: str | Path) -> Report:
    """Read `report.json`, or the one in a run folder.

    Raises:
        RunFolderError: There is none, or it is damaged or of another format.
    """
    file = Path(path)
    file = file / "report.json" if file.is_dir() else file
    try:
        return Report.model_validate_json(file.read_bytes())
    except OSError as error:
        raise RunFolderError(
            "there is no report to read",
            reason=error.strerror or str(error),
            hint="name a run folder in which `fxcompress run` has finished",
            where=str(file),
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise RunFolderError(
            "this is no report that this version can read",
            reason=f"{place}: {first['msg']}",
            hint="run the spec again with this version of fxcompress",
            where=str(file),
        ) from None


def write_report(report: Report, directory: str | Path) -> tuple[Path, ...]:
    """Write `report.json`, `report.html` and `report.md`, each whole or not at all."""
    folder = Path(directory)
    return (
        write_text(folder / "report.json", report.model_dump_json(indent=1) + "\n"),
        write_text(folder / "report.html", render_html(report)),
        write_text(folder / "report.md", render_markdown(report)),
    )
