from __future__ import annotations

import argparse
import json
import math
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO

import numpy as np
import pytest
from conftest import randomize, reference_of, save_with_bytes
from prepared import prepared

from tinygpt import GPT, GPTConfig, InputError, load_tokenizer
from tinygpt.commands import evaluate
from tinygpt.data.dataset import Dataset
from tinygpt.data.prepare import prepare
from tinygpt.evaluation import tasks
from tinygpt.evaluation.losses import Scorer, Window, evaluate_data, spread, windows
from tinygpt.tokenizer.encoding import char_tokenizer, encode, save_tokenizer
from tinygpt.tokenizer.tokenizer import END

CONFIG = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=16, vocab_size=257)
TEXT = "Ünder the sea, a café was öpen. " * 9


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model = randomize(GPT(CONFIG))
    for parameter in (model.wte.weight, model.wpe.weight):  # so that losses are no hundreds
        parameter.assign(parameter * 0.3).realize()
    save_with_bytes(model, folder)
    return folder, model


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Dataset:
    folder = tmp_path_factory.mktemp("data") / "data"
    return Dataset.open(prepared(folder, TEXT, load_tokenizer("bytes")))


def command(*argv) -> int:
    parser = argparse.ArgumentParser()
    evaluate.add_flags(parser)
    return evaluate.run(parser.parse_args([str(word) for word in argv]))


@pytest.mark.parametrize(
    ("length", "stride"), [(2, 5), (16, 16), (17, 16), (18, 16), (33, 16), (50, 5), (50, 1)]
)
def test_every_token_but_the_first_counts_once(length, stride):
    counted = [
        target
        for start, before, count in windows(7, 7 + length, 16, stride)
        for target in range(start + before + 1, start + before + 1 + count)
    ]
    assert counted == list(range(8, 7 + length))


def test_spread_windows_are_whole_and_even():
    assert spread(33, 16, 9) == [Window(0, 0, 16), Window(16, 0, 16)]
    assert spread(32, 16, 9) == spread(17, 16, 9) == [Window(0, 0, 16)]
    chosen = spread(16 * 100 + 1, 16, 10)
    assert len(chosen) == 10
    assert (chosen[0].start, chosen[-1].start) == (0, 16 * 99)
    assert all(window.start % 16 == 0 for window in chosen)


@pytest.mark.parametrize("stride", [16, 5, 1, None])
def test_losses_on_data_equal_the_reference(stride, saved, data):
    reference, tokens = (
        reference_of(saved[1]),
        np.array([256, *data.val[:]]),
    )  # behind the begin token
    total, done, step = 0.0, 0, stride or 8
    for start in range(0, len(tokens), step):  # by the definition: one window after the other
        start = min(start, len(tokens) - 17)
        logits = reference.row(tokens[start : start + 16])
        logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        for i, target in enumerate(tokens[start + 1 : start + 17]):
            if start + 1 + i > done:
                total -= logs[i, target]
                done = start + 1 + i
    assert done == len(tokens) - 1
    found = evaluate_data(saved[1], data, stride=stride, batch_size=2)
    loss = total / done
    assert found["loss"] == pytest.approx(loss, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert found["tokens"] == done
    text = TEXT[len(TEXT) * 9 // 10 :]
    bits = loss / math.log(2) * done
    assert found["bits_per_byte"] == pytest.approx(bits / len(text.encode()), rel=1e-5)
    assert found["bits_per_character"] == pytest.approx(bits / len(text), rel=1e-5)
    assert found["bits_per_character"] > found["bits_per_byte"]


@pytest.mark.parametrize("begins", ["", END])
@pytest.mark.parametrize("stride", [16, 5, None])
def test_each_document_is_measured_on_its_own(stride, begins, saved, tmp_path):
    """As the reference finds it in windows of this document alone, behind the end token."""
    texts = ["An öpen sea. " * 4, "b", "A café.", "The sea, the sea, the sea, the end"]
    text, step = tmp_path / "text.txt", stride or 8
    text.write_text(f"\n{END}\n".join(texts), encoding="utf-8")
    if begins:
        text.write_text(f"{END}\n{text.read_text(encoding='utf-8')}", encoding="utf-8")
    reference, total, count = reference_of(saved[1]), 0.0, 0
    for words in texts:
        ids = np.array([256, *words.encode()])
        done = 0  # targets that have counted
        for start in range(0, len(ids), step):
            start = min(start, max(0, len(ids) - 17))
            window = ids[start : start + 17]
            logits = reference.row(window[:-1])
            logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            for place in range(done - start, len(window) - 1):
                total, done, count = total - logs[place, window[place + 1]], done + 1, count + 1
    found = json_of(saved[0], text, *(["--stride", step] if stride else []))
    assert found["documents"] == len(texts)
    assert found["tokens"] == count == len("".join(texts).encode())
    assert found["loss"] == pytest.approx(total / count, rel=1e-5)
    bits = total / count / math.log(2) * len("".join(texts).encode())
    assert found["bits_per_character"] == pytest.approx(bits / len("".join(texts)), rel=1e-5)


def json_of(*argv) -> dict:
    with redirect_stdout(StringIO()) as output:
        assert command(*argv, "--json") == 0
    return json.loads(output.getvalue())


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17])
def test_a_text_that_is_hardly_a_window_is_measured_whole(length, saved, data):
    tokens = data.val[:length].astype(int)
    found = evaluate_data(saved[1], replace(data, val=data.val[:length]), stride=16)
    begun = np.array([256, *tokens])
    logits = reference_of(saved[1]).row(begun[:16][:length])
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    losses = -logs[range(min(length, 16)), begun[1 : length + 1][:16]]
    if length == 17:  # the last window is whole, and its last target alone counts
        logits = reference_of(saved[1]).row(begun[1:17])
        last = logits[-1] - np.log(np.exp(logits[-1]).sum())
        losses = np.append(losses, -last[begun[17]])
    assert found["loss"] == pytest.approx(losses.mean(), rel=1e-5)
    assert found["tokens"] == length


