"""A writer: what the command line and a server have in common, without either."""

from __future__ import annotations

from dataclasses import replace

import pytest
from conftest import randomize, save_with_bytes
from program import CONFIG
from tinygrad.nn.state import get_state_dict

from tinygpt import GPT, Generator, GPTConfig, InputError, generate, load_tokenizer
from tinygpt.tokenizer.encoding import char_tokenizer
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


def test_an_empty_prompt_of_a_model_without_the_start_token_is_token_0(writer):
    small = GPT(replace(CONFIG, vocab_size=256))
    assert Writer(small, writer.tokenizer).encode("") == [0]
    assert Writer(small, replace(writer.tokenizer, bos=None, eos=None)).encode("") == [0]


def test_the_built_in_model_starts_from_a_new_line(writer):
    named = GPT(CONFIG)
    named.name = "shakespeare"
    assert Writer(named, writer.tokenizer).encode("") == list(b"\n")


def test_a_new_model_has_the_tokenizer_of_its_vocabularys_size(monkeypatch):
    asked = []
    real = load_tokenizer("bytes")
    monkeypatch.setattr("tinygpt.writer.load_tokenizer", lambda *a: asked.append(a) or real)
    monkeypatch.setattr("tinygpt.writer.GPT", lambda config, seed: (config, seed))
    monkeypatch.setattr("tinygpt.writer.convert", lambda made, dtype: GPT(CONFIG))
    for size in (50257, 50256, 50258):
        Writer.new(replace(CONFIG, vocab_size=size), 3)
    assert asked == [("gpt2", 50257), ("bytes", 50256), ("bytes", 50258)]


def test_where_a_tokenizer_cannot_be_read_ids_are_the_text_if_asked_for(model, tmp_path, capsys):
    model.save_pretrained(tmp_path)
    (tmp_path / "tinygpt_tokenizer.json").write_text('{"kind": "other"}', encoding="utf-8")
    with pytest.raises(InputError, match="must be of kind"):
        Writer.open(str(tmp_path))
    assert Writer.open(str(tmp_path), ids=True).tokenizer.decode([72, 105]).split() == ["72", "105"]
    assert "the text below is ids" in capsys.readouterr().err


def test_what_is_not_said_is_128_tokens_at_temperature_0_8(writer, model):
    writer.model.tokenizer = replace(writer.tokenizer, eos=None)
    ids = list(Generator(model).generate(list(b"Hi"), 128, 5, temperature=0.8))
    assert generate(writer.model, "Hi", seed=5) == writer.tokenizer.decode(ids)


def test_a_new_model_has_the_ids_of_its_tokenizer():
    config = GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=4, vocab_size=300)
    assert Writer.new(config, 0, tokenizer="bytes").model.config.vocab_size == 300
    fitted = Writer.new(config, 0, tokenizer="bytes", fit_vocabulary=True)
    assert fitted.model.config.vocab_size == 257


