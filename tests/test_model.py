from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from conftest import SMALL, randomize, reference_of, weights_of
from tinygrad import Tensor, Variable, dtypes
from tinygrad.nn.state import get_state_dict

from tinygpt import GPT, GPTConfig, Record, load_tokenizer
from tinygpt.errors import InputError
from tinygpt.runtime import buffers
from tinygpt.study.reference import sinusoids
from tinygpt.tokenizer.encoding import char_tokenizer

TOKENS = np.random.default_rng(1).integers(0, SMALL.vocab_size, (2, 9))

# Each option that changes the forward pass, alone; then all of them together.
OPTIONS = {
    "gpt2": {},
    "post-norm": {"norm": "post"},
    "deep norm": {"norm": "deep", "n_layer": 3},
    "deep norm without shortcut": {"norm": "deep", "shortcut": False},
    "sinusoidal": {"position": "sinusoidal"},
    "exact gelu": {"activation": "gelu"},
    "relu": {"activation": "relu"},
    "no bias": {"bias": False},
    "no shortcut": {"shortcut": False},
    "own head": {"tie_word_embeddings": False},
    "inner width": {"n_inner": 24},
    "epsilon": {"layer_norm_epsilon": 0.1},
    "unscaled": {"scale_attn_weights": False},
    "inverse layer": {"scale_attn_by_inverse_layer_idx": True},
    "all": {
        "norm": "post", "position": "sinusoidal", "activation": "relu", "bias": False,
        "shortcut": False, "tie_word_embeddings": False, "n_inner": 24, "layer_norm_epsilon": 0.1,
        "scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True,
    },
}  # fmt: skip


@pytest.mark.backend
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_logits_equal_the_numpy_reference(options):
    model = randomize(GPT(replace(SMALL, **options)))
    logits = model(Tensor(TOKENS.astype(np.int32))).numpy()
    assert logits.shape == (2, 9, SMALL.vocab_size)
    np.testing.assert_allclose(logits, reference_of(model)(TOKENS), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "all"])
def test_logits_of_the_plain_forms_equal_the_numpy_reference(name, monkeypatch):
    """Also where there are C forms, which have been looked at above."""
    monkeypatch.setenv("TINYGPT_KERNELS", "0")
    test_logits_equal_the_numpy_reference(OPTIONS[name])


def test_each_option_changes_the_logits():
    """So that the test above could fail: the reference itself tells the options apart."""
    seen = []
    for options in OPTIONS.values():
        config = replace(SMALL, **options)
        seen.append(reference_of(randomize(GPT(config)))(TOKENS[:1]))
    for i, one in enumerate(seen):
        for other in seen[:i]:
            assert np.abs(one - other).max() > 1e-3


@pytest.mark.backend
def test_cached_equals_uncached(model):
    whole = model(Tensor(TOKENS.astype(np.int32))).numpy()
    cache = model.empty_cache(2, SMALL.block_size)
    cuts = [0, 4, 5, 9]
    pieces = [
        model(Tensor(TOKENS[:, a:b].astype(np.int32)), cache, Variable("p", 0, 12).bind(a)).numpy()
        for a, b in pairwise(cuts)
    ]
    np.testing.assert_allclose(np.concatenate(pieces, 1), whole, atol=1e-5, rtol=1e-5)


def test_a_block_alone_begins_where_its_cache_does(model):
    x = Tensor(np.random.default_rng(2).standard_normal((2, 5, 16)).astype(np.float32))
    block, cache = model.blocks[0], model.empty_cache(2, SMALL.block_size)[0]
    for part in (block, block.attn):
        np.testing.assert_allclose(part(x, cache=cache).numpy(), part(x).numpy(), atol=1e-5)


@pytest.mark.parametrize(("norm", "row"), [("pre", 0), ("pre", 8), ("post", 5)])
def test_one_column_alone_equals_that_of_all(norm, row):
    model = randomize(GPT(replace(SMALL, norm=norm)))
    whole = model.hidden_states(TOKENS).numpy()
    column = model.hidden_states(TOKENS, row=row)
    assert column.shape == (2, 1, SMALL.n_embd)
    np.testing.assert_allclose(column.numpy(), whole[:, row : row + 1], atol=1e-4, rtol=1e-4)


def test_ids_may_be_of_any_whole_type(model):
    narrow, wide = (Tensor(TOKENS.astype(kind)) for kind in (np.int32, np.int64))
    np.testing.assert_array_equal(model(wide).numpy(), model(narrow).numpy())
    losses = [model.losses(ids, ids).numpy() for ids in (wide, narrow)]
    np.testing.assert_array_equal(*losses)


