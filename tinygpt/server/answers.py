"""Bodies of requests, and answers: one of JSON, or events as they come."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterable, Callable
from contextlib import suppress
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from tinygpt.errors import InputError
from tinygpt.server.problems import Problem
from tinygpt.server.read_json import read_json

MOST_BODY_BYTES = 1_000_000
_BODY_S = 30.0  # in which a body has to come
PING_S = 10.0  # between comments while there is nothing to send


def answer(problem: Problem) -> Response:
    """A problem as a response."""
    return JSONResponse(problem.body(), problem.status, problem.headers)


async def body_of(request: Request) -> Any:
    """The JSON of a request's body.

    Raises:
        Problem: for one that is too large, too slow, or not as `read_json` wants it.
    """
    too_large = Problem(413, f"the body is longer than {MOST_BODY_BYTES:,} bytes", code="too_large")
    length = request.headers.get("content-length", "0")
    if not length.isdigit() or int(length) > MOST_BODY_BYTES:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(_BODY_S):
            async for part in request.stream():
                body += part
                if len(body) > MOST_BODY_BYTES:
                    raise too_large
    except TimeoutError as error:
        message = f"the body did not come within {_BODY_S:g} s"
        raise Problem(408, message, headers={"Connection": "close"}) from error
    try:
        return await asyncio.to_thread(read_json, bytes(body))
    except InputError as error:
        raise Problem(400, str(error)) from error


class EventStream(StreamingResponse):
    """Server-sent events, with a comment now and then while there are none.

    A problem in place of the first is answered as that of any request; one behind it is an event.
    """

    def __init__(self, events: AsyncGenerator[dict[str, Any]], left: Callable[[], None]) -> None:
        """
        Args:
            events: what each says.
            left: called where the client leaves before the last, perhaps before the first.
        """
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(_pinged(events), headers=headers, media_type="text/event-stream")
        self._left, self._whole = left, False

    async def stream_response(self, send: Send) -> None:
        """Send all of it."""
        events = self.body_iterator
        try:
            first = await anext(events)
        except Problem as problem:
            await answer(problem)(*self._asked, send)
        else:
            self.body_iterator = _from(first, events)
            await super().stream_response(send)
        self._whole = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer."""
        self._asked = scope, receive
        try:
            await super().__call__(scope, receive, send)
        finally:
            if not self._whole:
                self._left()


async def _from(first: Any, others: AsyncIterable[Any]) -> AsyncGenerator[Any]:
    yield first
    async for each in others:
        yield each


def _data(value: Any) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def _pinged(events: AsyncGenerator[dict[str, Any]]) -> AsyncGenerator[str]:
    """The events as they are sent, and comments in between, which a client leaves out.

    Raises:
        Problem: in place of the first.
    """
    waiting: asyncio.Future[dict[str, Any]] | None = None
    begun = False
    try:
        while True:
            waiting = waiting or asyncio.ensure_future(anext(events))
            done, _ = await asyncio.wait({waiting}, timeout=PING_S)
            if not done:
                begun = True
                yield ": ping\n\n"
                continue
            try:
                event = waiting.result()
            except StopAsyncIteration:
                break
            except Problem as problem:
                if not begun:
                    raise
                yield _data(problem.body())
                break
            finally:
                waiting = None
            begun = True
            yield _data(event)
        yield "data: [DONE]\n\n"
    finally:
        if waiting is not None:
            waiting.cancel()
            with suppress(asyncio.CancelledError, StopAsyncIteration):
                await waiting
        await events.aclose()
