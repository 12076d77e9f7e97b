"""What training begins with and goes on from, made without it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from tinygpt.data.dataset import Header, Split
from tinygpt.tokenizer.encoding import char_tokenizer, encode, save_tokenizer
from tinygpt.training.settings import TrainConfig
from tinygpt.training.state import State
from tinygpt.training.step import Counters

TEXT = "".join(f"{n} times {n} is {n * n}. " for n in range(300))


def prepared(folder: Path, text: str = TEXT, tokenizer=None) -> Path:
    """A folder of prepared tokens, by the file format alone."""
    folder.mkdir()
    tokenizer = tokenizer or char_tokenizer(TEXT)
    cut, splits = len(text) * 9 // 10, {}
    for name, part in (("train", text[:cut]), ("val", text[cut:])):
        ids = np.array(encode(tokenizer, part), np.uint16)
        (folder / f"{name}.bin").write_bytes(ids.tobytes())
        digest = hashlib.sha256(ids.tobytes()).hexdigest()
        splits[name] = Split(len(ids), len(part), len(part.encode()), digest)
    source = hashlib.sha256(text.encode()).hexdigest()
    Header("char", tokenizer.n_vocab, source, 0.1, None, splits).write(folder)
    save_tokenizer(tokenizer, folder)
    return folder


def state(step: int) -> State:
    """The state of a run after so many steps."""
    config = TrainConfig.of({"block_size": 8})
    data = {"seed": config.seed, "step": step, "order": "random", "tokens": 99}
    data |= {"batch_size": config.batch_size, "block_size": 8}
    return State(Counters(step=step, updates=step), None, data, "", None, config)