def test_ids_that_have_one_meaning_are_taken(model):
    expected = model(Tensor(TOKENS.astype(np.int32))).numpy()
    for given in (TOKENS, TOKENS.tolist(), TOKENS.astype(np.uint8), tuple(map(tuple, TOKENS))):
        np.testing.assert_array_equal(model(given).numpy(), expected)
    for rows in ([Tensor(row) for row in TOKENS], np.ma.masked_array(TOKENS)):
        np.testing.assert_array_equal(model(rows).numpy(), expected)
    scalars = [Tensor(int(each)) for each in TOKENS[0]]
    for row in (TOKENS[0], TOKENS[0].tolist(), Tensor(TOKENS[0]), scalars):
        assert model(row).shape == (1, *expected.shape[1:])
        np.testing.assert_allclose(model(row).numpy(), expected[:1], atol=1e-5)
    np.testing.assert_array_equal(
        model.losses(TOKENS, TOKENS.tolist()).numpy(), model.losses(TOKENS, TOKENS).numpy()
    )


class Raising:
    def __array__(self, *given, **named):
        raise RuntimeError("two\nlines")

    def __repr__(self) -> str:  # which names the test
        return "Raising()"


INSIDE_ITSELF: list = []
INSIDE_ITSELF.append(INSIDE_ITSELF)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([[67]], "token 67 is outside the vocabulary: ids run from 0 to 66"),
        (Tensor([[3, -1]]), "token -1 is outside"),
        (np.array([2**63], np.uint64), "token 9223372036854775808 is outside"),
        ("To be", "'To be' is text: encode it first"),
        ([["To be"]], "ids are of type <U5"),
        ([1.5], "ids are of type float64"),
        (np.ones((1, 2)), "ids are of type float64"),
        (Tensor([[1.0]]), "ids are of type dtypes.float"),
        ([True], "ids are of type bool"),
        ([], "no ids are given"),
        (Tensor.zeros(1, 0, dtype="int32"), "no ids are given"),
        (np.zeros((2, 0), int), "no ids are given"),
        ([[1], [1, 2]], "rows of different lengths"),
        ([[[1]]], "tokens have 3 axes"),
        (7, "tokens have 0 axes"),
        (None, "ids are of type object"),
        ({1: 2}, "ids are of type object"),
        ([Tensor(1.5)], "ids are of type object"),
        (np.ma.masked_array([1, 2], [False, True]), "ids are masked in part"),
        (Raising(), "no numbers"),
        (INSIDE_ITSELF, "a list that holds itself"),
    ],
    ids=lambda value: type(value).__name__ if value is INSIDE_ITSELF else str(value),
)
def test_what_is_no_row_of_ids_is_refused_in_one_line(model, given, words):
    for call in (model, model.hidden_states, lambda ids: model.losses(ids, ids)):
        with pytest.raises(InputError) as caught:
            call(given)
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)


def test_targets_of_another_shape_are_refused(model):
    with pytest.raises(InputError, match="each token has one target"):
        model.losses([1, 2, 3], [1, 2])


@pytest.mark.parametrize("norm", ["pre", "post", "deep"])
def test_a_record_holds_what_the_forward_pass_computes(norm):
    model, record = randomize(GPT(replace(SMALL, norm=norm))), Record()
    logits = model(TOKENS, record=record).numpy()
    np.testing.assert_allclose(logits, model(TOKENS).numpy(), atol=1e-4, rtol=1e-4)
    weights = [each.numpy() for each in record.attention_weights]
    hidden = [each.numpy() for each in record.hidden_states]
    assert [each.shape for each in weights] == [(2, 2, 9, 9)] * SMALL.n_layer
    assert [each.shape for each in hidden] == [(2, 9, 16)] * (SMALL.n_layer + 1)
    for each in weights:
        np.testing.assert_allclose(each.sum(-1), 1, atol=1e-5)
        assert (np.triu(each, 1) == 0).all()
    reference = reference_of(model)
    for row, tokens in enumerate(TOKENS):
        reference.row(tokens)
        for found, expected in ((hidden, reference.hidden), (weights, reference.weights)):
            for one, other in zip(found, expected, strict=True):
                np.testing.assert_allclose(one[row], other, atol=1e-4, rtol=1e-4)
    last = record.hidden_states[-1]
    again = model.logits(model.ln_f(last) if norm == "pre" else last).numpy()
    np.testing.assert_allclose(again, logits, atol=1e-4, rtol=1e-4)


def test_waves_of_positions_equal_their_definition():
    """Closer than logits are, in which a slightly longer wave is lost."""
    model = GPT(replace(SMALL, position="sinusoidal"), seed=None)
    found = model.encode_positions(Tensor.arange(SMALL.block_size, dtype=dtypes.int32)).numpy()
    np.testing.assert_allclose(found, sinusoids(SMALL.block_size, SMALL.n_embd), atol=5e-6)


