"""Checkpoints of every form, each by its own program: what it computes, the loaded model computes.

And the way out: what `tinygpt convert` writes, `transformers` and llama.cpp continue alike.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import writers
from conftest import randomize, save_with_bytes, weights_of
from tinygrad import Tensor
from writers import SHAPE, TOKENS, WRITERS

from tinygpt import GPT, Generator, GPTConfig, load_tokenizer
from tinygpt.checkpoints import gguf_file
from tinygpt.checkpoints.detect_form import drop_tied_copy
from tinygpt.checkpoints.open_checkpoint import open_checkpoint
from tinygpt.checkpoints.safetensors_file import read_header
from tinygpt.checkpoints.safetensors_file import write as write_safetensors
from tinygpt.checkpoints.save_gguf import save_gguf
from tinygpt.checkpoints.tensor_names import NANOGPT
from tinygpt.commands.main import main
from tinygpt.errors import CheckpointError, InputError
from tinygpt.tokenizer.encoding import char_tokenizer, encode, save_tokenizer

SMALL = GPTConfig(n_layer=2, n_head=2, n_embd=64, block_size=32, vocab_size=300)


def our_logits(model: GPT, tokens: np.ndarray = TOKENS) -> np.ndarray:
    return model(Tensor(tokens.astype(np.int32))).numpy()


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> tuple[Path, GPT]:
    """A model of ours and its folder, with a tokenizer."""
    folder = tmp_path_factory.mktemp("ours")
    save_with_bytes(model := randomize(GPT(SMALL)), folder)
    return folder, model


# In.


@pytest.mark.parametrize("form", WRITERS)
def test_each_form_computes_what_its_own_program_does(form, tmp_path):
    path, expected = WRITERS[form][1](tmp_path)
    model = GPT.from_pretrained(path)
    assert np.abs(expected).max() > 2
    np.testing.assert_allclose(our_logits(model), expected, atol=1e-5 * np.abs(expected).max())
    assert open_checkpoint(path).config == model.config
    if path.is_file():  # and the folder means its one file
        assert open_checkpoint(path).config == open_checkpoint(tmp_path).config


def test_the_content_tells_the_form_and_not_the_name(tmp_path):
    for form in ("nanoGPT", "GGUF F16", "the book, safetensors"):
        place = tmp_path / form
        place.mkdir()
        path, expected = WRITERS[form][1](place)
        odd = path.rename(place / "weights.data")
        found = our_logits(GPT.from_pretrained(odd))
        np.testing.assert_allclose(found, expected, atol=1e-4)
    with pytest.raises(CheckpointError, match=r"none of .* is there"):
        GPT.from_pretrained(place)  # but a folder with none of the usual names is a question


def test_a_file_of_hugging_faces_form_is_its_folder(tmp_path):
    _, expected = WRITERS["Hugging Face, pytorch_model.bin"][1](tmp_path)
    model = GPT.from_pretrained(tmp_path / "pytorch_model.bin")
    np.testing.assert_allclose(our_logits(model), expected, atol=1e-4)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config.json: no such file"):
        GPT.from_pretrained(tmp_path / "pytorch_model.bin")


def test_heads_beside_the_language_model_are_left_out_by_name(tmp_path, capsys):
    path, _ = writers.hf_with_heads(tmp_path)
    open_checkpoint(path)
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert "left out of" in err
    for name in ("v_head.summary.weight", "multiple_choice_head.summary.bias"):
        assert name in err
    assert "more" not in err
    torch = pytest.importorskip("torch")
    state = torch.load(path / "pytorch_model.bin")
    state |= {f"{name}_head.weight": torch.ones(1) for name in ("q", "reward")}
    torch.save(state, path / "pytorch_model.bin")
    open_checkpoint(path)
    assert "multiple_choice_head.summary.bias and 2 more, beside" in capsys.readouterr().err


# Prefix -> what stands before the names of the model and of the heads beside it.
OWNERS = {
    "trl's": ("pretrained_model.", "v_head.summary.weight"),
    "trl's, wrapped": ("module.pretrained_model.", "module.v_head.summary.weight"),
    "Lightning's": ("gpt.", "loss_head.weight"),
    "of two parts": ("policy.net.", "critic.0.weight"),
    "below a usual one": ("model.my_model.model.", "model.my_model.reward_head.weight"),
    "trlx's": ("base_model.", "ilql_heads.q_heads.0.2.weight"),
    "none": ("", "frozen_head.decoder_blocks.0.attn.c_attn.weight"),
}


@pytest.mark.parametrize("form", ["Hugging Face", "nanoGPT", "the book"])
@pytest.mark.parametrize("kind", OWNERS)
def test_one_name_before_all_of_a_model_is_left_off(kind, form, tmp_path, capsys):
    torch = pytest.importorskip("torch")
    prefix, head = OWNERS[kind]
    if form == "nanoGPT":
        path, expected = writers.nanogpt(tmp_path, prefix=prefix)
    elif form == "the book":
        path, expected = writers.book(
            tmp_path, change=lambda s: {prefix + name: value for name, value in s.items()}
        )
    else:
        folder, expected = writers.hf_bin(tmp_path)
        path = folder / "pytorch_model.bin"
        state = {prefix + name: value for name, value in torch.load(path).items()}
        state[head] = torch.ones(SHAPE["vocab_size"] if "q_heads" in head else 1, SHAPE["n_embd"])
        torch.save({"state_dict": state, "epoch": 1}, path)
    np.testing.assert_allclose(our_logits(GPT.from_pretrained(path)), expected, atol=1e-4)
    left_out = [line for line in capsys.readouterr().err.splitlines() if "left out of" in line]
    assert len(left_out) == (form == "Hugging Face")
    part = re.search(r"\w+_heads?|critic", head)[0]
    assert all(f" {part}." in line for line in left_out)


# Kind -> names that a program would add to a whole model's, and what is then said of them.
BELONG = {
    "a part of a block": ("h.0.v_head.weight", "not part of the model: h.0.v_head.weight"),
    "of another name": ("criterion.weight", "not part of the model: criterion.weight"),
    "a head for each token": ("output_head.weight", "not part of the model: output_head.weight"),
    "a second model": ("teacher.wte.weight", "not part of the model: teacher.wte.weight"),
    "twice": ("wte.weight", "not part of the model: gpt."),
    "a head twice": ("lm_head.weight", "'lm_head.weight' is there twice, with 'gpt.' before it"),
    "a classifier's": ("gpt.cls_head.dense.weight", r"a classifier \(cls_head.dense.weight\)"),
}


@pytest.mark.parametrize("kind", BELONG)
def test_what_may_belong_to_a_model_is_not_left_out(kind, tmp_path):
    torch = pytest.importorskip("torch")
    name, words = BELONG[kind]
    folder, _ = writers.hf_bin(tmp_path)
    prefix = "gpt." if name.startswith("gpt.") or "twice" in kind else ""
    state = torch.load(folder / "pytorch_model.bin")
    state = {prefix + name: value for name, value in state.items()}
    state[name] = torch.ones(SHAPE["vocab_size"], SHAPE["n_embd"])
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=words):
        GPT.from_pretrained(folder)


@pytest.mark.parametrize("head", ["score.weight", "classifier.bias", "module.qa_outputs.weight"])
def test_a_classifier_is_refused_by_name(head, tmp_path, ours):
    folder = Path(shutil.copytree(ours[0], tmp_path / "in"))
    write_safetensors(folder / "b.safetensors", {head: ("F32", (2,))}, lambda _: np.ones(2, "f4"))
    index = {"weight_map": {"a": "model-1.safetensors", "b": "b.safetensors"}}
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    words = rf"it is a classifier \({head.removeprefix('module.')}\): only language models"
    with pytest.raises(CheckpointError, match=words):
        GPT.from_pretrained(folder)


def test_weights_without_a_configuration_say_which_one_to_write(tmp_path):
    path, expected = writers.mingpt(tmp_path, config=False)
    with pytest.raises(
        CheckpointError, match=r"config.json: no such file: write one with"
    ) as caught:
        GPT.from_pretrained(path)
    text = str(caught.value)
    assert "N being its number of heads" in text
    asked = text[text.index("{") : text.index("}") + 1].replace(" N,", " 2,")
    assert json.loads(asked) == {**SHAPE, "activation_function": "gelu_new"}
    (tmp_path / "config.json").write_text(asked, encoding="utf-8")
    np.testing.assert_allclose(our_logits(GPT.from_pretrained(path)), expected, atol=1e-4)
    (tmp_path / "hf").mkdir()
    folder, expected = writers.hf_bin(tmp_path / "hf")
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"hf/config.json: no such file") as caught:
        GPT.from_pretrained(folder)
    text = str(caught.value)
    asked = text[text.index("{") : text.index("}") + 1].replace(" N,", " 2,")
    assert json.loads(asked) == SHAPE
    (folder / "config.json").write_text(asked, encoding="utf-8")
    np.testing.assert_allclose(our_logits(GPT.from_pretrained(folder)), expected, atol=1e-4)


def test_the_configuration_that_mingpt_leaves_beside_its_weights_is_told(tmp_path):
    path, _ = writers.mingpt(tmp_path, config=False)
    theirs = {"system": {"seed": 1}, "model": {"model_type": "gpt-mini", "n_layer": None}}
    (tmp_path / "config.json").write_text(json.dumps(theirs), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"it has no n_head: write one with \{\"n_layer\": 2"):
        GPT.from_pretrained(path)


def test_weights_of_another_model_without_a_configuration_are_told(tmp_path):
    layout = {"encoder.weight\n": ("F32", (2,))}
    write_safetensors(tmp_path / "x.safetensors", layout, lambda _: np.ones(2, "f4"))
    words = r"no such file, and its tensors \('encoder.weight\\n'\) are not named as a GPT-2's"
    with pytest.raises(CheckpointError, match=words):
        GPT.from_pretrained(tmp_path)


def test_a_shape_that_was_pickled_as_an_object_without_its_fields_is_asked_for(tmp_path):
    torch = pytest.importorskip("torch")
    path, _ = writers.build_nanogpt(tmp_path)
    state = writers.nanogpt_model(True, "tanh").state_dict()
    config = writers.GPTConfig(*range(2, 7))
    del config.n_head  # as of a class whose settings are attributes of the class
    torch.save({"model": state, "config": config}, path)
    with pytest.raises(CheckpointError, match=r"config.json: no such file: write one with"):
        GPT.from_pretrained(path)


@pytest.mark.parametrize("name", ["n_layer", "block_size", "vocab_size"])
def test_a_shape_of_nanogpts_that_lacks_something_is_told(name, tmp_path):
    torch = pytest.importorskip("torch")
    path, _ = writers.nanogpt(tmp_path)
    saved = torch.load(path)
    del saved["model_args"][name]
    torch.save(saved, path)
    with pytest.raises(CheckpointError, match=f"its model_args have no {name}"):
        GPT.from_pretrained(path)


GPT2 = {
    "general.architecture": "gpt2", "gpt2.block_count": 1, "gpt2.attention.head_count": 1,
    "gpt2.embedding_length": 4, "gpt2.context_length": 8,
    "gpt2.attention.layer_norm_epsilon": 1e-5,
}  # fmt: skip
TABLE = {"token_embd.weight": ("F32", (9, 4))}


@pytest.mark.parametrize(
    ("metadata", "layout", "words"),
    [
        (GPT2 | {"split.count": 2}, TABLE, "one of several parts: join them with llama.cpp's"),
        (GPT2 | {"split.count": 1}, TABLE, "1 tensors, for 0 layers at most"),
        (GPT2 | {"gpt2.context_length": ["8"]}, TABLE, "have no number gpt2.context_length"),
        (GPT2, {"output.weight": ("F32", (9, 4))}, "missing token_embd.weight"),
        (GPT2, {"token_embd.weight": ("F32", (36,))}, r"is \(36,\): it must have 2 axes"),
    ],
)
def test_a_gguf_that_lacks_what_gpt2_has_is_told(metadata, layout, words, tmp_path):
    path = tmp_path / "x.gguf"
    gguf_file.write(path, metadata, layout, lambda name: np.zeros(layout[name][1], np.float32))
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(path)


def test_nanogpts_head_is_its_embedding_and_the_books_may_be(tmp_path):
    path, _ = writers.nanogpt(tmp_path)
    config = open_checkpoint(path).config
    assert config.tie_word_embeddings
    assert config.activation == "gelu"
    torch = pytest.importorskip("torch")
    path, _ = writers.book(tmp_path)
    assert not open_checkpoint(path).config.tie_word_embeddings
    state = torch.load(path)
    state["out_head.weight"] = state["tok_emb.weight"].clone()  # as with OpenAI's weights
    torch.save(state, path)
    assert open_checkpoint(path).config.tie_word_embeddings


@pytest.mark.parametrize("row", [None, 0, 299, 300])
def test_a_head_is_a_copy_only_where_all_its_bytes_are(row, tmp_path):
    """Of more bytes than are compared at a time."""
    wte = np.random.default_rng(0).normal(size=(300, 1024)).astype(np.float32)
    arrays = {"wte.weight": wte, "lm_head.weight": wte.copy()}
    if row == 300:
        arrays["lm_head.weight"] = np.r_[wte, wte[:1]]
    elif row is not None:
        arrays["lm_head.weight"][row, -1 if row else 0] += 1
    path = tmp_path / "x.safetensors"
    layout = {name: ("F32", value.shape) for name, value in arrays.items()}
    write_safetensors(path, layout, arrays.__getitem__)
    tensors = {name: (path, info) for name, info in read_header(path)[0].items()}
    assert ("lm_head.weight" in drop_tied_copy(tensors, NANOGPT)) == (row is not None)


def test_the_books_heads_are_64_wide_unless_a_config_says_else(tmp_path):
    path, _ = writers.book(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"the number of heads is not in the file.*n_head"):
        GPT.from_pretrained(path)
    shapes = {name: value.shape for name, value in writers.book_model(False).state_dict().items()}
    wide = {name: [128 if n == 32 else 4 * 128 if n == 128 else n for n in shape]
            for name, shape in shapes.items()}  # fmt: skip
    layout = {name: ("F32", tuple(shape)) for name, shape in wide.items()}
    write_safetensors(tmp_path / "x.safetensors", layout, lambda n: np.zeros(layout[n][1], "f4"))
    assert open_checkpoint(tmp_path / "x.safetensors").config.n_head == 2
    (tmp_path / "config.json").write_text(
        '{"n_head": 64}', encoding="utf-8"
    )  # which divides no width of GPT-2's
    assert open_checkpoint(tmp_path / "x.safetensors").config.n_head == 64
    assert open_checkpoint(tmp_path / "x.safetensors").config.n_inner is None
    layout = {name: (kind, tuple(96 if n == 4 * 128 else n for n in shape))
              for name, (kind, shape) in layout.items()}  # fmt: skip
    write_safetensors(tmp_path / "x.safetensors", layout, lambda n: np.zeros(layout[n][1], "f4"))
    assert open_checkpoint(tmp_path / "x.safetensors").config.n_inner == 96


def test_a_configuration_that_asks_for_too_much_is_refused_at_once(tmp_path, ours):
    (tmp_path / "model.safetensors").write_bytes((ours[0] / "model.safetensors").read_bytes())
    config = json.loads((ours[0] / "config.json").read_text(encoding="utf-8"))
    for change, words in (
        (
            {"n_layer": 10**6},
            "28 tensors, for 4 layers at most, but its configuration says n_layer 1000000",
        ),
        ({"n_layer": 6}, "28 tensors, for 4 layers at most, but its configuration says n_layer 6"),
        (
            {"model_type": "tinygpt", "position": "sinusoidal", "n_positions": 10**6},
            "1000000 positions, where 131072 are read at most",
        ),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change), encoding="utf-8")
        with pytest.raises(CheckpointError, match=words):
            GPT.from_pretrained(tmp_path)


def test_weights_that_are_no_numbers_are_refused(tmp_path, ours):
    for value in (np.nan, np.inf, -np.inf):
        model = GPT.from_pretrained(ours[0])
        bias = model.blocks[1].mlp.c_fc.bias
        bias.assign(Tensor(np.r_[value, bias.numpy()[1:]].astype(np.float32))).realize()
        model.save_pretrained(tmp_path)
        with pytest.raises(
            CheckpointError, match=r"h.1.mlp.c_fc.bias has values that are infinite"
        ):
            GPT.from_pretrained(tmp_path)


def test_what_cannot_fit_is_refused_by_the_headers_alone(tmp_path, monkeypatch):
    def read_tensor(*_: object) -> np.ndarray:
        raise AssertionError("weights were read")

    monkeypatch.setattr("tinygpt.checkpoints.load_weights.read_tensor", read_tensor)
    monkeypatch.setattr("tinygpt.runtime.memory.available_memory_bytes", lambda: 1000)
    for form in ("Hugging Face, pytorch_model.bin", "nanoGPT", "the book, .pth", "GGUF Q4_0"):
        (tmp_path / form).mkdir()
        path, _ = WRITERS[form][1](tmp_path / form)
        with pytest.raises(InputError, match=r"needs .* MiB of memory"):
            GPT.from_pretrained(path)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("general.architecture", b"llama", "its architecture is 'llama'"),
        ("tokenizer.ggml.model", b"bert", "'model': 'bert'"),
        ("tokenizer.ggml.pre", b"llama3", "'pre': 'llama3'"),
    ],
)
def test_another_gguf_is_refused_by_name(key, value, words, tmp_path):
    path, _ = WRITERS["GGUF F32"][1](tmp_path)
    data = path.read_bytes()
    at = data.index(key.encode()) + len(key) + 4
    length = struct.unpack("<Q", data[at : at + 8])[0]
    data = data[:at] + struct.pack("<Q", len(value)) + value + data[at + 8 + length :]
    path.write_bytes(data)
    load = GPT.from_pretrained if key.startswith("general") else load_tokenizer
    with pytest.raises(CheckpointError, match=words):
        load(path)


def test_a_gguf_files_tokenizer_gives_the_ids_that_transformers_gives(tmp_path):
    transformers = pytest.importorskip("transformers")
    path, _ = WRITERS["GGUF F32"][1](tmp_path)
    vocab = {token: i for i, token in enumerate(writers.byte_vocabulary())}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    merges = [" ".join(merge) for merge in writers.MERGES]
    (tmp_path / "merges.txt").write_text(
        "\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8"
    )
    theirs = transformers.GPT2Tokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    mine = load_tokenizer(path, 300)
    for text in ("hello the the  hell ofthe", "naïve 中文 \n\t!", " the"):
        assert encode(mine, text) == theirs(text).input_ids
    assert mine.n_vocab == 262  # without the padding


# Out.


def convert(capsys, *argv: object) -> tuple[int, str, str]:
    return (main(["convert", *map(str, argv)]), *capsys.readouterr())


@pytest.mark.parametrize("form", [*WRITERS])
@pytest.mark.parametrize("to", ["hf", "gguf"])
def test_a_round_trip_keeps_the_logits_bit_for_bit(form, to, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    path, _ = WRITERS[form][1](tmp_path / "in")
    before = GPT.from_pretrained(path, "float32")
    status, out, err = convert(
        capsys, path, tmp_path / "out", "--to", to, "--dtype", "float32", "--tokenizer", "bytes"
    )
    if to == "gguf" and before.config.activation == "gelu":  # nanoGPT's, and llama.cpp has not
        assert (status, out) == (2, "")
        assert "activation is 'gelu', which GGUF's gpt2 cannot say" in err
        assert not (tmp_path / "out").exists()
        return
    assert (status, out) == (0, f"{tmp_path / 'out'}\n"), err
    after = GPT.from_pretrained(tmp_path / "out")
    np.testing.assert_array_equal(our_logits(after), our_logits(before))


def test_transformers_loads_what_hf_is(ours, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    folder, model = ours
    assert convert(capsys, folder, tmp_path / "hf", "--to", "hf")[0] == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    found = theirs(torch.from_numpy(TOKENS)).logits.detach().numpy()
    np.testing.assert_allclose(found, our_logits(model), atol=1e-4)
    text = "To be, or naïve?\n"
    assert tokenizer(text).input_ids == list(text.encode())
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def llama_greedy(path: Path, prompt: list[int], count: int) -> list[int]:
    """What llama.cpp continues a prompt with."""
    pytest.importorskip("llama_cpp")
    from tinygpt.commands.peers import LlamaCpp

    llama = LlamaCpp(str(path), "float32", 1)
    return [row[0] for row in llama.generate([prompt], count)]


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_llama_cpp_continues_alike(dtype, ours, tmp_path, capsys):
    pytest.importorskip("llama_cpp")
    path = tmp_path / "x.gguf"
    assert convert(capsys, ours[0], path, "--to", "gguf", "--dtype", dtype)[0] == 0
    model = GPT.from_pretrained(path, "float32")  # with the values that the file has
    for prompt in ([72, 101, 108], [84], [0, 255, 256]):
        found = llama_greedy(path, prompt, 20)
        if dtype != "int8":
            assert found == [*Generator(model).generate(prompt, max_new_tokens=20, temperature=0)]
        # llama.cpp rounds what it multiplies with Q8_0 to as many bits, which may turn a near tie
        logits = our_logits(model, np.array([prompt + found[:-1]]))[0, len(prompt) - 1 :]
        behind = logits.max(-1) - logits[np.arange(20), found]
        assert behind.max() <= (0.05 if dtype == "int8" else 0) * np.abs(logits).max()


def test_llama_cpp_reads_our_vocabulary(ours, tmp_path, capsys):
    llama_cpp = pytest.importorskip("llama_cpp")
    path = tmp_path / "x.gguf"
    vocab = {token: i for i, token in enumerate(writers.byte_vocabulary())}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    merges = [" ".join(merge) for merge in writers.MERGES]
    (tmp_path / "merges.txt").write_text("\n".join(merges), encoding="utf-8")
    save_gguf(ours[1], path, load_tokenizer(tmp_path))
    theirs = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    mine = load_tokenizer(path)
    for text in ("hello the the  hell ofthe", "naïve 中文 \n\t!", " the"):
        assert theirs.tokenize(text.encode(), add_bos=False) == encode(mine, text)
    theirs.close()


def test_a_vocabulary_comes_back_from_gguf_as_it_was(ours, tmp_path):
    try:
        gpt2 = load_tokenizer("gpt2")
    except InputError:
        pytest.skip("the vocabulary is not in the cache, and there is no network")
    model = GPT(replace(SMALL, vocab_size=50304, n_layer=1))
    save_gguf(model, tmp_path / "x.gguf", gpt2, "float16")
    again = load_tokenizer(tmp_path / "x.gguf", 50304)
    assert (again.ranks, again.others) == (gpt2.ranks, gpt2.others)


CANNOT = {
    ("hf", "norm", "post"): "norm is 'post', which Hugging Face's gpt2 cannot say",
    ("hf", "position", "sinusoidal"): "position is 'sinusoidal', which Hugging Face's gpt2",
    ("hf", "shortcut", False): "shortcut is False, which Hugging Face's gpt2",
    ("gguf", "norm", "post"): "norm is 'post', which GGUF's gpt2 cannot say",
    ("gguf", "position", "sinusoidal"): "position is 'sinusoidal', which GGUF's gpt2",
    ("gguf", "shortcut", False): "shortcut is False, which GGUF's gpt2",
    ("gguf", "activation", "relu"): "activation is 'relu', which GGUF's gpt2",
    ("gguf", "scale_attn_weights", False): "scale_attn_weights is False, which GGUF's gpt2",
}


@pytest.mark.parametrize("case", CANNOT, ids=str)
def test_a_form_that_cannot_say_a_model_refuses_it_by_name(case, tmp_path, capsys):
    to, name, value = case
    GPT(replace(SMALL, **{name: value})).save_pretrained(tmp_path / "in")
    status, out, err = convert(capsys, tmp_path / "in", tmp_path / "out", "--to", to)
    assert (status, out) == (2, "")
    assert CANNOT[case] in err
    assert os.listdir(tmp_path) == ["in"]


@pytest.mark.parametrize("to", ["hf", "gguf"])
def test_a_full_disk_is_told_by_the_name_that_was_given(to, ours, tmp_path, capsys, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.chdir(tmp_path)
    status, out, err = convert(capsys, ours[0], "out", "--to", to)
    assert (status, out) == (2, "")
    assert re.search(r": cannot write out(/[\w.]+)?: no space left on device\n", err), err
    assert ".tmp" not in err
    assert os.listdir(tmp_path) == []


def test_what_convert_refuses_leaves_nothing(ours, tmp_path, capsys):
    folder = Path(shutil.copytree(ours[0], tmp_path / "in"))
    (tmp_path / "there").write_text("mine", encoding="utf-8")
    for argv, words in (
        ((folder, "there", "--to", "hf"), "there is there already: name another"),
        ((folder, "there", "--to", "gguf"), "there is there already: name another"),
        (
            (folder, "new", "--to", "gguf", "--dtype", "bfloat16"),
            "unknown dtype of GGUF 'bfloat16'",
        ),
        ((folder, "new", "--to", "hf", "--dtype", "int8"), "dtype is 'int8', which Hugging Face"),
        ((folder, "no/new", "--to", "gguf"), "cannot write"),
        ((folder, "new", "--to", "onnx"), "unknown --to 'onnx'"),
        (("absent", "new", "--to", "hf"), "cannot fetch"),
    ):
        source, out, *rest = argv
        os.environ["HF_ENDPOINT"] = "http://127.0.0.1:1"
        try:
            status, shown, err = convert(capsys, source, tmp_path / out, *rest)
        finally:
            del os.environ["HF_ENDPOINT"]
        assert (status, shown) == (2, ""), words
        assert words in err
        assert len(err.splitlines()) == 1
        assert sorted(os.listdir(tmp_path)) == ["in", "there"]
    save_tokenizer(char_tokenizer("aé"), folder)  # which bytes cannot spell
    status, _, err = convert(capsys, folder, tmp_path / "new", "--to", "gguf")
    assert status == 2
    assert "tokenizer 'char' has tokens of bytes such as" in err


def test_convert_refuses_a_damaged_tokenizer(ours, tmp_path, capsys):
    folder = Path(shutil.copytree(ours[0], tmp_path / "in"))
    (folder / "tinygpt_tokenizer.json").unlink()
    (folder / "vocab.json").write_text('{"a": 1, "b": 1}', encoding="utf-8")
    status, out, err = convert(capsys, folder, tmp_path / "out", "--to", "hf")
    assert (status, out) == (2, "")
    assert "id 1 is both 'a' and 'b'" in err
    assert os.listdir(tmp_path) == ["in"]


def test_a_model_of_no_biases_goes_out_with_zeros(tmp_path):
    model = randomize(GPT(replace(SMALL, bias=False)))
    save_gguf(model, tmp_path / "x.gguf")
    again = GPT.from_pretrained(tmp_path / "x.gguf")
    np.testing.assert_array_equal(our_logits(again), our_logits(model))
    assert not weights_of(again)["blocks.0.mlp.c_fc.bias"].any()


@pytest.mark.parametrize("changes", [{}, {"n_inner": 96}, {"tie_word_embeddings": False}], ids=str)
def test_a_configuration_comes_back_from_gguf_as_it_was(changes, tmp_path):
    config = replace(SMALL, n_layer=3, layer_norm_epsilon=1e-3, **changes)
    save_gguf(GPT(config), tmp_path / "x.gguf")
    found = open_checkpoint(tmp_path / "x.gguf").config
    assert replace(found, layer_norm_epsilon=1e-3) == config
    assert abs(found.layer_norm_epsilon / 1e-3 - 1) < 1e-6  # a float32 there


@pytest.mark.parametrize("held", ["float32", "float16", "bfloat16", "int8"])
def test_gguf_has_the_values_that_the_model_holds(held, ours, tmp_path):
    gguf = pytest.importorskip("gguf")
    model = GPT.from_pretrained(ours[0], held)
    save_gguf(model, tmp_path / "x.gguf")
    kinds = {"float16": "F16", "int8": "Q8_0"}
    found = {t.name: t for t in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    assert found["token_embd.weight"].tensor_type.name == kinds.get(held, "F32")
    logits = our_logits(GPT.from_pretrained(tmp_path / "x.gguf", "float32"))
    error = np.abs(logits - our_logits(model)).max()
    assert error < (1 if held == "int8" else 1e-4)


def test_the_command_writes_text_with_a_model_of_any_form(ours, tmp_path, capsys):
    path = tmp_path / "x.gguf"
    assert convert(capsys, ours[0], path, "--to", "gguf")[0] == 0
    texts = []
    for model in (ours[0], path):
        assert main(["Hi", "--model", str(model), "--max-new-tokens", "8", "--json"]) == 0
        texts.append(json.loads(capsys.readouterr().out)["samples"])
    assert texts[0] == texts[1]
    assert SHAPE["vocab_size"] == 300
