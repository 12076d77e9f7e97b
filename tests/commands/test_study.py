"""The command `study`: what it prints as text, JSON and a page, and what it refuses."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import struct
import zlib
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from conftest import randomize, save_with_bytes
from prepared import prepared

from tinygpt import GPT, GPTConfig, load_tokenizer
from tinygpt.commands import study
from tinygpt.commands.main import main
from tinygpt.commands.study import WHATS
from tinygpt.study.attention import entropies
from tinygpt.study.attribution import attribute
from tinygpt.study.inside import look
from tinygpt.study.page import grey_png
from tinygpt.study.report import Map, Report, Table, plain_data, written
from tinygpt.study.terminal import lines

CONFIG = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=32, vocab_size=257)
TEXT = "the sea, a café"
LOOKS = {
    "explain": ["--block", "1"],
    "tokens": [TEXT],
    "lens": [TEXT],
    "attention": [TEXT],
    "heads": [],
    "attribute": [TEXT, "--token", "e", "--against", "x"],
}
pytestmark = pytest.mark.usefixtures("no_network")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_with_bytes(randomize(GPT(CONFIG)), folder)
    return folder


def test_each_look_has_an_example_here():
    assert set(LOOKS) == set(WHATS)


@pytest.mark.parametrize("what", LOOKS)
def test_a_look_is_text_json_and_a_page(what, folder, cli, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    argv = ["study", what, *LOOKS[what], "--model", folder]
    status, out, err = cli(*argv)
    assert status == 0, err
    assert max(map(len, out.splitlines())) <= 80
    assert "\x1b" not in out
    found = json.loads(cli(*argv, "--json")[1])
    assert found
    assert "NaN" not in json.dumps(found)
    page = tmp_path / "page.html"
    assert cli(*argv, "--html", page)[:2] == (0, "")
    check_page(page.read_text(encoding="utf-8"))
    monkeypatch.setenv("COLUMNS", "40")
    out = cli(*argv)[1]
    assert max(map(len, out.splitlines())) <= 40
    assert what == "explain" or not re.search(r"\d~", out)  # no number is cut, as a formula is


class Page(HTMLParser):
    """Finds what a page that stands by itself must not have, and what it must."""

    def __init__(self):
        super().__init__()
        self.open, self.faults, self.seen = [], [], set()

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.seen.add(tag)
        if tag not in ("meta", "img", "input"):
            self.open.append(tag)
        for name, value in attrs.items():
            if re.search(r"https?:|//", value or "") and not (value or "").startswith("data:"):
                self.faults.append((tag, name, value))
        if tag in ("script", "link", "iframe") or (tag == "img" and not attrs.get("alt")):
            self.faults.append((tag, attrs))
        if tag == "html" and attrs.get("lang") != "en":
            self.faults.append("lang")

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.faults.append(f"</{tag}>")


def check_page(html: str, film: bool = False) -> None:
    page = Page()
    page.feed(html)
    assert page.faults == [("script", {})] * film
    assert page.open == []
    assert page.seen >= {"html", "title", "main", "h1"}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run that keeps each second of its checkpoints."""
    data = prepared(
        tmp_path_factory.mktemp("data") / "data", "the sea. " * 99, load_tokenizer("bytes")
    )
    run = tmp_path_factory.mktemp("run") / "run"
    shape = "--n-layer 1 --n-head 2 --n-embd 16 --block-size 16 --batch-size 2 --steps 6"
    often = "--eval-every 1 --eval-batches 1 --sample-tokens 0 --keep 1 --keep-every 2"
    assert main(["train", str(data), "-o", str(run), *shape.split(), *often.split()]) == 0
    return run


def test_a_run_that_kept_one_checkpoint_says_how_to_keep_more(run_folder, cli, tmp_path):
    kept = run_folder / "step-00000002"
    shutil.copytree(kept, tmp_path / kept.name)
    status, out, err = cli("study", "compare", "--run", tmp_path, "the sea")
    assert (status, out.count("step-00000002")) == (0, 1), err
    assert "has kept one checkpoint: train --keep-every N keeps one of N steps" in err
    assert "has kept one" not in cli("study", "compare", "--run", run_folder, "the sea")[2]


