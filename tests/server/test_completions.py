from __future__ import annotations

import json
import random
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import reference_of
from serving import serving
from tinygrad.engine.realize import runtime_cache

from tinygpt import Generator, load_tokenizer
from tinygpt.logprobs import Token
from tinygpt.server.choice import Choice, logprobs_of

BYTES = load_tokenizer("bytes")
TEXTS = ["Once upon a time", "", "é", "a\n\n", "<|endoftext|>", "人", "x" * 60]


def greedy(**more):
    return {"temperature": 0, "max_tokens": 12, "prompt": "Once upon", **more}


def random_request(draw: random.Random) -> dict:
    """Any of what can be asked for, but for what is sent back at once."""
    beginning = draw.choice(["The King had three sons", "Once upon a time there was "])
    asked = {
        "prompt": beginning[: draw.randint(1, 30)] + draw.choice(TEXTS),
        "max_tokens": draw.randint(1, 30),
        "seed": draw.randrange(1000),
        "temperature": draw.choice([0, 1, 1, 0.7]),
    }
    for name, values in (
        ("n", [1, 2, 3]),
        ("logprobs", [0, 1, 5]),
        ("top_k", [5, 40]),
        ("top_p", [0.5, 0.9]),
        ("min_p", [0.05]),
        ("presence_penalty", [0.5, -1]),
        ("frequency_penalty", [0.7]),
        ("repetition_penalty", [1.3]),
        ("logit_bias", [{"5": 3.0, "70": -100}]),
        ("echo", [True]),
        ("stop", [["e"], ["a", "th"]]),
    ):
        if draw.random() < 0.3:
            asked[name] = draw.choice(values)
    return asked


def comparable(answer: dict) -> list:
    """What must not hang on what else runs; log-probabilities may by their rounding."""
    found = []
    for choice in sorted(answer["choices"], key=lambda choice: choice["index"]):
        logprobs = choice["logprobs"] or {}
        found.append(
            (choice["text"], choice["finish_reason"], logprobs.get("tokens"),
             logprobs.get("text_offset"))
        )  # fmt: skip
    return [*found, answer["usage"]]


def join(events: list[dict]) -> dict:
    """One answer of the events of a stream."""
    choices: dict[int, dict] = {}
    for event in events[:-1]:
        for each in event["choices"]:
            whole = choices.setdefault(each["index"], {**each, "text": "", "logprobs": None})
            whole["text"] += each["text"]
            whole["finish_reason"] = each["finish_reason"]
            if each["logprobs"]:
                old = whole["logprobs"] or {name: [] for name in each["logprobs"]}
                whole["logprobs"] = {k: old[k] + v for k, v in each["logprobs"].items()}
    assert events[-1]["choices"] == []
    return {"choices": list(choices.values()), "usage": events[-1]["usage"]}


def hold_equal(running, count: int, clients: int, one=None) -> None:
    """Requests alone on one slot, among many, and streamed from a warm cache."""
    draw = random.Random(0)
    requests = [random_request(draw) for _ in range(count)]
    alone = [comparable((one or running).complete(**each)) for each in requests]
    with ThreadPoolExecutor(clients) as pool:
        among = list(pool.map(lambda each: comparable(running.complete(**each)), requests))
    options = {"stream_options": {"include_usage": True}}
    streamed = [comparable(join(running.stream(**each, **options))) for each in requests]
    assert among == alone
    assert streamed == alone


def test_a_text_is_the_same_alone_among_others_and_streamed(running):
    built = len(runtime_cache), running.engine.slots.step_count
    hold_equal(running, 25, 8)
    assert (len(runtime_cache), running.engine.slots.step_count) == built


@pytest.mark.slow
def test_texts_are_the_same_under_32_clients_on_16_slots(served_model):
    with (
        serving(served_model, slots=1) as one,
        serving(served_model, slots=16, queue=200) as many,
    ):
        built = len(runtime_cache), many.engine.slots.step_count
        hold_equal(many, 250, 32, one)
        assert (len(runtime_cache), many.engine.slots.step_count) == built


