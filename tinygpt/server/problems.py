"""What goes wrong with a request, as OpenAI's clients read it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tinygpt.errors import InputError, show

# What each status is called in the field `type`.
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error",
          500: "server_error", 503: "service_unavailable_error", 504: "timeout_error"}  # fmt: skip


class Problem(Exception):
    """A request that ends with a status other than 200."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """
        Args:
            status: of HTTP.
            message: one line for whoever sent the request.
            param: the field that is wrong.
            code: a word that a program can tell it by.
            headers: to be sent with it.
        """
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """What is sent."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        fields = {"type": kind, "param": self.param, "code": self.code}
        return {"error": {"message": str(self), **fields}}


_SOON = {"Retry-After": "1"}


def ending() -> Problem:
    """What is said while the program ends."""
    return Problem(503, "the server is shutting down", code="draining", headers=_SOON)


def failed() -> Problem:
    """What is said of a fault that nobody foresaw."""
    return Problem(500, "the server failed on this request")


def queue_full(count: int, what: str) -> Problem:
    """What is said where so many texts, or studies, wait that no more may."""
    message = f"{count} {what} wait already: try again"
    return Problem(429, message, code="queue_full", headers=_SOON)


def timed_out(seconds: float) -> Problem:
    """What is said of a request that has had its time."""
    return Problem(504, f"the request took longer than {seconds:g} s", code="timeout")


def check_model(given: str | None, name: str) -> None:
    """Refuse a request for another model than this server has; None is for any."""
    if given not in (None, name):
        message = f"the model {show(given)} does not exist: this server has {name!r}"
        raise Problem(404, message, "model", "model_not_found")


def check_ids(param: str, ids: Iterable[int], vocab_size: int) -> None:
    """Refuse ids that the vocabulary does not have."""
    for token in ids:
        if not 0 <= token < vocab_size:
            message = f"{param} has the id {token}: ids are 0 to {vocab_size - 1}"
            raise Problem(400, message, param, "unknown_id")


@contextmanager
def vocabulary_has_all() -> Iterator[None]:
    """While a prompt is encoded: a character that the vocabulary lacks is the request's fault."""
    try:
        yield
    except InputError as error:
        raise Problem(400, str(error), "prompt", "unknown_character") from error
