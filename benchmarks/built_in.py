"""Makes a model that the package carries.

    python benchmarks/built_in.py tales RUN TALES
    python benchmarks/built_in.py shakespeare RUN [FILE]

trains in the folder RUN as `RECIPES` here says, goes on where it was stopped, stores the best
weights in the package, in as few bits as cost less than 0.5% of perplexity, and says how they are
to be sampled. TALES is the text that tinygpt/tales/README.md describes; FILE is char-rnn's
Shakespeare file, fetched where none is named.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

import tinygpt
from tinygpt import GPT
from tinygpt.checkpoints.load_tokenizer import GENERATION, with_files
from tinygpt.commands.main import main


class Recipe(NamedTuple):
    """How a model is trained, stored and sampled."""

    flags: str  # of `tinygpt train`
    dtype: str
    generation: dict[str, Any]  # what its generation_config.json says


RECIPES = {
    "tales": Recipe(
        "--recipe tales",
        "int8",
        {
            "do_sample": True,
            "temperature": 0.9,
            "min_p": 0.05,
            "repetition_penalty": 1.1,
            "max_new_tokens": 1000,
            "sentence_after": 200,
        },
    ),
    # Its tokens are bytes, so that any prompt can be read.
    "shakespeare": Recipe(
        "--tokenizer bytes --n-layer 6 --n-head 6 --n-embd 192 --block-size 256 --batch-size 16 "
        "--steps 3000 --learning-rate 2e-3 --min-learning-rate 1e-4 --warmup-steps 100 "
        "--weight-decay 0.2 --eval-every 250 --eval-batches 27 --sample-tokens 200",
        "float16",
        {"do_sample": True, "temperature": 0.8, "max_new_tokens": 300},
    ),
}


def build(name: str, run: Path, source: str) -> int:
    """Train, and store; the exit status of what was trained."""
    recipe = RECIPES[name]
    how = ["--resume"] if (run / "last").exists() else recipe.flags.split()
    if status := main(["train", source, "-o", str(run), *how]):
        return status
    model = GPT.from_pretrained(run / "best", recipe.dtype)
    says = {**model.tokenizer.kept.get(GENERATION, {}), **recipe.generation}
    tokenizer = with_files(model.tokenizer, {GENERATION: says})
    model.save_pretrained(Path(tinygpt.__file__).parent / name, tokenizer)
    return 0


if __name__ == "__main__":
    if not 3 <= len(sys.argv) <= 4 or sys.argv[1] not in RECIPES:
        sys.exit(__doc__)
    sys.exit(build(sys.argv[1], Path(sys.argv[2]), (sys.argv[3:] or ["shakespeare"])[0]))