def test_texts_of_one_prompt_are_read_once_though_it_is_echoed(running):
    """Its own log-probabilities are computed for the first of them; also where it was cached."""
    asked = {"prompt": "a long prompt " * 8, "max_tokens": 2, "echo": True, "logprobs": 2}
    asked |= {"temperature": 1.0}
    apart = [running.complete(**asked, seed=9 + i) for i in range(4)]
    before = running.engine.steps
    whole = running.complete(**asked, seed=9, n=4)
    assert running.engine.steps - before < 2 * 3 + 4  # of 112 tokens two chunks, not eight
    options = {"stream_options": {"include_usage": True}}
    streamed = join(running.stream(**asked, seed=9, n=4, **options))
    assert comparable(whole)[:-1] == [comparable(each)[0] for each in apart]
    assert comparable(streamed) == comparable(whole)
    for found in (whole, streamed):
        for choice in found["choices"]:
            columns = [
                each["logprobs"]["token_logprobs"]
                for each in (choice, apart[choice["index"]]["choices"][0])
            ]
            assert columns[0][1:] == pytest.approx(columns[1][1:], abs=1e-5)


def test_a_seed_writes_what_it_writes_elsewhere(running, served_model):
    settings = {"temperature": 0.8, "top_k": 30}
    answer = running.complete(prompt="Once upon", max_tokens=20, seed=5, n=2, **settings)
    for choice in answer["choices"]:
        ids = list(
            Generator(served_model).generate(
                BYTES.encode("Once upon"), 20, 5 + choice["index"], BYTES.ends, **settings
            )
        )
        assert choice["text"] == BYTES.decode(ids)


def test_prompts_of_any_form_are_answered_in_their_order(running):
    ids = BYTES.encode("Once upon")
    one = running.complete(**greedy())["choices"][0]["text"]
    for prompt in ("Once upon", ids, ["Once upon"], [ids]):
        answer = running.complete(**greedy(prompt=prompt))
        assert [choice["text"] for choice in answer["choices"]] == [one]
        assert answer["usage"] == {
            "prompt_tokens": 9, "completion_tokens": 12, "total_tokens": 21,
        }  # fmt: skip
    prompts = ["A", "Once upon", "A much longer one " * 3]
    answer = running.complete(**greedy(prompt=prompts, n=2, temperature=1, seed=3))
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    assert answer["usage"]["prompt_tokens"] == sum(map(len, prompts))
    for number, prompt in enumerate(prompts):
        alone = running.complete(**greedy(prompt=prompt, n=2, temperature=1, seed=3))
        texts = [choice["text"] for choice in answer["choices"][2 * number :][:2]]
        assert texts == [choice["text"] for choice in alone["choices"]]


def test_log_probabilities_are_the_models(running, served_model):
    """Of the prompt too, where it is echoed; the token itself is always among them."""
    answer = running.complete(**greedy(echo=True, logprobs=3, temperature=1, seed=1))
    found = answer["choices"][0]["logprobs"]
    ids = BYTES.encode("Once upon")
    for name in found["tokens"][9:]:
        ids.append(int(name[-2:], 16) if name.startswith("bytes:") else BYTES.encode(name)[0])
    logits = reference_of(served_model).row(ids)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert len(found["tokens"]) == 21
    assert found["token_logprobs"][0] is None is found["top_logprobs"][0]
    for place in range(1, 21):
        expected = logprobs[place - 1]
        got = found["token_logprobs"][place]
        assert got == pytest.approx(expected[ids[place]], abs=1e-4)
        top = found["top_logprobs"][place]
        assert top[found["tokens"][place]] == got
        assert len(top) in (3, 4)
        best = sorted(top.values())[::-1][:3]
        np.testing.assert_allclose(best, np.sort(expected)[::-1][:3], atol=1e-4)


def test_zero_log_probabilities_are_a_request(running):
    found = running.complete(**greedy(logprobs=0))["choices"][0]["logprobs"]
    assert [len(top) for top in found["top_logprobs"]] == [1] * 12
    assert running.complete(**greedy())["choices"][0]["logprobs"] is None


