from __future__ import annotations

import asyncio
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import pairwise

import pytest
from serving import serving
from tinygrad.helpers import GlobalCounters

LONG = {"prompt": "Once upon", "max_tokens": 110, "temperature": 0}
MALFORMED = [
    (b"", "not JSON"),
    (b"{", "not JSON"),
    (b"[1]", "it must be an object"),
    (b'"text"', "it must be an object"),
    (b"\xff\xfe{}", "not UTF-8"),
    (b'{"prompt": "a", "prompt": "b"}', "stands twice"),
    (b'{"temperature": NaN}', "NaN is no number"),
    (b'{"temperature": Infinity}', "Infinity is no number"),
    (b'{"temperature": 1e999}', "temperature is inf"),
    (b'{"max_tokens": ' + b"9" * 5000 + b"}", "too many digits"),
    (b'{"prompt": "\\ud800"}', "half of a character"),
    (b'{"\\udc00": 1}', "half of a character"),
    (b'{"prompt": ' + b"[" * 40 + b"]" * 40 + b"}", "deeper than 32"),
    (b"[" * 100_000, "deeper than 32"),
    ({"prompt": 5}, "prompt is 5"),
    ({"prompt": []}, "none of them empty"),
    ({"prompt": [[]]}, "none of them empty"),
    ({"prompt": ["a", 5]}, "it must be a text, a list"),
    ({"prompt": [True]}, "it must be a text, a list"),
    ({"prompt": [1.5]}, "it must be a text, a list"),
    ({"prompt": [-1]}, "the id -1: ids are 0 to 256"),
    ({"prompt": [257]}, "the id 257"),
    ({"prompt": [10**30]}, "the id 1000000000000000000000000000000"),
    ({"max_tokens": -1}, "max_tokens is -1"),
    ({"max_tokens": 1.5}, "max_tokens is 1.5"),
    ({"max_tokens": "5"}, "max_tokens is '5'"),
    ({"temperature": -0.1}, "temperature is -0.1"),
    ({"temperature": True}, "temperature is True"),
    ({"temperature": 10**400}, "temperature is"),
    ({"top_p": 0}, "top_p is 0"),
    ({"top_p": 1.1}, "top_p is 1.1"),
    ({"top_k": -5}, "top_k is -5"),
    ({"min_p": 2}, "min_p is 2"),
    ({"n": 0}, "n is 0"),
    ({"n": 129}, "n is 129"),
    ({"n": 3, "best_of": 2}, "best_of is 2, less than n"),
    ({"n": 1, "best_of": 2, "stream": True}, "cannot be streamed"),
    ({"prompt": ["a"] * 100}, "100 texts at once"),
    ({"stop": ["a"] * 5}, "up to 4"),
    ({"stop": ""}, "none of them empty"),
    ({"stop": [5]}, "it must be a text"),
    ({"seed": -1}, "seed is -1"),
    ({"seed": 2**63}, "seed is 9223372036854775808"),
    ({"logprobs": 21}, "logprobs is 21"),
    ({"logprobs": True}, "logprobs is True"),
    ({"echo": "yes"}, "echo is 'yes'"),
    ({"stream": 1}, "stream is 1"),
    ({"stream": True, "stream_options": []}, "stream_options is []"),
    ({"stream": True, "stream_options": {"usage": True}}, "unknown field of stream_options"),
    ({"presence_penalty": 3}, "presence_penalty is 3"),
    ({"frequency_penalty": "x"}, "frequency_penalty is 'x'"),
    ({"repetition_penalty": 0}, "repetition_penalty is 0"),
    ({"logit_bias": {"300": 1}}, "the id 300"),
    ({"logit_bias": {"a": 1}}, "the key 'a'"),
    ({"logit_bias": {"5": 101}}, "logit_bias.5 is 101"),
    ({"logit_bias": [1]}, "logit_bias is [1]"),
    ({"suffix": "end"}, "leave suffix out"),
    ({"temprature": 1}, "did you mean 'temperature'"),
    ({"messages": []}, "unknown field 'messages'"),
]


