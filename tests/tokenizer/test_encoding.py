"""Text to ids and back: against tiktoken's GPT-2, transformers and tokenizers; hostile files."""

import json
import os
import random
import re
import subprocess
import sys
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path

import pytest
import tiktoken

from tinygpt.checkpoints.gguf_vocabulary import metadata_of_tokenizer, tokenizer_from_metadata
from tinygpt.checkpoints.load_tokenizer import load_tokenizer
from tinygpt.errors import InputError
from tinygpt.tokenizer import encoding
from tinygpt.tokenizer import tokenizer as tokenizer_module
from tinygpt.tokenizer.encoding import (
    char_tokenizer,
    encode,
    end_token,
    save_tokenizer,
)
from tinygpt.tokenizer.text_stream import TextStream
from tinygpt.tokenizer.tokenizer import Tokenizer
from tinygpt.tokenizer.vocabulary import spell

END = "<|endoftext|>"
CACHE = Path(__file__).parents[3] / "shared" / "tiktoken_cache"
VOCAB_BPE = "6d1cbeee0f20b3d9449abfede4726ed8212e3aee"  # tiktoken's name for GPT-2's vocab.bpe
PIECES = (
    *(
        "the",
        " cat",
        " a",
        "'s",
        "I'll",
        "DON'T",
        "x1",
        "2024",
        " 3.14",
        "!?",
        "...",
        '"',
        "_",
        "#",
    ),
    *("\n", "\n\n", "\t", " ", "   ", "\r\n", "\x00", "\x1c", "\x7f", "\x85", "\u00a0", "\u3000"),
    *(
        "é",
        "e\u0301",
        "ß",
        "Ġ",
        "中文",
        "こんにちは",
        "한국",
        "שלום",
        "ﬁ",
        "٣",
        "Ⅷ",
        "\ufeff",
        "\uffff",
    ),
    *("😀", "👩‍👩‍👧", "🇫🇷", "👍🏽", "\U0010ffff", "<|", "endoftext", "|>"),
)


def random_texts(seed: int, count: int = 60) -> Iterator[str]:
    draw = random.Random(seed)
    for _ in range(count):
        pieces = draw.choices(PIECES, k=draw.randrange(20))
        anything = [chr(draw.choice([draw.randrange(0xD800), draw.randrange(0xE000, 0x110000)]))]
        yield "".join(draw.sample(pieces + anything, len(pieces) + 1))


