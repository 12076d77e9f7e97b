from __future__ import annotations

import gc
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from conftest import SMALL, needs_clang, randomize, reference_of
from tinygrad import Tensor
from tinygrad.engine.realize import runtime_cache
from tinygrad.helpers import GlobalCounters
from tinygrad.nn.state import get_state_dict

from tinygpt import GPT, Generator, InputError
from tinygpt import generator as generator_module
from tinygpt.layers import LayerNorm

PROMPTS = [[5, 9, 2, 33, 60, 1, 7], [11], [8, 3] * 7]
ONE_ROW = 8 * SMALL.n_layer * SMALL.block_size * SMALL.n_embd  # bytes of its KV cache
DRAWN = {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.01}


def greedy_reference(model, prompt, count, repetition=1.0, frequency=0.0, presence=0.0):
    """What the NumPy reference continues with, read anew each time, with penalties."""
    reference, window, ids = reference_of(model), list(prompt), []
    block_size = model.config.block_size
    for _ in range(count):
        if len(window) > block_size:
            window = window[-max(1, block_size // 2) :]
        logits = reference.row(window)[-1]
        for token in {*prompt, *ids}:
            logits[token] *= 1 / repetition if logits[token] > 0 else repetition
            logits[token] -= frequency * ids.count(token) + presence * (token in ids)
        ids.append(int(logits.argmax()))
        window.append(ids[-1])
    return ids


@pytest.mark.backend
def test_greedy_equals_the_reference_past_the_window(model, generator):
    for prompt in PROMPTS[:2]:
        ids = list(generator.generate(prompt, max_new_tokens=40, temperature=0))
        assert ids == greedy_reference(model, prompt, 40)
        assert len(set(ids)) > 5  # not one token over and over


@pytest.mark.parametrize("block_size", [1, 2, 3])
def test_the_smallest_windows_slide_too(block_size):
    small = randomize(GPT(replace(SMALL, block_size=block_size, tie_word_embeddings=False)))
    for prompt in PROMPTS:
        ids = list(Generator(small).generate(prompt, 9, temperature=0))
        assert ids == greedy_reference(small, prompt, 9)


@pytest.mark.parametrize("penalties", [(1.6, 0, 0), (1, 0.8, 0), (1, 0, 0.9), (1.2, 0.3, -0.2)])
def test_penalties_count_the_prompt_and_the_text_past_the_window(model, generator, penalties):
    names = ("repetition_penalty", "frequency_penalty", "presence_penalty")
    given = dict(zip(names, penalties, strict=True))
    steps = list(generator.generate_batch(PROMPTS[::2], 24, temperature=0, **given))
    for row, prompt in enumerate(PROMPTS[::2]):
        ids = [step[row] for step in steps]
        assert ids == greedy_reference(model, prompt, 24, *penalties)
        assert ids != greedy_reference(model, prompt, 24)


def test_what_is_not_said_is_128_tokens_read_64_at_once_and_none_that_ends(model):
    assert len(list(Generator(model).generate([1]))) == 128
    assert len(list(Generator(model).generate_batch([[1]]))) == 128
    wide = GPT(replace(SMALL, block_size=100))
    assert Generator(wide).chunk_size == 64
    assert Generator(wide, 101).chunk_size == 100


def test_a_prompt_past_the_window_keeps_its_newer_half(model, generator):
    prompt = [i * 7 % 67 for i in range(50)]
    ids = list(generator.generate(prompt, max_new_tokens=5, temperature=0))
    assert ids == greedy_reference(model, prompt, 5)
    assert ids == list(generator.generate(prompt[-8:], max_new_tokens=5, temperature=0))


@pytest.mark.parametrize("chunk_size", [1, 2, 7, 64])
def test_chunk_sizes_give_the_same_ids(model, generator, chunk_size):
    other = Generator(model, chunk_size)
    for prompt in (*PROMPTS, [i * 7 % 67 for i in range(14)]):
        expected = list(generator.generate(prompt, max_new_tokens=20, temperature=0))
        assert list(other.generate(prompt, max_new_tokens=20, temperature=0)) == expected


@pytest.mark.backend
@pytest.mark.parametrize(
    "sampling",
    [{"temperature": 0}, pytest.param(DRAWN, marks=pytest.mark.slow),
     {"repetition_penalty": 1.3, "frequency_penalty": 0.2, "presence_penalty": 0.1}],
    ids=["greedy", "drawn", "penalties"],
)  # fmt: skip
def test_batched_equals_one_by_one(generator, sampling):
    """Rows of different lengths, which slide at different times, and a stop token that ends one."""
    seeds = [1, 2, 3]
    alone = [
        list(generator.generate(p, max_new_tokens=30, seed=s, **sampling))
        for p, s in zip(PROMPTS, seeds, strict=True)
    ]
    stop = alone[2][4]  # ends the row that set the pace of the batch
    expected = [ids[: ids.index(stop)] if stop in ids else ids for ids in alone]
    steps = list(generator.generate_batch(PROMPTS, 30, seeds, stop_tokens=[stop], **sampling))
    for row, ids in enumerate(expected):
        column = [step[row] for step in steps]
        assert column == ids + [None] * (len(steps) - len(ids))


def test_a_seed_repeats_and_another_differs(generator):
    def draw(seed):
        return list(generator.generate(PROMPTS[0], max_new_tokens=20, seed=seed))

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)
    assert draw(None) != draw(None)
    samples = list(generator.generate_batch([PROMPTS[0]] * 2, 20, seed=[7, 8]))
    assert [step[1] for step in samples] == draw(8)


def test_stop_tokens_end_the_text(generator):
    ids = list(generator.generate(PROMPTS[0], max_new_tokens=30, temperature=0))
    stop = ids[9]
    stopped = generator.generate(PROMPTS[0], 30, stop_tokens={stop}, temperature=0)
    assert list(stopped) == ids[: ids.index(stop)]
    assert list(generator.generate(PROMPTS[0], max_new_tokens=0)) == []


def test_stop_tokens_of_any_form_end_the_text(generator):
    ids = list(generator.generate(PROMPTS[0], max_new_tokens=9, temperature=0))
    stop = ids[5]
    for given in (
        stop,
        np.int64(stop),
        [stop],
        np.array([66, stop]),
        Tensor([stop]),
        {stop: 1}.keys(),
    ):
        stopped = generator.generate(PROMPTS[0], 9, stop_tokens=given, temperature=0)
        assert list(stopped) == ids[: ids.index(stop)]
    for none in (None, (), set(), np.array([], int)):
        whole = generator.generate(PROMPTS[0], 9, stop_tokens=none, temperature=0)
        assert list(whole) == ids


def test_ids_come_one_at_a_time(model):
    """The first id is there before the second is computed."""
    ids = Generator(model).generate(PROMPTS[0], max_new_tokens=10**9, temperature=0)
    assert [next(ids), next(ids)] == greedy_reference(model, PROMPTS[0], 2)


def test_weights_are_the_only_state(model, generator):
    before = {name: tensor.numpy() for name, tensor in get_state_dict(model).items()}
    list(generator.generate(PROMPTS[0], max_new_tokens=20))
    after = get_state_dict(model)
    assert before.keys() == after.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(value, after[name].numpy())


def test_nothing_compiles_after_the_second_token(model):
    """Nor for a prompt of another length, another position, or another value of a setting."""
    generator = Generator(model, chunk_size=4)
    ids = generator.generate(PROMPTS[0], max_new_tokens=40, seed=1, temperature=0.5, top_k=5)
    next(ids), next(ids)
    built = len(runtime_cache)
    list(ids)
    for prompt in PROMPTS:
        list(generator.generate(prompt, max_new_tokens=9, seed=2, temperature=0.9, top_k=9))
    assert len(runtime_cache) == built


def test_streams_in_turn_have_each_their_own_cache(model):
    generator = Generator(model, chunk_size=4)
    alone = [greedy_reference(model, prompt, 6) for prompt in PROMPTS]
    streams = [generator.generate(p, max_new_tokens=6, temperature=0) for p in PROMPTS]
    assert [list(row) for row in zip(*zip(*streams, strict=True), strict=True)] == alone
    left = generator.generate(PROMPTS[0], max_new_tokens=6, temperature=0)
    next(left)
    del left
    assert list(generator.generate(PROMPTS[1], max_new_tokens=6, temperature=0)) == alone[1]


@needs_clang  # tinygrad by itself lets no other thread use a device while it compiles
@pytest.mark.parametrize("shared", [True, False])
def test_ten_threads_write_what_they_would_alone(shared, model):
    generator = Generator(model, chunk_size=4)
    alone = [greedy_reference(model, prompt, 6) for prompt in PROMPTS]

    def write(prompt):
        own = generator if shared else Generator(model, chunk_size=4)
        return list(own.generate(prompt, max_new_tokens=6, temperature=0))

    with ThreadPoolExecutor(10) as pool:
        assert list(pool.map(write, PROMPTS * 10)) == alone * 10


@pytest.mark.slow
@needs_clang
def test_two_hundred_texts_dropped_by_ten_threads_leave_no_memory_and_no_threads(model):
    def drop(number):
        text = Generator(model, chunk_size=4).generate(PROMPTS[number % 3], 9, seed=number)
        return [next(text), next(text)]

    def left_by(count):
        with ThreadPoolExecutor(10) as pool:
            texts = list(pool.map(drop, range(count)))
        gc.collect()
        list(map(drop, range(3)))  # whichever session is left, it has the steps for each prompt
        return texts, GlobalCounters.mem_used, threading.active_count()

    few, many = left_by(20), left_by(200)
    assert many[0][:20] == few[0]
    assert abs(many[1] - few[1]) < ONE_ROW
    assert many[2] == few[2]


def test_batches_of_many_sizes_leave_the_memory_of_one_row(model):
    generator = Generator(model)
    list(generator.generate(PROMPTS[0], 3, temperature=0))
    before = GlobalCounters.mem_used
    for rows in range(2, 6):
        list(generator.generate_batch([PROMPTS[0]] * rows, 3, temperature=0))
    assert GlobalCounters.mem_used > before + 4 * ONE_ROW
    list(generator.generate(PROMPTS[0], 3, temperature=0))
    assert GlobalCounters.mem_used < before + ONE_ROW


def test_a_batch_between_two_texts_does_not_cost_them_their_slots(model, monkeypatch):
    made, usual = [], generator_module.Slots
    monkeypatch.setattr(generator_module, "Slots", lambda *a: made.append(a[1]) or usual(*a))
    fresh = Generator(model, chunk_size=5)
    for rows in (1, 3, 1, 1, 3, 3):
        list(fresh.generate_batch([PROMPTS[0]] * rows, 2, temperature=0))
    assert made == [1, 3, 3]


@pytest.mark.slow
def test_a_stream_that_is_collected_in_a_cycle_harms_no_later_one():
    """Collected so, its end comes when the memory of its session is gone."""
    kept = randomize(GPT(SMALL))
    expected = list(Generator(kept).generate(PROMPTS[0], 5, temperature=0))
    for _ in range(20):
        cycle: list = [Generator(kept).generate(PROMPTS[0], 5, temperature=0)]
        next(cycle[0])
        cycle.append(cycle)
        del cycle
        gc.collect()
        assert list(Generator(kept).generate(PROMPTS[0], 5, temperature=0)) == expected


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@needs_clang
def test_parent_and_child_of_a_fork_share_no_memory(model):
    texts = [list(Generator(model).generate(p, 30, 1, temperature=0.8)) for p in PROMPTS]
    child = os.fork()
    wrong = 0
    for turn in range(20):
        which = (turn + (child == 0)) % len(PROMPTS)
        found = list(Generator(model).generate(PROMPTS[which], 30, 1, temperature=0.8))
        wrong += found != texts[which]
    if child == 0:
        os._exit(wrong)
    assert (wrong, os.waitpid(child, 0)[1]) == (0, 0)


CHANGES = {
    "a shortcut": lambda model: setattr(model.blocks[1], "shortcut", False),
    "an epsilon": lambda model: setattr(model.ln_f, "epsilon", 9.0),
    "an activation": lambda model: setattr(model.blocks[0].mlp, "activation", "relu"),
    "the scale of scores": lambda model: setattr(
        model.blocks[0].attn, "heads", replace(model.blocks[0].attn.heads, scale=3.0)
    ),
    "the order of blocks": lambda model: model.blocks.reverse(),
    "a class": lambda model: setattr(model.blocks[0].ln_1, "__class__", Negative),
}


class Negative(LayerNorm):
    def __call__(self, x):
        return -super().__call__(x)


@pytest.mark.parametrize("change", CHANGES)
def test_the_next_text_is_of_the_model_as_it_is_by_then(change):
    changed = randomize(GPT(SMALL), seed=1)
    list(Generator(changed).generate(PROMPTS[0], 9, temperature=0))
    before = changed(PROMPTS[0]).numpy()
    CHANGES[change](changed)
    assert not np.allclose(changed(PROMPTS[0]).numpy(), before)
    told = list(Generator(changed).generate(PROMPTS[0], 7, temperature=0))
    likeliest = changed([*PROMPTS[0], *told[:-1]]).numpy()[0].argmax(-1)
    assert told == likeliest[len(PROMPTS[0]) - 1 :].tolist()


def test_no_stream_keeps_the_memory_of_a_model_that_is_dropped():
    left = []
    for _ in range(3):
        list(Generator(randomize(GPT(SMALL))).generate(PROMPTS[0], 3, temperature=0))
        left.append(GlobalCounters.mem_used)
    assert left == left[:1] * 3


@pytest.mark.parametrize("new", ["values", "tensors"])
def test_the_next_text_is_of_the_weights_that_the_model_has_by_then(new):
    changed = randomize(GPT(SMALL), seed=1)
    generator = Generator(changed)
    first = list(generator.generate(PROMPTS[0], 9, temperature=0))
    for name, weight in get_state_dict(randomize(GPT(SMALL), seed=2)).items():
        own = get_state_dict(changed)[name]
        own.assign(weight).realize() if new == "values" else own.replace(weight)
    expected = greedy_reference(changed, PROMPTS[0], 9)
    assert list(generator.generate(PROMPTS[0], 9, temperature=0)) == expected != first


@pytest.fixture(params=["C", pytest.param("plain", marks=pytest.mark.slow)])
def form(request, monkeypatch):
    if request.param == "plain":
        monkeypatch.setenv("TINYGPT_KERNELS", "0")


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"top_k": 5, "seed": 1}])
def test_weights_that_diverged_end_the_text_in_one_line(form, sampling):
    broken = randomize(GPT(SMALL))
    weight = broken.blocks[1].mlp.c_fc.weight
    weight.assign(weight * np.inf).realize()
    generator = Generator(broken)
    for steps in (
        generator.generate(PROMPTS[0], 5, **sampling),
        generator.generate_batch(PROMPTS, 5, **sampling),
    ):
        with pytest.raises(InputError, match="logits are not finite numbers") as caught:
            list(steps)
        assert "\n" not in str(caught.value)


