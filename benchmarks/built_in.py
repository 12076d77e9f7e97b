"""Makes the model that the package carries, from char-rnn's Shakespeare file.

    python benchmarks/built_in.py RUN [FILE]

trains in the folder RUN on the first 90% of the file (fetched where none is named), goes on where
it was stopped, stores the best weights as float16 in tinygpt/shakespeare, and prints their loss on
the last 10%. Its tokens are bytes, so that any prompt can be read; the file's characters are all
of one byte, so a loss per byte is one per character.
"""

from __future__ import annotations

import sys
from pathlib import Path

import tinygpt
from tinygpt import GPT, load_tokenizer
from tinygpt.checkpoints import hub
from tinygpt.commands.main import main
from tinygpt.tokenizer.encoding import save_tokenizer

SETTINGS = """
    --n-layer 6 --n-head 6 --n-embd 192 --block-size 256 --batch-size 16 --steps 3000
    --learning-rate 2e-3 --min-learning-rate 1e-4 --warmup-steps 100 --weight-decay 0.2
    --eval-every 250 --eval-batches 27 --sample-tokens 200
"""


def build(run: Path, source: str) -> int:
    data, target = run / "data", Path(tinygpt.__file__).parent / hub.BUILT_IN
    if not data.exists() and main(["prepare", source, "--tokenizer", "bytes", "-o", str(data)]):
        return 1
    how = ["--resume"] if (run / "last").exists() else SETTINGS.split()
    if status := main(["train", str(data), "-o", str(run), *how]):
        return status
    GPT.from_pretrained(run / "best", "float16").save_pretrained(target)
    save_tokenizer(load_tokenizer("bytes"), target)
    return main(["evaluate", str(target), str(data)])


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 3:
        sys.exit(__doc__)
    sys.exit(build(Path(sys.argv[1]), (sys.argv[2:] or ["shakespeare"])[0]))
