"""What the studies write as pages, opened from disk in a browser."""

from __future__ import annotations

import pytest
from browser import addresses, opened, seen
from conftest import needs_clang, randomize, save_with_bytes

from tinygpt import GPT, GPTConfig
from tinygpt.commands.main import main
from tinygpt.study import norms
from tinygpt.study.induction import learn_induction
from tinygpt.study.norms import Norms, Trained
from tinygpt.study.page import page
from tinygpt.study.shown import induction_report, norms_report

pytestmark = needs_clang  # as for the command's own tests
TEXT = "the <sea>, a café"
LOOKS = {
    "explain": ["--block", "1"],
    "tokens": [TEXT],
    "lens": [TEXT],
    "attention": [TEXT],
    "map": [TEXT, "--block", "1", "--head", "0"],
    "rollout": [TEXT, "--rollout"],
    "heads": [],
    "attribute": [TEXT, "--token", "e", "--against", "x"],
}


@pytest.fixture(scope="module")
def pages(tmp_path_factory, trained):
    """A folder with a page of each study, of a small model and a small run."""
    folder, model = tmp_path_factory.mktemp("pages"), tmp_path_factory.mktemp("model")
    config = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=32, vocab_size=257)
    save_with_bytes(randomize(GPT(config)), model)
    commands = {
        name: ["study", {"map": "attention", "rollout": "attention"}.get(name, name), *argv]
        for name, argv in LOOKS.items()
    }
    for argv in commands.values():
        argv += ["--model", model]
    commands["two"] = ["study", "compare", model, model, TEXT, "--look", "tokens"]
    commands["film"] = ["study", "compare", "--run", trained / "run", "the sea"]
    commands["prove"] = ["doctor", "--prove", model, TEXT]
    commands["report"] = ["report", trained / "run"]
    for name, argv in commands.items():
        assert main([*map(str, argv), "--html", str(folder / f"{name}.html")]) == 0
    measured = [[[1.0] * 6]], [[1.0]], [[1.0]], [[1.0]]
    cells = [Trained(cell, [3.0] * 60, *measured) for cell in norms.cells(quick=True)]
    for name, report in (
        ("norms", norms_report(Norms(3.3, 2.4, cells))),
        ("induction", induction_report(learn_induction(2))),
    ):
        (folder / f"{name}.html").write_text(page(report), encoding="utf-8")
    return folder


def test_every_page_opens_from_disk_whole_and_axe_finds_nothing(pages, browser):
    found = {}
    files = sorted(pages.glob("*.html"))
    for file in files:
        with opened(browser, file.as_uri(), width=320) as (page, faults):
            found[file.stem] = seen(page) + addresses(page) + faults
    assert len(files) == len(LOOKS) + 6
    assert {name: faults for name, faults in found.items() if faults} == {}


def test_a_film_is_moved_by_the_keyboard(pages, browser):
    with opened(browser, (pages / "film.html").as_uri()) as (page, faults):
        shown = page.locator("section:visible h2")
        assert shown.all_inner_texts() == ["step-00000002: When the model decides"]
        page.keyboard.press("Tab")
        page.keyboard.press("ArrowRight")
        assert shown.all_inner_texts() == ["step-00000004: When the model decides"]
        said = page.locator("#frame").get_attribute("aria-valuetext")
        assert said == shown.inner_text()
        assert seen(page) + faults == []


@pytest.mark.parametrize(
    ("html", "told"),
    [
        ("<script>nothing()</script>", "fails: nothing is not defined"),
        ('<img alt="a" src="https://example.org/a.png">', "asks for https://example.org/a.png"),
        ('<a href="https://example.org/">there</a>', "https://example.org/"),
        ('<p style="color: #ccc">pale</p>', "color-contrast: <p "),
        ('<div style="width: 2000px">wide</div>', "pixels wider than the window"),
        ("<script>console.warn('old')</script>", "says old"),
    ],
)
def test_a_fault_of_a_page_is_found(html, told, browser, tmp_path):
    text = page(norms_report(Norms(3.3, 2.4, [])))
    (file := tmp_path / "page.html").write_text(
        text.replace("</main>", html + "</main>"), encoding="utf-8"
    )
    with opened(browser, file.as_uri()) as (open_page, faults):
        found = seen(open_page) + addresses(open_page) + faults
    assert any(told in fault for fault in found), found
