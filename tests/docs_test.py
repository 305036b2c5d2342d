"""Every Python snippet of README.md and docs/ runs; generated pages are current; links lead somewhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SNIPPET = re.compile(r"^```python\n(.*?)^```", re.M | re.S)
WITH_CODE = [p for p in PAGES if SNIPPET.search(p.read_text())]


@pytest.mark.parametrize("page", WITH_CODE, ids=[str(p.relative_to(ROOT)) for p in WITH_CODE])
def test_snippets_run(page, tmp_path, monkeypatch):
    """A page's snippets run one after the other in one namespace, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "snippet"}
    for i, code in enumerate(SNIPPET.findall(page.read_text())):
        exec(compile(code, f"{page.name}, snippet {i + 1}", "exec"), names)


def test_generated_pages_are_current():
    done = subprocess.run([sys.executable, "-m", "docs.build", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("page", PAGES, ids=[str(p.relative_to(ROOT)) for p in PAGES])
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