def test_two_models_and_all_of_a_run_are_compared(run_folder, folder, cli, tmp_path):
    kept = {path.name for path in run_folder.glob("step-*")}
    assert {f"step-{i:08}" for i in (2, 4, 6)} <= kept
    page = tmp_path / "film.html"
    status, out, err = cli("study", "compare", "--run", run_folder, "the sea", "--html", page)
    assert (status, out) == (0, "")
    html = page.read_text(encoding="utf-8")
    check_page(html, film=True)
    assert html.count("<section>") == len(kept)
    assert html.index("step-00000002") < html.index("step-00000006")
    argv = ["study", "compare", folder, run_folder, "the sea", "--look", "tokens"]
    out = cli(*argv)[1].replace("\n", " ")  # long folders' names break the line elsewhere
    assert out.count("How well each token was foreseen") == 2
    found = json.loads(cli(*argv, "--json")[1])
    assert [each["model"] for each in found] == [str(folder), str(run_folder)]
    alone = json.loads(cli("study", "tokens", "the sea", "--model", run_folder, "--json")[1])
    assert found[1]["found"] == alone
    for bad, words in (
        (["compare", folder], "needs two models and a text"),
        (["compare", folder, folder], "study compare needs a text"),
        (["compare", folder, folder, "a", "b"], "'b' is one text too many"),
        (["compare", "--run", folder, "a"], "is no run with checkpoints"),
        (["compare", folder, folder, "a", "--look", "lenses"], "did you mean 'lens'"),
        (["compare", folder, folder, "a", "--look", "tokens", "--head", "1"], "--head is not for"),
        (["lens", "a", "--look", "tokens", "--model", folder], "--look is for study compare"),
    ):
        status, out, err = cli("study", *bad)
        assert (status, out) == (2, "")
        assert words in err


def test_a_text_from_stdin_is_read_once_for_all_models(folder, cli, monkeypatch):
    given = iter(["the sea"])  # behind its end stdin gives nothing more
    monkeypatch.setattr(study, "read_prompt", lambda _: next(given, ""))
    found = json.loads(cli("study", "compare", folder, folder, "-", "--json")[1])
    assert found[0]["found"] == found[1]["found"]
    status, out, err = cli("study", "induction", "--look", "lens")
    assert (status, out) == (2, "")
    assert "--look is for study compare" in err


def test_a_report_has_the_settings_curves_samples_and_hashes_of_a_run(run_folder, cli, tmp_path):
    page = tmp_path / "report.html"
    assert cli("report", run_folder, "--html", page)[:2] == (0, "")
    html = page.read_text(encoding="utf-8")
    check_page(html)
    assert html.count("<polyline") == 3
    found = json.loads(cli("report", run_folder, "--json")[1])
    assert found["config"]["keep_every"] == 2
    assert found["step"] == 6
    steps = [step for step, _ in found["curves"]["loss"]]
    assert steps == [1, 2, 3, 4, 5, 6]
    last = run_folder / "step-00000006" / "model.safetensors"
    assert found["digests"]["step-00000006"] == hashlib.sha256(last.read_bytes()).hexdigest()
    assert len(found["inside"]["lens"]["places"]) == 3
    out = cli("report", run_folder)[1]
    assert re.search(r"keep_every +2 +0\n", out)
    assert f"tinygpt train DATA --resume -o {run_folder}" in out.replace("\n", " ")
    status, out, err = cli("report", tmp_path)
    assert (status, out) == (2, "")
    assert "is no run with checkpoints" in err


def test_numbers_are_those_of_the_functions(folder, cli):
    model, tokenizer = GPT.from_pretrained(folder), load_tokenizer("bytes")
    inside = look(model, tokenizer.encode(TEXT))
    expected = attribute(model, inside, ord("e"), ord("x"))
    argv = ["study", "attribute", TEXT, "--token", "e", "--against", "x", "--model", folder]
    found = json.loads(cli(*argv, "--json")[1])
    assert found["components"] == list(expected.components)
    assert found["values"] == pytest.approx(expected.values.tolist())
    assert found["logit"] == pytest.approx(expected.logit)
    assert re.search(rf"sum\s+{found['logit']:.3f}", cli(*argv)[1])
    lens = json.loads(cli("study", "lens", TEXT, "--model", folder, "--json")[1])
    assert len(lens["places"]) == len(lens["loss"]) == 5
    assert cli("study", "lens", TEXT, "--model", folder, "--position", 0)[1].count('token 0, "t"')


def test_one_map_is_drawn_as_wide_as_the_terminal_and_without_blocks_in_ascii(
    folder, cli, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "100")
    argv = ["study", "attention", TEXT, "--block", 1, "--head", 0, "--model", folder]
    out = cli(*argv)[1]
    assert "block 1, head 0" in out
    assert "not what matters" in " ".join(out.split())
    rows = [line for line in out.splitlines() if line.strip().startswith('"')]
    assert len(rows) == len(TEXT.encode())
    assert any(shade in out for shade in "░▒▓█")
    for text in ("abcdefg", "ab"):
        out = cli("study", "attention", text, "--rollout", "--block", 0, "--model", folder)[1]
        assert "rollout through block 0" in out
        names, *rows = out.splitlines()[3 : 4 + len(text)]
        assert names.split() == list(text)
        assert [row.strip()[:3] for row in rows] == [f'"{each}"' for each in text]
        assert 80 < max(map(len, rows)) <= 100
    drawn = Map("", np.tril(np.ones((50, 50))), [str(i) for i in range(50)])
    for encoding, shade in (("utf-8", "█"), ("ascii", "@"), ("no such", "@")):
        shown = list(lines(Report("A map", [drawn]), 40, encoding))
        assert max(map(len, shown)) <= 40
        assert shown[-1].endswith(shade * 30)


