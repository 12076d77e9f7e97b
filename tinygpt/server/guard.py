"""What stands before all addresses: who may ask, from where; what is counted and logged."""

from __future__ import annotations

import hmac
import ipaddress
import re
import time
import traceback
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tinygpt.errors import say, show
from tinygpt.server.answers import answer
from tinygpt.server.metrics import Metrics
from tinygpt.server.problems import Problem, failed

_PUBLIC = ("/", "/health", "/favicon.ico")
_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Access:
    """Who may ask."""

    api_key: str | None = None
    cors: str | None = None  # an origin besides the server's own
    hosts: tuple[str, ...] | None = None  # what the Host may be; None: anything


class Guard:
    """What stands before all addresses: who asks, from where; what is counted and logged.

    A path is taken from the scope, here and in the handlers. An address that is put together with
    the Host, as starlette does it, is another one where the Host has a `/` or a `?`.
    """

    def __init__(
        self, app: ASGIApp, access: Access, metrics: Metrics, paths: Collection[str]
    ) -> None:
        """
        Args:
            paths: that are counted each by its name; all others are counted together.
        """
        self.app, self.access, self.metrics, self.paths = app, access, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status, whole = time.perf_counter(), None, False
        request = Request(scope)
        cors = self._cors(request)

        async def sending(message: Message) -> None:
            nonlocal status, whole
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), *cors]
            else:
                whole = not message.get("more_body", False)
            await send(message)

        try:
            problem = self._refuses(request)
            if problem is not None:
                await answer(problem)(scope, receive, sending)
            elif request.method == "OPTIONS":
                await PlainTextResponse("", 204)(scope, receive, sending)
            else:
                await self.app(scope, receive, sending)
        except ClientDisconnect:  # while it sent the body
            status = 499  # whatever starlette has answered to nobody
            self.metrics.cancelled += 1
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]  # which has nobody's prompt
            where = f"{type(error).__name__} in {Path(last.filename).name}, line {last.lineno}"
            say(f"error: {request.method} {request.scope['path'][:100]}: {where}")
            if status is None:
                await answer(failed())(scope, receive, sending)
            elif not whole:
                raise
        finally:  # who has no answer at all has left before there was one
            self._count(request, status or 499, time.perf_counter() - began)

    def _cors(self, request: Request) -> list[tuple[bytes, bytes]]:
        allowed = self.access.cors
        if allowed is None or request.headers.get("origin") != allowed:
            return [(b"vary", b"Origin")]
        return [
            (b"vary", b"Origin"),
            (b"access-control-allow-origin", allowed.encode("latin-1")),
            (b"access-control-allow-headers", b"authorization, *"),
            (b"access-control-allow-methods", b"GET, POST"),
        ]

    def _refuses(self, request: Request) -> Problem | None:
        """Why a request is not answered, if it is not."""
        access = self.access
        host = request.headers.get("host", "")
        if access.hosts is not None and _name_of(host) not in access.hosts:
            return Problem(421, f"this server is not {show(host)}", code="wrong_host")
        origin = request.headers.get("origin")
        own = {f"http://{host}", f"https://{host}", access.cors}
        if origin is not None and origin not in own:
            return Problem(403, f"pages of {show(origin)} may not ask: see --cors", code="origin")
        public = request.scope["path"] in _PUBLIC or request.method == "OPTIONS"
        if access.api_key is not None and not public:
            scheme, _, given = request.headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(
                given.encode(), access.api_key.encode()
            ):
                headers = {"WWW-Authenticate": "Bearer"}
                return Problem(
                    401, "no API key, or a wrong one", code="invalid_api_key", headers=headers
                )
        return None

    def _count(self, request: Request, status: int, seconds: float) -> None:
        path = request.scope["path"]
        known = path if path in self.paths else "other"
        self.metrics.requests[known, status] += 1
        client = request.client.host if request.client else "?"
        say(f"{client} {request.method} {path[:100]} {status} {seconds * 1000:.0f} ms")


def _name_of(host: str) -> str | None:
    """The name of a Host, without its port; None of what is none."""
    found = re.fullmatch(r"(?:\[([0-9a-f:.]+)\]|([^][:@/?#]+))(?::[0-9]*)?", host.lower())
    return found and _plain(found[1] or found[2])


def _plain(name: str) -> str:
    """A name without capitals and a dot at its end, an address in the shortest of its spellings."""
    name = name.lower().removesuffix(".")
    try:
        ip = ipaddress.ip_address(name)
    except ValueError:
        return name
    return str(_unmapped(ip))


def _unmapped(ip: _Address) -> _Address:
    """The IPv4 address that one of IPv6 stands for, if it does."""
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    return mapped or ip


def hosts_of(address: str, name: str | None = None) -> tuple[str, ...] | None:
    """What the Host of a request may be, where the server listens on an IP address.

    Args:
        name: by which the address was asked for.
    """
    if not _unmapped(ipaddress.ip_address(address)).is_loopback:
        return None
    return (*_LOOPBACK, _plain(address), _plain(name or address))
