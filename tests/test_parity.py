"""Checkpoints go to and from the transformers package, and both give the same logits and tokens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL, randomize
from tinygrad import Tensor

from tinygpt import GPT, Generator, Record
from tinygpt.checkpoints.config_json import read_config
from tinygpt.tokenizer.encoding import save_tokenizer
from tinygpt.tokenizer.vocabulary import from_merges, spell

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).parents[1]
TOKENS = np.random.default_rng(1).integers(0, SMALL.vocab_size, (2, 9))
SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 16, "vocab_size": 67}


@pytest.fixture(autouse=True)
def quiet():
    """No progress bars and no advice: of what transformers prints, errors alone."""
    log = transformers.utils.logging
    before = log.get_verbosity()
    log.set_verbosity_error()
    log.disable_progress_bar()
    yield
    log.enable_progress_bar()
    log.set_verbosity(before)


def theirs_of(kind: str = "GPT2LMHeadModel", **options):
    """A model of theirs, weights and biases all drawn, and large, so that each part counts.

    Positions are the largest: they keep greedy decoding from going in circles.
    """
    # eager: their one attention that obeys reorder_and_upcast_attn
    usual = {"attn_implementation": "eager", "bos_token_id": None, "eos_token_id": None}
    config = transformers.GPT2Config(**{**SHAPE, **usual, **options})
    model = getattr(transformers, kind)(config).eval()
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = 1.0 if ".ln_" in name and name.endswith("weight") else 0.0
            scale = 1.0 if "wpe" in name else 0.3
            value = rng.normal(mean, scale, tuple(parameter.shape)).astype(np.float32)
            parameter.copy_(torch.from_numpy(value))
    return model


def their_logits(model) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS)).logits.numpy()


def our_logits(model: GPT) -> np.ndarray:
    return model(Tensor(TOKENS.astype(np.int32))).numpy()


def greedy(model, prompt: list[int], count: int, **options) -> list[int]:
    """What they continue a prompt with."""
    ids = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=count,
        do_sample=False,
        **{"pad_token_id": 0, "eos_token_id": None, **options},
    )
    return ids[0, len(prompt) :].tolist()


# From them to us.

OPTIONS = {
    "default": {},
    "gelu": {"activation_function": "gelu"},
    "relu": {"activation_function": "relu"},
    "gelu_pytorch_tanh": {"activation_function": "gelu_pytorch_tanh"},
    "inner width": {"n_inner": 24},
    "epsilon": {"layer_norm_epsilon": 0.1},
    "unscaled": {"scale_attn_weights": False},
    "inverse layer": {"scale_attn_by_inverse_layer_idx": True},
    "reordered": {"reorder_and_upcast_attn": True},
    "own head": {"tie_word_embeddings": False},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_logits_equal_theirs(tmp_path, options):
    theirs = theirs_of(**options)
    theirs.save_pretrained(tmp_path)
    expected = their_logits(theirs)
    assert expected.shape == (2, 9, 67)
    assert np.abs(expected).max() > 1
    found = our_logits(GPT.from_pretrained(tmp_path))
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


def test_each_option_changes_their_logits():
    """So that the test above could fail."""
    same = ("gelu_pytorch_tanh", "reordered")  # as the default, in what they compute
    seen = [their_logits(theirs_of(**o)) for name, o in OPTIONS.items() if name not in same]
    for i, one in enumerate(seen):
        for other in seen[:i]:
            assert np.abs(one - other).max() > 5e-4


def test_what_is_recorded_equals_what_they_put_out(tmp_path):
    theirs_of().save_pretrained(tmp_path)
    ours, record = GPT.from_pretrained(tmp_path), Record()
    ours(TOKENS, record=record)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, attn_implementation="eager")
    with torch.no_grad():
        wanted = {"output_attentions": True, "output_hidden_states": True}
        found = theirs.eval()(torch.from_numpy(TOKENS), **wanted)
    for one, other in zip(record.attention_weights, found.attentions, strict=True):
        np.testing.assert_allclose(one.numpy(), other.numpy(), atol=1e-4, rtol=1e-4)
    hidden = [*record.hidden_states[:-1], ours.ln_f(record.hidden_states[-1])]  # theirs end so
    for one, other in zip(hidden, found.hidden_states, strict=True):
        np.testing.assert_allclose(one.numpy(), other.numpy(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_checkpoints_give_the_logits_of_their_values(tmp_path, dtype):
    theirs = theirs_of().to(getattr(torch, dtype))
    theirs.save_pretrained(tmp_path)
    expected = their_logits(theirs.float())
    found = our_logits(GPT.from_pretrained(tmp_path))
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


def test_their_shards_load(tmp_path):
    theirs = theirs_of()
    theirs.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    assert not (tmp_path / "model.safetensors").exists()
    found = our_logits(GPT.from_pretrained(tmp_path))
    np.testing.assert_allclose(found, their_logits(theirs), atol=1e-4, rtol=0)


def test_their_model_without_a_head_loads(tmp_path):
    theirs = theirs_of("GPT2Model")
    theirs.save_pretrained(tmp_path)
    with torch.no_grad():
        hidden = theirs(torch.from_numpy(TOKENS)).last_hidden_state
        expected = (hidden @ theirs.wte.weight.T).numpy()
    found = our_logits(GPT.from_pretrained(tmp_path))
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


def test_an_empty_config_means_the_same_model(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}', encoding="utf-8")
    ours, theirs = read_config(tmp_path / "config.json"), transformers.GPT2Config()
    names = (
        "n_layer n_head n_embd n_inner vocab_size layer_norm_epsilon scale_attn_weights "
        "scale_attn_by_inverse_layer_idx tie_word_embeddings initializer_range"
    )
    for name in names.split():
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.block_size == theirs.n_positions
    assert (ours.activation, theirs.activation_function) == ("gelu_tanh", "gelu_new")


GREEDY = {
    "two layers": {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 97},
    "own head": {
        "n_layer": 3, "n_head": 4, "n_embd": 64, "vocab_size": 500, "tie_word_embeddings": False,
    },
    "whole vocabulary": {
        "n_layer": 1, "n_head": 1, "n_embd": 16, "vocab_size": 50257,
        "tie_word_embeddings": False,
    },
}  # fmt: skip


@pytest.mark.parametrize("shape", GREEDY.values(), ids=GREEDY)
def test_200_greedy_tokens_equal_theirs(tmp_path, shape):
    theirs = theirs_of(**shape, n_positions=256)
    theirs.save_pretrained(tmp_path)
    prompt = [5, 9, 2, 33, 60, 1, 7]
    expected = greedy(theirs, prompt, 200)
    assert len(expected) == 200
    assert len(set(expected[-50:])) > 5  # not going in circles
    generator = Generator(GPT.from_pretrained(tmp_path))
    assert list(generator.generate(prompt, max_new_tokens=200, temperature=0)) == expected


# From us to them.


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False},
        {"tie_word_embeddings": False},
        {"n_inner": 24, "activation": "gelu", "layer_norm_epsilon": 0.1},
        {"activation": "relu", "bias": False, "tie_word_embeddings": False},
        {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True},
    ],
    ids=lambda options: " ".join(options) or "default",
)
def test_what_we_save_gives_them_the_same_logits(tmp_path, options):
    ours = randomize(GPT(replace(SMALL, **options)))
    ours.save_pretrained(tmp_path)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert type(theirs) is transformers.GPT2LMHeadModel
    for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not report[fault], fault
    np.testing.assert_allclose(their_logits(theirs.eval()), our_logits(ours), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{"norm": "post"}, {"position": "sinusoidal"}, {"shortcut": False}],
    ids=["post-norm", "sinusoidal", "no shortcut"],
)
def test_they_refuse_by_name_what_gpt2_cannot_express(tmp_path, options):
    GPT(replace(SMALL, **options)).save_pretrained(tmp_path)
    assert (
        json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["model_type"]
        == "tinygpt"
    )
    for auto in (transformers.AutoConfig, transformers.AutoModelForCausalLM):
        with pytest.raises((ValueError, KeyError), match="tinygpt"):
            auto.from_pretrained(tmp_path)


# From the command line.


def save_small_tokenizer(folder: Path) -> int:
    """256 bytes, a few merges, the end of text; how many ids that makes."""
    vocab = {spell(bytes([byte])): byte for byte in range(256)}
    merges = [[spell(left), spell(right)] for left, right in ((b" ", b"t"), (b"h", b"e"))]
    merges += [[spell(b"e"), spell(b"a")], [spell(b"i"), spell(b"n")], [spell(b"in"), spell(b"g")]]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    vocab["<|endoftext|>"] = len(vocab)
    save_tokenizer(from_merges(vocab, merges, "small"), folder)
    assert {"vocab.json", "merges.txt"} <= set(os.listdir(folder))
    return len(vocab)


def test_the_program_writes_the_tokens_that_they_write(tmp_path):
    text = "The meaning of life is"
    end = save_small_tokenizer(tmp_path) - 1
    theirs = theirs_of(
        n_positions=256, vocab_size=end + 1, tie_word_embeddings=False,
        bos_token_id=end, eos_token_id=end,
    )  # fmt: skip
    theirs.save_pretrained(tmp_path)
    prompt = transformers.GPT2Tokenizer.from_pretrained(str(tmp_path))(text)["input_ids"]
    assert len(prompt) == len(text) - 4  # "he", "ea" and "ing" are one each
    expected = greedy(theirs, prompt, 128, eos_token_id=end, pad_token_id=end)
    expected = expected[: expected.index(end)] if end in expected else expected
    assert len(set(expected[-50:])) > 5
    done = subprocess.run(
        [sys.executable, "run.py", text, "--model", str(tmp_path), "--json"],
        cwd=ROOT,
        env={**os.environ, "DEV": "CPU"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["prompt_tokens"] == prompt
    assert [sample["tokens"] for sample in report["samples"]] == [expected]
