from __future__ import annotations

import json

import pytest
from serving import serving

from tinygpt import InputError

TEMPLATE = """{%- for message in messages %}
{%- if message.role == 'system' and not loop.first %}
{{- raise_exception('system comes first') }}{% endif %}
{{- message.role }}: {{ message.content }}
{% endfor %}
{%- if add_generation_prompt %}assistant:{% endif %}"""
MESSAGES = [{"role": "user", "content": "Hi <b>"}, {"role": "assistant", "content": "Yes?"}]


@pytest.fixture(scope="module")
def chatting(served_model, tmp_path_factory):
    pytest.importorskip("jinja2", reason="needs the extra serve")
    from tinygpt.server.chat import Template

    path = tmp_path_factory.mktemp("chat") / "template.jinja"
    path.write_text(TEMPLATE, encoding="utf-8")
    with serving(served_model, slots=2, template=Template(path)) as found:
        yield found


def test_contents_in_parts_and_names_are_taken(chatting):
    asked = {"max_tokens": 9, "temperature": 0}
    parts = [{"type": "text", "text": "Hi "}, {"type": "text", "text": "<b>"}]
    other = [{"role": "user", "name": "Ann", "content": parts}, MESSAGES[1]]
    null = [{**MESSAGES[0], "name": None}, MESSAGES[1]]  # which is not given
    answers = [
        chatting.ask("/v1/chat/completions", {"messages": messages, **asked})[2]["choices"]
        for messages in (MESSAGES, other, null)
    ]
    assert answers[0] == answers[1] == answers[2]
    assert chatting.ask("/tokenizer_info")[2]["chat_template"] == TEMPLATE


def test_messages_are_continued_as_the_template_writes_them(chatting):
    asked = {"max_tokens": 12, "seed": 3, "temperature": 1, "n": 2}
    prompt = "user: Hi <b>\nassistant: Yes?\nassistant:"
    texts = [choice["text"] for choice in chatting.complete(prompt=prompt, **asked)["choices"]]
    status, _, answer = chatting.ask("/v1/chat/completions", {"messages": MESSAGES, **asked})
    assert (status, answer["object"]) == (200, "chat.completion")
    assert [each["message"] for each in answer["choices"]] == [
        {"role": "assistant", "content": text} for text in texts
    ]
    assert answer["usage"]["prompt_tokens"] == len(prompt)
    *events, done, _ = chatting.ask(
        "/v1/chat/completions", {"messages": MESSAGES, **asked, "stream": True}
    )[2].split("\n\n")
    assert done == "data: [DONE]"
    found = ["", ""]
    for event in (json.loads(event.removeprefix("data: ")) for event in events):
        assert event["object"] == "chat.completion.chunk"
        for choice in event["choices"]:
            assert ("role" in choice["delta"]) == (found[choice["index"]] == "")
            found[choice["index"]] += choice["delta"].get("content", "")
    assert found == texts


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "messages is missing"),
        ({"messages": []}, "a list of messages"),
        ({"messages": "Hi"}, "a list of messages"),
        ({"messages": [{"role": "user"}]}, "a role and a content"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "one of system, user, assistant"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "a content is a text"),
        ({"messages": [{"role": "user", "content": []}]}, "a content is a text"),
        ({"messages": [{"role": "user", "content": "x", "name": 3}]}, "name is 3"),
        ({"messages": MESSAGES, "prompt": "a"}, "unknown field 'prompt'"),
        ({"messages": MESSAGES, "tools": []}, "unknown field 'tools'"),
        ({"messages": [*MESSAGES, {"role": "system", "content": "x"}]}, "system comes first"),
        ({"messages": MESSAGES, "max_completion_tokens": 1000}, "window of 128"),
    ],
)
def test_messages_that_cannot_be_are_refused(chatting, body, words):
    status, _, answer = chatting.ask("/v1/chat/completions", body)
    assert status == 400
    assert words in answer["error"]["message"]


def test_a_name_that_is_null_is_none_for_the_template_too(tmp_path, running):
    pytest.importorskip("jinja2", reason="needs the extra serve")
    from tinygpt.server.chat import Chat, Template

    path = tmp_path / "names"
    path.write_text("{{ messages[0].name is defined }}", encoding="utf-8")
    asked = {"messages": [{"role": "user", "content": "a", "name": None}]}
    chat = Chat(asked, running.server.writer, "small", running.server.limits, Template(path))
    assert [prompt.text for prompt in chat.prompts] == ["False"]


def test_a_template_that_cannot_be_read_is_told(tmp_path):
    pytest.importorskip("jinja2", reason="needs the extra serve")
    from tinygpt.server.chat import Template

    with pytest.raises(InputError, match="no such file"):
        Template(tmp_path / "none")
    (tmp_path / "bad").write_text("{% for %}", encoding="utf-8")
    with pytest.raises(InputError, match="--chat-template"):
        Template(tmp_path / "bad")
    (tmp_path / "sly").write_text("{{ messages.__class__.__mro__ }}", encoding="utf-8")
    Template(tmp_path / "sly")  # a sandbox runs it


def test_a_base_model_has_no_chat(running):
    status, _, answer = running.ask("/v1/chat/completions", {"messages": MESSAGES})
    assert (status, answer["error"]["message"]) == (
        400, "this is a base model: use /v1/completions",
    )  # fmt: skip