def test_what_cannot_be_had_is_refused(tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        Writer.open(str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="did you mean 'int8'"):
        Writer.open(str(tmp_path), dtype="int88")


def test_one_call_continues_a_text_and_streams_it(writer, model, tmp_path):
    save_with_bytes(model, tmp_path)
    loaded = GPT.from_pretrained(tmp_path)
    settings = {"seed": 3, "temperature": 0.9, "top_k": 40}
    ids = list(Generator(model).generate(list(b"Hi"), 9, 3, [256], temperature=0.9, top_k=40))
    text = generate(loaded, "Hi", 9, **settings)
    assert text == writer.tokenizer.decode(ids)
    pieces = generate(loaded, "Hi", 9, stream=True, **settings)
    assert next(pieces)
    assert len(list(pieces)) > 1
    assert "".join(generate(loaded, "Hi", 9, stream=True, **settings)) == text
    stop = text[-1]
    assert generate(loaded, "Hi", 9, stop=stop, **settings) == text[: text.index(stop)]
    assert generate(loaded, "", 0) == ""


def test_a_model_brings_its_tokenizer_and_keeps_it(model, tmp_path):
    new = GPT(CONFIG)
    with pytest.raises(InputError, match="a new model has no tokenizer"):
        generate(new, "Hi")
    new.tokenizer = char_tokenizer("Hi there")
    new.save_pretrained(tmp_path)
    loaded = GPT.from_pretrained(tmp_path)
    assert loaded.tokenizer.encode("Hi") == new.tokenizer.encode("Hi") != list(b"Hi")
    assert get_state_dict(loaded).keys() == get_state_dict(model).keys()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "gpt2"}, "model is 'gpt2': give one that GPT.from_pretrained has loaded"),
        ({"prompt": [1, 2]}, r"the prompt is \[1, 2\]: give text"),
        ({"max_tokens": 3}, "unknown sampling setting 'max_tokens'"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1"),
        ({"stop": ""}, "stop text '' is empty"),
        ({"stop": 5}, "stop text 5 is no text"),
        ({"stop": ["x", 5]}, "stop text 5 is no text"),
        ({"stop_tokens": [1]}, "unknown sampling setting 'stop_tokens'"),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
def test_a_bad_argument_of_the_one_call_is_refused_at_once(writer, change, words, stream):
    writer.model.tokenizer = writer.tokenizer
    with pytest.raises(InputError, match=words):
        generate(**{"model": writer.model, "prompt": "Hi", "stream": stream, **change})


def test_no_stop_text_may_be_said_as_none(writer):
    writer.model.tokenizer = writer.tokenizer
    assert generate(writer.model, "Hi", 3, seed=1, stop=None) == generate(
        writer.model, "Hi", 3, seed=1
    )


@pytest.mark.parametrize(
    ("says", "sampling"),
    [
        ({"do_sample": True, "top_k": 0, "temperature": 0.7}, {"temperature": 0.7}),
        ({"do_sample": True, "top_k": 0, "top_p": 1.0}, {"temperature": 1.0, "top_p": 1.0}),
        ({"do_sample": True, "top_k": 5}, {"temperature": 1.0, "top_k": 5}),
        (
            {"do_sample": True, "min_p": 0.05, "repetition_penalty": 1.1},
            {"temperature": 1.0, "min_p": 0.05, "repetition_penalty": 1.1},
        ),
        ({"do_sample": False, "top_k": "x"}, {"temperature": 0.0}),
    ],
)
def test_what_a_models_files_turn_off_is_off(says, sampling, model, writer):
    words = replace(writer.tokenizer, kept={"generation_config.json": says})
    found = Writer(model, words)
    assert found.sampling == sampling
    assert len(list(found.stream([1], 2, [1], **found.sampling))) in (1, 2)


@pytest.mark.parametrize("wrong", [{"top_k": "x"}, {"temperature": [1]}, {"top_p": 7}], ids=str)
def test_a_wrong_setting_of_a_models_files_names_the_file(wrong, model, writer):
    says = {"do_sample": True, **wrong}
    found = Writer(model, replace(writer.tokenizer, kept={"generation_config.json": says}))
    with pytest.raises(InputError, match=rf"generation_config\.json: {next(iter(wrong))} is "):
        found.sampling  # noqa: B018


def test_what_is_no_tokenizer_or_name_is_refused_where_it_is_given(model):
    with pytest.raises(InputError, match=r"model\.tokenizer is 'gpt2': set a tokenizer"):
        GPT(CONFIG).tokenizer = "gpt2"
    for given in (None, 5, b"gpt2"):
        with pytest.raises(InputError, match=r"the model is .*: give a name or a path"):
            GPT.from_pretrained(given)


def test_models_generators_and_configurations_tell_what_they_are(writer, model):
    config = "GPTConfig(n_layer=1, n_head=1, n_embd=16, block_size=16, vocab_size=257)"
    assert repr(CONFIG) == config
    assert repr(model) == f"GPT({CONFIG.parameter_count:,} parameters, float32, {config})"
    assert repr(writer.model).startswith(f"GPT({writer.model.name!r}, ")
    assert repr(Generator(model)) == f"Generator({model!r}, chunk_size=16)"
    other = GPTConfig(norm="post", bias=False)
    assert eval(repr(other)) == other


@pytest.mark.parametrize(
    ("says", "most", "sentence"),
    [
        ({}, 128, None),
        ({"max_new_tokens": 9, "sentence_after": 7}, 9, 7),
        ({"max_new_tokens": "9", "sentence_after": 7.0}, 128, None),
        ({"max_new_tokens": 0, "sentence_after": 0}, 128, None),
    ],
)
def test_its_files_say_how_much_it_writes_where_nobody_else_does(
    says, most, sentence, writer, model
):
    words = replace(writer.tokenizer, kept={"generation_config.json": says})
    found = Writer(model, words)
    assert (found.max_new_tokens, found.sentence_after) == (most, sentence)
