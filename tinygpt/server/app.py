"""The server's addresses: who may ask, what is answered, and what is counted."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from tinygpt.errors import InputError, show
from tinygpt.server.answers import EventStream, answer, body_of
from tinygpt.server.chat import CHAT, Chat, Template
from tinygpt.server.choice import special_texts
from tinygpt.server.completions import Completion, Limits
from tinygpt.server.continuation import Continuation
from tinygpt.server.engine import Engine
from tinygpt.server.fields import Field, check_text, read_fields, yes_or_no
from tinygpt.server.guard import Access, Guard
from tinygpt.server.metrics import Metrics
from tinygpt.server.openapi import openapi
from tinygpt.server.page import page_routes
from tinygpt.server.problems import (
    Problem,
    check_ids,
    check_model,
    ending,
    failed,
    vocabulary_has_all,
)
from tinygpt.server.study import Studies
from tinygpt.server.study_fields import CONTINUE, STUDIES
from tinygpt.writer import Writer


class Server:
    """What the handlers share."""

    def __init__(
        self,
        writer: Writer,
        engine: Engine,
        name: str,
        limits: Limits,
        access: Access,
        template: Template | None = None,
        file: str | None = None,
    ) -> None:
        self.writer, self.engine, self.name = writer, engine, name
        self.limits, self.access, self.template = limits, access, template
        self.metrics, self.created = Metrics(), int(time.time())
        self.studies = Studies(writer, engine, name, limits.timeout_s, file)
        # A long text takes seconds: these threads are for completions too.
        self._tokenizing = asyncio.Semaphore(2)
        self._computed = 0  # answers by now, see `_computing`

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
            Exception: _failed,
        }
        app = Starlette(routes=routes, exception_handlers=handlers)
        app.router.redirect_slashes = False
        return Guard(app, self.access, self.metrics, {route.path for route in routes})

    async def health(self, request: Request) -> Response:
        """200 as soon as texts can be continued."""
        if self.engine.draining:
            raise ending()
        self.require_ready()
        return JSONResponse({"status": "ok"})

    @property
    def busy(self) -> bool:
        """Whether a text runs, or something is computed of one."""
        return bool(self._computed or self.engine.busy or self.studies.reduced.running)

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """While an answer is computed, which the program waits for before it ends."""
        if self.engine.draining:
            raise ending()
        self._computed += 1
        try:
            yield
        finally:
            self._computed -= 1

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
        check_model(name, self.name)
        return JSONResponse(self._model())

    def _model(self) -> dict[str, Any]:
        about = {"id": self.name, "object": "model", "created": self.created}
        return {
            **about,
            "owned_by": "tinygpt",
            "max_model_len": self.writer.model.config.block_size,
        }

    async def chat(self, request: Request) -> Response:
        """The next message, where there is a template; a base model has none."""
        if self.template is None:
            raise Problem(400, "this is a base model: use /v1/completions")
        return await self._complete(request, Chat, self.template)

    async def tokenize(self, request: Request) -> Response:
        """A text's ids."""
        asked = await self.asked(request, FIELDS["/tokenize"])
        text, whole = asked["prompt"], asked["add_special_tokens"]
        encode = self.writer.tokenizer.encode
        with self._computing(), vocabulary_has_all():
            async with self._tokenizing:
                ids = await asyncio.to_thread(encode, text, whole=whole) if text else []
        window = self.writer.model.config.block_size
        return JSONResponse({"count": len(ids), "max_model_len": window, "tokens": ids})

    async def detokenize(self, request: Request) -> Response:
        """The text of ids."""
        asked = await self.asked(request, FIELDS["/detokenize"])
        ids = asked["tokens"] or []
        check_ids("tokens", ids, self.writer.model.config.vocab_size)
        with self._computing():
            text = await asyncio.to_thread(self.writer.tokenizer.decode, ids)
        return JSONResponse({"prompt": text})

    async def openapi(self, request: Request) -> Response:
        """All of this in words of OpenAPI."""
        chat = {} if self.template is None else {"/v1/chat/completions": CHAT}
        fields = {**FIELDS, **STUDIES, **chat}
        return JSONResponse(openapi(fields, self.access.api_key is not None))

    async def tokenizer_info(self, request: Request) -> Response:
        """What clients that count tokens want to know."""
        tokenizer = self.writer.tokenizer
        names = special_texts(tokenizer)
        source = None if self.template is None else self.template.source
        about = {"tokenizer_class": tokenizer.name, "vocab_size": tokenizer.n_vocab}
        return JSONResponse({**about, **names, "chat_template": source})

    async def asked(self, request: Request, known: dict[str, Field]) -> dict[str, Any]:
        """The fields of a request's body."""
        return read_fields(await body_of(request), known)

    async def completions(self, request: Request) -> Response:
        """Texts continued."""
        return await self._complete(request, Completion)

    async def _complete(self, request: Request, kind: type[Completion], *more: Any) -> Response:
        self.require_ready()
        began = time.perf_counter()
        asked = await body_of(request), self.writer, self.name, self.limits, *more
        with self._computing():
            completion = await asyncio.to_thread(kind, *asked)  # a long prompt takes its time
        completion.submit(self.engine)
        self.metrics.prompt_tokens += completion.usage["prompt_tokens"]
        completion.heard = self._counting(began)
        if completion.stream:
            left = partial(self._left_stream, completion)
            return EventStream(completion.events_of(), left)
        return await self._unless_left(request, self._whole(completion))

    async def study(self, request: Request) -> Response:
        """What a study tool sees in a text."""
        self.require_ready()
        path, body = request.scope["path"], await body_of(request)

        async def found() -> Response:
            return JSONResponse(await self.studies.answer(path, body))

        with self._computing():
            return await self._unless_left(request, found())

    async def continued(self, request: Request) -> Response:
        """A text token by token, also without parts of the model."""
        return await self._complete(request, Continuation, self.studies.reduced)

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
        return JSONResponse(await completion.whole())

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

    def _left_stream(self, completion: Completion) -> None:
        """A client has left before the end, perhaps before the first event was made."""
        completion.cancel()
        self.metrics.cancelled += 1


async def _failed(request: Request, error: Exception) -> Response:
    """The answer to what nobody foresaw; starlette raises it again for the guard to tell of."""
    return answer(failed())


def _of_starlette(request: Request, error: HTTPException) -> Problem:
    path, headers = request.scope["path"], dict(error.headers or {})
    if error.status_code == 405:
        allowed = headers.get("Allow", "")
        message = f"{path} takes {allowed}, not {request.method}"
        return Problem(405, message, headers=headers)
    return Problem(error.status_code, f"there is nothing at {show(path)}", headers=headers)


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


async def _left(request: Request) -> None:
    """Comes back once the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
