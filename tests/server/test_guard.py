"""The guard alone, with requests made by hand, as no client of a library would send them."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

import tinygpt

pytest.importorskip("starlette", reason="needs the extra serve")

from tinygpt.server import guard
from tinygpt.server.guard import Access, Guard, hosts_of
from tinygpt.server.metrics import Metrics

SERVER = Path(tinygpt.__file__).parent / "server"
TWISTED = ["x/health?", "x/health#", "x/?", "x/favicon.ico?", "[", "x/y?", "]", "\xff", ""]


@pytest.fixture(autouse=True)
def silent(monkeypatch):
    monkeypatch.setattr(guard, "say", lambda text: None)


def scope_of(path: str, host: str | None = "localhost", **headers: str) -> dict[str, Any]:
    """A request as a server of ASGI gives it."""
    given = {**({} if host is None else {"host": host}), **headers}
    return {
        "type": "http", "asgi": {"spec_version": "2.3"}, "http_version": "1.1", "method": "GET",
        "scheme": "http", "path": path, "raw_path": path.encode(), "query_string": b"",
        "root_path": "", "client": ("192.0.2.7", 5), "server": ("192.0.2.1", 80),
        "headers": [(k.encode(), v.encode("latin-1")) for k, v in given.items()],
    }  # fmt: skip


async def served(scope, receive, send) -> None:
    """What stands behind the guard."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"{}"})


def asked(
    scope: dict[str, Any], access: Access, app: Any = served, metrics: Metrics | None = None
) -> tuple[int | None, Any]:
    """The status and the JSON of an answer; None where there was none."""
    sent = list[dict[str, Any]]()

    async def send(message) -> None:
        sent.append(message)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    asyncio.run(Guard(app, access, metrics or Metrics(), {"/metrics"})(scope, receive, send))
    if not sent:
        return None, None
    return sent[0]["status"], json.loads(b"".join(each.get("body", b"") for each in sent))


@pytest.mark.parametrize("host", TWISTED)
def test_no_host_opens_what_needs_a_key(host):
    for path in ("/metrics", "/v1/completions", "/study/model"):
        status, answer = asked(scope_of(path, host), Access("secret"))
        assert (status, answer["error"]["code"]) == (401, "invalid_api_key")


@pytest.mark.parametrize("host", TWISTED)
def test_no_host_is_a_fault_of_the_servers(host):
    access = Access("secret")
    assert asked(scope_of("/health", host), access)[0] == 200
    assert asked(scope_of("/metrics", host, authorization="Bearer secret"), access)[0] == 200


def test_what_is_counted_is_the_path_and_not_the_host():
    metrics = Metrics()
    asked(scope_of("/metrics", "x/health?"), Access("secret"), metrics=metrics)
    assert list(metrics.requests) == [("/metrics", 401)]


def test_no_address_is_put_together_with_the_host():
    for file in SERVER.glob("*.py"):
        text = file.read_text(encoding="utf-8")
        assert "request.url" not in text, f"{file.name}: take the path from the scope"
        assert "base_url" not in text, file.name


def test_a_fault_that_nobody_foresaw_is_told_in_the_same_form(running, monkeypatch):
    """And the connection goes on, since the answer is whole."""
    monkeypatch.setattr(running.server, "_model", lambda: 1 / 0)
    connection = running.connect()
    for path, status in (("/v1/models", 500), ("/health", 200), ("/v1/models/small", 500)):
        connection.request("GET", path)
        answer = connection.getresponse()
        told = json.loads(answer.read())
        assert answer.status == status
        assert status == 200 or set(told["error"]) == {"message", "type", "param", "code"}
        assert connection.sock is not None
    connection.close()


def test_a_request_that_was_cut_before_its_answer_counts_as_left():
    async def nothing(scope, receive, send) -> None:
        pass

    async def cut(scope, receive, send) -> None:
        raise asyncio.CancelledError

    metrics = Metrics()
    assert asked(scope_of("/metrics"), Access(), nothing, metrics) == (None, None)
    with pytest.raises(asyncio.CancelledError):
        asked(scope_of("/metrics"), Access(), cut, metrics)
    assert metrics.requests == {("/metrics", 499): 2}


def test_a_fault_amid_an_answer_ends_its_connection():
    async def halfway(scope, receive, send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{", "more_body": True})
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        asked(scope_of("/metrics"), Access(), halfway)


@pytest.mark.parametrize(
    ("address", "hosts"),
    [
        ("127.0.0.1", ["127.0.0.1", "localhost:80", "[::ffff:7f00:1]", "[::ffff:127.0.0.1]:80"]),
        ("::1", ["[::1]", "[0:0:0:0:0:0:0:1]:80", "[0000::0001]", "LOCALHOST.", "127.0.0.1"]),
        ("::ffff:127.0.0.1", ["[::ffff:7f00:1]:80", "[::FFFF:7F00:1]", "[::ffff:127.0.0.1]"]),
        ("127.0.0.2", ["127.0.0.2", "[::ffff:7f00:2]", "127.0.0.1"]),
    ],
)
def test_an_address_may_be_spelled_as_one_likes(address, hosts):
    access = Access(hosts=hosts_of(address))
    for host in hosts:
        assert asked(scope_of("/health", host), access)[0] == 200, host
    for host in ("evil.example", "192.0.2.1", "[2001:db8::1]", "[::ffff:c000:201]", "", "127.0.0"):
        assert asked(scope_of("/health", host), access)[0] == 421, host


@pytest.mark.parametrize("name", ["box", "Box.Home.", "xn--bcher-kva.example", "localhost"])
def test_the_name_by_which_an_address_was_asked_for_is_its_own(name):
    access = Access(hosts=hosts_of("127.0.1.1", name))
    for host in (name, name.upper(), f"{name.lower().removesuffix('.')}:8000", "127.0.1.1:8000"):
        assert asked(scope_of("/health", host), access)[0] == 200, host
    assert asked(scope_of("/health", f"{name}.evil.example"), access)[0] == 421