def test_whole_numbers_of_any_library_are_a_prompt(generator):
    expected = list(generator.generate([3, 1, 4], 5, seed=2, temperature=0.5))
    for prompt in ((3, 1, 4), np.array([3, 1, 4], np.uint16), Tensor([3, 1, 4])):
        own = {"seed": np.int64(2), "temperature": np.float32(0.5)}
        assert list(generator.generate(prompt, np.int32(5), **own)) == expected
    rows = list(generator.generate_batch(np.array([[3, 1, 4]] * 2), 5, np.array([2, 2]),
                                         temperature=0.5))  # fmt: skip
    assert rows == [[token, token] for token in expected]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"prompt": "Hello"}, "'Hello' is text: encode it first"),
        ({"prompt": b"Hello"}, "is text"),
        ({"prompt": [1.0, 2.0]}, "ids are of type float64"),
        ({"prompt": Tensor([1.0])}, "ids are of type dtypes.float"),
        ({"prompt": [True]}, "ids are of type bool"),
        ({"prompt": 5}, "a prompt has 0 axes"),
        ({"prompt": [[1, 2]]}, "a prompt has 2 axes"),
        ({"prompt": [[1], [1, 2]]}, "rows of different lengths"),
        ({"prompt": None}, "ids are of type object"),
        ({"stop_tokens": ["a"]}, "ids are of type"),
        ({"stop_tokens": "a"}, "'a' is text"),
        ({"prompts": [[1]]}, "unknown sampling setting 'prompts'"),
        ({"prompt": []}, "empty"),
        ({"prompt": [3, 67]}, "token 67"),
        ({"prompt": [-1]}, "token -1"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1"),
        ({"max_new_tokens": 1.5}, "max_new_tokens is 1.5"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": "x"}, "seed"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_k": 2.5}, "top_k is 2.5"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.01}, "top_p is 1.01"),
        ({"min_p": 2}, "min_p is 2"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"frequency_penalty": float("inf")}, "frequency_penalty is inf"),
        ({"presence_penalty": None}, "presence_penalty is None"),
        ({"temprature": 1}, "did you mean 'temperature'"),
    ],
)
def test_bad_arguments_are_refused_at_once(generator, arguments, words):
    with pytest.raises(InputError, match=words) as caught:
        generator.generate(**{"prompt": [1], **arguments})
    assert "\n" not in str(caught.value)


def test_prompts_may_come_from_whatever_can_be_gone_through(generator):
    expected = list(generator.generate_batch([[3, 1], [4, 1]], 4, temperature=0))
    for rows in ((row for row in [[3, 1], [4, 1]]), Tensor([[3, 1], [4, 1]]), ([3, 1], (4, 1))):
        assert list(generator.generate_batch(rows, 4, temperature=0)) == expected


def test_bad_batches_are_refused_at_once(generator):
    for given, words in ((None, "prompts are None"), (5, "prompts are 5"), ("ab", "'a' is text")):
        with pytest.raises(InputError, match=words):
            generator.generate_batch(given)
    with pytest.raises(InputError, match="no prompts"):
        generator.generate_batch([])
    with pytest.raises(InputError, match="3 seeds for 1 prompts"):
        generator.generate_batch([[1]], seed=[1, 2, 3])
    for seed in (0, 2**64 - 1):
        assert len(list(generator.generate([1], 2, seed))) == 2
    with pytest.raises(InputError, match="seed is 18446744073709551616"):
        generator.generate([1], 2, 2**64)
    with pytest.raises(InputError, match="chunk_size is 0"):
        Generator(generator.model, chunk_size=0)
