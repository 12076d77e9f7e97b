"""Texts as people have them: special tokens, marks and line ends of Windows, records, folders."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from test_prepare import documents, fails, write

from tinygpt import load_tokenizer
from tinygpt.data import convert, corpus
from tinygpt.data.corpus import recut
from tinygpt.data.dataset import Dataset, Header
from tinygpt.data.prepare import prepare
from tinygpt.tokenizer.encoding import encode, end_token
from tinygpt.tokenizer.learn_bpe import bpe_tokenizer, train_bpe
from tinygpt.tokenizer.tokenizer import AddedToken
from tinygpt.tokenizer.vocabulary import from_merges

END = "<|endoftext|>"
TEXT = "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n" * 9


@pytest.fixture(autouse=True, params=[7, 97, 4 << 20])
def _pieces(request, monkeypatch):
    """Of few bytes, such that borders fall everywhere, and of all."""
    monkeypatch.setattr(corpus, "PIECE_BYTES", request.param)
    monkeypatch.setattr(convert, "PIECE_BYTES", request.param)


def ids_of(source, out: Path, tokenizer="bytes", **more) -> tuple[Dataset, list[int], list[int]]:
    prepare(source, out, tokenizer, **more)
    data = Dataset.open(out)
    return data, data.train[:].tolist(), data.val[:].tolist()


def own(name: str):
    """Tokenizers as people have them, offline."""
    if name == "bpe":
        return bpe_tokenizer(train_bpe([TEXT], 280))
    return name


@pytest.mark.parametrize("name", ["bytes", "bpe", "bpe:270"])
@pytest.mark.parametrize("as_tokens", [True, False])
def test_special_tokens_in_a_text_are_counted_and_read_as_asked(name, as_tokens, tmp_path, capsys):
    draw = random.Random(0)
    text = "".join(
        draw.choice(["to be ", "or not\n", END, "<|endof", "text|>", "é"]) for _ in range(500)
    )
    count = text.count(END)
    source = write(tmp_path / "text.txt", text)
    data, train, val = ids_of(source, tmp_path / "out", own(name), special_tokens=as_tokens)
    said = capsys.readouterr().err
    assert f"{END} stands in the text {count:,} times, read as " in said
    assert ("--special-tokens" in said) != as_tokens
    assert (data.header.special_tokens, data.header.special_tokens_found) == (as_tokens, count)
    tokenizer = data.tokenizer()
    end = end_token(tokenizer)
    assert (train + val).count(end) == (count if as_tokens else 0)
    assert tokenizer.decode(train + val) == text
    assert encode(tokenizer, tokenizer.decode(train), special=as_tokens) == train
    assert encode(tokenizer, tokenizer.decode(val), special=as_tokens) == val
    letters = len(text) - len(END) * count * as_tokens  # a loss per byte is one of text
    assert sum(split.characters for split in data.header.splits.values()) == letters


def test_a_special_token_is_not_divided_between_training_and_validation(tmp_path):
    text = "some text" + END + "more of it, and still more"
    source = write(tmp_path / "text.txt", text)
    for place in range(7, 25):  # the token is from 9 to 22
        out, val = tmp_path / str(place), 1 - (place + 0.5) / len(text)
        _, train, held_out = ids_of(source, out, special_tokens=True, val=val)
        assert (train + held_out).count(256) == 1
        assert len(train) == (place if place <= 9 else max(place - len(END), 9) + 1)


def test_a_special_token_at_the_start_is_not_divided_either(tmp_path):
    text = END + "some text, some more of it, and still more"
    source = write(tmp_path / "text.txt", text)
    for place in range(1, len(END) + 2):
        out, val = tmp_path / str(place), 1 - (place + 0.5) / len(text)
        _, train, _ = ids_of(source, out, special_tokens=True, val=val)
        assert train == [256] + [ord("s")] * (place > len(END))


def test_one_text_has_its_special_tokens_as_text_and_documents_have_them_as_tokens(tmp_path):
    alone = write(tmp_path / "text.txt", f"a{END}b " * 30)
    assert 256 not in ids_of(alone, tmp_path / "1")[1]
    for number, source in enumerate((tmp_path / "in", [alone, alone.with_name("b.txt")])):
        write(tmp_path / "in" / "text.txt", f"a{END}b " * 30)
        write(tmp_path / "b.txt", "other text")
        assert ids_of(source, tmp_path / f"2{number}")[1].count(256) > 20
    lines = write(tmp_path / "x.jsonl", [{"text": f"a{END}b{END}"}] * 20)
    data, train, _ = ids_of(lines, tmp_path / "3", field="text")
    assert train[:4] == [97, 256, 98, 256]  # the end that is there already is not put twice
    assert data.header.special_tokens
    assert 256 not in ids_of(lines, tmp_path / "4", field="text", special_tokens=False)[1][:20]


@pytest.mark.parametrize("tail", ["", "\n", f"\n{END}", f"\n{END}\n"])
@pytest.mark.parametrize("kind", ["bytes", "bpe:300"])
def test_lines_of_the_end_token_separate_documents(kind, tail, tmp_path):
    """However many, wherever pieces end; the line feeds around them are in no document."""
    texts = [f"Title {n}\n\n" + f"It said {END} here. " * (n % 3) + "End." * n for n in range(60)]
    source = write(tmp_path / "text.txt", f"\n{END}\n".join(texts) + tail)
    prepare(source, tmp_path / "out", kind, val=0)
    data = Dataset.open(tmp_path / "out")
    spelt = data.tokenizer().decode([*data.train[:]])
    assert spelt == END.join(texts) + ("\n" if tail == "\n" else "") + END
    assert data.header.special_tokens
    whole = sum(len(text.replace(END, "")) for text in texts)
    assert data.header.splits["train"].characters == whole + (tail == "\n")


def test_documents_may_be_empty_and_a_first_line_is_a_separator(tmp_path):
    source = write(tmp_path / "text.txt", f"{END}\n{END}\na\n{END}\n{END}\n{END}\nb\n")
    assert ids_of(source, tmp_path / "1", val=0)[1] == [256, 256, 97, 256, 256, 256, 98, 10, 256]
    source.write_text(f"a\n{END} b\n{END}\n", encoding="utf-8")  # the first is in a line with more
    assert ids_of(source, tmp_path / "3", val=0)[1] == [97, 10, 256, 32, 98, 256]
    _, as_text, _ = ids_of(source, tmp_path / "2", val=0, special_tokens=False)
    assert bytes(as_text) == source.read_bytes()


def test_a_tokenizer_without_special_tokens_says_so(tmp_path, capsys):
    source = write(tmp_path / "text.txt", f"a{END}b " * 30)
    header = prepare(source, tmp_path / "out", "char")
    assert header.special_tokens_found == 30
    assert "30 times, read as plain text, since single characters" in capsys.readouterr().err
    fails(tmp_path, "'char' has no special tokens: pass --tokenizer", source, "char",
          out=tmp_path / "new", special_tokens=True)  # fmt: skip


def test_the_most_frequent_of_many_special_tokens_are_named(tmp_path, capsys):
    names = ["<a>", "<b>", "<c>", "<d>"]
    vocab = {chr(97 + n): n for n in range(4)} | {"<": 4, ">": 5}
    vocab |= {name: 6 + n for n, name in enumerate(names)}
    tokenizer = from_merges(vocab, [], "test", [AddedToken(name, vocab[name]) for name in names])
    text = "".join(name * 9 for name in names[:3]) + "<d>a"
    source = write(tmp_path / "text.txt", text)
    prepare(source, tmp_path / "out", tokenizer, val=0, special_tokens=True)
    assert "<a>, <b>, <c> stands in the text 28 times, read as" in capsys.readouterr().err


def test_special_tokens_with_spaces_and_line_feeds_are_never_cut():
    names = ["<a b>", "\n\n", "b> c"]
    draw = random.Random(1)
    for _ in range(300):
        text = "".join(draw.choices(["<a b>", "<a", " b>", "\n\n", "\n", "x", " ", "c"], k=30))
        cuts = sorted(draw.choices(range(len(text)), k=9))
        given = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        pieces = list(recut(given, names))
        assert "".join(pieces) == text
        at = 0
        for piece in pieces[:-1]:
            at += len(piece)
            assert not any(
                text.startswith(name, start)
                for name in names
                for start in range(max(0, at - len(name) + 1), at)
            )


def test_a_learnt_vocabulary_has_no_pieces_of_special_tokens(tmp_path):
    source = write(tmp_path / "text.txt", f"the cat{END}" * 200)
    data, *_ = ids_of(source, tmp_path / "out", "bpe:300", special_tokens=True)
    assert not any(b"|" in token and len(token) > 1 for token in data.tokenizer().ranks)


@pytest.mark.parametrize("tokenizer", ["bytes", "char", "bpe:270"])
def test_a_text_of_windows_is_the_same_text(tokenizer, tmp_path):
    plain = write(tmp_path / "plain.txt", TEXT)
    _, *expected = ids_of(plain, tmp_path / "plain", tokenizer)
    mark = b"\xef\xbb\xbf"
    for number, (content, more) in enumerate((
        (mark + TEXT.encode(), {}),
        (TEXT.replace("\n", "\r\n").encode(), {}),
        (mark + TEXT.replace("\n", "\r\n").encode(), {}),
        (mark + TEXT.encode(), {"keep_crlf": True}),
    )):  # fmt: skip
        source = write(tmp_path / f"{number}.txt", content)
        _, *found = ids_of(source, tmp_path / str(number), tokenizer, **more)
        assert found == expected
    kept = write(tmp_path / "kept.txt", TEXT.replace("\n", "\r\n"))
    data, train, val = ids_of(kept, tmp_path / "kept", tokenizer, keep_crlf=True)
    assert data.tokenizer().decode(train + val) == TEXT.replace("\n", "\r\n")


def test_a_carriage_return_alone_is_text_and_marks_begin_every_file(tmp_path):
    _, train, _ = ids_of(write(tmp_path / "a.txt", "a\rb\r\r\nc\r"), tmp_path / "a", val=0)
    assert bytes(train) == b"a\rb\r\nc\r"
    for name in "ab":
        write(tmp_path / "in" / name, b"\xef\xbb\xbf" + name.encode() + b"\r\n")
    data, *_ = ids_of(tmp_path / "in", tmp_path / "b", val=0)
    assert documents(data, data.train) == ["a\n", "b\n"]


def test_a_folder_prepared_without_windows_line_ends_serves_either_way(tmp_path):
    source = write(tmp_path / "text.txt", TEXT)
    header = prepare(source, tmp_path / "out", "bytes")
    assert prepare(source, tmp_path / "out", "bytes", keep_crlf=True) == header
    write(source, TEXT.replace("\n", "\r\n"))
    prepare(source, tmp_path / "crlf", "bytes")
    fails(tmp_path, "with keep_crlf False, not True", source, keep_crlf=True, out=tmp_path / "crlf")


def test_a_header_from_before_these_were_settings_is_read(tmp_path):
    header = prepare(write(tmp_path / "text.txt", TEXT), tmp_path / "out", "bytes")
    path = tmp_path / "out" / "header.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    for name in ("special_tokens", "keep_crlf", "special_tokens_found"):
        del content[name]
    path.write_text(json.dumps(content), encoding="utf-8")
    (tmp_path / "out" / "SHA256SUMS").unlink()
    assert Header.read(tmp_path / "out").splits == header.splits
    assert prepare(tmp_path / "text.txt", tmp_path / "out", "bytes").splits == header.splits


RECORDS = [{"a": 'one, "two"', "b": "x\ny", "c": ""}, {"a": "é\u2028 three", "b": "", "c": "z"}] * 9


def as_file(form: str, folder: Path) -> Path:
    if form == "lines":
        return write(
            folder / "x.jsonl", "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in RECORDS)
        )
    if form in ("array", "pretty"):
        text = json.dumps(RECORDS, ensure_ascii=False, indent=4 if form == "pretty" else None)
        return write(folder / "x.json", text)
    rows = [RECORDS[0].keys(), *(record.values() for record in RECORDS)]
    sign = {"csv": ",", "excel": ";", "tab": "\t"}[form]
    quoted = [[f'"{cell}"' for cell in (str(x).replace('"', '""') for x in row)] for row in rows]
    text = "\r\n".join(map(sign.join, quoted)) + "\r\n"
    return write(folder / ("x.tsv" if form == "tab" else "x.csv"), b"\xef\xbb\xbf" + text.encode())


@pytest.mark.parametrize("form", ["lines", "array", "pretty", "csv", "excel", "tab"])
def test_records_of_every_form_give_their_texts(form, tmp_path):
    source = as_file(form, tmp_path)
    data, *_ = ids_of(source, tmp_path / "a", field="a", val=0.3)
    assert documents(data, data.train) + documents(data, data.val) == [x["a"] for x in RECORDS]
    assert len(data.val)
    data, *_ = ids_of(source, tmp_path / "b", field="b", val=0)
    assert documents(data, data.train) == ["x\ny"] * 9  # those without any are left out
    data, *_ = ids_of(source, tmp_path / "abc", field="a,b,c", val=0)
    assert documents(data, data.train)[:2] == ['one, "two"\nx\ny', "é\u2028 three\nz"]
    kind = {"lines": "JSON lines", "array": "JSON", "pretty": "JSON"}.get(form, "CSV")
    fails(tmp_path, rf"is {kind}: name the (key|column) that holds the text with --field", source)
    fails(tmp_path, "--field 'd' must name text", source, field="d")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.json", '[{"t": "a"}, {"t": "b"]', "entry 2: its JSON is damaged"),
        ("x.json", '[{"t": "a"} {"t": "b"}]', "entry 2: its JSON is damaged: no ',' stands before"),
        ("x.json", '[{"t": "a"}, "b"]', "entry 2: 'b' is not an object"),
        ("x.json", '[{"t": "a", "t": "b"}]', "entry 1: .*the key 't' appears twice"),
        ("x.json", "[" * 9999, "entry 1: .*"),
        ("x.json", "[]", "no text is left for train"),
        ("x.json", '[{"t": "a"}]\n[{"t": "b"}]', "behind its array: more follows"),
        ("x.json", '[{"t": "a"}] and', "behind its array: more follows"),
        ("x.json", "[]]", "behind its array: more follows"),
        ("x.json", '{"t":\n "a"}', "line 1: an object goes over several lines: it must be an a"),
        ("x.json", '{"t": "a"}\n{\n"t": "b"}', "line 2: an object goes over several lines"),
        ("x.json", '{"v": 1,\n"data": [{"t": "a"}]}', "line 1: .*save the list under 'data' alone"),
        ("x.json", '{"data": [{"t": "a"}]}', "line 1: .*must name text, but it holds {'data': "),
        ("x.json", '{"t": "a", "t": "b"}\n', "line 1: .*the key 't' appears twice"),
        ("x.json", '{"t": "a"} {\n}', "line 1: its JSON is damaged: Extra data"),
        ("x.json", '{"t":\n "a', "line 1: its JSON is damaged"),
        ("x.json", '[{"t": "\\ud800"}]', "entry 1: surrogates not allowed"),
        ("x.csv", "t,t\na,b\n", "line 1: .*have a name twice|line 2: .*have a name twice"),
        ("x.csv", "t,u\na\n", "must name text|no text is left"),
        ("x.csv", "t\n\xff", "line 2: invalid start byte"),
        ("x.csv", "t\nHi\nHello, world\n", "line 3: it has more cells than the 1 .*',' in it must"),
        ("x.csv", "t,\nHello, world\n", "line 2: it has more cells than the 1"),
        ("x.csv", "l;t\n1;a;b\n", "line 2: it has more cells than the 2 .*';' in it must"),
        ("x.tsv", "t\nHello\tworld\n", r"line 2: it has more cells than the 1 .*'\\t' in it must"),
        ("x.csv", "l,t\n1,a\nb\n", "line 3: .*must name text, but it holds {'l': 'b'}"),
        ("x.csv", 't\n"a\nb"\n"c\nd\ne\n', "line 4: .*quote that begins a cell is not closed"),
        ("x.csv", 't\n"a" b\nc\n', "line 2: .*more stands behind the one that closes it"),
        ("x.tsv", 't\tl\n"a\t1\nb\t2\n', "line 2: .*quote that begins a cell is not closed"),
        ("x.csv", "t\rHello\rworld\r", "line 1: .*carriage return alone stands in it"),
        ("x.csv", "t\nHello\rworld\n", "line 2: .*carriage return alone stands in it"),
    ],
)
def test_damaged_records_are_one_line(name, content, words, tmp_path):
    source = write(tmp_path / name, content.encode("latin-1"))
    fails(tmp_path, words, source, field="t" if "u" not in content[:3] else "u")


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("x.csv", "t,,\na,,\nb\n", ["a", "b"]),  # empty columns of a spreadsheet
        ("x.csv", "t\na,,\n", ["a"]),
        ("x.csv", "t,l\na,1\nb\n\nc,\n", ["a", "b", "c"]),
        ("x.csv", 't\n5" disk\n"a ""b"""\n"c,\nd"\n', ['5" disk', 'a "b"', "c,\nd"]),
        ("x.tsv", 't\nHello, world; all\n"a\tb"\n', ["Hello, world; all", "a\tb"]),
        ("x.json", '[{"t": "a"}]\n \n', ["a"]),
    ],
)
def test_cells_and_entries_are_whole_texts(name, content, texts, tmp_path):
    data, *_ = ids_of(write(tmp_path / name, content), tmp_path / "out", field="t", val=0)
    assert documents(data, data.train) == texts


