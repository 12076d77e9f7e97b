"""Clients that leave, that do not read, and many of them."""

from __future__ import annotations

import json
import os
import random
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from serving import serving


def one_of_many(running, number: int) -> None:
    """A request that is read whole, or cut in the queue or in mid-stream."""
    draw = random.Random(number)
    asked = {"prompt": "abc" * draw.randint(1, 20), "max_tokens": 40, "seed": number}
    if number % 3 == 0:
        assert running.complete(**asked)["usage"]["completion_tokens"] <= 40
        return
    with running.send(**asked, stream=number % 2 == 0) as connection:
        if number % 3 == 1:  # amid it, or as soon as it is asked for
            connection.settimeout(60)
            connection.recv(draw.randint(1, 400))


def survive(running, count: int) -> None:
    """Many clients at once, two thirds of which leave, and what is left of them."""
    fixed = {"prompt": "Once upon", "max_tokens": 20, "temperature": 0}
    expected = running.complete(**fixed)["choices"]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda number: one_of_many(running, number), range(count)))
    assert running.idle_within(1)
    assert running.complete(**fixed)["choices"] == expected


def test_clients_that_leave_leave_nothing(running):
    survive(running, 60)


@pytest.mark.slow
def test_a_thousand_clients_leave_neither_slots_nor_sockets(served_model):
    with serving(served_model, slots=4, queue=64) as server:
        survive(server, 300)
        sockets = len(os.listdir("/proc/self/fd"))
        survive(server, 1000)
        time.sleep(0.5)
        assert len(os.listdir("/proc/self/fd")) <= sockets + 4


def test_a_reader_that_does_not_read_is_cut(served_model, monkeypatch):
    """Here after a third of a second, and with small buffers of the system's."""
    pytest.importorskip("uvicorn", reason="needs the extra serve")
    from tinygpt.server import protocol

    monkeypatch.setattr(protocol, "SEND_S", 0.3)
    with serving(served_model, slots=1) as server:
        slow = socket.socket()
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        slow.connect(("127.0.0.1", server.port))
        asked = {"prompt": "a", "max_tokens": 120, "stream": True, "logprobs": 20, "n": 60}
        body = json.dumps(asked).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        with slow:
            slow.sendall(head.replace("Host: x", "Host: localhost").encode() + body)
            while not server.engine.running:
                time.sleep(0.01)
            assert server.idle_within(60)
        assert server.complete(prompt="a", max_tokens=2)["usage"]["completion_tokens"] == 2


def test_a_stream_with_nothing_to_send_is_pinged(running, monkeypatch):
    from tinygpt.server import answers

    monkeypatch.setattr(answers, "PING_S", 0.05)
    usual = running.engine.slots.step
    monkeypatch.setattr(running.engine.slots, "step", lambda *a: time.sleep(0.2) or usual(*a))
    asked = {"prompt": "a", "max_tokens": 3, "stream": True}
    text = running.ask("/v1/completions", asked)[2]
    assert text.count(": ping\n\n") >= 3
    assert text.endswith("data: [DONE]\n\n")
