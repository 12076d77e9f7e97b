"""What goes wrong with a request, as OpenAI's clients read it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
