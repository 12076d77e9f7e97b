"""Counts what there is to count in the built-in model's tales, beside tales that it has not read.

    python benchmarks/tale_samples.py TRAINING HELD_OUT [MODEL] [--count 50] [--show]

TRAINING is the text that the model was trained on, HELD_OUT another of the same kind. Texts are
generated as `tinygpt` does by default, with the seeds 1 to COUNT, and of held-out tales beginnings
of the same lengths are taken. Of both are counted: words that stand in the training text, words
that lie in runs of eight which stand there too, texts that end with a whole sentence, paragraphs
whose quotation marks pair, and names, which are words with a capital letter that the training text
writes so nine times in ten, and how many of them come back.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np

RUN = 8  # words
_WORD = re.compile(r"[A-Za-z]+(?:['-][A-Za-z]+)*")
_END = re.compile(r"""[.!?]["')\]]*\s*\Z""")


def words_of(text: str) -> list[str]:
    """The words of a text, in the letters that it has them in."""
    return _WORD.findall(text)


class Read:
    """What a training text has: words, how they are written, and runs of words."""

    def __init__(self, text: str) -> None:
        written = Counter(words_of(text))
        self.numbers: dict[str, int] = {}
        small, large = Counter[str](), Counter[str]()
        for word, count in written.items():
            self.numbers.setdefault(word.lower(), len(self.numbers) + 1)
            (large if word[0].isupper() else small)[word.lower()] += count
        self.names = {word for word, n in large.items() if n >= 9 * small[word]}
        self.runs = np.unique(self._runs(text))

    def _runs(self, text: str) -> np.ndarray:
        """A number for each run of words: uint64 (words - RUN + 1,)."""
        ids = [self.numbers.get(word.lower(), 0) for word in words_of(text)]
        found = np.zeros(max(0, len(ids) - RUN + 1), np.uint64)
        for place in range(RUN):
            part = np.array(ids[place : place + len(found)], np.uint64)
            found = (found ^ part) * np.uint64(0x9E3779B97F4A7C15)
            found ^= found >> np.uint64(29)
        return found

    def copied(self, text: str) -> int:
        """How many words of a text lie in runs that the training text has too."""
        runs = self._runs(text)
        marked = np.zeros(len(runs) + RUN - 1, bool)
        places = np.minimum(np.searchsorted(self.runs, runs), len(self.runs) - 1)
        for start in np.flatnonzero(self.runs[places] == runs):
            marked[start : start + RUN] = True
        return int(marked.sum())


def counted(texts: list[str], read: Read) -> dict[str, float]:
    """What is counted of some texts, in percent but where it says otherwise."""
    sums = Counter[str]()
    for text in texts:
        words = words_of(text)
        sums["words"] += len(words)
        sums["known"] += sum(word.lower() in read.numbers for word in words)
        sums["copied"] += read.copied(text)
        sums["whole"] += bool(_END.search(text))
        paragraphs = [part for part in text.split("\n") if part.strip()]
        sums["marks"] += text.count('"')
        sums["paragraphs"] += len(paragraphs)
        sums["paired"] += sum(part.count('"') % 2 == 0 for part in paragraphs)
        inside = re.findall(rf"(?<=[a-z,;] ){_WORD.pattern}", text)  # not at a sentence's begin
        names = {word for word in inside if word[0].isupper() and word.lower() in read.names}
        sums["names"] += len(names)
        sums["again"] += sum(words.count(name) > 1 for name in names)
    share = {
        "words in the training text": ("known", "words"),
        "words in copied runs of 8": ("copied", "words"),
        "texts that end a sentence": ("whole", ""),
        "paragraphs with paired quotes": ("paired", "paragraphs"),
        "names that come back": ("again", "names"),
    }
    found = {
        name: 100 * sums[part] / (sums[whole] if whole else len(texts))
        for name, (part, whole) in share.items()
    }
    found["quotation marks per 100 words"] = 100 * sums["marks"] / sums["words"]
    found["names per text"] = sums["names"] / len(texts)
    found["words per text"] = sums["words"] / len(texts)
    return found


def tales(model: str | None, seed: int) -> str:
    """A text as the program gives it."""
    command = [sys.executable, "-m", "tinygpt", "--json", "--seed", str(seed)]
    if model:
        command += ["--model", model]
    run = subprocess.run(command, check=True, capture_output=True, encoding="utf-8")
    return json.loads(run.stdout)["samples"][0]["text"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("training", type=Path)
    parser.add_argument("held_out", type=Path)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--show", action="store_true", help="print the texts too")
    args = parser.parse_args()
    read = Read(args.training.read_text(encoding="utf-8"))
    told = [tales(args.model, seed) for seed in range(1, args.count + 1)]
    if args.show:
        print(*(f"--- seed {seed}\n{text}" for seed, text in enumerate(told, 1)), sep="\n")
    others = args.held_out.read_text(encoding="utf-8").split("\n<|endoftext|>\n")
    others = [text for text in others if len(text) > 400]
    beginnings = []
    for number, text in enumerate(told):  # as long as what was told, and to a sentence's end
        other = others[number % len(others)]
        ends = [found.end() for found in re.finditer(r"""[.!?]["')\]]*(?=\s)""", other)]
        ends = [end for end in ends if end >= len(text)] or [len(other)]
        beginnings.append(other[: ends[0]])
    results = counted(told, read), counted(beginnings, read)
    print(f"{'':32}{'told':>10}{'held out':>10}")
    for name in results[0]:
        print(f"{name:32}" + "".join(f"{result[name]:10.1f}" for result in results))


if __name__ == "__main__":
    main()