def test_echo_alone_is_the_prompt_with_what_it_cost(running):
    for prompt in ("Once upon", "é人", BYTES.encode("Once")):
        text = prompt if isinstance(prompt, str) else BYTES.decode(prompt)
        answer = running.complete(prompt=prompt, max_tokens=0, echo=True, logprobs=1)
        (choice,) = answer["choices"]
        assert (choice["text"], choice["finish_reason"]) == (text, "length")
        assert len(choice["logprobs"]["tokens"]) == len(BYTES.encode(text))
        assert answer["usage"]["completion_tokens"] == 0
        bare = running.complete(prompt=prompt, max_tokens=0, echo=True)["choices"][0]
        assert (bare["text"], bare["logprobs"]) == (text, None)
    assert running.complete(prompt="a", max_tokens=0)["choices"][0]["text"] == ""


def test_the_best_of_several_are_those_likeliest_a_token(running):
    asked = {"prompt": "Once", "max_tokens": 6, "seed": 9, "logprobs": 0}
    all_of_them = running.complete(**asked, n=5)["choices"]
    means = [np.mean(choice["logprobs"]["token_logprobs"]) for choice in all_of_them]
    order = np.argsort(means)[::-1][:2]
    best = running.complete(**asked, n=2, best_of=5)
    assert [choice["text"] for choice in best["choices"]] == [all_of_them[i]["text"] for i in order]
    assert best["usage"]["completion_tokens"] == 30
    echoed = running.complete(**asked, n=2, best_of=5, echo=True)["choices"]
    assert [choice["text"] for choice in echoed] == [
        "Once" + choice["text"] for choice in best["choices"]
    ]


def pieces_of(texts: list[bytes], stop: list[str], finish: str = "length"):
    """What a choice shows of tokens with these bytes, token by token, and at the end."""
    tokenizer = SimpleNamespace(token_bytes=lambda token: texts[token])
    choice, shown = Choice(tokenizer, stop, 0), []
    for token in range(len(texts)):
        shown.append(choice.add(Token(token, -1.0)))
        if choice.stopped:
            return choice, shown, tokenizer
    shown.append(choice.end(finish))
    return choice, shown, tokenizer


@pytest.mark.parametrize(
    ("texts", "stop", "expected", "finish", "tokens"),
    [
        ([b"a", b"\xe4\xba", b"\xba", b"b"], [], "a人b", "length", 4),
        ([b"a", b"\xe4\xba"], [], "a\ufffd", "length", 2),  # an invalid tail
        ([b"ab", b"ST", b"OP", b"c"], ["STOP"], "ab", "stop", 1),
        ([b"ab", b"ST", b"OX", b"c"], ["STOP"], "abSTOXc", "length", 4),  # begun, not finished
        ([b"ab", b"ST"], ["STOP"], "abST", "length", 2),
        ([b"aa", b"b", b"ab"], ["aab"], "", "stop", 0),
        ([b"a", b"a", b"a", b"b"], ["aab", "ab"], "a", "stop", 1),  # overlapping
        ([b"xay", b"bz"], ["yb"], "xa", "stop", 1),  # the token is cut, but has begun before
        ([b"a", b"\xc3", b"\xa9", b"z"], ["\xe9"], "a", "stop", 1),
    ],
)
def test_a_piece_splits_no_character_and_shows_nothing_of_a_stop_text(
    texts, stop, expected, finish, tokens
):
    choice, shown, tokenizer = pieces_of(texts, stop)
    assert "".join(piece.text for piece in shown) == expected
    assert choice.finish == finish
    rows = [row for piece in shown for row in logprobs_of(piece, tokenizer)["text_offset"]]
    assert len(rows) == tokens
    whole = b"".join(texts).decode(errors="replace")
    begun = [len(b"".join(texts[:i]).decode(errors="ignore")) for i in range(len(texts))]
    assert rows == begun[:tokens]
    assert whole.startswith(expected)


def test_offsets_count_the_characters_of_the_text_that_is_given(running):
    for echo in (False, True):
        for stream in (False, True):
            asked = greedy(
                prompt="人é", echo=echo, logprobs=0, max_tokens=20, temperature=1, seed=4
            )
            if stream:
                options = {"stream_options": {"include_usage": True}}
                (choice,) = join(running.stream(**asked, **options))["choices"]
            else:
                (choice,) = running.complete(**asked)["choices"]
            found = choice["logprobs"]
            assert found["text_offset"] == sorted(found["text_offset"])
            assert choice["text"].startswith("人é") == echo
            for name, offset in zip(found["tokens"], found["text_offset"], strict=True):
                if not name.startswith("bytes:"):
                    assert choice["text"][offset:].startswith(name)