def same(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether all is equal but names, and what files say that decides nothing."""
    parts = ("ranks", "others", "prefix_space", "before", "after", "bos", "eos")
    return (
        all(getattr(one, part) == getattr(other, part) for part in parts)
        and {*one.added} == {*other.added}
        and one.encoding._pat_str == other.encoding._pat_str
    )


def message(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 500
    return text


def vocabulary(*tokens: str, missing: str = "") -> dict[str, int]:
    """GPT-2's spelling of all bytes but the `missing`, then tokens, then the end token."""
    names = [spell(bytes([byte])) for byte in range(256)]
    names = [name for name in names if name not in missing]
    return {name: number for number, name in enumerate([*names, *tokens, END])}


def write(folder: Path, files: dict[str, object]) -> Path:
    for name, content in files.items():
        if not isinstance(content, str | bytes):
            content = json.dumps(content)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


@pytest.fixture(scope="module")
def gpt2() -> Iterator[Tokenizer]:
    with pytest.MonkeyPatch.context() as patch:
        if "TIKTOKEN_CACHE_DIR" not in os.environ:
            patch.setenv("TIKTOKEN_CACHE_DIR", str(CACHE))
        if not Path(os.environ["TIKTOKEN_CACHE_DIR"], VOCAB_BPE).is_file():
            pytest.skip("needs tiktoken's files of GPT-2, in TIKTOKEN_CACHE_DIR")
        yield load_tokenizer("gpt2", 50257)


@pytest.fixture(scope="module")
def gpt2_folder(gpt2: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2")
    save_tokenizer(gpt2, folder)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small BPE that the tokenizers package trained and saved, in both forms."""
    tokenizers = pytest.importorskip("tokenizers")
    texts = [Path(encoding.__file__).read_text(encoding="utf-8"), *random_texts(1, 400)]
    model = tokenizers.ByteLevelBPETokenizer()
    special = ["<s>", END]
    model.train_from_iterator(texts, 900, 2, show_progress=False, special_tokens=special)
    folder = tmp_path_factory.mktemp("trained")
    model.save_model(str(folder))
    model.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def small(tmp_path: Path) -> Tokenizer:
    vocab = vocabulary("ab", "abc", "Ġa", "ĠĠ")
    merges = "#version: 0.2\na b\nab c\nĠ a\nĠ Ġ\n"
    folder = tmp_path / "small"
    folder.mkdir()
    return load_tokenizer(write(folder, {"vocab.json": vocab, "merges.txt": merges}), len(vocab))


@pytest.fixture(scope="module")
def transformers():
    with warnings.catch_warnings():  # of its import only, which depends on what else is installed
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        return pytest.importorskip("transformers")


def test_import_is_light() -> None:
    """Neither tiktoken nor tinygrad comes with the module (the package's __init__ left out)."""
    folder = str(Path(encoding.__file__).parents[1])
    code = (
        "import sys, types; package = types.ModuleType('tinygpt'); "
        f"package.__path__ = [{folder!r}]; sys.modules['tinygpt'] = package; "
        "import tinygpt.tokenizer.encoding; print({'tiktoken', 'tinygrad'} & {*sys.modules})"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True, encoding="utf-8"
    )
    assert run.stdout == "set()\n"


# Equal to what others make of the same files.


def test_gpt2_known_ids(gpt2: Tokenizer) -> None:
    assert encode(gpt2, "Hello, I am") == [15496, 11, 314, 716]
    assert end_token(gpt2) == 50256
    assert encode(gpt2, END) == [27, 91, 437, 1659, 5239, 91, 29]
    assert encode(gpt2, f"a{END}", special=True) == [64, 50256]


def test_gpt2_from_each_form(gpt2: Tokenizer, gpt2_folder: Path, tmp_path: Path) -> None:
    assert load_tokenizer(gpt2_folder).encoding is gpt2.encoding
    vocab, merges = ((gpt2_folder / name).read_bytes() for name in ("vocab.json", "merges.txt"))
    openai = load_tokenizer(write(tmp_path, {"encoder.json": vocab, "vocab.bpe": merges}))
    assert same(openai, gpt2)
    for text in random_texts(2):
        assert encode(openai, text) == gpt2.encoding.encode_ordinary(text)
        assert encode(openai, text + END, special=True) == gpt2.encoding.encode(
            text + END, allowed_special="all"
        )


def test_gpt2_merges_are_the_published_ones(gpt2: Tokenizer, gpt2_folder: Path) -> None:
    published = Path(os.environ["TIKTOKEN_CACHE_DIR"], VOCAB_BPE)
    assert (gpt2_folder / "merges.txt").read_bytes() == published.read_bytes()


def test_transformers_reads_saved_gpt2(gpt2_folder: Path, gpt2, transformers) -> None:
    theirs = transformers.GPT2Tokenizer.from_pretrained(str(gpt2_folder))
    for text in random_texts(3):
        assert encode(gpt2, text, special=True) == theirs(text)["input_ids"]


def test_trained_vocabulary(trained: Path, transformers, tmp_path: Path) -> None:
    """Trained by tokenizers, read by us, saved by us, read by transformers: the same ids."""
    theirs = transformers.GPT2Tokenizer.from_pretrained(str(trained))
    ours = load_tokenizer(trained, 900)
    save_tokenizer(ours, tmp_path / "new" / "folder")
    assert same(load_tokenizer(tmp_path / "new" / "folder"), ours)
    again = transformers.GPT2Tokenizer.from_pretrained(str(tmp_path / "new" / "folder"))
    for text in random_texts(4, 200):
        ids = encode(ours, text, special=True)
        assert ids == theirs(text)["input_ids"] == again(text)["input_ids"]
        assert ours.decode(ids) == text


def test_transformers_knows_our_special_tokens(transformers, tmp_path: Path) -> None:
    vocab = vocabulary("ab", "<|user|>", END)
    ours = load_tokenizer(write(tmp_path, pair(vocab, VERSION + "a b\n")))
    save_tokenizer(ours, tmp_path / "saved")
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "saved"))
    text = f"ab<|user|>ba{END}"
    assert theirs(text)["input_ids"] == encode(ours, text, special=True)


def test_tokenizers_json(trained: Path, transformers, tmp_path: Path) -> None:
    """The one-file form, as tokenizers and transformers write it, and with merges as strings."""
    two_files = load_tokenizer(trained)
    content = json.loads((trained / "tokenizer.json").read_text(encoding="utf-8"))
    write(tmp_path, {"tokenizer.json": content})
    assert same(load_tokenizer(tmp_path), two_files)

    merges = content["model"]["merges"]
    content["model"]["merges"] = [m if isinstance(m, str) else " ".join(m) for m in merges]
    del content["model"]["type"], content["pre_tokenizer"]["use_regex"]  # as in the oldest files
    assert same(load_tokenizer(write(tmp_path, {"tokenizer.json": content})), two_files)

    theirs = transformers.GPT2Tokenizer.from_pretrained(str(trained))
    theirs.add_tokens(["two words"])
    theirs.save_pretrained(str(tmp_path / "theirs"))
    ours = load_tokenizer(tmp_path / "theirs")
    assert ours.n_vocab == len(theirs) == two_files.n_vocab + 1
    text = f"one{END} two words"
    assert encode(ours, text, special=True) == theirs(text)["input_ids"]


def test_post_processors_in_a_row_are_those_of_tokenizers(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokens = {f"t{n}": n for n in range(5)}
    first, second = template("t0", "t1", "A", "t2", **tokens), template("t3", "A", "t4", **tokens)
    level = HF["pre_tokenizer"] | {"trim_offsets": False}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"id": 257, "content": END, "special": True, **flags}]
    for row in ([level, first], [second, level], [first], [level], []):  # two templates panic
        processor = {"type": "Sequence", "processors": row}
        write(tmp_path, one(pre_tokenizer=level, added_tokens=added, post_processor=processor))
        theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        assert load_tokenizer(tmp_path).encode("ab a") == theirs.encode("ab a").ids


