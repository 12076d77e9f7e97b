"""Text to token files: against tokens of the whole text, nanoGPT's numbers, and all that is bad."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import regex
import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

from tinygpt import GPT, GPTConfig
from tinygpt.checkpoints import download
from tinygpt.checkpoints.save_gguf import save_gguf
from tinygpt.commands.prepare import add_flags, run
from tinygpt.data import convert, records
from tinygpt.data import corpus as text_module
from tinygpt.data import prepare as module
from tinygpt.data.corpus import recut
from tinygpt.data.dataset import Dataset
from tinygpt.data.prepare import prepare
from tinygpt.data.records import Records
from tinygpt.data.token_file import TokenFile
from tinygpt.errors import InputError
from tinygpt.tokenizer.encoding import (
    char_tokenizer,
    encode,
    end_token,
    same_tokenizer,
    save_tokenizer,
)
from tinygpt.tokenizer.learn_bpe import bpe_tokenizer, train_bpe
from tinygpt.tokenizer.vocabulary import from_merges

SHARED = Path(__file__).parents[3] / "shared"
SHAKESPEARE = SHARED / "data" / "tinyshakespeare.txt"
KINDS = ("char", "bytes", "gpt2", "bpe:300")
PIECES = (
    *("the", " cat", "'s", "'", "ll", "2024", "!?", "_", "3.14", "é", "中文", "😀", "e\u0301"),
    *(" ", "  ", "\n", "\n\n", "\t", "\r\n", "\x1c", "\x85", "\u00a0", "\u3000", " " * 30),
)


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    """So that a text of some kB is cut in many places, and in the middle of characters."""
    monkeypatch.setattr(text_module, "PIECE_BYTES", 97)
    monkeypatch.setattr(convert, "PIECE_BYTES", 200)


@pytest.fixture(params=KINDS)
def kind(request):
    if request.param == "gpt2" and not (
        "TIKTOKEN_CACHE_DIR" in os.environ or (SHARED / "tiktoken_cache").is_dir()
    ):
        pytest.skip("needs tiktoken's files of GPT-2, in TIKTOKEN_CACHE_DIR")
    return request.param


def some_text(seed: int, size: int = 1500) -> str:
    return "".join(random.Random(seed).choices(PIECES, k=size))


def write(path: Path, content: str | bytes | list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, list):
        content = "".join(json.dumps(entry) + "\n" for entry in content)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def fails(tmp_path: Path, match: str, source: str | Path, tokenizer: str = "bytes", **more) -> None:
    """Refused in one line, and the folder of the test holds what it held before."""
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    with pytest.raises(InputError, match=match) as caught:
        prepare(source, more.pop("out", tmp_path / "out"), tokenizer, **more)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    after = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    assert after == before


def documents(data: Dataset, split: TokenFile) -> list[str]:
    """The texts that a split holds, each of which must have been given its end."""
    ids, tokenizer = split[:], data.tokenizer()
    end = end_token(tokenizer)
    if end is None:
        return tokenizer.decode(ids.tolist()).removesuffix("\n").split("\n")
    parts = np.split(ids, np.flatnonzero(ids == end) + 1)
    assert len(parts[-1]) == 0
    return [tokenizer.decode(part[:-1].tolist()) for part in parts[:-1]]


@pytest.mark.parametrize(("seed", "keep_crlf"), [(0, True), (1, True), (2, False)])
def test_streamed_tokens_are_those_of_the_whole(kind, seed, keep_crlf, tmp_path):
    text = some_text(seed)
    source = write(tmp_path / "text.txt", text)
    header = prepare(source, tmp_path / "out", kind, val=0.25, keep_crlf=keep_crlf)
    text = text if keep_crlf else text.replace("\r\n", "\n")
    data = Dataset.open(tmp_path / "out")
    assert data.header == header
    for name, split in header.splits.items():
        content = (tmp_path / "out" / f"{name}.bin").read_bytes()
        assert split.sha256 == hashlib.sha256(content).hexdigest()
    raw = text.encode()
    cut = int(len(raw) * 0.75)
    while cut < len(raw) and (raw[cut] & 0xC0 == 0x80 or raw[cut - 1 : cut + 1] == b"\r\n"):
        cut += 1
    for part, ids, split in (
        (raw[:cut].decode(), data.train[:], header.splits["train"]),
        (raw[cut:].decode(), data.val[:], header.splits["val"]),
    ):
        assert ids.tolist() == encode(data.tokenizer(), part)
        assert split.tokens == len(ids)
        assert (split.characters, split.bytes) == (len(part), len(part.encode()))
    assert header.source == hashlib.sha256(source.read_bytes()).hexdigest()
    assert header.vocab_size == data.tokenizer().n_vocab
    assert sorted(os.listdir(tmp_path)) == ["out", "text.txt"]


@pytest.mark.parametrize("seed", range(20))
def test_cuts_change_no_token(seed):
    text, draw = some_text(seed, 300), random.Random(seed)
    cuts = sorted(draw.choices(range(len(text)), k=20))
    given = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    pieces = list(recut(given))
    assert "".join(pieces) == text
    assert len(pieces) > 5
    # Of a vocabulary with all words that either way cuts out, the ids show where each cuts.
    words = {w for t in (text, *pieces) for w in regex.findall(r50k_pat_str, t)}
    names = {bytes([byte]) for byte in range(256)} | {word.encode() for word in words}
    ranks = {name: number for number, name in enumerate(sorted(names))}
    exact = tiktoken.Encoding("", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={})
    whole = exact.encode_ordinary(text)
    assert [number for piece in pieces for number in exact.encode_ordinary(piece)] == whole


def test_text_without_a_place_to_cut(monkeypatch):
    assert list(recut(["ab", "c", "d"])) == ["abcd"]
    assert list(recut(["a b", "c", "d e"])) == ["a", " bcd", " e"]
    monkeypatch.setattr(text_module, "_WORD_LENGTH", 3)
    assert list(recut(["ab", "cd", "e", "fg"])) == ["abcd", "efg"]


def test_a_word_without_an_end_is_cut_past_16_mib_so_that_it_fills_no_memory():
    assert len(next(recut(["a" * (1 << 20)] * 20))) == 17 << 20  # the first piece past it is whole


def test_a_long_run_of_spaces_is_no_trouble(tmp_path, monkeypatch):
    monkeypatch.undo()  # in one piece
    text = "a" + " " * 1_000_000 + "b c"  # would overflow tiktoken's stack
    prepare(write(tmp_path / "text.txt", text), tmp_path / "out", "bpe:260", val=0)
    assert (
        Dataset.open(tmp_path / "out")
        .tokenizer()
        .decode(Dataset.open(tmp_path / "out").train[:].tolist())
        == text
    )


@pytest.mark.skipif(not SHAKESPEARE.is_file(), reason="needs ../shared/data")
def test_shakespeare_is_nano_gpts(kind, tmp_path, monkeypatch):
    monkeypatch.undo()
    if kind == "bpe:300":
        kind = "bpe:1000"
    header = prepare(SHAKESPEARE, tmp_path / "out", kind)
    data = Dataset.open(tmp_path / "out")
    counts = [header.splits[split].tokens for split in ("train", "val")]
    if kind == "char":  # data/shakespeare_char/prepare.py
        text = SHAKESPEARE.read_text(encoding="utf-8")
        numbers = {c: i for i, c in enumerate(sorted(set(text)))}
        assert data.train[:].tolist() == [numbers[c] for c in text[: int(len(text) * 0.9)]]
        assert data.val[:].tolist() == [numbers[c] for c in text[int(len(text) * 0.9) :]]
        assert (header.vocab_size, counts) == (65, [1003854, 111540])
    elif kind == "gpt2":  # data/shakespeare/readme.md
        assert counts == [301966, 36059]
    else:
        text = SHAKESPEARE.read_text(encoding="utf-8")
        assert data.tokenizer().decode(data.train[:].tolist()) == text[:1003854]
        assert header.vocab_size == (257 if kind == "bytes" else 1000)
    assert header.source == module._SHAKESPEARE[1]


def test_json_lines_become_documents(kind, tmp_path):
    texts = [some_text(seed, 40).replace("\n", "") + "." for seed in range(30)]
    lines = [{"text": text, "id": 7} for text in texts]
    source = write(tmp_path / "x.jsonl", lines)
    source.write_bytes(source.read_bytes().replace(b"\n", b"\n\n", 3))  # blank lines are none
    header = prepare(source, tmp_path / "out", kind, field="text")
    data = Dataset.open(tmp_path / "out")
    train, val = documents(data, data.train), documents(data, data.val)
    assert train + val == texts
    starts = np.cumsum([0, *(len(line) for line in source.read_bytes().splitlines(True))])
    assert len(val) >= 1
    assert starts[-1] * 0.8 < sum(len(json.dumps(line)) + 1 for line in lines[: len(train)])
    extra = 1 if kind == "char" else 0  # the line feed is text
    assert header.splits["train"].characters == sum(len(text) + extra for text in train)
    assert header.splits["val"].bytes == sum(len(text.encode()) + extra for text in val)


def test_a_folder_is_its_files_in_order(tmp_path):
    texts = {"b.txt": "beta\n" * 50, "a/z.md": "alpha\n" * 50, "c.txt": "gamma, delta " * 40}
    for name, text in texts.items():
        write(tmp_path / "in" / name, text)
    write(tmp_path / "in" / ".hidden", b"\xff")
    write(tmp_path / "in" / ".git" / "x", b"\xff")
    out = tmp_path / "in" / "out"  # inside the source, and yet no part of it
    header = prepare(tmp_path / "in", out, "bytes", val=0.2)
    assert prepare(tmp_path / "in", out, "bytes", val=0.2) == header
    data = Dataset.open(out)
    train, val = documents(data, data.train), documents(data, data.val)
    assert train[:2] == [texts["a/z.md"], texts["b.txt"]]
    assert len(train) == 3
    assert len(val) == 1
    assert train[2] + val[0] == texts["c.txt"]
    assert header.splits["val"].bytes == 1070 - int(1070 * 0.8)


def test_the_same_settings_reuse_the_folder_and_others_are_refused(tmp_path):
    source = write(tmp_path / "text.txt", "some text, " * 30)
    out = tmp_path / "out"
    header = prepare(source, out, "bytes")
    stamp = os.stat(out / "train.bin").st_mtime_ns
    os.utime(source)
    assert prepare(source, out, "bytes", 0.1) == header
    assert os.stat(out / "train.bin").st_mtime_ns == stamp
    fails(tmp_path, "out was prepared with tokenizer 'bytes', not 'char'", source, "char")
    fails(tmp_path, "out was prepared with val 0.1, not 0.2: pass another -o", source, val=0.2)
    write(source, "other text, " * 30)
    fails(tmp_path, "out was prepared with other text: pass another -o", source)


def test_what_is_there_is_never_harmed(tmp_path):
    source = write(tmp_path / "text.txt", "some text, " * 30)
    (tmp_path / "empty").mkdir()
    prepare(source, tmp_path / "empty", "bytes")
    write(tmp_path / "full" / "thesis.doc", b"\xff")
    for out in ("full", "full/thesis.doc", "text.txt"):
        fails(tmp_path, "is there and holds something else", source, out=tmp_path / out)
    fails(tmp_path, "cannot write .*: not a directory", source, out=tmp_path / "text.txt" / "out")
    fails(tmp_path, "cannot .*: file name too long", source, out=tmp_path / ("x" * 300))


def test_nothing_is_left_when_it_fails_in_the_middle(tmp_path, monkeypatch):
    source = write(tmp_path / "text.txt", "some text, " * 100)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module.Header, "write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare(source, tmp_path / "out", "char")
    assert os.listdir(tmp_path) == ["text.txt"]


def test_a_full_disk(tmp_path):
    resource = pytest.importorskip("resource")
    source = write(tmp_path / "text.txt", "some text, " * 9999)
    script = "import sys; from tinygpt.data.prepare import prepare; prepare(*sys.argv[1:])"
    result = subprocess.run(
        [sys.executable, "-c", script, source, tmp_path / "out", "bytes"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)),
        env=os.environ | {"PYTHONPATH": str(Path(module.__file__).parents[2])},
        capture_output=True,
        encoding="utf-8",
    )
    assert "InputError: cannot write" in result.stderr
    assert "out: file too large; pass another -o" in result.stderr
    assert os.listdir(tmp_path) == ["text.txt"]


def test_a_file_that_grows_meanwhile(tmp_path, monkeypatch):
    source = write(tmp_path / "text.txt", "some text, " * 100)

    def save(*_):
        with open(source, "a", encoding="utf-8") as file:
            file.write("more")

    monkeypatch.setattr(module, "save_tokenizer", save)
    with pytest.raises(InputError, match="changed while it was read"):
        prepare(source, tmp_path / "out", "bytes")
    assert os.listdir(tmp_path) == ["text.txt"]


@pytest.mark.parametrize("val", [1, 1.5, -0.1, float("nan"), True, "0.1"])
def test_a_fraction_that_is_none(tmp_path, val):
    source = write(tmp_path / "text.txt", "some text")
    fails(tmp_path, "val is .*: it must be a number, 0 or more and below 1", source, val=val)


@pytest.mark.parametrize("tokenizer", ["bpe", "bpe:", "bpe:N", "bpe:-5", "bpe:1e3", "chars", ""])
def test_a_tokenizer_that_is_none(tmp_path, tokenizer):
    source = write(tmp_path / "text.txt", "some text")
    fails(tmp_path, "unknown tokenizer .*allowed are char, bytes, gpt2, bpe:N", source, tokenizer)


@pytest.mark.parametrize("form", ["folder", "gguf", "itself"])
def test_a_tokenizer_of_ones_own_makes_the_ids(form, tmp_path):
    """As for going on with a model that has learnt them, from another text than the one at hand."""
    own = bpe_tokenizer(train_bpe([some_text(9)], 300))
    save_tokenizer(own, tmp_path / "own")
    given = {"folder": str(tmp_path / "own"), "gguf": tmp_path / "model.gguf", "itself": own}[form]
    if form == "gguf":
        model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=32, block_size=8, vocab_size=own.n_vocab))
        save_gguf(model, given, own)
    text, out = some_text(1).replace("\r", ""), tmp_path / "out"
    source = write(tmp_path / "text.txt", text)
    header = prepare(source, out, given, val=0)
    data = Dataset.open(out)
    assert same_tokenizer(data.tokenizer(), own)
    assert data.train[:].tolist() == encode(own, text)
    assert prepare(source, out, own, val=0) == header  # whatever it is called
    fails(tmp_path, "was prepared with tokenizer .*, not 'bytes'", source, "bytes", val=0)


def test_a_text_beyond_the_alphabet_of_a_given_tokenizer(tmp_path):
    own = char_tokenizer("\u044fbc ")
    source = write(tmp_path / "text.txt", "\u044f b c d e f g " * 50)
    words = r"^200 of 700 characters .*, such as 'd' \(U\+0064\), 'e' [^,]*, 'f' [^,]*: use"
    fails(tmp_path, words, source, own)
    few = from_merges(
        {"a": 0, "b": 1, "ab": 2, "\u0120": 3}, ["a b"], "few"
    )  # tiktoken would panic
    source = write(tmp_path / "text.txt", "ab a " * 50 + "b\n")  # at which tiktoken would panic
    fails(tmp_path, r"character '\\n' \(U\+000A\) is not in tokenizer 'bpe'", source, few)


def test_a_few_characters_beyond_a_given_alphabet_are_left_out_and_said(tmp_path, capsys):
    """As when a model of characters goes on with another text."""
    source = write(tmp_path / "text.txt", "a b c " * 100 + "é b\n" + "a b c " * 30)
    header = prepare(source, tmp_path / "out", char_tokenizer("abc "))
    ids = [*Dataset.open(tmp_path / "out").train[:], *Dataset.open(tmp_path / "out").val[:]]
    assert char_tokenizer("abc ").decode(ids) == "a b c " * 100 + " b" + "a b c " * 30
    assert "2 of 784 characters are not in the tokenizer, such as" in capsys.readouterr().err
    assert header.splits["train"].characters + header.splits["val"].bytes == 782


def test_bad_text(tmp_path):
    text, lines = tmp_path / "text.txt", tmp_path / "x.jsonl"
    fails(tmp_path, "there is no file or folder '.*text.txt'", text)
    (tmp_path / "folder").mkdir()
    fails(tmp_path, "no file is in folder '.*folder'", tmp_path / "folder")
    os.mkfifo(tmp_path / "pipe")
    fails(tmp_path, "pipe' is no plain file: save what comes from it", tmp_path / "pipe")
    fails(tmp_path, "is empty: give some text", write(text, ""))
    fails(tmp_path, "no text is left for train", write(text, "a"), val=0.5)
    fails(tmp_path, "no text is left for val", write(text, "aé"), val=0.1)
    fails(tmp_path, "needs 257 ids or more", write(text, "some text"), "bpe:256")
    for kind in ("char", "bytes", "bpe:300"):
        broken = write(text, "é".encode() * 150 + b"\xff" + b"text" * 100)
        fails(tmp_path, r"not UTF-8 text: byte 0xff at position 300; convert it", broken, kind)
        fails(tmp_path, r"not UTF-8 text: byte 0xc3 at position 4", write(text, b"text\xc3"), kind)
    fails(tmp_path, "x.jsonl is JSON lines: name the key .* --field", write(lines, [{"text": "a"}]))
    for content, match in (
        (b'{"text": "a"}\nplain', "x.jsonl, line 2: it must hold a JSON object"),
        (b'{"text": "a"}\n\n{"body": "b"}', "line 3: --field 'text' must name text, but it holds"),
        (b'{"text": 5}', "line 1: --field 'text' must name text"),
        (b'{"text": "\\ud800"}', "line 1: surrogates not allowed"),
        (b'{"text": "a", "text": "b"}', "line 1: its JSON is damaged: the key 'text'"),
        (b'{"text": "\xff"}', "line 1: its JSON is damaged"),
        (b"\n \n", "no text is left for train"),
        (b'{"text": "a"}', "no text is left for val"),
    ):
        fails(tmp_path, match, write(lines, content), field="text")


@pytest.mark.parametrize(
    ("name", "content", "part", "words"),
    [
        ("x.jsonl", '{"text": "%s"}\n', "a", "line 1: it has 1 MiB or more"),
        ("x.json", '[{"text": "a"}, {"text": "%s"}]', "a", "entry 2: it has over 1 MiB"),
        ("x.csv", 'text\n"%s"\n', "aaa\n", "line 2: .*a cell has over 1 MiB"),
    ],
)
def test_a_record_too_long_for_memory(name, content, part, words, tmp_path, monkeypatch):
    monkeypatch.setattr(text_module, "PIECE_BYTES", 1 << 16)
    monkeypatch.setattr(records, "RECORD_BYTES", 1 << 20)
    source = write(tmp_path / name, content % (part * ((1 << 20) // len(part) + 1)))
    fails(tmp_path, words, source, field="text")
    write(source, content % (part * (1_000_000 // len(part))))
    header = prepare(source, tmp_path / "out", "bytes", 0, "text")
    assert header.splits["train"].bytes - 1_000_000 == (name == "x.json")


def test_a_line_of_256_mib_is_refused_and_one_a_byte_below_the_limit_is_not(monkeypatch):
    piece = b"a" * (1 << 20)  # always the same one: no memory is filled
    with pytest.raises(ValueError, match="it has 256 MiB or more"):
        list(Records([piece] * 256))
    monkeypatch.setattr(records, "RECORD_BYTES", 15)
    assert list(Records([b'{"t": "first"}\n{"t": "other"}'])) == [
        (0, {"t": "first"}),
        (15, {"t": "other"}),
    ]
    for long in (b'{"t": "first "}\n', b'{"t": "first"}\n{"t": "other "}'):
        with pytest.raises(ValueError, match="too much for one text"):
            list(Records([long]))


def test_an_object_on_several_lines_is_looked_for_in_64_mib():
    lines = iter([b"{" + b" " * (1 << 20)] * 100)
    with pytest.raises(ValueError, match="damaged"):
        list(Records(chain.from_iterable((line, b"\n") for line in lines)))
    assert len(list(lines)) == 100 - 64  # the others were not read


def test_an_object_on_several_lines_is_looked_for_in_so_much_only(tmp_path, monkeypatch):
    source, whole = tmp_path / "x.jsonl", '{"text":\n"abc"}'  # 14 bytes beside the line feed
    for most, words in ((14, "goes over several lines"), (13, "its JSON is damaged")):
        monkeypatch.setattr(records, "_EXPLAINED_BYTES", most)
        fails(tmp_path, f"line 1: .*{words}", write(source, whole), field="text")


def test_no_validation_text_when_none_is_wanted(tmp_path):
    header = prepare(write(tmp_path / "text.txt", "abc"), tmp_path / "out", "char", val=0)
    assert header.splits["train"].tokens == 3
    assert Dataset.open(tmp_path / "out").val[:].shape == (0,)


def test_ids_of_a_large_vocabulary_have_four_bytes(tmp_path, monkeypatch):
    monkeypatch.undo()  # in one piece
    text = "".join(map(chr, range(0x10000, 0x10000 + 65537)))
    header = prepare(write(tmp_path / "text.txt", text), tmp_path / "out", "char", val=0)
    assert header.dtype == np.dtype("<u4")
    assert Dataset.open(tmp_path / "out").train[:].tolist() == list(range(65537))


def test_a_large_text_teaches_a_bpe_through_a_part_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_LEARN_BYTES", 1000)
    seen = []

    def train(pieces, size):
        seen.extend(pieces)
        return train_bpe(seen, size)

    monkeypatch.setattr(module, "train_bpe", train)
    text = "".join(f"word{i} " for i in range(2000))
    prepare(write(tmp_path / "text.txt", text), tmp_path / "out", "bpe:300")
    assert 900 < sum(map(len, seen)) < 1300
    assert all(piece in text for piece in seen)
    assert text.index(seen[-1]) > 0.7 * len(text)  # from all over the training text, and only it
    assert text.index(seen[-1]) + len(seen[-1]) <= 0.9 * len(text)


@pytest.fixture
def site(tmp_path, monkeypatch) -> Iterator[Path]:
    """A folder that a server gives out, as the place that char-rnn's file comes from."""
    folder = tmp_path / "site"
    folder.mkdir()

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("TINYGPT_CACHE", str(tmp_path / "cache"))
    digest = hashlib.sha256(b"To be, or not to be" * 100).hexdigest()
    url = f"http://127.0.0.1:{server.server_address[1]}/input.txt"
    monkeypatch.setattr(module, "_SHAKESPEARE", (url, digest))
    yield folder
    server.shutdown()
    thread.join()
    server.server_close()


