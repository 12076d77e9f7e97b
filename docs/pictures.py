"""Takes the pictures of the pages: `python docs/pictures.py [NAME ...]`, all by default.

It needs Chromium on the PATH, and the extras `browser`, `serve` and `plot` (for Pillow).
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image
from playwright.sync_api import expect, sync_playwright

FOLDER = Path(__file__).parent / "pictures"
PROGRAM = [sys.executable, "-m", "tinygpt"]
TEXT = "Once upon a time there was a king who had a daughter"
# Of each page of a study the command, and the width of the window in pixels.
STUDIES = {
    "tokens": (["tokens", TEXT], 960),
    "lens": (["lens", TEXT], 760),
    "attention": (["attention", TEXT, "--block", "3", "--head", "3"], 700),
    "induction": (["induction"], 760),
}


def study(browser: Any, name: str) -> Any:
    """A study's page."""
    argv, width = STUDIES[name]
    with TemporaryDirectory() as made:
        file = Path(made, f"{name}.html")
        subprocess.run([*PROGRAM, "study", *argv, "--html", str(file)], check=True)
        page = browser.new_page(viewport={"width": width, "height": 300})
        page.goto(file.as_uri())
    return page


def written(browser: Any, address: str, width: int, **media: str) -> Any:
    """The server's page with a text."""
    page = browser.new_page(viewport={"width": width, "height": 1000}, **media)
    page.goto(address)
    expect(page.locator("#write")).to_be_enabled()
    page.fill("#prompt", "Once upon a time there was a king")
    page.click("#write")
    expect(page.locator("#said")).to_contain_text("a second", timeout=60_000)
    return page


def without(page: Any, parts: str) -> Any:
    """The page, some of it hidden."""
    page.locator(parts).evaluate_all("all => all.forEach(each => { each.hidden = true; })")
    return page


def serve_alternatives(browser: Any, address: str) -> Any:
    """What else might have come."""
    page = written(browser, address, 1080)
    page.fill("#top_k-A-number", "6")
    page.click("#text-A .token[data-index='12']")
    expect(page.locator(".others caption")).to_contain_text("keep 6")
    return without(page, "#request, #card, section:has(#tree)")


def serve_reads(browser: Any, address: str) -> Any:
    """What a token reads, and a branch without the head."""
    page = written(browser, address, 1080, color_scheme="dark")
    page.click("#text-A .token[data-index='15']")
    page.click("#tab-reads")
    page.click("[data-head='3.3']")
    expect(page.locator("#head-about")).to_contain_text("head 3: previous", timeout=120_000)
    page.check("#leave-head")
    page.click("#go-on")
    expect(page.locator("#tree [role=treeitem]")).to_have_count(2)
    expect(page.locator("#stop")).to_be_disabled(timeout=60_000)
    expect(page.locator("#text-A")).to_have_class("text reading", timeout=60_000)
    return without(page, "#request, #card")


SERVE = {"serve-alternatives": serve_alternatives, "serve-reads": serve_reads}


@contextmanager
def served() -> Iterator[str]:
    """The address of a server of the model in the package."""
    argv = [*PROGRAM, "serve", "--port", "0", "--slots", "4"]
    with subprocess.Popen(argv, stderr=subprocess.PIPE, encoding="utf-8") as server:
        try:
            lines = iter(server.stderr.readline, "")
            found = (re.search("listening on (http://[^;]+);", line) for line in lines)
            yield next(each[1] for each in found if each)
        finally:
            server.terminate()
            server.communicate()


def keep(name: str, page: Any) -> None:
    """Write what is seen, in few colours: there is text, and hardly a shade."""
    picture = Image.open(BytesIO(page.screenshot(full_page=True))).convert("RGB")
    picture.quantize(128 if name in SERVE else 32).save(FOLDER / f"{name}.png", optimize=True)
    page.close()
    print(name)


def main() -> None:
    """Take those that were asked for."""
    FOLDER.mkdir(exist_ok=True)
    names = sys.argv[1:] or [*STUDIES, *SERVE]
    with sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        for name in (name for name in names if name in STUDIES):
            keep(name, study(browser, name))
        if pages := [name for name in names if name in SERVE]:
            with served() as address:
                for name in pages:
                    keep(name, SERVE[name](browser, address))


if __name__ == "__main__":
    main()
