"""Merges learnt from text: against a naive trainer, the tokenizers package and transformers."""

import json
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import regex

from tinygpt.errors import InputError
from tinygpt.tokenizer import learn_bpe
from tinygpt.tokenizer.encoding import encode, end_token, folder_tokenizer, save_tokenizer
from tinygpt.tokenizer.learn_bpe import bpe_tokenizer, train_bpe
from tinygpt.tokenizer.vocabulary import spell

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # encoder.py
TEXTS = (
    "Hello, world! It's what they'd've said; DON'T you'll see, I'm sure we're 100% right.",
    "  two  spaces\t\ttabs\n\n\n   indented\r\n trailing   ",
    "naïve café – Ünïcödé “quotes” … 中文字符 こんにちは שלום мир ٣٤٥ Ⅷ",
    "😀👩‍👩‍👧🇫🇷 e\u0301 \ufeff\u00a0\u3000\u2028 \x00\x1c\x7f",
    "x = {'a': [1, 2.50, -3e10]}  # ~~~ <|endoftext|> ~~~ ______ ====",
    "",
)


def naive(text: str, count: int) -> list[list[str]]:
    """All pairs counted anew for every merge."""
    words = [([spell(bytes([b])) for b in word.encode()]) for word in regex.findall(GPT2, text)]
    order = sorted(spell(bytes([byte])) for byte in range(256))
    merges = []
    while len(merges) < count:
        pairs = Counter(pair for word in words for pair in pairwise(word))
        if not pairs or max(pairs.values()) < 2:
            break
        most = max(pairs.values())
        ids = {name: number for number, name in enumerate(order)}
        left, right = min((p for p in pairs if pairs[p] == most), key=lambda p: [ids[s] for s in p])
        for word in words:
            place = 0
            while place < len(word) - 1:
                if word[place : place + 2] == [left, right]:
                    word[place : place + 2] = [left + right]
                place += 1
        merges.append([left, right])
        order.append(left + right)
    return merges


@pytest.fixture(scope="module")
def text() -> str:
    """Some Python, some letters of a small alphabet (many ties, long words) and some of each."""
    draw = random.Random(0)
    noise = "".join(draw.choices("aab \n", k=3000)) + "".join(draw.choices("xyz", k=2000))
    return Path(learn_bpe.__file__).read_text(encoding="utf-8") + noise + "\n".join(TEXTS) * 2


@pytest.mark.parametrize("seed", range(8))
def test_merges_are_those_of_a_naive_trainer(seed):
    draw = random.Random(seed)
    alphabet = draw.choice(["a", "ab ", "abcd  \n", "aé中 😀'st1"])
    text = "".join(draw.choices(alphabet, k=draw.randrange(400)))
    assert train_bpe([text], 257 + 60) == naive(text, 60)


def test_merges_of_real_text_are_those_of_a_naive_trainer(text):
    assert train_bpe([text[:6000]], 257 + 80) == naive(text[:6000], 80)


def test_merges_are_those_of_the_tokenizers_package(text):
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.ByteLevelBPETokenizer()
    theirs.train_from_iterator([text], 999, min_frequency=2, show_progress=False)
    merges = json.loads(theirs._tokenizer.to_str())["model"]["merges"]
    assert 400 < len(merges) <= 743
    assert train_bpe([text], 1000)[: len(merges)] == merges


def test_pieces_are_one_text():
    pieces = ["the cat", " the hat", "\nthe bat"]
    assert train_bpe(pieces, 270) == train_bpe(["".join(pieces)], 270)


def test_transformers_reads_the_folder_and_gives_the_same_ids(text, tmp_path):
    transformers = pytest.importorskip("transformers")
    merges = train_bpe([text], 700)
    ours = bpe_tokenizer(merges)
    save_tokenizer(ours, tmp_path)
    theirs = transformers.GPT2Tokenizer.from_pretrained(str(tmp_path))
    assert len(theirs) == ours.n_vocab == 257 + len(merges)
    assert theirs.eos_token_id == end_token(ours) == ours.n_vocab - 1
    for sample in (*TEXTS, text):
        sample = sample.replace("<|endoftext|>", "")  # they take it for the token, we for text
        ids = encode(ours, sample)
        assert theirs(sample)["input_ids"] == ids
        assert ours.decode(ids) == sample == theirs.decode(ids, clean_up_tokenization_spaces=False)
    assert encode(folder_tokenizer(tmp_path), text) == encode(ours, text)


def test_what_is_learnt_shortens_text(text):
    assert len(encode(bpe_tokenizer(train_bpe([text], 700)), text)) < 0.5 * len(text.encode())


def test_a_short_text_gives_fewer_merges():
    assert train_bpe(["abab"], 1000) == [["a", "b"]]  # "abab" itself occurs once
    assert train_bpe([], 1000) == train_bpe(["ab"], 1000) == train_bpe(["abab"], 257) == []
    assert bpe_tokenizer([]).n_vocab == 257


@pytest.mark.parametrize("size", [256, 0, -1, True, 300.0])
def test_a_vocabulary_without_room_for_the_bytes_is_refused(size):
    with pytest.raises(InputError, match=r"needs 257 ids or more") as caught:
        train_bpe(["text"], size)
    assert "\n" not in str(caught.value)
