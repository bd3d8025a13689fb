"""The page in a real browser: what it draws, what it says, what it loads."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fxcompress.report import render_html
from tests.report.sample import report

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


# What the browser itself asks for at every start, whatever the page.
_OWN = {"clients2.google.com", "android.clients.google.com", "accounts.google.com",
        "www.google.com", "update.googleapis.com", "edgedl.me.gvt1.com",
        "optimizationguide-pa.googleapis.com", "content-autofill.googleapis.com",
        "safebrowsingohttpgateway.googleapis.com", "www.googleapis.com",
        "redirector.gvt1.com"}  # fmt: skip


def _hosts(tmp_path: Path) -> set[str]:
    log = (tmp_path / "net.json").read_text()
    return set(re.findall(r'"url":"(?:https?|wss?)://([^/":]+)', log))


def test_a_request_would_be_seen(tmp_path: Path):
    page = tmp_path / "page.html"
    page.write_text('<img src="http://127.0.0.1:9/x.png">')
    _open(page, tmp_path, "--dump-dom")
    assert "127.0.0.1" in _hosts(tmp_path)


def _open(page: Path, tmp_path: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
            "--no-first-run", "--disable-background-networking", "--disable-component-update",
            "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr",
            f"--log-net-log={tmp_path / 'net.json'}", *flags, page.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("blocks", [2, 40, 400])
def test_the_graph_is_drawn_without_an_error_or_a_request(tmp_path: Path, blocks: int):
    page = tmp_path / "report.html"
    page.write_text(render_html(report(blocks)))
    result = _open(page, tmp_path, "--dump-dom")
    assert "CONSOLE" not in result.stderr, result.stderr
    dom = result.stdout
    assert len(re.findall(r'<g class="node ', dom)) >= 2
    assert len(re.findall(r'<path d="M[^"]+" class="edge', dom)) >= 2
    assert 'role="button"' in dom
    if blocks == 2:
        for status in ("same", "added", "changed", "removed"):
            assert f'class="node {status} ' in dom
    assert _hosts(tmp_path) <= _OWN


def test_the_screenshot_is_no_blank_page(tmp_path: Path):
    page = tmp_path / "report.html"
    page.write_text(render_html(report()))
    picture = tmp_path / "report.png"
    _open(page, tmp_path, f"--screenshot={picture}", "--window-size=1300,1600")
    assert picture.stat().st_size > 40_000