@pytest.mark.backend
def test_rows_take_whichever_row_of_a_cache_they_are_told(model):
    """Each from its own position; of one that stands nowhere nothing is read or written."""
    cache = model.empty_cache(4, SMALL.block_size)
    for slots, starts, T in (([3, 1], [0, 0], 3), ([1, 3], [3, 3], 4), ([3, 0], [7, -1], 2)):
        rows = [TOKENS[0 if slot == 3 else 1] for slot in slots]
        tokens = [row[max(0, at) :][:T] for row, at in zip(rows, starts, strict=True)]
        place = [Tensor(np.array(each, np.int32)).realize() for each in (starts, slots)]
        found = model(np.array(tokens), cache, *place).numpy()
        for row, at, logits in zip(rows, starts, found, strict=True):
            if at < 0:
                assert np.isnan(logits).all()
            else:
                expected = reference_of(model).row(row[: at + T])[at:]
                np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=1e-4)
    for keys, values in cache:
        for part in (keys.numpy(), values.numpy()):
            assert part[[1, 3]].any((1, 2, 3)).all()
            assert not part[[0, 2]].any()


def test_the_future_does_not_leak(model):
    changed = TOKENS.copy()
    changed[:, 5] = (changed[:, 5] + 1) % SMALL.vocab_size
    a, b = (model(Tensor(t.astype(np.int32))).numpy() for t in (TOKENS, changed))
    np.testing.assert_array_equal(a[:, :5], b[:, :5])
    assert np.abs(a[:, 5:] - b[:, 5:]).max() > 1e-3


def test_the_state_is_the_weights_alone():
    names = set(get_state_dict(GPT(SMALL)))
    block = {"ln_1", "ln_2", "mlp.c_fc", "mlp.c_proj"} | {
        f"attn.{name}_proj" for name in ("q", "k", "v", "out")
    }
    layers = {f"blocks.{i}.{part}" for i in range(2) for part in block} | {"ln_f"}
    expected = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    assert names == expected | {"wte.weight", "wpe.weight"}


def test_what_an_option_takes_away_has_no_weights():
    config = replace(SMALL, norm="post", position="sinusoidal", bias=False)
    names = set(get_state_dict(GPT(replace(config, tie_word_embeddings=False))))
    assert not any("ln_f" in name or "wpe" in name or "bias" in name for name in names)
    assert "lm_head.weight" in names


def test_initialisation():
    config = GPTConfig(n_layer=8, n_head=2, n_embd=64, block_size=64, vocab_size=500)
    weights = {k: v.numpy() for k, v in get_state_dict(GPT(config, seed=3)).items()}
    again = {k: v.numpy() for k, v in get_state_dict(GPT(config, seed=3)).items()}
    other = {k: v.numpy() for k, v in get_state_dict(GPT(config, seed=4)).items()}
    for name, value in weights.items():
        np.testing.assert_array_equal(value, again[name])
        if value.ndim == 2:
            residual = name.endswith(("out_proj.weight", "c_proj.weight"))
            assert value.std() == pytest.approx(0.02 / (4 if residual else 1), rel=0.1)
            assert abs(value.mean()) < 0.002
            assert not np.array_equal(value, other[name])
        else:
            assert (value == name.endswith("weight")).all()


@pytest.mark.parametrize("norm", ["pre", "deep"])
@pytest.mark.parametrize("tied", [True, False])
def test_xaviers_initialisation(norm, tied):
    config = GPTConfig(2, 2, 64, 64, 500, n_inner=128, norm=norm, tie_word_embeddings=tied)
    for name, weight in get_state_dict(GPT(config, seed=3, init="xavier")).items():
        value, own = weight.numpy(), name.split(".")[-2]
        if value.ndim == 2:
            expected = (2 / sum(value.shape)) ** 0.5
            if name.startswith("blocks."):
                gain = 16**-0.25 if norm == "deep" and own not in ("q_proj", "k_proj") else 1
                expected *= gain
            elif own != "lm_head":  # the sum of two is to have variance 1
                expected = 0.02 if tied else 0.5**0.5
            assert value.std() == pytest.approx(expected, rel=0.05), name


def test_dropout_acts_in_training_alone():
    config = replace(SMALL, embd_pdrop=0.5, attn_pdrop=0.5, resid_pdrop=0.5)
    dropping, plain = randomize(GPT(config)), randomize(GPT(SMALL))
    tokens = Tensor(TOKENS.astype(np.int32))
    np.testing.assert_array_equal(dropping(tokens).numpy(), plain(tokens).numpy())
    for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop"):
        one = randomize(GPT(replace(SMALL, **{name: 0.5})))
        key = Tensor(np.array([1, 2, 0, 1], np.uint32)).realize()
        losses = [m.losses(tokens, tokens, key).numpy() for m in (one, plain)]
        assert np.abs(losses[0] - losses[1]).max() > 1e-2, name


