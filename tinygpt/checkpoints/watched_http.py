"""HTTP whose answers are watched from their first byte on, and whose redirects tell no secret.

A server that is slow or endless, in whatever part of an answer, is left.
"""

from __future__ import annotations

import io
import re
import time
from email.message import Message
from http.client import HTTPException, HTTPResponse
from socket import socket
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import (
    HTTPHandler,
    HTTPRedirectHandler,
    HTTPSHandler,
    Request,
    build_opener,
)

from tinygpt.errors import InputError, show

_SILENCE_S = 30  # without a byte
# A piece takes a minute at most, which is 1 KiB/s: a slow download may take as long as it needs,
# but a server that sends a byte now and then is not waited for. What stands around a piece, and
# before all of them, is small.
PIECE_BYTES, _PIECE_S, _AROUND_BYTES = 64 << 10, 60, 128 << 10
_HASH = re.compile(r'(?:W/)?"?([0-9a-f]{64}|[0-9a-f]{40})"?')


def open_url(request: Request, redirects: Redirects) -> Response:
    """The answer to a request, its headers read, after all redirects.

    Raises:
        InputError: for a redirect that is refused.
        OSError, HTTPException, ValueError: when there is none, or one of an error (`HTTPError`).
    """
    try:
        return build_opener(redirects, _Http, _Https).open(request, timeout=_SILENCE_S)
    except HTTPError as error:
        where = error.headers.get("Location")
        if where is None or error.code not in (301, 302, 303, 307, 308):
            raise
        error.close()
        away = re.match(r"(?i)(?!https?:)[a-z][a-z0-9+.-]*:", where)
        fact = "where nothing is fetched from" if away else "and so in a circle"
        asked = urlsplit(request.full_url)
        name = asked.path.rpartition("/")[2]
        fact = f"{asked.netloc} redirects {name} to {show(where)}, {fact}"
        raise InputError(f"{fact}: try again later, or another server") from error


class _Watch(io.RawIOBase):
    """A connection's bytes, of which a server must send enough in time, and not too many."""

    def __init__(self, raw: Any) -> None:
        self.raw = raw
        self.again()

    def again(self) -> None:
        """Begin to count anew: a piece of the body comes."""
        self.left, self.end = PIECE_BYTES + _AROUND_BYTES, time.monotonic() + _PIECE_S

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if time.monotonic() > self.end:
            raise TimeoutError("the server is too slow")
        if self.left <= 0:
            raise HTTPException("the server sends too much around the file")
        count = self.raw.readinto(memoryview(buffer)[: self.left])
        self.left -= count or 0
        return count

    def close(self) -> None:
        self.raw.close()
        super().close()


class Response(HTTPResponse):
    """An answer that is watched from its first byte on: endless headers are as endless as bodies.

    Without this, each header may come as slowly as `_SILENCE_S` allows, a server may say "continue"
    for ever, and a chunk of size -1 is all that comes, in memory.
    """

    def __init__(self, sock: socket, *args: Any, **settings: Any) -> None:
        super().__init__(sock, *args, **settings)
        unwatched, self.watch = self.fp, _Watch(sock.makefile("rb", buffering=0))
        self.fp = io.BufferedReader(self.watch)
        unwatched.close()

    def piece(self) -> bytes:
        """The next bytes of the body, none at its end.

        Raises:
            OSError, HTTPException, ValueError: when the connection or its form is broken.
        """
        self.watch.again()
        return self.read(PIECE_BYTES)


class _Watched:
    """What makes urllib's openers of connections give such answers."""

    def do_open(self, http_class: type, request: Request, **settings: Any) -> Any:
        watched = type("Connection", (http_class,), {"response_class": Response})
        return super().do_open(watched, request, **settings)  # type: ignore[misc]


class _Http(_Watched, HTTPHandler):
    pass


class _Https(_Watched, HTTPSHandler):
    pass


class Redirects(HTTPRedirectHandler):
    """Follows redirects without giving up encryption or showing the token to another host.

    What the Hub itself states of a large file it states where it sends on to the host that has it.
    Source: huggingface_hub's `HUGGINGFACE_HEADER_X_LINKED_ETAG`; of such files it is the SHA-256,
    and the ETag of others is git's hash.
    """

    stated: str | None = None

    def note(self, asked: str, headers: Message, answered: str, last: bool = False) -> None:
        """Remember the hash that an answer of the host that was asked states."""
        if urlsplit(asked).netloc != urlsplit(answered).netloc:
            return
        for header in ("X-Linked-Etag", "ETag") if last else ("X-Linked-Etag",):
            if found := _HASH.fullmatch(headers.get(header) or ""):
                self.stated = self.stated or found[1]

    def redirect_request(self, req, fp, code, msg, headers, newurl):  # type: ignore[no-untyped-def]
        old, new = urlsplit(req.full_url), urlsplit(newurl)
        if new.scheme != "https" and new.scheme != old.scheme:
            fp.close()
            raise InputError(f"{old.netloc} redirects from {old.scheme} to {new.scheme}: refused")
        self.note(req.full_url, headers, req.full_url)
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        token = req.unredirected_hdrs.get("Authorization")
        if request and token and (old.scheme, old.netloc) == (new.scheme, new.netloc):
            request.add_unredirected_header("Authorization", token)
        return request
