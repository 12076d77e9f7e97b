from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from conftest import SMALL, randomize, reference_of
from tinygrad.engine.realize import runtime_cache

from tinygpt import GPT, Generator, InputError
from tinygpt.sampling import Sampling
from tinygpt.slots import Slots

BLOCK = SMALL.block_size
SETTINGS = [
    {"temperature": 0},
    {},
    {"temperature": 0.7, "top_k": 20},
    {"top_p": 0.8, "repetition_penalty": 1.3},
    {"min_p": 0.02, "frequency_penalty": 0.3, "presence_penalty": -0.2},
    {"temperature": 0, "presence_penalty": 0.8},
]


def texts(count: int, seed: int = 0):
    """Random prompts, some of which begin alike, with settings, seeds and lengths."""
    draw = random.Random(seed)
    beginnings = [[draw.randrange(67) for _ in range(BLOCK)] for _ in range(3)]
    for number in range(count):
        ids = draw.choice(beginnings)[: draw.randint(0, BLOCK)]
        ids = [*ids, *(draw.randrange(67) for _ in range(draw.randint(1, BLOCK + 4)))]
        yield ids, draw.choice(SETTINGS), number, draw.randint(1, 30)


def alone(generator, ids, settings, seed, count):
    return list(generator.generate(ids, count, seed, **settings))


def serve(slots: Slots, waiting: list, chunks: int | None = 1) -> list[list[int]]:
    """Texts that begin as slots become free, and end when they have their tokens."""
    waiting = list(enumerate(waiting))[::-1]
    running, found = {}, {}
    while waiting or running:
        while waiting and slots.free:
            number, (ids, settings, seed, count) = waiting.pop()
            running[slots.start(ids, Sampling(**settings), seed)] = number, count
            found[number] = []
        for slot, token in slots.step(chunks).items():
            number, count = running[slot]
            found[number].append(token.token)
            if len(found[number]) == count:
                slots.stop(slot)
                del running[slot]
    return [found[number] for number in sorted(found)]


@pytest.mark.backend
@pytest.mark.parametrize(("n", "serving"), [(5, True), (3, False)])
def test_a_text_is_what_it_would_be_alone_whatever_stands_beside_it(model, generator, n, serving):
    """Begun at any time, with settings of its own, past the window, from a prompt begun alike."""
    some = list(texts(24))
    expected = [alone(generator, *each) for each in some]
    slots = Slots(model, n, chunk_size=5, serving=serving)
    assert serve(slots, some) == expected
    assert serve(slots, some[::-1], chunks=None) == expected[::-1]


def test_one_slot_that_serves_writes_what_a_stream_does(model, generator):
    some = list(texts(8, seed=1))
    slots = Slots(model, 1, chunk_size=4, serving=True)
    assert serve(slots, some) == [alone(generator, *each) for each in some]


@pytest.mark.parametrize("n", [1, 6])
def test_nothing_is_compiled_once_all_steps_were(n):
    model = randomize(GPT(SMALL))
    slots = Slots(model, n, chunk_size=4, serving=True)
    slots.compile()
    built = len(runtime_cache), slots.step_count
    serve(slots, list(texts(40, seed=2)))
    slots.start([1, 2, 3, 4, 5, 6], top=3, scores=True)
    slots.start([1, 2, 3], bias={3: 1.0}) if n > 1 else None
    for _ in range(4):
        slots.step()
    assert (len(runtime_cache), slots.step_count) == built


def test_what_a_prompt_begins_with_like_another_is_not_read_again(model, monkeypatch):
    slots = Slots(model, 3, chunk_size=4, serving=True)
    read, usual = [], slots._session.fill
    monkeypatch.setattr(
        slots._session, "fill", lambda ids, *at: read.append(len(ids)) or usual(ids, *at)
    )
    copied, copy = [], slots._session.copy
    monkeypatch.setattr(
        slots._session, "copy", lambda *places: copied.append(places) or copy(*places)
    )
    prompt = list(range(1, 14))
    expected = reference_of(model).row(prompt)[-1].argmax()

    def first(ids):
        slot = slots.start(ids, Sampling(temperature=0))
        while not (found := slots.step()):
            pass
        return slot, found[slot].token

    one, token = first(prompt)
    assert (token, read, copied) == (expected, [4, 4, 4], [])
    two, token = first(prompt)
    assert (token, read, copied) == (expected, [4, 4, 4], [(one, two)])
    slots.stop(two)
    three, token = first(prompt)  # where it stood
    assert (three, token, len(read), len(copied)) == (two, expected, 3, 1)
    other = [*prompt[:9], 50, 51]
    four, token = first(other)
    assert token == reference_of(model).row(other)[-1].argmax()
    assert (read, len(copied)) == ([4, 4, 4, 1], 2)
    slots.stop(four)
    slots.clear()
    first(prompt)
    assert (len(read), len(copied)) == (7, 2)


