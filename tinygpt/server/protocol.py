"""What uvicorn leaves open: deadlines for a request's head and for a reader, and a bound."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from tinygpt.server.problems import Problem

HEAD_S = 10.0  # in which a request's head has to come
SEND_S = 30.0  # in which a reader has to take what is more than 64 KB behind


class Protocol(H11Protocol):
    """uvicorn's HTTP/1.1, which cuts a client that does not go on in time."""

    most_connections = 1000  # at once; see `run.prepare`
    _head_timer: asyncio.TimerHandle | None = None
    _send_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client is there, and is expected to ask for something."""
        super().connection_made(transport)
        if len(self.connections) > self.most_connections:
            transport.abort()
        else:
            self._expect_head()

    def data_received(self, data: bytes) -> None:
        """Some bytes came."""
        super().data_received(data)
        cycle: Any = self.cycle
        if cycle is None or cycle.response_complete:
            self._expect_head()
        else:
            self._head_timer = _stopped(self._head_timer)

    def on_response_complete(self) -> None:
        """An answer is whole; a part of its body, or of the next head, may still have to come."""
        super().on_response_complete()
        cycle: Any = self.cycle
        if cycle.response_complete and (self.conn.trailing_data[0] or self._is_half):
            self._expect_head()

    def pause_writing(self) -> None:
        """More than 64 KB wait for the reader."""
        super().pause_writing()
        self._send_timer = self._send_timer or self.loop.call_later(SEND_S, self.transport.abort)

    def resume_writing(self) -> None:
        """The reader has taken most of it."""
        super().resume_writing()
        self._send_timer = _stopped(self._send_timer)

    def shutdown(self) -> None:
        """The program ends: who is idle, or amid a request, is cut, what was sent aside."""
        super().shutdown()
        cycle: Any = self.cycle
        if self._is_half:
            self.transport.close()
        if cycle is None or cycle.response_complete or self._is_half:
            self.loop.call_later(1, self.transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has left, or was cut."""
        self._head_timer = _stopped(self._head_timer)
        self._send_timer = _stopped(self._send_timer)
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP is told so as all else is."""
        body = json.dumps(Problem(400, msg).body()).encode()
        headers = [("content-type", "application/json"), ("connection", "close")]
        head = h11.Response(
            status_code=400,
            headers=[*headers, ("content-length", str(len(body)))],
            reason=b"Bad Request",
        )
        for event in (head, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    @property
    def _is_half(self) -> bool:
        """Whether a part of a body has still to come."""
        return self.conn.their_state is h11.SEND_BODY

    def _expect_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_S, self.transport.abort)


def _stopped(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
