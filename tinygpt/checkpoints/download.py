"""Downloading a file over HTTP: watched by time, length and hash, and kept only when it is whole.

A file that was cut goes on where it stopped, if the server still has the same. No secret is told to
strangers.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request

from tinygpt.checkpoints import other_files, safetensors_file, small_files, torch_file
from tinygpt.checkpoints.unfinished import Cut, sweep
from tinygpt.checkpoints.watched_http import Redirects, Response, open_url
from tinygpt.errors import CheckpointError, InputError, one_line, reason, show
from tinygpt.storage import (
    LONG_BYTES,
    MAX_TEXT_BYTES,
    atomic_file,
    byte_bar,
    open_plain,
    read_bytes,
    remove_unless_plain,
)

_MOST_BYTES = 64 << 30  # of weights: ten times those of the largest GPT-2
_WEIGHTS = {".safetensors": safetensors_file.read_header, ".bin": torch_file.read_header}
_STRONG = re.compile(r'"[!#-~]{1,200}"')  # an ETag that says that every byte is the same


def fetch_from_hub(endpoint: str, repo: str, name: str, folder: Path) -> bool:
    """Download one file of a model into a folder, or go on with what an earlier try has left there.

    Beside the folder stands what says of which state of the file that was: its ETag.

    Args:
        endpoint: the Hub, or a mirror of it.
        repo: the model's name there.
        name: the file's.
    Returns:
        False when the Hub has none of that name.
    Raises:
        Cut: when the connection ended too early.
        InputError: when it cannot be fetched, or is not what the Hub says it is.
        CheckpointError: when it is no such file as its name says.
    """
    path, note = folder / name, folder.parent / f"{name}.etag"
    for each in (path, note):
        remove_unless_plain(each)
    tag, start = _left(path, note)
    response, stated = _open(endpoint, repo, name, tag, start)
    if response is None:
        path.unlink(missing_ok=True)
        note.unlink(missing_ok=True)
        return False
    limit = _MOST_BYTES if path.suffix in _WEIGHTS else MAX_TEXT_BYTES
    with response:
        start = start if response.status == 206 else 0
        _need_plain(response, endpoint, name, bool(stated))
        if not start:
            note.unlink(missing_ok=True)
        path.touch()
        with open(path, "r+b") as file:
            file.truncate(start)
            file.seek(start)
            tag = response.headers.get("ETag") or ""
            if not start and _STRONG.fullmatch(tag):
                note.write_text(tag, encoding="ascii")
            _receive(response, endpoint, name, limit, file)
            file.flush()
            os.fsync(file.fileno())
    try:
        _check(path, endpoint, stated)
    except InputError:
        note.unlink(missing_ok=True)  # so that another try starts anew
        raise
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
        sweep(path.parent)
    except OSError as error:
        raise InputError(f"cannot keep {name} in {path.parent}: {reason(error)}") from error
    try:
        request = Request(url, headers={"User-Agent": "tinygpt"})
        response = open_url(request, Redirects())
    except InputError:
        raise
    except (OSError, HTTPException, ValueError) as error:
        raise InputError(f"cannot fetch {url}: {reason(error)}; try again") from error
    with response, atomic_file(path) as file:
        _receive(response, host, name, MAX_TEXT_BYTES, file)
        file.flush()
        digest = _digest(Path(file.name), len(sha256))
        if digest != sha256:
            raise InputError(f"{url} has SHA-256 {digest}, not {sha256}: it is not kept; try again")


def _left(path: Path, note: Path) -> tuple[str, int]:
    """The ETag of what an earlier try has left of a file, and where to go on; "" and 0 for nothing.

    Its last byte is asked for again, so that of a whole file too there is a part to ask for.
    """
    try:
        tag, size = read_bytes(note, 1 << 20).decode("ascii"), path.stat().st_size
    except (OSError, ValueError):
        return "", 0
    return (tag, size - 1) if size > 1 and _STRONG.fullmatch(tag) else ("", 0)


def _need_plain(response: Response, endpoint: str, name: str, has_hash: bool) -> None:
    """Refuse an answer whose body is not the file itself."""
    for header in ("Content-Encoding", "Transfer-Encoding"):
        coding = (response.headers.get(header) or "identity").strip().lower()
        if coding not in ("identity", "chunked" if header[0] == "T" else "identity"):
            fact = f"{endpoint} sent {name} in the encoding {show(coding)}, which was not asked for"
            raise InputError(f"{fact}: try again, or use another HF_ENDPOINT")
    # The other forms tell by themselves whether they are whole.
    by_itself = name.endswith((".json", *_WEIGHTS))
    if response.length is None and not response.chunked and not has_hash and not by_itself:
        fact = f"{endpoint} does not say how long {name} is"
        raise InputError(f"{fact}, so it may be cut: try again, or use another HF_ENDPOINT")


def _receive(response: Response, endpoint: str, name: str, limit: int, file: BinaryIO) -> None:
    """Write an answer's body to a file, behind what it has, watched by length."""
    length, start = response.length, file.tell()  # what the server announced, or None
    free = shutil.disk_usage(os.path.dirname(file.name)).free
    if length and length > free:
        need = -(-length >> 20)  # in whole MiB, up, as what is free goes down
        raise OSError(f"{name} has {need:,} MiB, but only {free >> 20:,} MiB are free")
    received = 0
    with byte_bar(name, None if length is None else start + length) as bar:
        bar.update(start)
        for piece in _pieces(response, endpoint, name):
            received += len(piece)
            if start + received > limit:
                raise InputError(f"{name} is larger than {limit >> 20} MiB")
            if received > free:
                raise OSError(f"no more than {free >> 20} MiB are free")
            file.write(piece)
            bar.update(len(piece))
    if length is not None and received != length:
        sent = f"{start + received} of {start + length} bytes"
        raise Cut(f"{endpoint} sent {sent} of {name}: try again")