@pytest.mark.parametrize(("body", "words"), MALFORMED, ids=lambda v: str(v)[:50])
def test_a_request_that_is_wrong_is_told_what_is(running, body, words):
    status, _, answer = running.ask("/v1/completions", body)
    assert status == 400
    error = answer["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert words in error["message"]
    assert "\n" not in error["message"]
    if isinstance(body, dict):
        assert error["param"] in body or error["param"] == "n"
    assert running.complete(prompt="a", max_tokens=1)["usage"]["total_tokens"] == 2


@pytest.mark.parametrize(
    ("path", "method", "status"),
    [("/nothing", "GET", 404), ("/v1/models/other", "GET", 404), ("/v1/completions", "GET", 405),
     ("/v1/models", "POST", 405), ("/health", "DELETE", 405), ("/v1/chat/completions", "POST", 400),
     ("/v1/completions/", "POST", 404)],
)  # fmt: skip
def test_what_is_not_there_is_told_in_the_same_form(running, path, method, status):
    got, headers, answer = running.ask(path, b"{}" if method == "POST" else None, method)
    assert got == status
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    if status == 405:
        assert headers["allow"]


def test_a_model_has_one_name(running):
    assert running.ask("/v1/models")[2]["data"][0]["id"] == "small"
    assert running.ask("/v1/models/small")[2]["id"] == "small"
    status, _, answer = running.ask("/v1/completions", {"model": "gpt-4", "prompt": "a"})
    assert (status, answer["error"]["code"]) == (404, "model_not_found")
    assert running.complete(model="small", prompt="a")["model"] == "small"


def test_a_body_that_is_too_long_is_refused_while_it_comes(running):
    assert running.ask("/v1/completions", b" " * 1_000_001)[0] == 413
    connection = running.connect()
    connection.putrequest("POST", "/v1/completions")
    connection.putheader("Transfer-Encoding", "chunked")
    connection.endheaders()
    try:
        for _ in range(40):
            connection.send(b"%x\r\n" % 100_000 + b" " * 100_000 + b"\r\n")
    except OSError:  # it is not read any further
        pass
    assert connection.getresponse().status == 413
    connection.close()
    status, _, answer = running.ask("/v1/completions", {"prompt": "a" * 999_000})
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")


def test_text_becomes_ids_and_text_again(running):
    for text in ("Once upon", "", "人é"):
        answer = running.ask("/tokenize", {"prompt": text})[2]
        assert answer["count"] == len(answer["tokens"]) == len(text.encode())
        assert running.ask("/detokenize", {"tokens": answer["tokens"]})[2] == {"prompt": text}
    assert running.ask("/detokenize", {"tokens": [257]})[0] == 400
    assert running.ask("/tokenizer_info")[2]["vocab_size"] == 257


def test_who_has_no_key_reads_nothing(served_model):
    with serving(served_model, slots=1, api_key="secret") as keyed:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            for path in ("/v1/models", "/v1/completions", "/metrics", "/tokenize"):
                status, _, answer = keyed.ask(path, **headers)
                assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
        assert keyed.ask("/health")[0] == 200
        for scheme in ("Bearer", "bearer"):
            assert keyed.ask("/v1/models", Authorization=f"{scheme} secret")[0] == 200


def test_pages_of_others_may_not_ask(running, served_model):
    body = {"prompt": "a", "max_tokens": 1}
    own = f"http://127.0.0.1:{running.port}"
    assert running.ask("/v1/completions", body, Origin="https://evil.example")[0] == 403
    assert running.ask("/v1/completions", body, Origin=own)[0] == 200
    assert running.ask("/v1/completions", body, Host="evil.example")[0] == 421
    for host in (f"localhost:{running.port}", "LOCALHOST.", "127.0.0.1", "[::1]:80", "[::1]"):
        assert running.ask("/v1/completions", body, Host=host)[0] == 200
    for host in ("[::1].evil.example", "[localhost]x", "localhost:80@evil.example", "[]", ":80"):
        assert running.ask("/v1/completions", body, Host=host)[0] == 421
    with serving(served_model, slots=1, cors="https://good.example") as open_to:
        for method in ("OPTIONS", "POST"):
            status, headers, _ = open_to.ask(
                "/v1/completions", body, method, Origin="https://good.example"
            )
            assert status in (200, 204)
            assert headers["access-control-allow-origin"] == "https://good.example"
        assert open_to.ask("/v1/completions", body, Origin="https://evil.example")[0] == 403


def busy(running, count: int) -> None:
    """Wait until so many texts run."""
    while len(running.engine.running) + len(running.engine.waiting) < count:
        time.sleep(0.001)


@pytest.mark.parametrize("leaves", [True, False])
def test_a_stream_tells_of_a_client_that_leaves_before_its_first_event(leaves):
    pytest.importorskip("starlette", reason="needs the extra serve")
    from tinygpt.server.answers import EventStream

    told, sent = [], []

    async def events():
        yield {"n": 1}

    async def receive():
        if not leaves:
            await asyncio.sleep(60)
        return {"type": "http.disconnect"}

    async def send(message):
        if leaves:  # whose socket takes nothing
            await asyncio.sleep(60)
        sent.append(message.get("body"))

    scope = {"type": "http", "asgi": {"spec_version": "2.3"}}
    asyncio.run(EventStream(events(), lambda: told.append(True))(scope, receive, send))
    assert (told, sent[1:2]) == (([True], []) if leaves else ([], [b'data: {"n":1}\n\n']))


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot(running, stream, monkeypatch):
    """In the queue too, before its first token, and in mid-stream."""
    usual = running.engine.slots.step
    monkeypatch.setattr(running.engine.slots, "step", lambda *a: time.sleep(0.02) or usual(*a))
    clients = [running.send(**LONG, stream=stream, n=2) for _ in range(4)]
    while len(running.engine.waiting) < 4 or len(running.engine.running) < 4:
        time.sleep(0.001)
    if stream:
        clients[0].recv(1000)
    for client in clients:
        client.close()
    assert running.idle_within(1)
    assert running.complete(**{**LONG, "max_tokens": 3})["usage"]["completion_tokens"] == 3


def test_a_full_queue_says_when_to_come_again(served_model, monkeypatch):
    with serving(served_model, slots=1, queue=2) as small:
        usual = small.engine.slots.step
        monkeypatch.setattr(small.engine.slots, "step", lambda *a: time.sleep(0.02) or usual(*a))
        clients = [small.send(**LONG) for _ in range(3)]
        busy(small, 3)
        status, headers, answer = small.ask("/v1/completions", {"prompt": "a"})
        assert (status, answer["error"]["code"]) == (429, "queue_full")
        assert headers["retry-after"].isdigit()
        for client in clients:
            client.close()
        assert small.idle_within(1)
        assert small.complete(prompt="a", max_tokens=1)["usage"]["completion_tokens"] == 1


def test_a_long_prompt_lets_a_running_stream_go_on(running, monkeypatch):
    """At most one chunk is read between two of its tokens."""
    session, log = running.engine.slots._session, []
    for name in ("fill", "choose"):
        usual = getattr(session, name)

        def noting(tokens, *args, name=name, usual=usual, **more):
            log.append((name, tokens.shape[-1]))
            time.sleep(0.01)  # so that the stream has not ended when the other begins
            return usual(tokens, *args, **more)

        monkeypatch.setattr(session, name, noting)
    with ThreadPoolExecutor(2) as pool:
        stream = pool.submit(running.stream, **{**LONG, "prompt": "Zebras fly"})
        while not log:
            time.sleep(0.001)
        late = pool.submit(running.complete, prompt="y" * 120, max_tokens=3, temperature=0)
        stream.result(), late.result()
    chunks = [length > 1 for _, length in log]
    assert sum(chunks) == 2 + 1  # of 120 tokens two, of 9 one
    assert not any(a and b for a, b in pairwise(chunks[1:]))  # the first is the stream's own


def test_a_text_that_fails_ends_alone(running, monkeypatch):
    """In the shape of an error, while others go on."""
    usual = running.engine.slots.start

    def start(ids, *args):
        if ids[0] == 33:
            raise RuntimeError("broken")
        return usual(ids, *args)

    monkeypatch.setattr(running.engine.slots, "start", start)
    status, _, answer = running.ask("/v1/completions", {"prompt": "!"})
    assert (status, answer["error"]["code"]) == (500, "engine_error")
    assert "broken" not in str(answer)
    status, _, answer = running.ask("/v1/completions", {"prompt": "!", "stream": True})
    assert (status, answer["error"]["code"]) == (500, "engine_error")
    assert running.complete(prompt="a", max_tokens=2)["usage"]["completion_tokens"] == 2


def test_what_fails_in_mid_stream_is_an_event(running, monkeypatch):
    usual, count = running.engine.slots.step, iter(range(99))

    def step(*args):
        if next(count) == 3:
            raise RuntimeError
        return usual(*args)

    monkeypatch.setattr(running.engine.slots, "step", step)
    *events, last = running.stream(prompt="a", max_tokens=9)
    assert [len(event["choices"]) for event in events] == [1] * 3
    assert last["error"]["code"] == "engine_error"


def test_a_stream_that_waits_is_refused_by_its_status(served_model, monkeypatch):
    """As one answer is, when the program is about to end; what runs goes on."""
    with serving(served_model, slots=1) as running, ThreadPoolExecutor() as pool:
        usual = running.engine.slots.step
        monkeypatch.setattr(running.engine.slots, "step", lambda *a: time.sleep(0.05) or usual(*a))
        first = pool.submit(running.stream, prompt="a", max_tokens=30)
        busy(running, 1)
        path, asked = "/v1/completions", {"prompt": "b", "stream": True}
        others = [pool.submit(running.ask, path, {**asked, "stream": s}) for s in (True, False)]
        busy(running, 3)
        running.engine.drain()
        for status, headers, answer in (each.result() for each in others):
            assert (status, answer["error"]["code"]) == (503, "draining")
            assert "retry-after" in headers
        assert len(first.result()) == 31


def test_a_step_that_fails_ends_the_texts_of_that_step_alone(running, monkeypatch):
    usual, broken = running.engine.slots.step, [True]

    def step(*args):
        if broken:
            raise RuntimeError(broken.pop())
        return usual(*args)

    monkeypatch.setattr(running.engine.slots, "step", step)
    assert running.ask("/v1/completions", {"prompt": "a"})[0] == 500
    assert running.complete(prompt="a", max_tokens=2)["usage"]["completion_tokens"] == 2
    assert running.idle_within(1)


def test_a_request_takes_no_longer_than_it_may(served_model, monkeypatch):
    with serving(served_model, slots=2, timeout_s=0.3) as hasty:
        usual = hasty.engine.slots.step
        monkeypatch.setattr(hasty.engine.slots, "step", lambda *a: time.sleep(0.05) or usual(*a))
        status, _, answer = hasty.ask("/v1/completions", LONG)
        assert (status, answer["error"]["code"]) == (504, "timeout")
        assert hasty.stream(**LONG)[-1]["error"]["code"] == "timeout"
        assert hasty.idle_within(1)


def test_half_open_sockets_keep_nobody_waiting(running, monkeypatch):
    from tinygpt.server import protocol

    monkeypatch.setattr(protocol, "HEAD_S", 1.5)
    halves = [socket.create_connection(("127.0.0.1", running.port)) for _ in range(200)]
    for number, half in enumerate(halves):
        half.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: loc"[: number % 40])
    began = time.monotonic()
    running.complete(prompt="a", max_tokens=1)
    assert time.monotonic() - began < 30  # not held up; how fast is measured elsewhere
    for half in halves:
        with half:
            half.settimeout(20)
            with suppress(ConnectionResetError):
                assert half.recv(100) == b""  # closed by the server


def test_half_a_head_behind_a_whole_one_is_cut_too(running, monkeypatch):
    from tinygpt.server import protocol

    monkeypatch.setattr(protocol, "HEAD_S", 0.5)
    whole = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", running.port)) as client:
        client.settimeout(60)
        client.sendall(whole + whole[:30])
        told = b""
        while part := client.recv(1000):  # until the server closes
            told += part
        assert told.endswith(b'{"status":"ok"}')
    assert time.monotonic() - began < 25  # an idle client has 30 s


def test_a_text_that_no_window_holds_is_not_read(running, monkeypatch):
    """To count its tokens may take seconds."""
    monkeypatch.setattr(running.server.writer, "encode", lambda text: pytest.fail("it is read"))
    status, _, answer = running.ask("/v1/completions", {"prompt": "é" * 5000})
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
    assert "10,000 bytes" in answer["error"]["message"]


def test_a_string_that_does_not_end_takes_no_time(running):
    """A scan for brackets that went back in it took an hour for a megabyte of these."""
    began = time.process_time()
    for part in (b'\\"', b"\\", b'"', b'\\\\"'):
        body = b'"' + part * (900_000 // len(part))
        status, _, answer = running.ask("/tokenize", body)
        assert (status, "not JSON" in answer["error"]["message"]) == (400, True)
    assert time.process_time() - began < 20


def test_so_many_texts_are_refused_before_any_is_read(running):
    for asked in ({"prompt": [""] * 200_000}, {"prompt": ["a"] * 60_000, "n": 128}):
        status, _, answer = running.ask("/v1/completions", asked)
        assert (status, answer["error"]["code"]) == (400, "too_many_texts")


def test_a_client_that_leaves_amid_its_body_is_no_fault_of_the_servers(running):
    before = running.server.metrics.requests["/v1/completions", 499]
    with socket.create_connection(("127.0.0.1", running.port)) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n")
        client.sendall(b"Content-Length: 500\r\n\r\n{")
        time.sleep(0.2)
    end = time.monotonic() + 10
    while running.server.metrics.requests["/v1/completions", 499] == before:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_what_is_no_http_is_told_in_the_same_form(running):
    with socket.create_connection(("127.0.0.1", running.port)) as client:
        client.sendall(b"GARBAGE\r\n\r\n")
        answer = b""
        while part := client.recv(1000):
            answer += part
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400")
    assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.2", "::1", "0.0.0.0", "192.0.2.7"])
def test_a_host_is_checked_on_every_loopback_address(address):
    pytest.importorskip("starlette", reason="needs the extra serve")
    from tinygpt.server.guard import hosts_of

    found = hosts_of(address)
    assert (found is None) == (address in ("0.0.0.0", "192.0.2.7"))
    assert found is None or {"localhost", "127.0.0.1", address} <= set(found)


def test_names_of_hosts_know_no_capitals(running):
    for host in (f"LOCALHOST:{running.port}", "localhost.", "[::1]:80"):
        assert running.ask("/health", Host=host)[0] == 200


def test_studies_let_a_stream_go_on_and_end_with_their_client(running, monkeypatch):
    """One such between two steps, and none whose client has left."""
    ran, usual = [], running.server.studies._tokens
    monkeypatch.setattr(
        running.server.studies, "_tokens", lambda *a: ran.append(running.engine.steps) or usual(*a)
    )
    step = running.engine.slots.step
    monkeypatch.setattr(running.engine.slots, "step", lambda *a: time.sleep(0.02) or step(*a))
    stream = running.send(**LONG, stream=True)
    busy(running, 1)
    body = json.dumps({"prompt": "Once upon"}).encode()
    head = f"POST /study/tokens HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    clients = [socket.create_connection(("127.0.0.1", running.port)) for _ in range(30)]
    for client in clients:
        client.sendall(head.encode() + body)
    while len(ran) < 4:
        time.sleep(0.001)
    for client in clients:
        client.close()
    time.sleep(0.3)
    count = len(ran)
    time.sleep(0.5)
    stream.close()
    assert len(set(ran)) == len(ran)  # each after another step
    assert len(ran) == count < 30
    assert running.idle_within(1)


def test_what_is_counted_is_shown(running):
    running.complete(prompt="a", max_tokens=3)
    text = running.ask("/metrics")[2]
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert int(lines['tinygpt_requests_total{path="/v1/completions",status="200"}']) >= 1
    assert lines["tinygpt_slots"] == "4"
    assert lines["tinygpt_slots_busy"] == lines["tinygpt_queue_length"] == "0"
    assert int(lines["tinygpt_completion_tokens_total"]) >= 3
    assert int(lines["tinygpt_time_to_first_token_seconds_count"]) >= 1


def test_thousands_of_requests_leave_no_memory(running):
    def some(count):
        for number in range(count):
            asked = {"prompt": "abc" * (number % 9 + 1), "max_tokens": 2, "logprobs": number % 3}
            running.complete(**asked, top_k=number % 5, presence_penalty=0.1 * (number % 2))
        return GlobalCounters.mem_used

    assert some(20) == some(60)