@pytest.mark.parametrize(
    ("name", "content", "starts"),
    [
        ("x.jsonl", '{"t": "a"}\n{"t": "b"}\n{"t": "c"}\n{"t": "d"}\n', (11, 22)),
        ("x.json", '[{"t": "a"},{"t": "b"},{"t": "c"},{"t": "d"}]', (11, 22)),
        ("x.csv", "t\na\nb\nc\nd\n", (4, 6)),
    ],
)
def test_records_that_start_at_the_cut_or_past_it_are_for_validation(
    name, content, starts, tmp_path
):
    source = write(tmp_path / name, content)
    for cut in (at + past for at in starts for past in (0, 1)):
        more = {"field": "t", "val": 1 - (cut + 0.5) / len(content)}
        data, *_ = ids_of(source, tmp_path / str(cut), **more)
        assert documents(data, data.train) == [*"abc"][: 1 + sum(at < cut for at in starts)]


@pytest.mark.parametrize("keep_crlf", [False, True])
def test_line_ends_of_windows_in_records(keep_crlf, tmp_path):
    source = write(tmp_path / "x.jsonl", [{"t": "a\r\nb"}])
    more = {"field": "t", "val": 0, "keep_crlf": keep_crlf}
    data, *_ = ids_of(source, tmp_path / "out", **more)
    assert documents(data, data.train) == ["a\r\nb" if keep_crlf else "a\nb"]


