"""The documents' links lead somewhere, what the tour names is in the file that it names, and the
site of them is whole."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import needs_clang

from tinygpt import __version__

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "benchmarks").glob("*.md")),
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert "://" in target or (page.parent / target).exists(), target


def test_the_site_is_built_without_a_warning_and_fetches_nothing(tmp_path):
    pytest.importorskip("sphinx")
    pytest.importorskip("myst_parser")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "docs", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")
    assert run.returncode == 0, run.stderr
    loads = re.compile(r"""(?:src=|<link[^>]+href=|url\()["']?(?:https?:)?//""")
    pages = list(tmp_path.rglob("*.html"))
    assert not [page for page in pages if loads.search(page.read_text(encoding="utf-8"))]
    # Links between pages lead somewhere, from the course to lines of the package too.
    lines = 0
    for page in pages:
        for target, anchor in re.findall(
            r'href="([^":#?]+\.html)(?:#([^"]*))?"', page.read_text(encoding="utf-8")
        ):
            linked = page.parent / target
            assert linked.is_file(), f"{page}: {target}"
            if anchor.startswith("L-"):
                lines += 1
                assert f'name="{anchor}"' in linked.read_text(encoding="utf-8")
    assert lines >= 15


@needs_clang  # tinygrad's assembler without optimisations makes code that crashes
def test_the_python_code_works_as_written(capsys):
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    names: dict = {}
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(code, "python.md", "exec"), names)
    out = capsys.readouterr().out
    assert out.startswith("GPT('shakespeare', 2,755,200 parameters")
    assert "(1, 13, 257)" in out


def test_the_tour_names_what_is_there():
    text = re.sub(r"\s+", " ", (ROOT / "docs" / "tour.md").read_text(encoding="utf-8"))
    named = re.findall(r"\]\(([^)]+)\)((?:, `[\w.]+`)+)", text)
    assert len(named) > 10
    for target, names in named:
        source = (ROOT / "docs" / target).read_text(encoding="utf-8")
        for name in re.findall(r"[\w.]+", names):
            assert re.search(rf"(class|def) {name.split('.')[-1]}\b", source), f"{target}: {name}"


def test_what_is_cited_is_this_version():
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^version: (.+)$", text, re.MULTILINE)[1] == __version__
    assert re.search(r"^license: MIT$", text, re.MULTILINE)


def test_the_public_ci_calls_scripts_that_are_there():
    text = (ROOT / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8")
    calls = re.findall(r"- run: (\S+)", text)
    assert sorted(calls) == [".ci/portable", ".ci/run"]
    for call in (*calls, ".ci/package"):
        assert os.access(ROOT / call, os.X_OK), call
