"""What a server still waits for when it is about to end, and what it does not."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from serving import serving

from tinygpt.tokenizer.tokenizer import Tokenizer

PROMPT = {"prompt": "Once upon"}


@pytest.fixture
def held(monkeypatch):
    """Let functions wait until they are released; when one has begun, and the release."""
    began, release = threading.Event(), threading.Event()

    def hold(owner: object, name: str) -> None:
        usual = getattr(owner, name)

        def waiting(*args, **more):
            began.set()
            assert release.wait(120)
            return usual(*args, **more)

        monkeypatch.setattr(owner, name, waiting)

    return hold, began, release


@contextmanager
def releasing(event: threading.Event) -> Iterator[None]:
    """Also where a test fails, before anybody waits for who waits for the event."""
    try:
        yield
    finally:
        event.set()


def until(condition) -> None:
    while not condition():
        time.sleep(0.005)


@pytest.mark.parametrize(
    ("path", "body", "holds", "status"),
    [
        ("/study/tokens", PROMPT, lambda server: (server.studies, "_tokens"), 200),
        ("/study/attention", PROMPT, lambda server: (server.studies, "_attention"), 200),
        ("/tokenize", PROMPT, lambda server: (Tokenizer, "encode"), 200),
        ("/detokenize", {"tokens": [5]}, lambda server: (Tokenizer, "decode"), 200),
        ("/v1/completions", PROMPT, lambda server: (server.writer, "encode"), 503),
        ("/study/continue", PROMPT, lambda server: (server.writer, "encode"), 503),
    ],
)
def test_who_comes_while_something_is_computed_is_told_that_it_ends(
    served_model, held, path, body, holds, status
):
    hold, began, release = held
    with serving(served_model) as server, ThreadPoolExecutor() as pool, releasing(release):
        assert not server.server.busy
        hold(*holds(server.server))
        first = pool.submit(server.ask, path, body)
        assert began.wait(120)
        server.engine.drain()
        assert server.server.busy
        for late in ("/study/tokens", "/tokenize", "/detokenize", "/v1/completions"):
            got, headers, answer = server.ask(late, {"tokens": [5]} if "de" in late else PROMPT)
            assert (got, answer["error"]["code"], "retry-after" in headers) == (503, "draining", 1)
        assert server.ask("/health")[0] == 503
        release.set()
        assert first.result()[0] == status
        until(lambda: not server.server.busy)


def test_what_is_computed_for_a_client_that_has_left_is_waited_for(served_model, held):
    hold, began, release = held
    with serving(served_model) as server, releasing(release):
        hold(server.server.studies, "_tokens")
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            head = "POST /study/tokens HTTP/1.1\r\nHost: localhost\r\nContent-Length: 15\r\n\r\n"
            client.sendall(head.encode() + b'{"prompt": "a"}')
            assert began.wait(120)
        until(lambda: server.server.metrics.requests["/study/tokens", 499])
        assert server.server.busy
        release.set()
        until(lambda: not server.server.busy)


def test_who_sends_half_a_request_delays_no_end(served_model, monkeypatch):
    """Half a head, half a body of either form, and half a body that is not read any more."""
    pytest.importorskip("uvicorn", reason="needs the extra serve")
    from tinygpt.server import answers, protocol

    monkeypatch.setattr(answers, "_BODY_S", 1e6)
    monkeypatch.setattr(protocol, "HEAD_S", 1e6)
    halves = [
        b"GET /health HTTP/1.1\r\nHos",
        b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n5\r\n{",
        b"POST /nothing HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{",
    ]
    with serving(served_model) as server:
        clients = [socket.create_connection(("127.0.0.1", server.port)) for _ in halves]
        for client, half in zip(clients, halves, strict=True):
            client.sendall(half)
        until(lambda: server.server.metrics.requests["other", 404])
    for client in clients:  # the server has ended
        with client:
            client.settimeout(60)
            while client.recv(1000):
                pass
    assert server.server.metrics.requests["/tokenize", 499] == 1


def test_a_body_that_does_not_come_in_time_ends_its_connection(running, monkeypatch):
    from tinygpt.server import answers

    monkeypatch.setattr(answers, "_BODY_S", 0.2)
    with socket.create_connection(("127.0.0.1", running.port)) as client:
        client.settimeout(20)  # an idle client has 30 s
        head = "POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{"
        client.sendall(head.encode())
        answer = b""
        while part := client.recv(1000):
            answer += part
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"\r\nconnection: close\r\n" in answer.lower()


def test_a_body_that_is_refused_unread_has_no_longer_than_a_head(running, monkeypatch):
    from tinygpt.server import protocol

    monkeypatch.setattr(protocol, "HEAD_S", 0.5)
    with socket.create_connection(("127.0.0.1", running.port)) as client:
        client.settimeout(20)  # an idle client has 30 s
        client.sendall(b"POST /nothing HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{")
        answer = b""
        while part := client.recv(1000):
            answer += part
    assert answer.startswith(b"HTTP/1.1 404")