def test_a_stop_text_ends_the_text_before_it(running):
    whole = running.complete(**greedy(max_tokens=40))["choices"][0]["text"]
    stop = whole[7:9]
    for stops in (stop, [stop], ["never to be seen", stop]):
        (choice,) = running.complete(**greedy(max_tokens=40, stop=stops))["choices"]
        assert choice["text"] == whole[: whole.index(stop)]
        assert choice["finish_reason"] == "stop"


def test_an_end_token_ends_the_text(running):
    forced = greedy(logit_bias={"256": 100})
    answer = running.complete(**forced)
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("", "stop")
    assert answer["usage"]["completion_tokens"] == 1
    found = running.complete(**forced, echo=True, logprobs=1)["choices"][0]
    assert found["text"] == "Once upon"
    assert len(found["logprobs"]["tokens"]) == 9 + 1
    assert found["logprobs"]["tokens"][-1] == "<|endoftext|>"
    assert found["logprobs"]["text_offset"][-1] == 9


def test_the_events_of_a_stream_are_as_clients_read_them(running):
    events = running.stream(**greedy(), stream_options={"include_usage": True})
    whole = running.complete(**greedy())
    assert {event["object"] for event in events} == {"text_completion"}
    assert len({event["id"] for event in events}) == 1
    assert all(event["usage"] is None for event in events[:-1])
    assert events[-1]["usage"] == whole["usage"]
    assert "usage" not in running.stream(**greedy())[0]
    ends = [choice["finish_reason"] for event in events for choice in event["choices"]]
    assert ends == [None] * (len(ends) - 1) + ["length"]


def test_a_text_past_the_window_is_refused_unless_it_may_be_cut(running):
    long = "".join(chr(97 + i % 26) for i in range(140))
    for asked in ({"prompt": long}, {"prompt": "a", "max_tokens": 128}):
        status, _, answer = running.ask("/v1/completions", asked)
        assert status == 400
        assert answer["error"]["code"] == "context_length_exceeded"
        assert "window of 128" in answer["error"]["message"]
        assert str(asked.get("max_tokens", 16)) in answer["error"]["message"]
    cut = running.complete(prompt=long, truncate_prompt=True, temperature=0)
    same = running.complete(prompt=long[-112:], temperature=0)
    assert cut["choices"] == same["choices"]
    assert running.complete(prompt=long[:112], temperature=0)["usage"]["total_tokens"] == 128


def test_bodies_say_what_json_says(running):
    """Whole numbers that are written as such, and text in any of its spellings."""
    escaped = json.dumps(greedy(prompt="人\U0001f600"), ensure_ascii=True).encode()
    plain = json.dumps(greedy(prompt="人\U0001f600"), ensure_ascii=False).encode()
    one, two = (running.ask("/v1/completions", body)[2]["choices"] for body in (escaped, plain))
    assert one == two


def test_null_within_an_object_is_not_given_either(running):
    asked = {"prompt": "a", "max_tokens": 1, "stream_options": {"include_usage": None}}
    assert all("usage" not in event for event in running.stream(**asked))


def test_prompts_that_are_alike_are_read_once_though_they_are_echoed(running):
    """In a list, with others among them, and each as if it were alone."""
    long, other = "a long prompt " * 8, "another prompt " * 7
    for more in ({}, {"n": 2}, {"max_tokens": 0}):
        asked = {"max_tokens": 2, "echo": True, "logprobs": 2, "seed": 1, "temperature": 1, **more}
        alone = [running.complete(prompt=each, **asked)["choices"] for each in (long, other)]
        found = running.complete(prompt=[long, other, long, long, other], **asked)["choices"]
        expected = [alone[i] for i in (0, 1, 0, 0, 1)]
        for choice, same in zip(found, [each for group in expected for each in group], strict=True):
            assert choice["text"] == same["text"]
            np.testing.assert_allclose(
                [p for p in choice["logprobs"]["token_logprobs"] if p is not None],
                [p for p in same["logprobs"]["token_logprobs"] if p is not None],
                atol=1e-5,
            )
    before = running.engine.steps
    running.complete(prompt=["b" * 112] * 4, max_tokens=2, echo=True, logprobs=2)
    assert running.engine.steps - before < 7  # of 112 tokens two chunks, not eight
