"""A server of a small model in this process, and a client that is nothing but sockets."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tinygrad.nn.state import get_state_dict

from tinygpt import GPT, GPTConfig, load_tokenizer
from tinygpt.runtime.buffers import write
from tinygpt.writer import Writer

SHAPE = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=128, vocab_size=257)


class Running:
    """A server that listens, and what stands behind it."""

    def __init__(self, server: Any, port: int) -> None:
        self.server, self.engine, self.port = server, server.engine, port

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)

    def ask(
        self, path: str, body: Any = None, method: str | None = None, **headers: str
    ) -> tuple[int, dict[str, str], Any]:
        """The status, headers and JSON of an answer; a body of bytes is sent as it is."""
        connection = self.connect()
        raw = body if isinstance(body, bytes | type(None)) else json.dumps(body).encode()
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        if raw is not None:
            headers.setdefault("Content-Type", "application/json")
        connection.request(method or ("GET" if raw is None else "POST"), path, raw, headers)
        answer = connection.getresponse()
        text = answer.read()
        connection.close()
        kind = answer.headers.get("content-type", "")
        value = json.loads(text) if kind.startswith("application/json") else text.decode()
        return answer.status, {k.lower(): v for k, v in answer.headers.items()}, value

    def complete(self, **body: Any) -> dict[str, Any]:
        """The answer to a request that is right."""
        status, _, answer = self.ask("/v1/completions", body)
        assert status == 200, answer
        return answer

    def stream(self, **body: Any) -> list[Any]:
        """The events of an answer, of which the last was [DONE]."""
        status, headers, text = self.ask("/v1/completions", {**body, "stream": True})
        assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
        *events, done, rest = text.split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        return [json.loads(e.removeprefix("data: ")) for e in events if not e.startswith(":")]

    def send(self, **asked: Any) -> socket.socket:
        """A request whose answer is not read."""
        connection = socket.create_connection(("127.0.0.1", self.port))
        body = json.dumps(asked).encode()
        head = f"Host: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(f"POST /v1/completions HTTP/1.1\r\n{head}".encode() + body)
        return connection

    def idle_within(self, seconds: float) -> bool:
        """Whether no text runs or waits by then."""
        end = time.monotonic() + seconds
        while self.engine.running or self.engine.waiting:
            if time.monotonic() > end:
                return False
            time.sleep(0.01)
        return True


@contextmanager
def serving(model: GPT, slots: int = 4, queue: int = 64, **more: Any) -> Iterator[Running]:
    """A server in threads of its own, with bytes as tokens."""
    uvicorn = pytest.importorskip("uvicorn", reason="needs the extra serve")
    pytest.importorskip("starlette", reason="needs the extra serve")
    from tinygpt.server import guard
    from tinygpt.server.app import Server
    from tinygpt.server.completions import Limits
    from tinygpt.server.engine import Engine
    from tinygpt.server.guard import Access, hosts_of
    from tinygpt.server.run import prepare

    writer = Writer(model, load_tokenizer("bytes", 257))
    engine = Engine(model, slots, queue)
    limits = Limits(more.get("max_tokens"), more.get("timeout_s", 600.0), slots + queue)
    access = Access(more.get("api_key"), more.get("cors"), hosts_of("127.0.0.1"))
    template = more.get("template")
    server = Server(writer, engine, "small", limits, access, template, "models/small")
    listener = socket.create_server(("127.0.0.1", more.get("port", 0)))
    running = prepare(uvicorn, server)
    loops = list[asyncio.AbstractEventLoop]()

    async def run() -> None:
        loops.append(asyncio.get_running_loop())
        await running._serve([listener])

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    engine.start()
    engine.ready.wait()
    assert engine.failed is None
    thread.start()
    told, guard.say = guard.say, lambda text: None  # lines of no test's
    try:
        yield Running(server, listener.getsockname()[1])
    finally:
        guard.say = told
        running.should_exit = True
        thread.join(60)
        left = "\n".join(map(repr, asyncio.all_tasks(loops[0]))) if thread.is_alive() else ""
        running.force_exit = True
        thread.join()
        engine.stop()
        assert not left, f"requests do not end: {left}"


def model_to_serve(block_size: int = 128) -> GPT:
    """Weights that make texts of any bytes."""
    rng, model = np.random.default_rng(0), GPT(replace(SHAPE, block_size=block_size))
    for parameter in get_state_dict(model).values():
        value = rng.normal(0.0, 0.3, parameter.shape).astype(np.float32)
        write(parameter, value)
    return model
