"""nanoGPT's `meta.pkl`: a model's characters, which its `prepare.py` pickles beside the data."""

from __future__ import annotations

from pathlib import Path

from tinygpt.checkpoints import unpickle
from tinygpt.errors import CheckpointError, reason, show
from tinygpt.storage import need, read_bytes
from tinygpt.tokenizer.encoding import alphabet_tokenizer
from tinygpt.tokenizer.tokenizer import Tokenizer

META = "meta.pkl"


def nanogpt_characters(path: Path) -> Tokenizer:
    """The tokenizer of such a file, read as data: see `unpickle`.

    Source: nanoGPT's `data/shakespeare_char/prepare.py`.

    Raises:
        CheckpointError: when it cannot be read, or does not give each character one id, from 0 on.
    """
    try:
        content = unpickle.load(read_bytes(path, unpickle.MAX_BYTES))
        numbers = content.get("stoi") if type(content) is dict else None
        if type(numbers) is not dict:
            raise ValueError("it has no stoi, a dict that gives each character its id")
        for token, number in numbers.items():
            if type(token) is not str or len(token) != 1 or type(number) is not int:
                fact = f"its stoi has {show(token)} as {show(number)}"
                raise ValueError(f"{fact}: only characters, each with its id, can be read")
        need(sorted(numbers.values()) == [*range(len(numbers))], "the ids in its stoi are not 0 on")
        characters = sorted(numbers, key=numbers.__getitem__)
        back = dict(enumerate(characters))
        need(content.get("itos") in (None, back, characters), "its itos and its stoi differ")
        return alphabet_tokenizer(characters)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {reason(error)}") from error
