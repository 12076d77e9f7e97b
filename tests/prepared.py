"""A folder of prepared tokens, written by the file format alone."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from tinygpt.data.dataset import Header, Split
from tinygpt.tokenizer.encoding import char_tokenizer, encode, save_tokenizer

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
