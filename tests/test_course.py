"""The course's code runs as written and prints what stands there; its links lead to their lines."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import needs_clang
from pytest_examples import find_examples

COURSE = Path(__file__).parents[1] / "docs" / "course"
GLOSSARY = COURSE.parent / "glossary.md"
CHAPTERS = sorted(COURSE.glob("[0-9][0-9]-*.md"))


def titled(chapters):
    return pytest.mark.parametrize("chapter", chapters, ids=lambda chapter: chapter.stem)


@needs_clang  # what is printed is that of the operations in C, and the models are not small
@titled(CHAPTERS)
def test_a_chapters_code_prints_what_stands_there(chapter, eval_example, monkeypatch, tmp_path):
    """`pytest -n 0 --update-examples tests/test_course.py` writes what it does print."""
    monkeypatch.chdir(tmp_path)
    check = eval_example.run_print_check
    if eval_example.update_examples:
        check = eval_example.run_print_update
    names: dict = {}
    for example in (found := list(find_examples(str(chapter)))):
        names |= check(example, module_globals=names)
    assert len(found) > 2


@titled(CHAPTERS)
def test_a_chapter_has_a_picture_and_an_exercise_with_a_tested_answer(chapter):
    text = chapter.read_text(encoding="utf-8")
    for picture in (pictures := re.findall(r"!\[[^\]]{20,}\]\((pictures/[^)]+)\)", text)):
        assert (COURSE / picture).is_file(), f"{picture}: python docs/course/pictures.py makes it"
    assert pictures
    answer = text.split("## Exercise")[1].split("<summary>Answer</summary>")[1]
    assert re.search(r"```python\n.*?\bassert\b.*?```.*?</details>", answer, re.DOTALL)
    assert "## In the package" in answer
    assert len(text.splitlines()) <= 150, "a chapter is read in one sitting"


def test_the_glossary_has_each_term_that_the_course_sets_in_italics():
    rows = re.findall(r"^\| ([^|]+) \|", GLOSSARY.read_text(encoding="utf-8"), re.MULTILINE)
    words = [word.casefold() for row in rows for word in row.split(", ")]
    for page in (COURSE / "README.md", *CHAPTERS):
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for found in re.findall(r"(?<![*\w])\*([^*]+)\*(?![*\w])", text):
            term = " ".join(found.split()).casefold()
            # Or a word of the glossary with an ending, as "vanishes" is.
            known = [word for word in words if term.startswith(word) and len(term) - len(word) < 3]
            assert known, f"{page.name}: {term}"


@titled(CHAPTERS)
def test_a_link_to_a_line_leads_to_what_it_names(chapter):
    """[`name`](path#L12): line 12 defines the name."""
    links = re.findall(r"\[`([\w.]+)`\]\(([^)#]+)#L(\d+)\)", chapter.read_text(encoding="utf-8"))
    assert links
    for name, target, line in links:
        lines = (COURSE / target).read_text(encoding="utf-8").split("\n")
        wanted = re.compile(rf"\s*(class|def) {name.split('.')[-1]}\b")
        found = [number for number, text in enumerate(lines, 1) if wanted.match(text)]
        assert int(line) in found, f"{name} stands in lines {found} of {target}"


def test_the_contents_list_every_chapter_in_its_order():
    text = (COURSE / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"\]\((\d\d-[\w-]+\.md)\)", text) == [path.name for path in CHAPTERS]