# Names, folders, saving.


def test_bytes() -> None:
    tokenizer = load_tokenizer("bytes", 257)
    for text in random_texts(5):
        assert encode(tokenizer, text) == list(text.encode())
        assert tokenizer.decode(encode(tokenizer, text)) == text
    assert encode(tokenizer, f"a{END}", special=True) == [97, end_token(tokenizer)] == [97, 256]
    assert tokenizer.n_vocab == 257
    beside = encode(tokenizer, f"a{END}b {END} c", special=True)  # it takes nothing beside it
    assert beside == [97, 256, 98, 32, 256, 32, 99]


def test_characters() -> None:
    tokenizer = char_tokenizer("hello\n😀é")
    assert encode(tokenizer, "\nehloé😀") == list(range(7))
    assert tokenizer.decode([6, 5, 1, 1]) == "😀éee"
    assert end_token(tokenizer) is None
    assert same(char_tokenizer(iter(["he\n", "lo", "é😀"])), tokenizer)


@pytest.mark.parametrize("kind", ["hf", "gguf"])
def test_half_a_surrogate_in_what_is_passed_on_is_written_as_it_came(kind, small, tmp_path):
    """JSON can spell it, and UTF-8 cannot."""
    folder = tmp_path / "with"
    save_tokenizer(small, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    write(folder, {"tokenizer_config.json": config | {"chat_template": "a\ud800"}})
    if kind == "hf":
        save_tokenizer(load_tokenizer(folder), tmp_path / "again")
        again = load_tokenizer(tmp_path / "again")
    else:
        metadata = metadata_of_tokenizer(load_tokenizer(folder), small.n_vocab)
        again = tokenizer_from_metadata(metadata, tmp_path)
    assert again.kept["tokenizer_config.json"]["chat_template"] == "a\ud800"


@pytest.mark.parametrize("kind", ["bytes", "char", "small"])
def test_save_and_load(kind: str, small: Tokenizer, tmp_path: Path) -> None:
    tokenizer = {
        "bytes": load_tokenizer("bytes"),
        "char": char_tokenizer(random_texts(6)),
        "small": small,
    }[kind]
    folder = tmp_path / "saved"
    save_tokenizer(char_tokenizer("another, to be replaced"), folder)
    save_tokenizer(tokenizer, folder)
    assert same(load_tokenizer(folder), tokenizer)
    names = {path.name for path in folder.iterdir()}
    own = {"tinygpt_tokenizer.json"}
    both = {"vocab.json", "merges.txt", "tokenizer_config.json"}
    assert names == {"bytes": own | both, "char": own, "small": both}[kind]


def test_saved_bytes_read_by_others(tmp_path: Path) -> None:
    save_tokenizer(load_tokenizer("bytes"), tmp_path)
    (tmp_path / "tinygpt_tokenizer.json").unlink()
    other = load_tokenizer(tmp_path, 257)
    assert encoding.same_tokenizer(other, load_tokenizer("bytes"))  # though it splits otherwise
    for text in random_texts(9):
        assert encode(other, text + END, special=True) == [*text.encode(), 256]


def test_folder_of_gpt2_size(tmp_path: Path, gpt2: Tokenizer) -> None:
    assert load_tokenizer(tmp_path, 50257).encoding is gpt2.encoding
    assert load_tokenizer(tmp_path, 50304).encoding is gpt2.encoding  # as nanoGPT rounds it up


def test_folder_without_tokenizer(tmp_path: Path) -> None:
    assert same(load_tokenizer(tmp_path, 257), load_tokenizer("bytes"))
    for vocab_size in (None, 256, 50256):
        with pytest.raises(InputError) as error:
            load_tokenizer(tmp_path, vocab_size)
        assert all(
            name in message(error)
            for name in (tmp_path.name, "vocab.json", "vocab.bpe", "tokenizer.json", "--tokenizer")
        )
    write(tmp_path, {"vocab.json": {}})  # half of a tokenizer is not none
    with pytest.raises(InputError, match=r"merges\.txt"):
        load_tokenizer(tmp_path, 257)


def test_a_path_is_never_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_tokenizer(char_tokenizer("ab"), "bytes")
    assert load_tokenizer("bytes").n_vocab == 257
    assert load_tokenizer(Path("bytes")).n_vocab == 2


def test_vocab_size() -> None:
    assert load_tokenizer("bytes", 300).n_vocab == 257  # a padded vocabulary
    with pytest.raises(InputError) as error:
        load_tokenizer("bytes", 255)
    assert "ids up to 255" in message(error)
    assert "vocabulary of 255" in message(error)
    assert load_tokenizer("bytes", 256).n_vocab == 257  # an end that never occurs does no harm


def test_failed_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import requests

    def no_network(*_: object) -> bytes:
        raise requests.exceptions.ConnectionError("name not\nresolved")

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tiktoken.load, "read_file", no_network)
    monkeypatch.delitem(tiktoken.registry.ENCODINGS, "gpt2", raising=False)
    with pytest.raises(InputError) as error:
        load_tokenizer("gpt2")
    for part in ("'gpt2'", "no network", "TIKTOKEN_CACHE_DIR", "--tokenizer", "vocab.json"):
        assert part in message(error)


