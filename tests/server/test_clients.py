"""Clients that others wrote, where they are installed."""

from __future__ import annotations

import pytest
from serving import serving

# What no schema can say: how long a text is in tokens, and what goes with what.
_BY_CONTEXT = {
    "context_length_exceeded", "combination", "too_many_texts", "unknown_id", "unknown_part",
    "outside_of_text",
}  # fmt: skip


@pytest.fixture(scope="module")
def openai(running):
    module = pytest.importorskip("openai", reason="needs the extra clients")
    with module.OpenAI(base_url=f"http://127.0.0.1:{running.port}/v1", api_key="any") as client:
        yield client


def test_openais_client_reads_a_stream_as_the_whole(openai):
    asked = {"model": "small", "prompt": "Once upon", "max_tokens": 20, "seed": 7, "n": 2}
    whole = openai.completions.create(**asked, logprobs=2)
    texts, logprobs, usage = {0: "", 1: ""}, {0: [], 1: []}, None
    options = {"include_usage": True}
    for event in openai.completions.create(
        **asked, logprobs=2, stream=True, stream_options=options
    ):
        usage = event.usage or usage
        for choice in event.choices:
            texts[choice.index] += choice.text
            logprobs[choice.index] += choice.logprobs.token_logprobs
    assert usage == whole.usage
    for choice in whole.choices:
        assert choice.text == texts[choice.index]
        assert choice.logprobs.token_logprobs == pytest.approx(logprobs[choice.index], abs=1e-4)


def test_openais_client_knows_what_went_wrong(openai):
    import openai as module

    with pytest.raises(module.NotFoundError) as caught:
        openai.completions.create(model="gpt-4", prompt="a")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(module.BadRequestError, match="window of 128"):
        openai.completions.create(model="small", prompt="a", max_tokens=1000)
    with pytest.raises(module.BadRequestError, match="use /v1/completions"):
        openai.chat.completions.create(model="small", messages=[{"role": "user", "content": "a"}])
    assert [each.id for each in openai.models.list().data] == ["small"]


@pytest.mark.slow
def test_the_answers_are_as_the_schema_has_them(served_model):
    """Right requests and wrong ones, as a fuzzer draws them."""
    schemathesis = pytest.importorskip("schemathesis", reason="needs the extra clients")
    from hypothesis import HealthCheck, given, settings

    with serving(served_model, slots=4) as server:
        schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{server.port}/openapi.json")
        server.ask("/study/attention", {"prompt": "a"})  # the first measures all heads
        count, modes = 0, schemathesis.GenerationMode
        for operation in (each.ok() for each in schema.get_all_operations()):
            # What takes nothing can be asked for in one way alone.
            both = [modes.POSITIVE, modes.NEGATIVE] if operation.body else [modes.POSITIVE]
            for mode in both:
                strategy = operation.as_strategy(generation_mode=mode)

                @settings(max_examples=350, deadline=None, suppress_health_check=list(HealthCheck),
                          database=None)  # fmt: skip
                @given(case=strategy)
                def check(case):
                    nonlocal count
                    count += 1
                    answer = case.call()
                    excluded = []
                    if answer.status_code == 400 and answer.json()["error"]["code"] in _BY_CONTEXT:
                        excluded = [schemathesis.checks.positive_data_acceptance]
                    case.validate_response(answer, excluded_checks=excluded)

                check()
        assert count > 2000
        assert server.idle_within(2)
