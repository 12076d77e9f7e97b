"""Takes the pictures of the studies' pages: `python docs/pictures.py [NAME ...]`, all by default.

It needs Chromium on the PATH, and the extras `browser` and `plot` (for Pillow).
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image
from playwright.sync_api import sync_playwright

TEXT = "Once upon a time there was a king who had a daughter"
# Of each page the command, and the width of the window in pixels.
PICTURES = {
    "tokens": (["tokens", TEXT], 960),
    "lens": (["lens", TEXT], 760),
    "attention": (["attention", TEXT, "--block", "3", "--head", "3"], 700),
    "induction": (["induction"], 760),
}


def main() -> None:
    folder = Path(__file__).parent / "pictures"
    folder.mkdir(exist_ok=True)
    with TemporaryDirectory() as made, sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        for name in sys.argv[1:] or PICTURES:
            argv, width = PICTURES[name]
            file = Path(made, f"{name}.html")
            command = [sys.executable, "-m", "tinygpt", "study", *argv, "--html", str(file)]
            subprocess.run(command, check=True)
            page = browser.new_page(viewport={"width": width, "height": 300})
            page.goto(file.as_uri())
            seen = Image.open(BytesIO(page.screenshot(full_page=True))).convert("RGB")
            seen.quantize(32).save(folder / f"{name}.png", optimize=True)
            print(name)


if __name__ == "__main__":
    main()