def test_the_order_of_documents_changes_nothing(saved, tmp_path):
    texts, found = ["An öpen sea. " * 4, "b", "A café.", "The sea, the sea, the sea, the end"], []
    for i, order in enumerate((texts, texts[::-1])):
        text = tmp_path / f"{i}.txt"
        text.write_text(f"\n{END}\n".join(order), encoding="utf-8")
        found.append(json_of(saved[0], text))
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_a_begin_token_of_its_own_stands_before_each_document(saved, tmp_path):
    """Where a model's files name one that is not the end token, as the first and in between."""
    text = f"the sea\n{END}\nthe café"
    (file := tmp_path / "text.txt").write_text(text, encoding="utf-8")
    folder = tmp_path / "data"
    prepare(file, folder, load_tokenizer("bytes"), val=0)
    begins = replace(load_tokenizer("bytes"), bos=1)
    found = evaluate_data(saved[1], Dataset.open(folder), "train", tokenizer=begins)
    reference, losses = reference_of(saved[1]), []
    for words in ("the sea", "the café"):
        ids = np.array([1, *words.encode()])
        logits = reference.row(ids[:-1])
        logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        losses += [-logs[i, id] for i, id in enumerate(ids[1:])]
    assert found["loss"] == pytest.approx(np.mean(losses), rel=1e-5)


def test_a_text_without_tokens_to_predict_is_refused_by_its_name(saved, tmp_path):
    characters = tmp_path / "characters"
    randomize(GPT(replace(CONFIG, vocab_size=3))).save_pretrained(characters)
    save_tokenizer(char_tokenizer("abc"), characters)
    for folder, text, words in (
        (saved[0], f"{END}\n{END}\n", f"no token but {END}"),
        (saved[0], f"{END}\n", f"no token but {END}"),
        (saved[0], END, f"no token but {END}"),
        (characters, "a", "1 tokens, and at least 2 are needed"),
    ):
        (file := tmp_path / "text.txt").write_text(text, encoding="utf-8")
        with pytest.raises(InputError) as caught:
            command(folder, file)
        assert str(caught.value) == f"{file} has {words}: give more text"


def test_a_continuation_and_what_is_before_it_both_have_some_tokens(saved):
    scorer = Scorer(saved[1])
    assert tasks.score_continuation(scorer, [5], [7] * 16).tokens == 16
    for context, text in (([], [7]), ([5], []), ([5], [7] * 17)):
        with pytest.raises(InputError, match="both must have some, and the window holds 16"):
            tasks.score_continuation(scorer, context, text)


def theirs(saved):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    model = transformers.GPT2LMHeadModel.from_pretrained(saved[0]).eval()

    def score(context: list[int], text: list[int]) -> tuple[float, bool]:
        ids = torch.tensor([[*context, *text]])[:, -17:]
        with torch.no_grad():
            logits = model(ids[:, :-1]).logits[0, -len(text) :]
        logs = logits.log_softmax(-1)
        right = (logits.argmax(-1) == torch.tensor(text)).all()
        return -logs[range(len(text)), text].sum().item(), bool(right)

    return score


