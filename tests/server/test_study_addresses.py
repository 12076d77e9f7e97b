from __future__ import annotations

import asyncio
import json
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import SMALL, needs_clang, randomize
from serving import model_to_serve
from tinygrad.nn.state import get_state_dict

from tinygpt import GPT, Generator, load_tokenizer
from tinygpt.errors import InputError
from tinygpt.runtime import buffers
from tinygpt.server.problems import Problem
from tinygpt.study.attention import head_scores
from tinygpt.study.attribution import attribute
from tinygpt.study.inside import look
from tinygpt.study.lens import lens
from tinygpt.study.without import Without
from tinygpt.writer import Writer

pytest.importorskip("starlette", reason="needs the extra serve")
from tinygpt.server.study import Studies

pytestmark = needs_clang
TEXT = "Once upon a time"
IDS = list(TEXT.encode())


def study(running, path, **body):
    status, _, answer = running.ask(f"/study/{path}", body)
    assert status == 200, answer
    return answer


def continued(running, **body):
    """The events of /study/continue, of which the last was [DONE]."""
    status, headers, text = running.ask("/study/continue", body)
    assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8"), text
    *events, done, rest = text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(e.removeprefix("data: ")) for e in events if not e.startswith(":")]


def ids_of(events):
    return [event["id"] for event in events if "id" in event]


@pytest.fixture(scope="module")
def inside(served_model):
    return look(served_model, IDS)


def test_tokens_are_what_completions_say_of_the_prompt(running):
    found = study(running, "tokens", prompt=TEXT)["tokens"]
    logprobs = running.complete(prompt=TEXT, echo=True, logprobs=3, max_tokens=0)["choices"][0]
    expected = logprobs["logprobs"]["token_logprobs"]
    assert [each["id"] for each in found] == IDS
    assert found[0]["loss"] is expected[0] is None
    np.testing.assert_allclose([-each["loss"] for each in found[1:]], expected[1:], atol=1e-5)
    for each in found[1:]:
        shares = [other["probability"] for other in each["likeliest"]]
        assert shares == sorted(shares, reverse=True)
        assert (each["rank"] == 1) == (each["likeliest"][0]["id"] == each["id"])


def test_attention_lens_and_attribution_are_those_of_the_study(running, served_model, inside):
    weights = study(running, "attention", prompt=TEXT, block=1, head=0)["weights"]
    assert [len(row) for row in weights] == [*range(1, len(IDS) + 1)]
    for i, row in enumerate(weights):
        np.testing.assert_allclose(row, inside.attention[1, 0, i, : i + 1], atol=2e-6)
    places = study(running, "lens", prompt=IDS, index=5)["places"]
    expected = lens(served_model, inside)
    assert [each["place"] for each in places] == list(expected.places)
    assert [each["id"] for each in places] == expected.likeliest[:, 5].tolist()
    assert [each["rank"] for each in places] == expected.rank[:, 5].tolist()
    np.testing.assert_allclose(
        [each["divergence"] for each in places], expected.divergence[:, 5], atol=1e-4
    )
    found = study(running, "attribute", prompt=TEXT, index=5, token=65, against=66)
    values = attribute(served_model, inside, 65, 66, 5)
    np.testing.assert_allclose([e["logit"] for e in found["parts"]], values.values, atol=1e-4)
    assert found["sum"] == pytest.approx(found["logit"], abs=1e-4)


def test_the_last_text_is_not_taken_for_another_of_its_length(running):
    for text in ("abc", "xbc"):
        tokens = study(running, "tokens", prompt=text)["tokens"]
        assert [each["text"] for each in tokens] == [*text]
        expected = running.complete(prompt=text, echo=True, logprobs=0, max_tokens=0)
        last = expected["choices"][0]["logprobs"]["token_logprobs"][-1]
        assert tokens[-1]["loss"] == pytest.approx(-last, abs=1e-5)


def test_the_heads_scores_are_those_of_the_study(running, served_model):
    found = study(running, "attention", prompt=TEXT)["heads"]
    expected = head_scores(served_model)
    for each in found:
        for kind in ("previous", "first", "duplicate", "induction"):
            value = getattr(expected, kind)[each["block"], each["head"]]
            assert each[kind] == pytest.approx(value, abs=1e-6)
    assert len(found) == 4
    assert all(0 < each["entropy"] <= 1.0001 for each in found)