def test_each_dropout_has_a_place_and_a_rate_of_its_own():
    """Two of one place would drop the same numbers."""
    config = replace(SMALL, embd_pdrop=0.1, attn_pdrop=0.2, resid_pdrop=0.3)
    model = GPT(config, seed=None)
    every = [(model.dropout, 0.1)]
    for block in model.blocks:
        every += [(block.attn.weights_dropout, 0.2), (block.attn.output_dropout, 0.3)]
        every += [(block.mlp.output_dropout, 0.3)]
    key = Tensor(np.array([1, 2, 0, 1], np.uint32))
    assert [dropout.at(key).place for dropout, _ in every] == list(range(7))
    assert [dropout.at(key).rate for dropout, _ in every] == [rate for _, rate in every]
    assert all(dropout.at(None) is None for dropout, _ in every)
    assert GPT(SMALL, seed=None).dropout.at(key) is None  # a rate of 0 costs nothing


def test_memory_is_asked_for_before_it_is_taken(monkeypatch):
    asked = []
    where = "tinygpt.runtime.memory.require_memory"
    monkeypatch.setattr(where, lambda size, what: asked.append(size))
    model = GPT(SMALL)
    sizes = [value.nbytes for value in weights_of(model).values()]
    assert asked == [sum(sizes) + max(sizes)]  # with a copy of the one that is drawn
    GPT(SMALL, seed=None)
    assert len(asked) == 1  # whoever brings the weights has asked
    cache = model.empty_cache(3, 5)
    assert [part.shape for pair in cache for part in pair] == [(3, 2, 5, 8)] * 4
    logits = 4 * 3 * SMALL.vocab_size
    assert asked[1] == logits + sum(part.numpy().nbytes for pair in cache for part in pair)
    assert not any(part.numpy().any() for pair in cache for part in pair)


def test_a_model_says_what_it_is_and_what_reads_for_it():
    model = GPT(SMALL)
    count = sum(value.size for value in weights_of(model).values())
    assert repr(model) == f"GPT({count:,} parameters, float32, {SMALL!r})"
    model.name = "mine"
    assert repr(model).startswith(f"GPT('mine', {count:,} parameters")
    with pytest.raises(InputError, match="a new model has no tokenizer"):
        _ = model.tokenizer
    with pytest.raises(InputError, match=r"model\.tokenizer is 7: set a tokenizer"):
        model.tokenizer = 7
    asked = []
    model.tokenizer = lambda: asked.append(1) or load_tokenizer("bytes")
    assert not asked  # until it is needed
    assert model.tokenizer.encode("a") == model.tokenizer.encode("a") == [97]
    assert asked == [1]


def test_the_models_own_tokenizer_is_saved_where_none_is_given(tmp_path):
    def damaged():
        raise InputError("its tokenizer is damaged")

    model, other = GPT(SMALL), char_tokenizer("To be")
    own = load_tokenizer("bytes")
    for place, (tokenizer, given, saved) in enumerate(
        ((own, None, own), (own, other, other), (damaged, other, other), (damaged, None, None))
    ):
        model.tokenizer = tokenizer
        folder = tmp_path / str(place)
        model.save_pretrained(folder, given)
        assert (folder / "model.safetensors").is_file()
        if saved is not None:
            assert load_tokenizer(folder).encode("To be") == saved.encode("To be")
        else:
            assert not [*folder.glob("tokenizer*")]


def test_every_parameter_gets_a_gradient():
    for config in (SMALL, replace(SMALL, norm="post", tie_word_embeddings=False)):
        model = randomize(GPT(config))
        parameters = get_state_dict(model)
        loss = model(Tensor(TOKENS.astype(np.int32))).log_softmax()[:, :, 1].sum()
        gradients = loss.gradient(*parameters.values())
        Tensor.realize(*gradients)
        for name, gradient in zip(parameters, gradients, strict=True):
            # softmax does not see what is added to all scores alike, as a key's bias is
            if not name.endswith("k_proj.bias"):
                assert np.abs(gradient.numpy()).max() > 1e-6, name


def test_tokens_past_the_window_are_refused(model):
    with pytest.raises(InputError, match="window of 16"):
        model(Tensor.zeros(1, 17, dtype="int32"))
    with pytest.raises(InputError, match="positions 8 to 16 reach past the window of 16"):
        model(TOKENS, start_pos=8)
    assert np.isfinite(model(TOKENS, model.empty_cache(2, 16), 7).numpy()).all()


@pytest.mark.backend
def test_values_of_memory_that_may_not_be_written_are_taken():
    """Such as that of a mapped file."""
    values = np.arange(1 << 10, dtype=np.float32).reshape(8, 128)
    values.setflags(write=False)
    assert np.array_equal(buffers.tensor(values).numpy(), values)
    assert np.array_equal(buffers.tensor(values.T).numpy(), values.T)