def test_failed_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {"file": ""})
    with pytest.raises(InputError, match="file"):
        save_tokenizer(load_tokenizer("bytes"), tmp_path / "file")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    before = char_tokenizer("ab")
    save_tokenizer(before, tmp_path)
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InputError, match="no space left"):
        save_tokenizer(char_tokenizer("xyz"), tmp_path)
    assert same(load_tokenizer(tmp_path), before)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "tinygpt_tokenizer.json"}


@pytest.mark.parametrize(
    ("pattern", "longer", "special"),
    [
        (r"\w+|\W+", {b"ab": 256}, {END: 257}),  # another split pattern
        (None, {b"abc": 256}, {END: 257}),  # a token that no two make
        (None, {b"ab": 256}, {"ab": 257}),  # one spelling, two ids
    ],
)
def test_save_refuses_another_form(
    pattern: str | None, longer: dict, special: dict, small: Tokenizer, tmp_path: Path
) -> None:
    ranks = {bytes([byte]): byte for byte in range(256)} | longer
    pattern = pattern or small.encoding._pat_str
    foreign = Tokenizer(
        tiktoken.Encoding("foreign", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    )
    folder = tmp_path / "saved"
    with pytest.raises(InputError) as error:
        save_tokenizer(foreign, folder)
    assert "'foreign'" in message(error)
    assert not folder.exists()


def test_save_refuses_what_no_file_can_say(small: Tokenizer, tmp_path: Path) -> None:
    for around in ({"before": (5,)}, {"after": (5, 6)}):
        with pytest.raises(
            InputError, match=r"puts ids \(5,.*\) around a text, which tokenizer_con"
        ):
            save_tokenizer(replace(small, **around), tmp_path / "saved")
    write(tmp_path, {"file": ""})
    with pytest.raises(InputError, match=r"cannot read .*file: not a directory; pass another"):
        encoding.folder_has_tokenizer(tmp_path / "file")


def test_a_template_of_talks_is_kept(tmp_path: Path) -> None:
    write(tmp_path, pair(vocabulary()) | {"chat_template.jinja": "{{ messages }}"})
    kept = {"tokenizer_config.json": {"chat_template": "{{ messages }}"}}
    assert load_tokenizer(tmp_path).kept == kept
    save_tokenizer(load_tokenizer(tmp_path), tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved").kept["tokenizer_config.json"]
    assert again["chat_template"] == "{{ messages }}"


# Encoding.


def test_special_tokens_are_text_unless_asked(small: Tokenizer) -> None:
    text = f"ab{END}{END}c"
    end = end_token(small)
    assert small.decode(encode(small, text)) == text
    assert end not in encode(small, text)
    assert encode(small, text, special=True) == [
        *encode(small, "ab"),
        end,
        end,
        *encode(small, "c"),
    ]


def test_longest_special_token_wins(tmp_path: Path) -> None:
    added = [{"content": text, "id": 300 + n} for n, text in enumerate(("<a", "<a>", "<a>>"))]
    content = {
        "model": {"vocab": vocabulary(), "merges": []},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
        "added_tokens": added,
    }
    tokenizer = load_tokenizer(write(tmp_path, {"tokenizer.json": content}))
    assert encode(tokenizer, "<a>><a><a", special=True) == [302, 301, 300]


def test_character_not_in_vocabulary(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    files = {"vocab.json": vocabulary(missing="z\n|Ã"), "merges.txt": "#version: 0.2\n"}
    tokenizer = load_tokenizer(write(tmp_path, files))
    for text, name in (("xyz", "'z' (U+007A)"), ("aé", "'é' (U+00E9)")):
        with pytest.raises(InputError) as error:
            encode(tokenizer, text)
        assert name in message(error)
    with pytest.raises(InputError, match=r"'\|'"):
        encode(tokenizer, END)
    assert encode(tokenizer, END, special=True) == [end_token(tokenizer)]
    with pytest.raises(InputError) as error:
        encode(char_tokenizer("abc"), "ab\nc")
    assert r"'\n' (U+000A)" in message(error)
    assert capfd.readouterr() == ("", "")  # no panic on the way


@pytest.mark.parametrize("kind", ["bytes", "char", "small"])
def test_lone_surrogate(kind: str, small: Tokenizer) -> None:
    known = {"bytes": load_tokenizer("bytes"), "char": char_tokenizer("ab"), "small": small}
    with pytest.raises(InputError) as error:
        encode(known[kind], "a\ud83db")
    assert r"'\ud83d'" in message(error)
    with pytest.raises(InputError, match="surrogate"):
        char_tokenizer("a\ud83db")


def test_no_characters() -> None:
    with pytest.raises(InputError) as error:
        char_tokenizer("")
    assert "0 characters" in message(error)


def test_long_white_space(small: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that overflows tiktoken's stack is cut where tiktoken's own pieces would end."""
    text = "a" + " " * 1_200_001 + "ab"
    assert small.decode(encode(small, text)) == text
    shorter = tokenizer_module.LONG_SPACE.pattern.replace("9999", "3")
    monkeypatch.setattr(tokenizer_module, "LONG_SPACE", re.compile(shorter))
    draw = random.Random(7)
    for _ in range(300):
        text = "".join(draw.choices("   \n\t\u3000\u0085\x1ca'1.", k=30))
        assert encode(small, text) == small.encoding.encode_ordinary(text)


# Decoding in pieces.


def decode_stream(
    tokenizer: Tokenizer, ids: Iterable[int], stop: str | list[str] = ()
) -> Iterator[str]:
    stream = TextStream(tokenizer, stop)
    for token in ids:
        if piece := stream.add(token):
            yield piece
        if stream.stopped:
            return
    if piece := stream.end():
        yield piece


def sentence_end(text: str, least: int) -> int:
    """Where the first sentence ends at or behind a place: the plain definition, by hand."""
    for end in range(least, len(text)):
        mark = len(text[:end].rstrip("\"')]"))
        if not mark or text[mark - 1] not in ".!?" or not text[end].isspace():
            continue
        word = re.split(r"\W", text[: mark - 1])[-1]
        if word in ("Mr", "Mrs", "Dr", "St") or (len(word) == 1 and word.isupper()):
            continue
        paragraph, behind = text[:end].rpartition("\n")[2], text[end:].lstrip()
        if text[end] == "\n" or (
            behind and not "a" <= behind[0] <= "z" and paragraph.count('"') % 2 == 0
        ):
            return end
    return len(text)


def test_a_text_ends_with_the_first_sentence_past_a_length():
    draw, tokenizer, early = random.Random(5), load_tokenizer("bytes"), 0
    parts = [
        "Hans",
        " cried",
        " I",
        " Mr",
        ".",
        "!",
        "?",
        '"',
        " ",
        "  ",
        "\n",
        ")",
        "'",
        " é",
        "St",
    ]
    for _ in range(2000):
        text = "".join(draw.choices(parts, k=draw.randrange(1, 40)))
        data, least = text.encode(), draw.randrange(12)
        stream, shown = TextStream(tokenizer, (), least), ""
        for byte in data:
            shown += stream.add(byte)
            assert text.startswith(shown)
            if stream.stopped:
                break
        shown += stream.end()
        # A character of two bytes has its place where the second of them is.
        place = len(data[:least].decode(errors="ignore"))
        assert shown == text[: sentence_end(text, place)], (text, least)
        early += stream.stopped
    assert 500 < early < 1500


def test_a_stop_text_ends_a_text_that_would_end_with_a_sentence():
    def shown(text, stop, after):
        stream, found = TextStream(load_tokenizer("bytes"), stop, after), ""
        for byte in text.encode():
            found += stream.add(byte)
        return found + stream.end()

    assert shown("One. Two. Three.", "Two", 1) == "One. "  # complete before a T is shown
    assert shown("One. Two. Three.", "Twx", 1) == "One."
    assert shown("One. Two. Three.", "Three", 5) == "One. Two. "
    assert shown("One two. \nThree.", "\n", 1) == "One two. "
    assert shown("One two. ", (), 1) == "One two. "  # the end of the ids shows no sentence's


def cut(text: str, stops: list[str]) -> str:
    """The text before the stop text that is complete first: the plain definition."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return text


def all_splits(data: bytes) -> tuple[Tokenizer, Iterator[list[int]]]:
    """A tokenizer with every part of `data` as a token, and every way to write `data` with it."""
    size = len(data)
    parts = {data[start:end] for end in range(size + 1) for start in range(end)}
    ranks = {part: number for number, part in enumerate(sorted(parts))}
    tokenizer = Tokenizer(
        tiktoken.Encoding("p", pat_str=".", mergeable_ranks=ranks, special_tokens={})
    )

    def ways() -> Iterator[list[int]]:
        for borders in product((False, True), repeat=size - 1):
            cuts = [0, *(n for n, border in enumerate(borders, 1) if border), size]
            yield [ranks[data[a:b]] for a, b in pairwise(cuts)]

    return tokenizer, ways()


@pytest.mark.parametrize("data", ["aé€😀".encode(), b"a\xc3\xe2\x82\xf0\x9f\x98\x80\xff", b"\xf0"])
def test_stream_is_whole_for_every_split(data: bytes) -> None:
    tokenizer, ways = all_splits(data)
    for ids in ways:
        pieces = list(decode_stream(tokenizer, ids))
        assert "".join(pieces) == data.decode(errors="replace") == tokenizer.decode(ids)
        assert all(pieces)


@pytest.mark.parametrize(
    "stops", [["cab"], ["€a", "b€"], ["aab", "a€"], ["bc€ab", "c"], ["no"], ["€abx", "bca"]]
)
def test_stop_is_the_same_for_every_split(stops: list[str]) -> None:
    text = "aabc€abcab"
    tokenizer, ways = all_splits(text.encode())
    for ids in ways:
        taken = iter(ids)
        assert "".join(decode_stream(tokenizer, taken, stops)) == cut(text, stops)
        if cut(text, stops) != text:
            used = ids[: len(ids) - len(list(taken))]
            until = tokenizer.encoding.decode_bytes(used[:-1]).decode(errors="ignore")
            assert cut(until, stops) == until  # the last id taken is the one that ended it


def test_random_stops(small: Tokenizer) -> None:
    draw = random.Random(8)
    plain = load_tokenizer("bytes")
    for _ in range(500):
        text = "".join(draw.choices("abc é\n", k=30))
        stops = ["".join(draw.choices("abc é\n", k=draw.randrange(1, 6))) for _ in range(3)]
        for tokenizer in (plain, small):
            ids = encode(tokenizer, text)
            assert "".join(decode_stream(tokenizer, ids, stops)) == cut(text, stops)


def test_stream_is_prompt() -> None:
    """Text comes with the id that completes it, no later; what may begin a stop text waits."""
    tokenizer = load_tokenizer("bytes")
    taken: list[int] = []

    def ids() -> Iterator[int]:
        for number in "né st sto stop no".encode():
            taken.append(number)
            yield number

    got = [(bytes(taken).decode(), piece) for piece in decode_stream(tokenizer, ids(), ["stop"])]
    assert got == [
        ("n", "n"),
        ("né", "é"),
        ("né ", " "),
        ("né st ", "st "),
        ("né st sto ", "sto "),
    ]
    assert bytes(taken).decode() == "né st sto stop"


def test_held_text_comes_at_the_end() -> None:
    tokenizer = load_tokenizer("bytes")
    assert "".join(decode_stream(tokenizer, b"a sto", ["stop"])) == "a sto"
    assert "".join(decode_stream(tokenizer, b"a\xe2\x82", ["stop"])) == "a\ufffd"
    assert list(decode_stream(tokenizer, b"stop it", "stop")) == []  # one text is one stop


def test_unknown_ids() -> None:
    tokenizer = load_tokenizer("bytes", 300)
    assert tokenizer.decode([97, 299, 98]) == "a\ufffdb"
    assert tokenizer.decode([0xE2, 0x82, 299, 0xAC]) == "\ufffd\ufffd\ufffd"
    assert tokenizer.decode([-1, 2**40, 256]) == f"\ufffd\ufffd{END}"


def test_nothing_comes_after_a_stop() -> None:
    stream = TextStream(load_tokenizer("bytes"), "st")
    assert [stream.add(number) for number in b"a st st"] == ["a", " ", "", "", "", "", ""]
    assert stream.stopped
    assert stream.end() == ""


def test_empty_stop_is_refused_at_once() -> None:
    with pytest.raises(InputError) as error:
        TextStream(load_tokenizer("bytes"), ["a", ""])
    assert "''" in message(error)


# Bad names and files.


@pytest.mark.parametrize("name", ["", "gtp2", "no/such/folder", "a\x00b", "n\nl", "x" * 200])
def test_unknown_name(name: str) -> None:
    with pytest.raises(InputError) as error:
        load_tokenizer(name)
    assert repr(name)[:40] in message(error)
    assert "folder" in message(error)
    assert "bytes" in message(error)


VERSION = "#version: 0.2\n"
HF = {
    "model": {"type": "BPE", "vocab": vocabulary("ab"), "merges": ["a b"]},
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
    "added_tokens": [{"id": 257, "content": END}],
}


def template(*parts: str, **ids: int) -> dict[str, object]:
    """What a post-processor puts around a text, which is "A"."""
    single = [
        {"Sequence" if part == "A" else "SpecialToken": {"id": part, "type_id": 0}}
        for part in parts
    ]
    special = {name: {"id": name, "ids": [n], "tokens": [name]} for name, n in ids.items()}
    return {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": special}


def pair(vocab: object, merges: object = VERSION) -> dict[str, object]:
    return {"vocab.json": vocab, "merges.txt": merges}


def one(**changes: object) -> dict[str, object]:
    return {"tokenizer.json": HF | changes}


def own(content: object) -> dict[str, object]:
    return {"tinygpt_tokenizer.json": content}


BAD_FILES = {
    "not UTF-8": (own(b"\xff\xfe"), "tinygpt_tokenizer.json"),
    "not JSON": (pair("{"), "vocab.json"),
    "too deep": (pair("[" * 100_000), "vocab.json"),
    "a number too long": (pair('{"a": ' + "9" * 5000 + "}"), "vocab.json"),
    "merges not UTF-8": (pair({}, b"\xff"), "merges.txt"),
    "own: no kind": (own({"knd": "char"}), "knd"),
    "own: unknown kind": (own({"kind": "word"}), "word"),
    "own: not an object": (own([1]), "JSON object"),
    "own: no characters": (own({"kind": "char"}), "characters"),
    "own: characters not text": (own({"kind": "char", "characters": [1]}), "characters"),
    "own: characters twice": (own({"kind": "char", "characters": "aa"}), "characters"),
    "own: none": (own({"kind": "char", "characters": ""}), "tinygpt_tokenizer.json"),
    "own: surrogate": (own({"kind": "char", "characters": "\ud800"}), "tinygpt_tokenizer.json"),
    "vocabulary a list": (pair([1, 2]), "JSON object"),
    "id a text": (pair({"a": "0"}), "'a'"),
    "id a truth": (pair({"a": True}), "True"),
    "id a fraction": (pair({"a": 1.0}), "1.0"),
    "id negative": (pair({"a": -1}), "-1"),
    "id too large": (pair({"a": 2**32}), "4294967296"),
    "id twice": (pair({"a": 1, "b": 1}), "id 1 is both 'a' and 'b'"),
    "empty token": (pair({"": 0}), "''"),
    "no tokens": (pair({}), "no byte"),
    "only special tokens": (pair({"<s>": 0}), "no byte"),
    "special token not Unicode": (pair(vocabulary("<\ud800>")), "valid Unicode"),
    "special tokens without end": (
        pair(vocabulary(f"<{'x' * 70_000}>")),
        "70015 characters of special tokens: at most 65536",
    ),
    "more merges than tokens": (pair({"a": 0}, VERSION + "a b\n" * 2), "2 merges for 1 tokens"),
    "merge of one": (pair(vocabulary("ab"), VERSION + "ab\n"), "['ab']"),
    "merge of three": (pair(vocabulary("ab"), VERSION + "a b c\n"), "['a', 'b', 'c']"),
    "merge of nothing": (pair(vocabulary("ab"), VERSION + " ab\n"), "['', 'ab']"),
    "result not in vocabulary": (pair(vocabulary("ab"), VERSION + "a c\n"), "['a', 'c']"),
    "half not in vocabulary": (pair(vocabulary("abc"), VERSION + "ab c\n"), "['ab', 'c']"),
    "half not made yet": (pair(vocabulary("ab", "abc"), VERSION + "ab c\n"), "'abc'"),
    "not bytes": (pair(vocabulary("中", "a中"), VERSION + "a 中\n"), "stands for no byte"),
    "ids fall": (pair(vocabulary("ab", "cd"), VERSION + "c d\na b\n"), "must rise"),
    "made twice": (pair(vocabulary("aa", "aaa"), VERSION + "a a\na aa\naa a\n"), "must rise"),
    "never happens": (pair(vocabulary("aa", "aaa"), VERSION + "a a\na aa\n"), "cannot happen"),
    "merges cut short": (pair(vocabulary("Ġa", "Ġab")), "no merge makes"),
    "one: not an object": ({"tokenizer.json": [1]}, "JSON object"),
    "one: no model": (one(model=None), "model"),
    "one: another model": (one(model={"type": "Unigram"}), "'Unigram'"),
    "one: vocabulary missing": (one(model={"merges": []}), "None"),
    "one: merges missing": (one(model={"vocab": {}}), "None"),
    "one: merges of numbers": (one(model={"vocab": {"a": 1}, "merges": [3]}), "merge 3"),
    "one: suffix": (one(model=HF["model"] | {"end_of_word_suffix": "</w>"}), "'</w>'"),
    "one: normalizer": (one(normalizer={"type": "NFC"}), "NFC"),
    "one: splits otherwise": (one(pre_tokenizer={"type": "Metaspace"}), "'Metaspace'"),
    "one: no split": (one(pre_tokenizer=None), "pre_tokenizer"),
    "one: adds what is no truth": (
        one() | {"tokenizer_config.json": {"add_prefix_space": "yes"}},
        "add_prefix_space is 'yes'",
    ),
    "one: drops merges at random": (one(model=HF["model"] | {"dropout": 0.1}), "dropout is 0.1"),
    "one: words whole": (one(model=HF["model"] | {"ignore_merges": True}), "ignore_merges is True"),
    "one: another class": (
        one() | {"tokenizer_config.json": {"tokenizer_class": "RobertaTokenizer"}},
        "tokenizer_class is 'RobertaTokenizer'",
    ),
    "one: a post-processor of another kind": (
        one(post_processor={"type": "BertProcessing"}),
        "post_processor is {'type': 'BertP",
    ),
    "one: a template without a text": (
        one(post_processor={"type": "TemplateProcessing", "single": [], "special_tokens": {}}),
        "post_processor",
    ),
    "one: a template of a token that it does not know": (
        one(post_processor=template("<x>", "A")),
        "post_processor",
    ),
    "one: a template of two texts": (one(post_processor=template("A", "A")), "post_processor"),
    "one: post-processors in each other": (
        one(post_processor=json.loads('{"type": "Sequence", "processors": [' * 900 + "]}" * 900)),
        "post_processor",
    ),
    "extra tokens that are no list": (
        pair(vocabulary()) | {"tokenizer_config.json": {"extra_special_tokens": 5}},
        "extra_special_tokens is 5",
    ),
    "one: flags no truths": (
        one(added_tokens=[{"id": 257, "content": END, "lstrip": 1}]),
        "true or false",
    ),
    "listed: no object": (
        pair(vocabulary()) | {"tokenizer_config.json": {"added_tokens_decoder": [1]}},
        "added_tokens_decoder is [1]",
    ),
    "listed: no id": (
        pair(vocabulary()) | {"tokenizer_config.json": {"added_tokens_decoder": {"x": {}}}},
        "no id of a token",
    ),
    "listed: of another id": (
        pair(vocabulary())
        | {"tokenizer_config.json": {"added_tokens_decoder": {"9": {"content": END}}}},
        "has id 9, in the vocabulary 256",
    ),
    "listed: a surrogate": (
        pair(vocabulary()) | {"added_tokens.json": {"\ud800": 300}},
        "valid Unicode",
    ),
    "old list: no number": (pair(vocabulary()) | {"added_tokens.json": {"<a>": "9"}}, "has id '9'"),
    "old list: below zero": (pair(vocabulary()) | {"added_tokens.json": {"<a>": -1}}, "id -1"),
    "WordPiece": ({"vocab.txt": "[PAD]"}, "a WordPiece vocabulary"),
    "SentencePiece": ({"spiece.model": b"\x0a"}, "a SentencePiece model"),
    "several": (
        {"a.tokenizer.json": HF, "b-tokenizer.json": HF},
        "a.tokenizer.json, b-tokenizer.json",
    ),
    "one: no pattern": (
        one(pre_tokenizer=HF["pre_tokenizer"] | {"use_regex": False}),
        "use_regex is False",
    ),
    "one: added of another id": (one(added_tokens=[{"id": 3, "content": END}]), "has id 3"),
    "one: added of a taken id": (one(added_tokens=[{"id": 3, "content": "<s>"}]), "id 3 is both"),
    "one: added a truth": (one(added_tokens=[{"id": True, "content": "<s>"}]), "True"),
    "one: added no object": (one(added_tokens=["<s>"]), "'<s>'"),
    "one: added no list": (one(added_tokens=3), "added_tokens"),
}


@pytest.mark.parametrize(("files", "named"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files(files: dict[str, object], named: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        load_tokenizer(write(tmp_path, files))
    assert named in message(error)
    assert str(tmp_path) in message(error)


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").mkdir()
    with pytest.raises(InputError, match=r"vocab\.json"):
        load_tokenizer(write(tmp_path, {"merges.txt": VERSION}))
    with pytest.raises(InputError, match=r"vocab\.json"):  # a file's tokenizer lies beside it
        load_tokenizer(str(tmp_path / "merges.txt"))


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "vocab.json")
    with pytest.raises(InputError, match=r"vocab\.json: it is no plain file"):
        load_tokenizer(write(tmp_path, {"merges.txt": VERSION}))


def test_long_token_is_refused_at_once(tmp_path: Path) -> None:
    """Doubling merges make a token of 64 KiB in a small file: no quadratic work over its bytes."""
    halves = ["a" * 2**n for n in range(16)]
    merges = VERSION + "".join(f"{half} {half}\n" for half in halves)
    files = pair(vocabulary(*(half + half for half in halves)), merges)
    with pytest.raises(InputError, match="its tokens are too long"):
        load_tokenizer(write(tmp_path, files))


def test_a_stop_text_is_compared_no_further_than_the_text_goes():
    """One of 100,000 letters would else take a minute for each token."""
    slices = 0

    class Counted(str):
        def __getitem__(self, key):
            nonlocal slices
            slices += 1
            return str(self)[key]

    stream = TextStream(load_tokenizer("bytes"), Counted("ab" * 5000))
    text = "".join(map(stream.add, b"an abc of ab"))
    assert text + stream.end() == "an abc of ab"
    assert slices < 100
