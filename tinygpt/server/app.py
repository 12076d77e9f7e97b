"""The server's addresses: who may ask, what is answered, and what is counted."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
import traceback
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tinygpt.errors import InputError, say, show
from tinygpt.server.completions import Completion, Limits, ending
from tinygpt.server.continuation import Continuation
from tinygpt.server.engine import Engine
from tinygpt.server.fields import Field, check_text, read_fields, yes_or_no
from tinygpt.server.metrics import Metrics
from tinygpt.server.openapi import openapi
from tinygpt.server.page import page_routes
from tinygpt.server.problems import Problem
from tinygpt.server.read_json import read_json
from tinygpt.server.study import Studies
from tinygpt.server.study_fields import CONTINUE, STUDIES
from tinygpt.writer import Writer

MOST_BODY_BYTES = 1_000_000
_BODY_S = 30.0  # in which a body has to come
_SEND_S = 30.0  # in which a reader has to take what was sent
_PING_S = 10.0  # between comments while there is nothing to send
_PUBLIC = ("/", "/health", "/favicon.ico")
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Access:
    """Who may ask."""

    api_key: str | None = None
    cors: str | None = None  # an origin besides the server's own
    hosts: tuple[str, ...] | None = None  # what the Host may be; None: anything


class Server:
    """What the handlers share."""

    def __init__(
        self, writer: Writer, engine: Engine, name: str, limits: Limits, access: Access
    ) -> None:
        self.writer, self.engine, self.name = writer, engine, name
        self.limits, self.access = limits, access
        self.metrics, self.created = Metrics(), int(time.time())
        self.studies = Studies(writer, engine, name)

    def app(self) -> ASGIApp:
        """The application that uvicorn runs."""
        routes = [
            Route("/health", self.health),
            Route("/metrics", self.show_metrics),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.one_model),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/detokenize", self.detokenize, methods=["POST"]),
            Route("/tokenizer_info", self.tokenizer_info),
            Route("/openapi.json", self.openapi),
            *(Route(path, self.study, methods=["POST"]) for path in STUDIES if path != CONTINUE),
            Route(CONTINUE, self.continued, methods=["POST"]),
            Route("/study/model", self.about),
            *page_routes(),
        ]
        handlers: dict[Any, Any] = {
            Problem: lambda request, problem: answer(problem),
            HTTPException: lambda request, error: answer(_of_starlette(request, error)),
        }
        app = Starlette(routes=routes, exception_handlers=handlers)
        app.router.redirect_slashes = False
        return Guard(app, self)

    async def health(self, request: Request) -> Response:
        """200 as soon as texts can be continued."""
        if self.engine.draining:
            raise ending()
        self.require_ready()
        return JSONResponse({"status": "ok"})

    def require_ready(self) -> None:
        """Refuse what comes before the engine is compiled."""
        if not self.engine.ready.is_set():
            raise Problem(503, "the model is being compiled", headers={"Retry-After": "5"})

    async def show_metrics(self, request: Request) -> Response:
        """What was counted."""
        kind = "text/plain; version=0.0.4; charset=utf-8"
        return Response(self.metrics.text(self.engine), media_type=kind)

    async def models(self, request: Request) -> Response:
        """The one model."""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def one_model(self, request: Request) -> Response:
        """The model of this name."""
        name = request.path_params["name"]
        if name != self.name:
            message = f"the model {show(name)} does not exist: this server has {self.name!r}"
            raise Problem(404, message, "model", "model_not_found")
        return JSONResponse(self._model())

    def _model(self) -> dict[str, Any]:
        about = {"id": self.name, "object": "model", "created": self.created}
        return {
            **about,
            "owned_by": "tinygpt",
            "max_model_len": self.writer.model.config.block_size,
        }

    async def chat(self, request: Request) -> Response:
        """No chat: a base model has none."""
        raise Problem(400, "this is a base model: use /v1/completions")

    async def tokenize(self, request: Request) -> Response:
        """A text's ids."""
        asked = await self.asked(request, FIELDS["/tokenize"])
        text, whole = asked["prompt"], asked["add_special_tokens"]
        encode = self.writer.tokenizer.encode
        try:
            ids = await asyncio.to_thread(encode, text, whole=whole) if text else []
        except InputError as error:  # a character that the vocabulary lacks
            raise Problem(400, str(error), "prompt", "unknown_character") from error
        window = self.writer.model.config.block_size
        return JSONResponse({"count": len(ids), "max_model_len": window, "tokens": ids})

    async def detokenize(self, request: Request) -> Response:
        """The text of ids."""
        asked = await self.asked(request, FIELDS["/detokenize"])
        most = self.writer.model.config.vocab_size - 1
        for token in (ids := asked["tokens"] or []):
            if not 0 <= token <= most:
                message = f"tokens has the id {token}: ids are 0 to {most}"
                raise Problem(400, message, "tokens", "unknown_id")
        return JSONResponse({"prompt": self.writer.tokenizer.decode(ids)})

    async def openapi(self, request: Request) -> Response:
        """All of this in words of OpenAPI."""
        return JSONResponse(openapi({**FIELDS, **STUDIES}, self.access.api_key is not None))

    async def tokenizer_info(self, request: Request) -> Response:
        """What clients that count tokens want to know."""
        tokenizer = self.writer.tokenizer
        names = {
            name: None if token is None else tokenizer.decode([token])
            for name, token in (("bos_token", tokenizer.bos), ("eos_token", tokenizer.eos))
        }
        about = {"tokenizer_class": tokenizer.name, "vocab_size": tokenizer.n_vocab}
        return JSONResponse({**about, **names, "chat_template": None})

    async def asked(self, request: Request, known: dict[str, Field]) -> dict[str, Any]:
        """The fields of a request's body."""
        return read_fields(await body_of(request), known)

    async def completions(self, request: Request) -> Response:
        """Texts continued."""
        self.require_ready()
        began = time.perf_counter()
        asked = await body_of(request), self.writer, self.name, self.limits
        completion = await asyncio.to_thread(Completion, *asked)  # a long prompt takes its time
        completion.submit(self.engine)
        self.metrics.prompt_tokens += completion.usage["prompt_tokens"]
        completion.heard = self._counting(began)
        if completion.stream:
            return EventStream(self._events(completion))
        return await self._unless_left(request, self._whole(completion))

    async def study(self, request: Request) -> Response:
        """What a study tool sees in a text."""
        self.require_ready()
        found = self.studies.answer(request.url.path, await body_of(request))
        return JSONResponse(await found)

    async def continued(self, request: Request) -> Response:
        """A text token by token, also without parts of the model."""
        self.require_ready()
        began = time.perf_counter()
        asked = await body_of(request), self.studies, self.limits
        continuation = await asyncio.to_thread(Continuation, *asked)
        continuation.submit(continuation.engine)
        self.metrics.prompt_tokens += continuation.usage["prompt_tokens"]
        continuation.heard = self._counting(began)
        return EventStream(self._events(continuation))

    async def about(self, request: Request) -> Response:
        """What the model is made of."""
        return JSONResponse(self.studies.about())

    def _counting(self, began: float) -> Callable[[], None]:
        """What is called at each token of a request, and counts its time."""
        last = began

        def heard() -> None:
            nonlocal last
            now = time.perf_counter()
            first = last == began
            (self.metrics.first_token_s if first else self.metrics.token_s).add(now - last)
            last = now
            self.metrics.completion_tokens += 1

        return heard

    async def _whole(self, completion: Completion) -> Response:
        return JSONResponse(await completion.whole(self.engine))

    async def _unless_left(self, request: Request, answering: Awaitable[Response]) -> Response:
        """An answer, or its end as soon as the client has left."""
        task = asyncio.ensure_future(answering)
        leaving = asyncio.ensure_future(_left(request))
        try:
            await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                self.metrics.cancelled += 1
                raise Problem(499, "the client has left")
            return task.result()
        finally:
            for each in (task, leaving):
                each.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await each

    async def _events(self, completion: Completion) -> AsyncGenerator[str]:
        done = False
        try:
            async with aclosing(completion.events_of(self.engine)) as events:
                async for event in events:
                    yield _data(event)
            yield "data: [DONE]\n\n"
            done = True
        except Problem as problem:
            yield _data(problem.body())
            yield "data: [DONE]\n\n"
            done = True
        finally:
            self.engine.cancel(completion.jobs)
            if not done:
                self.metrics.cancelled += 1