def test_hellaswag_equals_transformers(saved, tmp_path):
    score, rng = theirs(saved), np.random.default_rng(0)
    words = ["sea", "a café", "open", "was", "the", "x"]
    examples, right, normalised = [], 0, 0
    for i in range(12):
        context = " ".join(rng.choice(words, 4))
        endings = [" ".join(rng.choice(words, n)) for n in rng.permutation([1, 2, 2, 1])]
        label = int(rng.integers(4))
        examples.append(
            {"ctx": context, "endings": endings, "label": label if i % 2 else str(label)}
        )
        context_ids = list(context.encode())
        losses = [score(context_ids, list(f" {text}".encode()))[0] for text in endings]
        means = [loss / (1 + len(t.encode())) for loss, t in zip(losses, endings, strict=True)]
        right += int(np.argmin(losses)) == label
        normalised += int(np.argmin(means)) == label
    file = tmp_path / "hellaswag.jsonl"
    file.write_text("".join(json.dumps(example) + "\n\n" for example in examples), encoding="utf-8")
    found = tasks.hellaswag(Scorer(saved[1]), load_tokenizer("bytes"), file)
    expected = {"accuracy": right / 12, "accuracy_normalised": normalised / 12}
    assert found == {"examples": 12, **expected}
    assert 0 < right < 12


def test_lambada_equals_transformers(saved, tmp_path):
    score, total, right, lines = theirs(saved), 0.0, 0, []
    for start in ("The sea was", "A", "Open is the café of", "long " * 9 + "is"):
        lines.append(json.dumps({"text": f"{start} sea"}))
        loss, hit = score(list(start.encode()), list(b" sea"))
        total += loss
        right += hit
    file = tmp_path / "lambada.jsonl"
    file.write_text("\n".join(lines), encoding="utf-8")
    found = tasks.lambada(Scorer(saved[1]), load_tokenizer("bytes"), file)
    assert found["examples"] == 4
    assert found["accuracy"] == right / 4
    assert found["perplexity"] == pytest.approx(math.exp(total / 4), rel=1e-4)


class SureOfB(Scorer):
    """Finds each space and each b the likeliest."""

    def __call__(self, inputs, targets):
        losses, _ = super().__call__(inputs, targets)
        return losses, np.isin(targets, [*b" b"])


def test_accuracy_is_the_share_of_last_words_that_are_right(saved, tmp_path):
    file = tmp_path / "lambada.jsonl"
    lines = [json.dumps({"text": text}) for text in ("a b", "a c", "a bb", "b b")]
    file.write_text("\n".join(lines), encoding="utf-8")
    found = tasks.lambada(SureOfB(saved[1]), load_tokenizer("bytes"), file)
    assert (found["examples"], found["accuracy"]) == (4, 0.75)


def test_greedy_is_seen(saved):
    model, scorer = saved[1], Scorer(saved[1])
    context = encode(load_tokenizer("bytes"), "the sea")
    ids = list(context)
    for _ in range(3):
        ids.append(int(reference_of(model).row(np.array(ids))[-1].argmax()))
    found = tasks.score_continuation(scorer, context, ids[7:])
    assert found.greedy
    assert found.tokens == 3
    wrong = [*ids[7:9], (ids[9] + 1) % 257]
    assert not tasks.score_continuation(scorer, context, wrong).greedy


def test_the_command_prints_numbers_or_json(saved, data, tmp_path, capsys):
    assert command(saved[0], data.folder, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["loss", "perplexity", "bits_per_byte", "bits_per_character", "tokens",
                           "documents"]  # fmt: skip
    assert command(saved[0], data.folder, "--split", "train", "--stride", "8") == 0
    assert "bits per byte  " in capsys.readouterr().out
    file = tmp_path / "lambada.jsonl"
    file.write_text('{"text": "a b"}', encoding="utf-8")
    assert command(saved[0], "lambada", file, "--json") == 0
    assert json.loads(capsys.readouterr().out)["examples"] == 1


def test_data_of_another_tokenizer_is_refused_whatever_its_size(saved, tmp_path):
    """Ids that the model knows are no proof that they mean to it what they mean in the data."""
    text = "oxford: for my part. " * 20
    other = prepared(tmp_path / "data", text, char_tokenizer(text))
    with pytest.raises(InputError, match="model's tokenizer 'bytes' gives other ids") as caught:
        command(saved[0], other)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="gives other ids"):
        evaluate_data(saved[1], Dataset.open(other), tokenizer=load_tokenizer("bytes"))
    # A tokenizer under another name that gives the same ids is no other.
    save_tokenizer(load_tokenizer("bytes"), tmp_path / "own")
    (tmp_path / "own" / "tinygpt_tokenizer.json").unlink()
    data = prepared(tmp_path / "same", TEXT, load_tokenizer("bytes"))
    assert command(saved[0], data, "--tokenizer", tmp_path / "own") == 0