def _pieces(response: Response, endpoint: str, name: str) -> Iterator[bytes]:
    """The body in pieces; apart from the writing, so that only network errors are caught here."""
    try:
        while piece := response.piece():
            yield piece
    except (OSError, HTTPException, ValueError) as error:  # ValueError: a chunk of negative size
        fact = f"cannot fetch {name} from {endpoint}: {reason(error)}"
        raise Cut(f"{fact}; try again") from error


def _check(path: Path, endpoint: str, stated: str | None) -> None:
    """Refuse a file that is not what the Hub states, or not of the form that its name says."""
    sent, again = f"{endpoint} sent {path.name}", "it is not kept: try again"
    if stated and (digest := _digest(path, len(stated))) != stated:
        name = "SHA-256" if len(stated) == 64 else "a git hash"
        raise InputError(f"{sent} with {name} {digest}, where it states {stated}; {again}")
    if other_files.is_page(path):
        login = "behind a login, perhaps of the network here, or of a private model (HF_TOKEN)"
        raise CheckpointError(f"{sent} as a page of the web, {login}; {again}")
    try:
        if path.suffix in _WEIGHTS:
            _WEIGHTS[path.suffix](path)
        elif not path.stat().st_size and not stated:
            raise CheckpointError("it is empty")
        else:
            small_files.check(path)
    except CheckpointError as error:
        fact = str(error).replace(one_line(f"{path}: "), "")
        raise CheckpointError(f"{sent} damaged: {fact}; {again}") from error


def _digest(path: Path, digits: int) -> str:
    """A file's SHA-256, or its SHA-1 as git has it, by how many hexadecimal digits are asked for.

    Source: git's `hash-object`, which puts "blob", the size and a zero byte before the content.
    """
    size = path.stat().st_size
    digest = hashlib.sha256() if digits == 64 else hashlib.sha1(b"blob %d\0" % size)
    with open_plain(path) as file, byte_bar(f"checking {path.name}", size, LONG_BYTES) as bar:
        while piece := file.read(1 << 20):
            digest.update(piece)
            bar.update(len(piece))
    return digest.hexdigest()


def _open(
    endpoint: str, repo: str, name: str, tag: str, start: int
) -> tuple[Response | None, str | None]:
    """The Hub's answer to a request for a file, None for 404; and the hash it states, if any.

    Args:
        tag, start: ask for what follows so many bytes of the state of that ETag; "" for all of it.
    Returns:
        an answer of status 206 only if it is just that part.
    """
    request = Request(f"{endpoint}/{repo}/resolve/main/{name}", headers={"User-Agent": "tinygpt"})
    if tag:
        request.add_header("Range", f"bytes={start}-")
        request.add_header("If-Range", tag)
    token = os.environ.get("HF_TOKEN", "").strip()
    if token and not re.fullmatch(r"[!-~]+", token):
        raise InputError("HF_TOKEN is not a token: it has spaces or other unusual characters")
    if token:  # urllib would hand on an ordinary header to whichever host a redirect names
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    redirects = Redirects()
    try:
        response = open_url(request, redirects)
        redirects.note(request.full_url, response.headers, response.geturl(), last=True)
        if response.status == 200 or (tag and _is_part(response, tag, start)):
            return response, redirects.stated
        response.close()
        if tag:
            return _open(endpoint, repo, name, "", 0)
        fact = f"{endpoint} answered HTTP {response.status} for {repo} {name}, which is no file"
        raise InputError(f"{fact}: try again, or use another HF_ENDPOINT")
    except HTTPError as error:
        error.close()
        if error.code == 404:
            return None, None
        if error.code in (412, 416) and tag:  # there is no such part of what it has now
            return _open(endpoint, repo, name, "", 0)
        if error.code in (401, 403):
            fact = f"{endpoint} does not give out {repo} (HTTP {error.code})"
            advice = "check the name; if it is private or gated, set HF_TOKEN"
            raise InputError(f"{fact}: {advice}") from error
        fact = f"{endpoint} answered HTTP {error.code} for {repo} {name}"
        raise InputError(f"{fact}: try again later, or use another HF_ENDPOINT") from error
    except InputError:
        raise
    except (OSError, HTTPException, ValueError) as error:  # ValueError: a redirect to nonsense
        fact = f"cannot fetch {name} from {endpoint}: {reason(error)}"
        advice = "give --model a folder, or set HF_ENDPOINT to a mirror"
        raise Cut(f"{fact}; {advice}") from error


def _is_part(response: Response, tag: str, start: int) -> bool:
    """Whether an answer is the rest of the state of a file that begins at a byte."""
    if response.status != 206:
        return False
    given = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", response.headers.get("Content-Range") or "")
    if given is None or response.headers.get("ETag") != tag or response.length is None:
        return False
    first, last, total = (int(number[:20]) for number in given.groups())
    return first == start and last + 1 == total == start + response.length