def _data(value: Any) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


def answer(problem: Problem) -> Response:
    """A problem as a response."""
    return JSONResponse(problem.body(), problem.status, problem.headers)


def _of_starlette(request: Request, error: HTTPException) -> Problem:
    headers = dict(error.headers or {})
    if error.status_code == 405:
        allowed = headers.get("Allow", "")
        message = f"{request.url.path} takes {allowed}, not {request.method}"
        return Problem(405, message, headers=headers)
    return Problem(
        error.status_code, f"there is nothing at {show(request.url.path)}", headers=headers
    )


def _is_ids(name: str, value: Any) -> None:
    if not isinstance(value, list) or not all(type(each) is int for each in value):
        raise InputError(f"{name} is {show(value)}: it must be a list of ids")


TEXT = Field(check_text, {"type": "string"})
IDS = Field(_is_ids, {"type": "array", "items": {"type": "integer", "minimum": 0}})

FIELDS: dict[str, dict[str, Field]] = {
    "/tokenize": {
        "prompt": Field(check_text, {"type": "string"}, ""),
        "add_special_tokens": yes_or_no("let the text be whole, with what stands around one", True),
        "model": TEXT,
    },
    "/detokenize": {"tokens": IDS, "model": TEXT},
}


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
        raise Problem(408, f"the body did not come within {_BODY_S:g} s") from error
    try:
        return await asyncio.to_thread(read_json, bytes(body))
    except InputError as error:
        raise Problem(400, str(error)) from error


