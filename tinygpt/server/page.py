"""The page at `/`: one file, and the policy that lets a browser load nothing else."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_FILE = Path(__file__).with_name("page.html")


def page_routes() -> list[Route]:
    """The addresses that a browser asks for by itself."""
    return [Route("/", _page), Route("/favicon.ico", _icon)]


async def _page(request: Request) -> Response:
    """The page. Its own script and style run, known by their digests, and no others."""
    html, policy = _read()
    headers = {
        "Content-Security-Policy": policy,
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-cache",
    }
    return Response(html, media_type="text/html", headers=headers)


async def _icon(request: Request) -> Response:
    """None; so that no browser is told of an error."""
    return Response(status_code=204)


@cache
def _read() -> tuple[str, str]:
    """The page and its policy."""
    html = _FILE.read_text(encoding="utf-8")
    sources = {kind: " ".join(_digests(html, kind)) for kind in ("script", "style")}
    return html, (
        f"default-src 'self'; script-src {sources['script']}; style-src {sources['style']}; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _digests(html: str, kind: str) -> list[str]:
    """What the policy calls the contents of the elements of this kind."""
    found = re.findall(f"<{kind}>(.*?)</{kind}>", html, re.DOTALL)
    digests = [hashlib.sha256(text.encode()).digest() for text in found]
    return [f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests]