def test_a_part_of_a_character_is_shown_as_its_bytes_and_what_a_terminal_lacks_too(folder, cli):
    out = cli("study", "tokens", "é", "--model", folder)[1]
    assert [line.split()[0] for line in out.splitlines()[3:5]] == [r'"\xc3"', r'"\xa9"']
    table = Table("", ("piece", "n"), [["猫猫", 1], ["é", 22]])
    wide = [*lines(Report("R", [table]), 40)][3:]
    assert wide == ["猫猫    1", "é      22"]  # a letter of Chinese is as wide as two
    narrow = [*lines(Report("R", [table]), 40, "ascii")][3:]
    assert narrow == [r"\u732b\u732b   1", r"\xe9          22"]


def test_the_overview_of_attention_has_the_entropy_of_the_text_as_json_too(folder, cli):
    argv = ["study", "attention", TEXT, "--model", folder]
    found = json.loads(cli(*argv, "--json")[1])
    assert set(found) == {"scores", "entropy"}
    assert np.shape(found["entropy"]) == (2, 2)
    inside = look(GPT.from_pretrained(folder), load_tokenizer("bytes").encode(TEXT))
    assert np.array(found["entropy"]) == pytest.approx(entropies(inside.attention), abs=1e-5)


def test_heads_are_left_out_by_zero_or_by_their_mean(folder, cli):
    argv = ["study", "heads", "the sea " * 12, "--model", folder]
    zero, mean = (json.loads(cli(*argv, *more, "--json")[1]) for more in ([], ["--by", "mean"]))
    assert zero["scores"] == mean["scores"]
    assert zero["left_out"]["loss"] == pytest.approx(mean["left_out"]["loss"], abs=1e-5)
    assert zero["left_out"]["without"] != mean["left_out"]["without"]
    assert "head's output is its mean" in cli(*argv, "--by", "mean")[1].replace("\n", " ")


def test_heads_read_the_file_that_a_text_names(folder, cli, tmp_path):
    (file := tmp_path / "text.txt").write_text("the sea " * 200, encoding="utf-8")
    argv = ["--model", folder, "--json"]
    status, named, _ = cli("study", "heads", file, *argv)
    assert status == 0
    assert json.loads(named) == json.loads(cli("study", "heads", "the sea " * 200, *argv)[1])
    both = ("study", "compare", folder, folder, file, "--look", "heads", "--json")
    assert json.loads(cli(*both)[1])[0]["found"] == json.loads(named)
    page = tmp_path / "page.html"
    assert cli("study", "heads", file, "--model", folder, "--html", page)[0] == 0
    assert page.read_text(encoding="utf-8").count("the sea") < 200
    status, _, err = cli("study", "heads", "none.txt", "--model", folder)
    assert status == 2
    assert "tokens: give 65 or more, which are two windows, as a text or a file" in err


def test_a_text_comes_from_a_pipe_and_a_long_one_loses_its_begin(folder, monkeypatch, cli):
    status, out, err = cli("study", "tokens", "a" * 40, "--model", folder)
    assert status == 0
    assert "the text has 40 tokens, the model's window 32: the last are looked at" in err
    assert out.count('"a"') >= 32


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["study", "lense", "x"], "did you mean"),
        (["study", "tokens"], "study tokens needs a text: give one, or - for stdin"),
        (["study", "tokens", ""], "the prompt is empty"),
        (["study", "tokens", "x", "--block", "1"], "--block is not for study tokens"),
        (["study", "norms", "--model", "gpt2"], "--model is not for study norms"),
        (["study", "induction", "--model", "gpt2"], "--model is not for study induction"),
        (["study", "compare", "a", "b", "x", "--model", "c"], "--model is not for study compare"),
        (["study", "attention", "x", "--block", "2"], "--block is 2: it must be"),
        (["study", "attention", "x", "--head", "9"], "--head is 9: it must be"),
        (["study", "lens", "xyz", "--position", "3"], "--position is 3: it must be"),
        (["study", "attribute", "x"], "study attribute needs --token"),
        (["study", "attribute", "x", "--token", "ab"], '--token \'ab\' is 2 pieces: "a" "b"'),
        (["study", "heads", "--by", "median"], "unknown --by 'median'"),
        (["study", "attention", "x", "--rollout", "--head", "1"], "--rollout is of all heads"),
        (["study", "heads", "x" * 60], "the text has 60 tokens: give 65 or more"),
        (["study", "tokens", "x", "--html", "no/such/folder.html"], "cannot write"),
    ],
    ids=str,
)
def test_what_cannot_work_is_one_line(argv, words, folder, cli):
    status, out, err = cli(*argv, "--model", folder)
    assert (status, out) == (2, "")
    assert words in err
    assert "Traceback" not in err
    assert err.count("\n") == 1