async def _left(request: Request) -> None:
    """Comes back once the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """Server-sent events, with a comment now and then while there are none."""

    def __init__(self, events: AsyncGenerator[str]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(_pinged(events), headers=headers, media_type="text/event-stream")


async def _pinged(events: AsyncGenerator[str]) -> AsyncGenerator[str]:
    """The same events, and comments in between, which a client leaves out."""
    waiting: asyncio.Future[str] | None = None
    try:
        while True:
            waiting = waiting or asyncio.ensure_future(anext(events))
            done, _ = await asyncio.wait({waiting}, timeout=_PING_S)
            if not done:
                yield ": ping\n\n"
                continue
            try:
                event = waiting.result()
            except StopAsyncIteration:
                return
            finally:
                waiting = None
            yield event
    finally:
        if waiting is not None:
            waiting.cancel()
            with suppress(asyncio.CancelledError, StopAsyncIteration):
                await waiting
        await events.aclose()


class Guard:
    """What stands before all addresses: who asks, from where; what is counted and logged."""

    def __init__(self, app: ASGIApp, server: Server) -> None:
        self.app, self.server = app, server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.perf_counter(), 0
        request = Request(scope)
        cors = self._cors(request)

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), *cors]
            await asyncio.wait_for(send(message), _SEND_S)

        try:
            problem = self._refuses(request)
            if problem is not None:
                await answer(problem)(scope, receive, sending)
            elif request.method == "OPTIONS":
                await PlainTextResponse("", 204)(scope, receive, sending)
            else:
                await self.app(scope, receive, sending)
        except Exception as error:  # of a client that does not read, or of ours
            last = traceback.extract_tb(error.__traceback__)[-1]  # which has nobody's prompt
            where = f"{type(error).__name__} in {Path(last.filename).name}, line {last.lineno}"
            say(f"error: {request.method} {request.url.path[:100]}: {where}")
            if status:
                raise
            await answer(Problem(500, "the server failed on this request"))(scope, receive, sending)
        finally:
            self._count(request, status, time.perf_counter() - began)

    def _cors(self, request: Request) -> list[tuple[bytes, bytes]]:
        allowed = self.server.access.cors
        if allowed is None or request.headers.get("origin") != allowed:
            return [(b"vary", b"Origin")]
        return [
            (b"vary", b"Origin"),
            (b"access-control-allow-origin", allowed.encode("latin-1")),
            (b"access-control-allow-headers", b"authorization, content-type"),
            (b"access-control-allow-methods", b"GET, POST"),
        ]

    def _refuses(self, request: Request) -> Problem | None:
        """Why a request is not answered, if it is not."""
        access = self.server.access
        host = request.headers.get("host", "")
        if access.hosts is not None and _name_of(host) not in access.hosts:
            return Problem(421, f"this server is not {show(host)}", code="wrong_host")
        origin = request.headers.get("origin")
        own = {f"http://{host}", f"https://{host}", access.cors}
        if origin is not None and origin not in own:
            return Problem(403, f"pages of {show(origin)} may not ask: see --cors", code="origin")
        public = request.url.path in _PUBLIC or request.method == "OPTIONS"
        if access.api_key is not None and not public:
            given = request.headers.get("authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(given.encode(), access.api_key.encode()):
                headers = {"WWW-Authenticate": "Bearer"}
                return Problem(
                    401, "no API key, or a wrong one", code="invalid_api_key", headers=headers
                )
        return None

    def _count(self, request: Request, status: int, seconds: float) -> None:
        path = request.url.path
        known = path if path in KNOWN else "other"
        self.server.metrics.requests[known, status] += 1
        client = request.client.host if request.client else "?"
        say(f"{client} {request.method} {path[:100]} {status} {seconds * 1000:.0f} ms")


KNOWN = frozenset(
    ("/", "/health", "/metrics", "/openapi.json", "/v1/models", "/v1/completions",
     "/v1/chat/completions", "/tokenize", "/detokenize", "/tokenizer_info", "/study/tokens",
     "/study/attention", "/study/lens", "/study/attribute", "/study/continue", "/study/model")
)  # fmt: skip


def _name_of(host: str) -> str:
    """The name of a Host, without its port."""
    if host.startswith("["):
        return host[1:].split("]")[0]
    return host.rsplit(":", 1)[0] if ":" in host else host


def hosts_of(address: str) -> tuple[str, ...] | None:
    """What the Host of a request may be, where the server listens on an address."""
    return _LOOPBACK if address in _LOOPBACK else None
