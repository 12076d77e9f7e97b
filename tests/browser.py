"""A page as a reader has it: opened in Chromium, with axe looking at it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_ADDRESSES = """() => [...document.querySelectorAll("[src], [href], [action], [data]")]
  .map(each => each.src || each.getAttribute("href") || each.action || each.data)
  .filter(each => !/^(data:|#)/.test(each))"""


@contextmanager
def started() -> Iterator[Any]:
    """A browser without a window; where there is none, the test is skipped."""
    playwright = pytest.importorskip("playwright.sync_api", reason="it needs the extra `browser`")
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip("it needs Chromium on the PATH")
    with playwright.sync_playwright() as driver:
        # Without its sandbox it runs as root too; it opens nothing but our own pages.
        chromium = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@contextmanager
def opened(browser: Any, address: str, width: int = 1280) -> Iterator[tuple[Any, list[str]]]:
    """A page, and what the browser complains of until it is closed, which grows.

    Faults are a message on the console, an error of a script, and a request of another address.

    Args:
        width: of the window, in pixels.
    """
    faults: list[str] = []
    context = browser.new_context(viewport={"width": width, "height": 800})
    page = context.new_page()  # more tabs are had by `page.context.new_page()`
    own = address.rpartition("/")[0]

    def requested(request: Any) -> None:
        if not request.url.startswith((own, "data:", "blob:")):
            faults.append(f"asks for {request.url}")

    page.on("console", lambda said: faults.append(f"says {said.text}"))
    page.on("pageerror", lambda error: faults.append(f"fails: {error}"))
    page.on("request", requested)
    page.goto(address)
    yield page, faults
    context.close()


def seen(page: Any) -> list[str]:
    """What axe finds, and what is wider than the window."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="extra `browser`")
    found = axe.Axe().run(page).response["violations"]
    faults = [f"{each['id']}: {each['nodes'][0]['html']}" for each in found]
    over = page.evaluate("document.documentElement.scrollWidth - innerWidth")
    return faults + [f"{over} pixels wider than the window"] * (over > 0)


def addresses(page: Any) -> list[str]:
    """All that the page names outside of itself."""
    return page.evaluate(_ADDRESSES)