def test_a_continuation_is_what_completions_write(running):
    asked = {"prompt": TEXT, "max_tokens": 12, "seed": 3, "temperature": 0.8, "top_k": 5}
    *tokens, end = continued(running, **asked)
    choice = running.complete(**asked, logprobs=10)["choices"][0]
    expected = pytest.approx(choice["logprobs"]["token_logprobs"], abs=1e-5)  # it was cached
    assert [each["logprob"] for each in tokens] == expected
    assert [each["text"] for each in tokens] == choice["logprobs"]["tokens"]
    assert end["finish"] == choice["finish_reason"]
    for each in tokens:
        kept = [other["kept"] for other in each["likely"]]
        scaled = np.exp([other["logprob"] / 0.8 for other in each["likely"][:5]])
        np.testing.assert_allclose(kept[:5], scaled / scaled.sum(), rtol=1e-4)
        assert kept[5:] == [0.0] * 5


def test_a_continuation_tells_the_prompt_first(running):
    first, *events = continued(running, prompt=TEXT, max_tokens=1, echo=True)
    assert first == {"prompt": IDS}
    assert [each["id"] for each in events if each.get("echo")] == IDS
    first, *events = continued(running, prompt="", max_tokens=1, echo=True)
    assert len(first["prompt"]) == 1
    assert [each.get("echo") for each in events] == [False, None]


def without_head(model: GPT, block: int, head: int) -> GPT:
    """A model of its own, in which what comes of a head is multiplied with zeros."""
    twin = GPT(model.config, seed=None)
    for name, part in get_state_dict(model).items():
        values = part.numpy()
        if name == f"blocks.{block}.attn.out_proj.weight":
            size = model.config.head_dim
            values = values.copy()
            values[:, head * size : (head + 1) * size] = 0
        buffers.write(get_state_dict(twin)[name], values)
    return twin


@pytest.mark.parametrize("more", [{}, {"heads": [[1, 0]]}])
def test_the_penalties_count_what_was_written_before(running, more):
    asked = {"temperature": 0, "frequency_penalty": 1.5, "presence_penalty": 0.5, **more}
    whole = ids_of(continued(running, prompt=IDS, max_tokens=20, **asked))
    begun = {"prompt": IDS + whole[:8], "max_tokens": 12, **asked}
    assert ids_of(continued(running, **begun, written=8)) == whole[8:]
    assert ids_of(continued(running, **begun)) != whole[8:]
    every = ids_of(continued(running, **begun, written=len(IDS) + 8))
    assert ids_of(continued(running, **begun, written=9999)) == every


def test_without_a_head_it_is_a_model_of_which_the_weights_are_zero(running, served_model):
    asked = {"prompt": TEXT, "max_tokens": 20, "temperature": 0}
    whole = ids_of(continued(running, **asked))
    found = ids_of(continued(running, **asked, heads=[[1, 0]]))
    twin = without_head(served_model, 1, 0)
    assert found == [*Generator(twin).generate(IDS, 20, temperature=0)]
    assert found != whole == ids_of(continued(running, **asked, heads=[], blocks=[]))


def test_without_a_block_it_is_a_model_that_lacks_it(running, served_model):
    found = ids_of(continued(running, prompt=TEXT, max_tokens=20, temperature=0, blocks=[0]))
    shorter = GPT(replace(served_model.config, n_layer=1), seed=None)
    given = get_state_dict(served_model)
    for name, part in get_state_dict(shorter).items():
        buffers.write(part, given[name.replace("blocks.0.", "blocks.1.")].numpy())
    assert found == [*Generator(shorter).generate(IDS, 20, temperature=0)]


def test_with_nothing_left_out_it_is_the_model_itself(running, served_model):
    without = Without(served_model)
    without.slots.start(IDS, seed=4)
    found = [token.token for _ in range(12) for token in without.slots.step().values()]
    asked = {"prompt": TEXT, "max_tokens": 12, "seed": 4, "temperature": 1}
    assert found == ids_of(continued(running, **asked))


def test_texts_without_parts_wait_for_each_other_and_end_when_they_are_left(running, monkeypatch):
    reduced = running.server.studies.reduced
    step = reduced._step
    monkeypatch.setattr(reduced, "_step", lambda *text: (time.sleep(0.05), step(*text)))
    connections = [running.connect() for _ in range(3)]
    for connection in connections:
        body = {"prompt": TEXT, "max_tokens": 100, "heads": [[0, 0]], "seed": 1, "temperature": 1}
        connection.request("POST", "/study/continue", json.dumps(body))
    assert connections[0].getresponse().read(20)
    for connection in connections:
        connection.close()
    end = time.monotonic() + 1
    while reduced.running or reduced.waiting:
        assert time.monotonic() < end, "a text that nobody reads goes on"
        time.sleep(0.01)
    assert len(ids_of(continued(running, prompt=TEXT, max_tokens=3, blocks=[1]))) <= 3