def test_a_text_is_measured_in_the_models_own_tokens(saved, data, tmp_path, capsys):
    """As a whole, whatever its line ends, and as the same text prepared is."""
    text = tmp_path / "text.txt"
    text.write_bytes(b"\xef\xbb\xbf" + TEXT.replace(" ", "\r\n").encode())
    assert command(saved[0], text, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    whole = prepared(tmp_path / "data", TEXT.replace(" ", "\n") + " ", load_tokenizer("bytes"))
    ids = np.array([*TEXT.replace(" ", "\n").encode()], np.uint16)
    expected = evaluate_data(saved[1], replace(Dataset.open(whole), val=ids))["loss"]
    assert found["loss"] == pytest.approx(expected, rel=1e-5)
    assert found["tokens"] == len(ids)
    size, bits = len(ids), found["loss"] / math.log(2)
    assert found["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    assert size == len(TEXT.encode())
    for argv, words in (
        ([text, "--split", "val"], "--split is for prepared tokens"),
        ([data.folder, "--field", "a"], "--field is for a text, but .* holds prepared tokens"),
        ([data.folder, "--keep-crlf"], "--keep-crlf is for a text"),
        ([tmp_path / "helaswag"], "there is no file or folder '.*helaswag'"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            command(saved[0], *argv)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("odd", ["\u2028", "\u2029", "\x85"])
def test_json_lines_end_at_line_feeds_alone(odd, saved, tmp_path):
    file = tmp_path / "lambada.jsonl"
    line = json.dumps({"text": f"a{odd} b"}, ensure_ascii=False)
    file.write_bytes(f"\ufeff{line}\r\n{line}\n".encode())
    assert tasks.lambada(Scorer(saved[1]), load_tokenizer("bytes"), file)["examples"] == 2


def test_bad_input_is_one_line(saved, data, tmp_path):
    def error(*argv) -> str:
        with pytest.raises(InputError) as caught:
            command(*argv)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    stride = (saved[0], data.folder, "--stride")
    assert error(*stride, "17") == "--stride is 17: it must be from 1 to the window, 16"
    assert error(*stride, "0") == "--stride is 0: it must be a whole number, 1 or more"
    assert "evaluate MODEL hellaswag FILE" in error(saved[0], "hellaswag")
    assert "give it alone" in error(saved[0], data.folder, "x")
    file = tmp_path / "file.jsonl"
    for task, content, words in (
        ("hellaswag", '{"ctx": "a"}', "file.jsonl:1: it needs ctx, endings and label"),
        ("hellaswag", '{"ctx": "a", "endings": ["b"], "label": 1}', "label 1 names no ending"),
        ("lambada", '{"text": "one"}', "needs a text of two words"),
        ("lambada", '{"text": "one "}', "needs a text of two words"),
        ("lambada", "{", "JSON is damaged"),
        ("lambada", "[1]", "is not an object"),
        ("lambada", "", "holds no examples"),
        ("lambada", json.dumps({"text": "a " + "b" * 99}), "the window holds 16"),
    ):
        file.write_text(content, encoding="utf-8")
        assert words in error(saved[0], task, file)
    small = GPT(replace(CONFIG, vocab_size=100))
    with pytest.raises(InputError, match="vocabulary of 257, but the model has 100"):
        evaluate_data(small, data)


@pytest.mark.parametrize("form", ["C", "plain"])
def test_a_loss_that_is_no_number_is_refused_in_one_line(form, data, monkeypatch):
    if form == "plain":
        monkeypatch.setenv("TINYGPT_KERNELS", "0")
    broken = randomize(GPT(replace(CONFIG, n_layer=1)))
    broken.wpe.weight.assign(broken.wpe.weight * np.inf).realize()
    for refused in (
        lambda: evaluate_data(broken, data),
        lambda: tasks.score_continuation(Scorer(broken), [1, 2], [3]),
    ):
        with pytest.raises(InputError, match="logits are not finite numbers"):
            refused()
