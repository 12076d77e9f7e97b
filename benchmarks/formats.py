"""Every form in and out, as a table: `python benchmarks/formats.py`.

A small checkpoint of each form is written by the program it comes from (see `writers`), loaded, and
converted to each form that can be written. Shown are the largest difference of the logits from that
program's, what the way through each form changes in our own float32 logits, and whether the other
side of the way out, `transformers` and llama.cpp, continues with the same greedy tokens.
"""

from __future__ import annotations

import io
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from tinygrad import Tensor

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from writers import TOKENS, WRITERS  # noqa: E402

from tinygpt import GPT, Generator  # noqa: E402
from tinygpt.commands.main import main  # noqa: E402
from tinygpt.commands.peers import FAMILIES  # noqa: E402

COUNT = 10  # with the prompt, within the window
PROMPT = TOKENS[0, :5].tolist()


def logits(model: GPT) -> np.ndarray:
    return model(Tensor(TOKENS.astype(np.int32))).numpy()


def way(source: Path, model: GPT, to: str, folder: Path) -> tuple[str, str]:
    """Out in a form and in again: what changed, and who continues alike."""
    out = folder / to
    argv = ["convert", str(source), str(out), "--to", to, "--dtype", "float32"]
    said = io.StringIO()
    with redirect_stdout(io.StringIO()), redirect_stderr(said):
        status = main([*argv, "--tokenizer", "bytes"])
    if status:
        return said.getvalue().partition("error: ")[2].split(":")[0].strip(), ""
    change = np.abs(logits(GPT.from_pretrained(out)) - logits(model)).max()
    family = {"hf": "transformers", "gguf": "llama.cpp"}[to]
    try:
        theirs = FAMILIES[family](str(out), "float32", 1).generate([PROMPT], COUNT)
        found = [row[0] for row in theirs]
    except ImportError:
        return f"{change:.0e}", "not installed"
    ours = [*Generator(model).generate(PROMPT, max_new_tokens=COUNT, temperature=0)]
    return "bit-equal" if change == 0 else f"{change:.0e}", "same" if found == ours else "other"


def main_table() -> None:
    head = ("form", "compared with", "logits differ by", "of", "to hf", "transformers")
    print(f"| {' | '.join((*head, 'to gguf', 'llama.cpp'))} |")
    print("|---|---|---|---|---|---|---|---|")
    for form, (other, write) in WRITERS.items():
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            (folder / "in").mkdir()
            try:
                path, expected = write(folder / "in")
            except pytest.skip.Exception as error:  # llama.cpp writes the K types
                print(f"| {form} | {error} | | | | | | |")
                continue
            model = GPT.from_pretrained(path, "float32")
            error = np.abs(logits(model) - expected).max()
            cells = [cell for to in ("hf", "gguf") for cell in way(path, model, to, folder)]
            numbers = f"{error:.1e} | {np.abs(expected).max():.1f}"
            print(f"| {form} | {other} | {numbers} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main_table()