def test_an_end_that_is_an_ordinary_token_is_put_behind_each_text_that_lacks_it(tmp_path):
    files = {"generation_config.json": {"eos_token_id": ord(".")}}
    tokenizer = replace(load_tokenizer("bytes"), kept=files)
    source = write(tmp_path / "x.jsonl", [{"t": "A."}, {"t": "B.C"}, {"t": "."}, {"t": "D"}])
    _, ids, _ = ids_of(source, tmp_path / "out", tokenizer, field="t", val=0)
    assert bytes(ids) == b"A.B.C..D."


def test_plain_texts_beside_records_are_documents_of_their_own(tmp_path):
    for name, content in (
        ("a.txt", "plain\n"),
        ("b.jsonl", '{"t": "one"}\n{"t": "two"}'),
        ("c.md", '{"t": 1}'),
        ("d.csv", "t\nthree\n"),
    ):
        write(tmp_path / "in" / name, content)
    data, *_ = ids_of(tmp_path / "in", tmp_path / "out", field="t", val=0)
    assert documents(data, data.train) == ["plain\n", "one", "two", '{"t": 1}', "three"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("hello".encode("utf-16"), "text in UTF-16: save it in UTF-8"),
        ("hello".encode("utf-16-be"), "zero bytes, so it is no UTF-8 text"),
        (b"\x1f\x8b\x08", "compressed: unpack it first"),
        (b"PK\x03\x04", "a zip file"),
        (b"PAR1abc", "Parquet"),
        (b"%PDF-1.4", "a PDF"),
        (b"\xef\xbb\xbf", "is empty"),
    ],
)
def test_what_is_no_text_is_called_by_its_name(content, words, tmp_path):
    fails(tmp_path, words, write(tmp_path / "text.txt", content))
    write(tmp_path / "in" / "good.txt", "some text")
    if content[3:]:
        fails(tmp_path, words, write(tmp_path / "in" / "bad.txt", content).parent)


