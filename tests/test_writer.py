"""A writer: what the command line and a server have in common, without either."""

from __future__ import annotations

import pytest
from conftest import randomize, save_with_bytes
from program import CONFIG

from tinygpt import GPT, Generator, GPTConfig, InputError
from tinygpt.writer import Writer


@pytest.fixture(scope="module")
def model() -> GPT:
    return randomize(GPT(CONFIG))


@pytest.fixture(scope="module")
def writer(model, tmp_path_factory) -> Writer:
    folder = tmp_path_factory.mktemp("saved")
    save_with_bytes(model, folder)
    return Writer.open(str(folder))


def test_it_streams_what_the_generator_yields(writer, model):
    ids = writer.encode("Hi")
    assert ids == list(b"Hi")
    rows = list(writer.stream(ids, 6, [3, 4], temperature=0.9))
    for row, seed in enumerate((3, 4)):
        expected = list(Generator(model).generate(ids, 6, seed, [256], temperature=0.9))
        assert [step[row] for step in rows if step[row] is not None] == expected


def test_it_goes_on_with_another_prompt(writer, model):
    for prompt in ("Hi", "You there"):
        ids = writer.encode(prompt)
        (expected,) = zip(*Generator(model).generate_batch([ids], 4, temperature=0), strict=True)
        assert [token for (token,) in writer.stream(ids, 4, [0], temperature=0)] == list(expected)


def test_its_text_ends_before_a_stop_text(writer):
    for stop, text in ((["tw", "x"], "one "), (["x"], "one two")):
        stream = writer.text_stream(stop)
        assert "".join(map(stream.add, b"one two")) + stream.end() == text
        assert stream.stopped == (text == "one ")


def test_an_empty_prompt_is_the_end_token_and_special_tokens_are_none_if_asked(writer):
    assert writer.encode("") == [256]
    assert writer.encode("<|endoftext|>") == [256]
    assert writer.encode("<|endoftext|>", special_tokens=False) == list(b"<|endoftext|>")


def test_a_new_model_has_the_ids_of_its_tokenizer():
    config = GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=4, vocab_size=300)
    assert Writer.new(config, 0, tokenizer="bytes").model.config.vocab_size == 300
    fitted = Writer.new(config, 0, tokenizer="bytes", fit_vocabulary=True)
    assert fitted.model.config.vocab_size == 257


def test_what_cannot_be_had_is_refused(tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        Writer.open(str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="did you mean 'int8'"):
        Writer.open(str(tmp_path), dtype="int9")