@pytest.mark.parametrize(
    ("path", "body", "told"),
    [
        ("tokens", {"prompt": 5}, "prompt is 5: it must be a text, or a list of ids"),
        ("tokens", {"prompt": []}, "prompt is []: it must be"),
        ("tokens", {"prompt": [True]}, "prompt is [True]: it must be"),
        ("tokens", {"prompt": ["a"]}, "prompt is ['a']: it must be"),
        ("tokens", {"prompt": [257]}, "prompt has the id 257: ids are 0 to 256"),
        ("tokens", {"prompt": "a", "block": 1}, "unknown field 'block'"),
        ("tokens", {"prompt": "a" * 129}, "129 tokens, more than the model's window of 128"),
        ("attention", {"prompt": "a", "block": 1}, "head is missing"),
        ("attention", {"prompt": "a", "head": 1}, "block is missing"),
        ("attention", {"prompt": "a", "block": 2, "head": 0}, "block is 2: it must be from 0 to 1"),
        ("attention", {"prompt": "a", "block": 0, "head": 9}, "head is 9: it must be from 0 to 1"),
        ("attention", {"prompt": "a", "block": -1, "head": 0}, "block is -1: it must be"),
        ("lens", {"prompt": "ab", "index": 2}, "index is 2: the text's tokens are 0 to 1"),
        ("lens", {"prompt": "ab", "index": 0.5}, "index is 0.5: it must be a whole number"),
        ("attribute", {"prompt": "ab", "token": 257}, "token has the id 257: ids are 0 to 256"),
        ("attribute", {"prompt": "ab", "against": 257}, "against has the id 257"),
        ("continue", {"prompt": "a", "heads": [[2, 0]]}, "heads has [2, 0]: blocks are 0 to 1"),
        ("continue", {"prompt": "a", "heads": [[0, -1]]}, "heads has [0, -1]"),
        ("continue", {"prompt": "a", "heads": [0, 1]}, "it must be a list of [block, head]"),
        ("continue", {"prompt": "a", "heads": 1}, "it must be a list of [block, head]"),
        ("continue", {"prompt": "a", "blocks": [2]}, "blocks has 2: blocks are 0 to 1"),
        ("continue", {"prompt": "a", "blocks": [True]}, "it must be a list of whole numbers"),
        ("continue", {"prompt": "a", "n": 2}, "unknown field 'n'"),
        ("continue", {"prompt": "a", "top": 21}, "top is 21"),
        ("continue", {"prompt": "a", "max_tokens": 128}, "more than the model's window of 128"),
        ("continue", {"prompt": ["a", "b"]}, "it must be a text, or a list of ids"),
    ],
)
def test_a_request_that_cannot_be_is_told_why(running, path, body, told):
    status, _, answer = running.ask(f"/study/{path}", body)
    assert (status, answer["error"]["type"]) == (400, "invalid_request_error")
    assert told in answer["error"]["message"]


def test_another_model_is_not_here(running):
    status, _, answer = running.ask("/study/tokens", {"prompt": "a", "model": "gpt2"})
    assert (status, answer["error"]["code"]) == (404, "model_not_found")


def at_once(model: GPT) -> Studies:
    """Studies whose functions run as soon as they are asked for."""
    engine = SimpleNamespace(model=model, queue=1, draining=False, call=lambda call: call.run())
    return Studies(Writer(model, load_tokenizer("bytes")), engine, "small")


def test_the_logits_of_a_post_norm_model_are_no_sum():
    model = randomize(GPT(replace(SMALL, norm="post", vocab_size=257)))
    with pytest.raises(Problem, match="post-norm scales the sum in every block") as problem:
        asyncio.run(at_once(model).answer("/study/attribute", {"prompt": "a"}))
    assert problem.value.status == 400


def test_weights_that_are_no_numbers_are_the_servers_fault():
    model = model_to_serve(16)
    buffers.write(model.wte.weight, np.full(model.wte.weight.shape, np.nan, np.float32))
    with pytest.raises(Problem, match=r"wte\.weight has values") as problem:
        asyncio.run(at_once(model).answer("/study/tokens", {"prompt": "a"}))
    assert (problem.value.status, problem.value.code) == (500, "not_numbers")


def test_the_models_card(running, served_model):
    status, _, about = running.ask("/study/model")
    assert (status, about["id"], about["file"]) == (200, "small", "models/small")
    assert about["parameters"] == served_model.config.parameter_count
    assert (about["config"]["n_head"], about["dtype"]) == (2, "float32")
    assert about["bytes"] == 4 * about["parameters"]


def test_a_part_that_is_not_there_is_refused(served_model):
    with pytest.raises(InputError, match=r"heads has \[0, 5\]: blocks are 0 to 1, heads 0 to 1"):
        Without(served_model).leave_out([(0, 5)], [])