def test_files_folders_and_patterns_are_read_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("in/b.txt", "in/a.txt", "in/deep/c.txt", "in/x.md", "in/.d.txt", "e[1].txt"):
        write(tmp_path / name, name)
    for number, (source, names) in enumerate((
        ("in/*.txt", ["in/a.txt", "in/b.txt"]),
        ("in/**/*.txt", ["in/a.txt", "in/b.txt", "in/deep/c.txt"]),
        (["in/x.md", "in/a.txt", "in/x.md"], ["in/x.md", "in/a.txt"]),
        (["in/deep", "in/b.txt"], ["in/deep/c.txt", "in/b.txt"]),
        (["e[1].txt", "in/x.md"], ["e[1].txt", "in/x.md"]),
    )):  # fmt: skip
        data, *_ = ids_of(source, tmp_path / f"out{number}", val=0)
        assert documents(data, data.train) == names
    fails(tmp_path, "no file has a name like 'in/\\*.jpg'", "in/*.jpg")
    fails(tmp_path, "no file or folder 'in/a.tx': did you mean 'in/a.txt'", "in/a.tx")
    fails(tmp_path, "no folder 'inn'", "inn/a.txt")
    fails(tmp_path, "no file or folder 'shakspeare': did you mean 'shakespeare'", "shakspeare")
    fails(tmp_path, "out0 holds prepared tokens", ["in/x.md", "out0"])