def test_shakespeare_is_fetched_once_and_only_whole(site, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    for content, match in (
        (None, "cannot fetch http://.*/input.txt: .*"),
        (b"To be, or not to b", "/input.txt has SHA-256 .*, not .*: it is not kept"),
    ):
        if content:
            write(site / "input.txt", content)
        with pytest.raises(InputError, match=match) as caught:
            prepare("shakespeare", out, "char")
        assert "\n" not in str(caught.value)
        assert not out.exists()
        assert os.listdir(tmp_path / "cache" / "data") == []
    write(site / "input.txt", b"To be, or not to be" * 100)
    header = prepare("shakespeare", out, "char")
    (site / "input.txt").unlink()
    assert prepare("shakespeare", out, "char") == header
    assert header.splits["train"].characters == 1710
    assert "./shakespeare" not in capsys.readouterr().err
    write(tmp_path / "here" / "shakespeare", "another text")
    monkeypatch.chdir(tmp_path / "here")
    assert prepare("shakespeare", out, "char") == header
    assert "./shakespeare is what is here" in capsys.readouterr().err


def test_fetch_tells_where_it_cannot_keep(site, tmp_path):
    write(tmp_path / "file", "x")
    with pytest.raises(InputError, match=r"cannot keep input\.txt in .*file"):
        download.fetch(module._SHAKESPEARE[0], tmp_path / "file" / "x.txt", "")


def command(*argv: str) -> int:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return run(parser.parse_args(argv))


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "my.text.txt", "some text, " * 100)
    assert command("my.text.txt") == 0
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "tinygpt: my.text-char: 990 train and 110 val tokens of 8 ids\n"
    args = ("my.text.txt", "--tokenizer", "bpe:300", "--val", "0.5", "-o", "made")
    assert command(*args) == command(*args) == 0
    assert Dataset.open("made").header.val == 0.5
    write(tmp_path / "x.jsonl", [{"body": "some text"}] * 20)
    assert command("x.jsonl", "--field", "body", "--tokenizer", "bytes") == 0
    assert Dataset.open("x-bytes").header.field == "body"