def test_a_prompt_is_read_one_chunk_a_step_while_others_go_on(model):
    slots = Slots(model, 2, chunk_size=4, serving=True)
    running = slots.start([1])
    slots.step()
    late = slots.start(list(range(2, 16)))
    steps = [sorted(slots.step()) for _ in range(5)]
    assert steps == [[running]] * 3 + [[running, late]] * 2


def test_a_short_prompt_is_read_in_smaller_chunks(model, monkeypatch):
    slots = Slots(model, 2, chunk_size=16, serving=True)
    read, usual = [], slots._session._run
    monkeypatch.setattr(
        slots._session, "_run", lambda do, ids, *at: read.append(ids.shape) or usual(do, ids, *at)
    )
    for length, expected in ((3, [4]), (10, [4, 4, 4]), (12, [4, 4, 4]), (13, [16])):
        read.clear()
        slots.clear()
        slots.start([7] * length)
        while not slots.step():
            pass
        assert read == [(1, size) for size in expected], length


def test_log_probabilities_are_those_of_the_raw_softmax(model):
    """And those after the settings stand beside them; of a prompt's tokens too."""
    slots = Slots(model, 3, chunk_size=4, serving=True)
    prompt, reference = [5, 9, 2, 33, 60, 1, 7], reference_of(model)
    slots.start([3])
    slot = slots.start(prompt, Sampling(top_k=2, temperature=0.5), 3, 5, {9: 2.0}, scores=True)
    ids, found = list(prompt), []
    while len(found) < 5:
        if token := slots.step().get(slot):
            found.append(token)
            ids.append(token.token)
    logits = reference.row(ids)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert len(found[0].prompt) == len(prompt) - 1
    assert all(not each.prompt for each in found[1:])
    for place, token in enumerate([*found[0].prompt, *found]):
        expected = logprobs[place]
        assert token.token == ids[place + 1]
        assert token.logprob == pytest.approx(expected[token.token], abs=1e-4)
        order = np.argsort(-expected)[:5]
        assert [each.token for each in token.top] == order.tolist()
        np.testing.assert_allclose([each.logprob for each in token.top], expected[order], atol=1e-4)
        kept = logits[place] + (2.0 * (np.arange(67) == 9) if place >= len(prompt) - 1 else 0)
        if place >= len(prompt) - 1:
            kept = np.where(kept >= np.sort(kept)[-2], kept / 0.5, -np.inf)
        kept = np.exp(kept - kept.max())
        np.testing.assert_allclose(
            [each.kept for each in token.top], (kept / kept.sum())[order], atol=1e-4
        )


def test_a_greedy_choice_keeps_one_token(model):
    slots = Slots(model, 1, serving=True)
    slots.start([5, 9], Sampling(temperature=0), top=4)
    (token,) = slots.step().values()
    assert [each.kept for each in token.top] == [1, 0, 0, 0]
    assert token.top[0].token == token.token


def test_bias_forbids_a_token_or_forces_it(model, generator):
    greedy = Sampling(temperature=0)
    usual = alone(generator, [5, 9], {"temperature": 0}, 0, 1)[0]
    slots = Slots(model, 4, serving=True)
    given = {slots.start([5, 9], greedy, bias=bias): bias
             for bias in (None, {usual: -100}, {41: 100})}  # fmt: skip
    for slot, token in slots.step(None).items():
        bias = given[slot]
        assert (token.token == usual) == (bias is None)
        assert (token.token == 41) == (bias == {41: 100})


def test_a_text_whose_logits_are_no_numbers_harms_no_other():
    """Here those of one token, whose embedding is damaged."""
    broken = randomize(GPT(replace(SMALL, tie_word_embeddings=False)))
    expected = alone(Generator(broken), [5, 9], {"temperature": 0}, 0, 3)
    weight = broken.wte.weight.numpy().copy()
    weight[66] = np.nan
    broken.wte.weight.assign(weight).realize()
    slots = Slots(broken, 2, serving=True)
    bad, good = (
        slots.start([66], Sampling(temperature=0)),
        slots.start([5, 9], Sampling(temperature=0)),
    )
    found = [slots.step() for _ in range(3)]
    assert all(step[bad].token in (-1, 67) for step in found)
    assert [step[good].token for step in found] == expected


def test_slots_are_taken_until_their_text_is_stopped(model):
    slots = Slots(model, 2)
    first, second = slots.start([1]), slots.start([2])
    assert (slots.free, {first, second}) == (0, {0, 1})
    with pytest.raises(InputError, match="all 2 slots are taken"):
        slots.start([3])
    slots.stop(first)
    slots.stop(first)
    assert (slots.free, slots.start([3])) == (1, first)
    slots.stop(second)
    assert sorted(slots.step(None)) == [first]


def test_nothing_to_do_gives_nothing(model):
    slots = Slots(model, 2)
    assert slots.step() == {}
    slot = slots.start([1, 2])
    slots.stop(slot)
    assert slots.step() == {}