def test_a_model_whose_logits_are_no_sum_is_not_taken_apart(tmp_path, cli):
    save_with_bytes(randomize(GPT(GPTConfig(**{**vars(CONFIG), "norm": "post"}))), tmp_path)
    status, _, err = cli("study", "attribute", "x", "--token", "e", "--model", tmp_path)
    assert status == 2
    assert "no sum of its parts: post-norm" in err


@pytest.mark.parametrize(
    ("shape", "why"),
    [({"shortcut": False}, "this model has none"), ({"norm": "deep"}, "DeepNorm makes")],
)
def test_rollout_counts_no_shortcut_that_is_not_there(shape, why, tmp_path, cli):
    save_with_bytes(randomize(GPT(replace(CONFIG, **shape))), tmp_path)
    argv = ["study", "attention", "the sea", "--model", tmp_path]
    status, out, err = cli(*argv, "--rollout")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert f"counts each shortcut as a half of what passes: {why}" in err
    assert cli(*argv)[0] == 0


def test_a_missing_tokenizer_is_told_without_a_flag_that_there_is_not(tmp_path, cli):
    GPT(replace(CONFIG, vocab_size=100)).save_pretrained(tmp_path)
    looks = (["study", "tokens", "abc", "--model"], ["doctor", "--prove"], ["evaluate"])
    for argv in looks:
        more = [tmp_path] + (["text.txt"] if argv == ["evaluate"] else [])
        status, out, err = cli(*argv, *more)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert "no tokenizer in folder" in err
        assert "--ids" not in err
    assert "or give ids in place of text (--ids)" in cli("Abc", "--model", tmp_path)[2]


def test_the_first_token_has_no_rank_in_json(folder, cli):
    found = json.loads(cli("study", "tokens", "sea", "--model", folder, "--json")[1])
    assert found["rank"][0] is found["loss"][0] is None
    assert found["likeliest"][0] == found["probability"][0] == [None] * 3
    assert all(isinstance(rank, int) and rank > 0 for rank in found["rank"][1:])
    assert all(isinstance(each, int) for row in found["likeliest"][1:] for each in row)


def test_narrow_weights_are_widened_and_that_is_said(tmp_path, cli):
    model = randomize(GPT(CONFIG))
    from tinygpt.checkpoints.quantization import convert

    save_with_bytes(convert(model, "int8"), tmp_path)
    status, _, err = cli("study", "lens", "xyz", "--model", tmp_path)
    assert status == 0
    assert "its weights are int8: looked at as float32" in err


def test_a_picture_has_the_shades_of_its_numbers():
    values = np.array([[0, 0.5, 1], [1, 0, 2]])
    data = grey_png(values)
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height, depth, colour = struct.unpack(">IIBB", data[16:26])
    assert (width, height, depth, colour) == (3, 2, 8, 0)
    start = data.index(b"IDAT") + 4
    (size,) = struct.unpack(">I", data[start - 8 : start - 4])
    rows = np.frombuffer(zlib.decompress(data[start : start + size]), np.uint8).reshape(2, 4)
    assert rows.tolist() == [[0, 255, 128, 0], [0, 0, 255, 0]]


def test_cells_have_the_digits_that_matter():
    cells = [1234567, 0.12345, 1e-9, 12345.6, 0.0, None, float("nan"), True, "x", np.float32(2)]
    assert [written(cell) for cell in cells] == [
        "1,234,567", "0.123", "1.00e-09", "1.23e+04", "0.000", "", "", "yes", "x", "2.000",
    ]  # fmt: skip
    assert plain_data({"a": np.array([1.0, np.nan]), "b": (np.int64(2),)}) == {
        "a": [1.0, None],
        "b": [2],
    }
    table = Table("T", ("a long name of a column", "b"), [["x", 1]], "a note")
    shown = list(lines(Report("R", [table]), 12))
    assert max(map(len, shown[:-1])) <= 12
