"""Downloading a file over HTTP: watched by length and SHA-256, with no secret told to strangers."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from email.message import Message
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import BinaryIO
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from tinygpt.errors import InputError, reason
from tinygpt.storage import MAX_TEXT_BYTES, atomic_file, byte_bar

_TIMEOUT_S = 30  # without a byte, not in total: a slow download may take as long as it needs


def fetch_from_hub(endpoint: str, repo: str, name: str, folder: Path) -> bool:
    """Download one file of a model into a folder.

    Args:
        endpoint: the Hub, or a mirror of it.
        repo: the model's name there.
        name: the file's.
    Returns:
        False when the Hub has none of that name.
    Raises:
        InputError: when it cannot be fetched, or is not what the Hub says it is.
    """
    response, stated = _open(endpoint, repo, name)
    if response is None:
        return False
    limit = None if name.endswith((".safetensors", ".bin")) else MAX_TEXT_BYTES
    with response, open(folder / name, "wb") as file:
        digest = _receive(response, endpoint, name, limit, file)
        if stated and digest != stated:
            fact = f"{endpoint} sent {name} with SHA-256 {digest}, where it states {stated}"
            raise InputError(f"{fact}: try again")
        file.flush()
        os.fsync(file.fileno())
    return True


def fetch(url: str, path: Path, sha256: str) -> None:
    """Download a file whose contents are known: all of it and nothing else, or no file.

    Raises:
        InputError: when it cannot be fetched or kept, or has other contents.
    """
    parts = urlsplit(url)
    host, name = f"{parts.scheme}://{parts.netloc}", parts.path.rpartition("/")[2]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot keep {name} in {path.parent}: {reason(error)}") from error
    try:
        request = Request(url, headers={"User-Agent": "tinygpt"})
        response = build_opener(_Redirects).open(request, timeout=_TIMEOUT_S)
    except InputError:
        raise
    except (OSError, HTTPException, ValueError) as error:
        raise InputError(f"cannot fetch {url}: {reason(error)}; try again") from error
    with response, atomic_file(path) as file:
        digest = _receive(response, host, name, MAX_TEXT_BYTES, file)
        if digest != sha256:
            raise InputError(f"{url} has SHA-256 {digest}, not {sha256}: it is not kept")


def _receive(
    response: HTTPResponse, endpoint: str, name: str, limit: int | None, file: BinaryIO
) -> str:
    """Write an answer's body to a file, watched by length; its SHA-256."""
    length = response.length  # what the server announced, or None
    free = shutil.disk_usage(os.path.dirname(file.name)).free
    if length and length > free:
        raise OSError(f"{name} has {length >> 20} MiB, but only {free >> 20} MiB are free")
    received, digest = 0, hashlib.sha256()
    with byte_bar(name, length) as bar:
        for chunk in _chunks(response, endpoint, name):
            received += len(chunk)
            if limit and received > limit:
                raise InputError(f"{name} is larger than {limit >> 20} MiB")
            file.write(chunk)
            digest.update(chunk)
            bar.update(len(chunk))
    if length is not None and received != length:
        raise InputError(f"{endpoint} sent {received} of {length} bytes of {name}: try again")
    return digest.hexdigest()


def _open(endpoint: str, repo: str, name: str) -> tuple[HTTPResponse | None, str | None]:
    """The Hub's answer to a request for a file, None for 404; and the SHA-256 it states, if any."""
    request = Request(f"{endpoint}/{repo}/resolve/main/{name}", headers={"User-Agent": "tinygpt"})
    token = os.environ.get("HF_TOKEN", "").strip()
    if token and not re.fullmatch(r"[!-~]+", token):
        raise InputError("HF_TOKEN is not a token: it has spaces or other unusual characters")
    if token:  # urllib would hand on an ordinary header to whichever host a redirect names
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    redirects = _Redirects()
    try:
        response = build_opener(redirects).open(request, timeout=_TIMEOUT_S)
        redirects.note(request.full_url, response.headers, response.geturl())
        return response, redirects.sha256
    except HTTPError as error:
        error.close()
        if error.code == 404:
            return None, None
        if error.code in (401, 403):
            fact = f"{endpoint} does not give out {repo} (HTTP {error.code})"
            advice = "check the name; if it is private or gated, set HF_TOKEN"
            raise InputError(f"{fact}: {advice}") from error
        raise InputError(f"{endpoint} answered HTTP {error.code} for {repo} {name}") from error
    except InputError:
        raise
    except (OSError, HTTPException, ValueError) as error:  # ValueError: a redirect to nonsense
        fact = f"cannot fetch {name} from {endpoint}: {reason(error)}"
        raise InputError(
            f"{fact}; give --model a folder, or set HF_ENDPOINT to a mirror"
        ) from error


def _chunks(response: HTTPResponse, endpoint: str, name: str) -> Iterator[bytes]:
    """The body in pieces; apart from the writing, so that only network errors are caught here."""
    try:
        while chunk := response.read(1 << 20):
            yield chunk
    except (OSError, HTTPException) as error:
        fact = f"cannot fetch {name} from {endpoint}: {reason(error)}"
        raise InputError(f"{fact}; try again") from error


class _Redirects(HTTPRedirectHandler):
    """Follows redirects without giving up encryption or showing the token to another host.

    What the Hub itself states of a large file it states where it sends on to the host that has it.
    Source: huggingface_hub's `HUGGINGFACE_HEADER_X_LINKED_ETAG`; of such files it is the SHA-256.
    """

    sha256: str | None = None

    def note(self, asked: str, headers: Message, answered: str) -> None:
        """Remember the SHA-256 that an answer of the host that was asked states."""
        stated = re.fullmatch(r'"?([0-9a-f]{64})"?', headers.get("X-Linked-Etag") or "")
        if stated and urlsplit(asked).netloc == urlsplit(answered).netloc:
            self.sha256 = self.sha256 or stated[1]

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
